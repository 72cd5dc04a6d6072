"""What others published of Medusa on their devices, as data: `suites/quoted.toml`, validated.

Shown next to our figures and never mixed in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from harness.files import read_toml
from harness.paths import shipped
from harness.specs.bounds import Spec

QUOTED_FILE = shipped("quoted.toml")


class QuotedRow(Spec):
    """What someone else published of Medusa on a device; absent is None.

    `evidence` says how the figure was read off.
    Units: tokens/s, GB/s (1e9 bytes), TFLOP/s (1e12 dense half-precision operations).
    """

    claims: tuple[str, ...] = Field(min_length=1)
    by: str = Field(min_length=1)
    device: str | None = None
    device_key: str | None = None
    model: str = Field(min_length=1)
    method: str = Field(min_length=1)
    benchmark: str = ""
    tokens_per_step: float | None = Field(default=None, gt=0, le=1e9)
    overhead: float | None = Field(default=None, gt=0, le=1e9)
    speedup: float | None = Field(default=None, gt=0, le=1e9)
    tokens_per_s: float | None = Field(default=None, gt=0, le=1e9)
    read_bandwidth_gb_per_s: float | None = Field(default=None, gt=0, le=1e9)
    dense_fp16_tflop_per_s: float | None = Field(default=None, gt=0, le=1e9)
    evidence: Literal["read", "read-from-figure", "digitised", "computed", "secondary", "memory"]
    source: str = Field(min_length=1)


class _QuotedFile(Spec):
    schema_version: Literal[1]
    quoted: tuple[QuotedRow, ...]


def load_quoted(path: Path | None = None) -> tuple[QuotedRow, ...]:
    """Return the published figures of a file; without a path those that ship.

    Raises: UserError for an unreadable file, an unknown key or a figure that is none.
    """
    return read_toml(path or QUOTED_FILE, _QuotedFile, noun="a file of quoted figures").quoted
