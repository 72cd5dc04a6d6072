"""What others published of Medusa on their devices, as data: `suites/quoted.toml`, validated. Shown beside
our figures, never mixed in.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness.errors import UserError
from harness.files import Frozen, first_fault
from harness.paths import shipped

QUOTED_FILE = shipped("quoted.toml")


class QuotedRow(Frozen):
    """What someone else published of Medusa on a device; absent is None. `evidence` says how the figure was
    read off.

    Units: tokens/s, GB/s (1e9 bytes), TFLOP/s (1e12 dense half-precision operations).
    """

    claims: tuple[str, ...] = Field(min_length=1)
    by: str = Field(min_length=1)
    device: str | None = None
    device_key: str | None = None
    model: str = Field(min_length=1)
    method: str = Field(min_length=1)
    benchmark: str = ""
    tokens_per_step: float | None = Field(default=None, gt=0)
    overhead: float | None = Field(default=None, gt=0)
    speedup: float | None = Field(default=None, gt=0)
    tokens_per_s: float | None = Field(default=None, gt=0)
    read_bandwidth_gb_per_s: float | None = Field(default=None, gt=0)
    dense_fp16_tflop_per_s: float | None = Field(default=None, gt=0)
    evidence: Literal["read", "read-from-figure", "digitised", "computed", "secondary", "memory"]
    source: str = Field(min_length=1)


class _QuotedFile(Frozen):
    schema_version: Literal[1]
    quoted: tuple[QuotedRow, ...]


def load_quoted(path: Path | None = None) -> tuple[QuotedRow, ...]:
    """Return the published figures of a file; without a path those that ship.

    Raises: UserError for an unreadable file, an unknown key or a figure that is none.
    """
    path = QUOTED_FILE if path is None else path
    try:
        return _QuotedFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).quoted
    except ValidationError as error:
        raise UserError(
            found=first_fault(error), need="figures as the schema knows them", where=path.name
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            found=f"no readable file of quoted figures ({error})", need="a TOML file", where=path.name
        ) from error
