"""What numbers, dates and names in a record may be: finite, within 64 bits, and on the right side of zero."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

_LARGEST_WHOLE = 2**63 - 1
_LONGEST_S = 1e9  # 31 years
SHORTEST_S = 1e-9  # no clock tells less
_LARGEST = 1e18


def _utc(text: str) -> str:
    """Return a time as it is written, where it is one in ISO 8601 that says its zone."""
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("found a time without its zone, need one that ends in Z")
    return text


def _file_name(name: str) -> str:
    """Return the name of a file in a folder, where it can be one and names no other folder."""
    if name in ("", ".", "..") or any(letter in "/\\" or not letter.isprintable() for letter in name):
        raise ValueError(f"found {name!r}, need the name of a file in the record's folder")
    return name


Whole = Annotated[int, Field(ge=-_LARGEST_WHOLE, le=_LARGEST_WHOLE)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_WHOLE)]
Finite = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=_LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=_LONGEST_S, allow_inf_nan=False)]
StepSeconds = Annotated[float, Field(ge=SHORTEST_S, le=_LONGEST_S, allow_inf_nan=False)]
Utc = Annotated[str, AfterValidator(_utc)]
FileName = Annotated[str, AfterValidator(_file_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
