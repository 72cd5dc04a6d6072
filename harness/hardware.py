"""Devices as data: `suites/hardware.toml`, validated."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from harness.config import Frozen
from harness.errors import UserError
from harness.roofline import Limits

HARDWARE_FILE = Path(__file__).parent.parent / "suites" / "hardware.toml"


class DeviceSpec(Frozen):
    """One device's published limits, with the source of each figure.

    Units: GB/s are 1e9 bytes a second; TFLOP/s 1e12 dense half-precision operations a second; `memory_gb` as sold.
    """

    name: str
    read_bandwidth_gb_per_s: float = Field(gt=0)
    dense_fp16_tflop_per_s: float = Field(gt=0)
    memory_gb: int = Field(gt=0)
    source: str = Field(min_length=1)

    @property
    def limits(self) -> Limits:
        """The limits in bytes and operations a second."""
        return Limits(bytes_per_s=self.read_bandwidth_gb_per_s * 1e9, flop_per_s=self.dense_fp16_tflop_per_s * 1e12)


class _HardwareFile(Frozen):
    schema_version: Literal[1]
    devices: dict[str, DeviceSpec]


def load_hardware(path: Path | None = None) -> dict[str, DeviceSpec]:
    """Return the devices of a hardware file by key; without a path those that ship.

    Raises: UserError for an unreadable file, an unknown key or a figure that is none.
    """
    path = HARDWARE_FILE if path is None else path
    try:
        return dict(_HardwareFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).devices)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(found=f"{key}: {first['msg']}", need="devices as the schema knows them", where=path.name) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(found=f"no readable hardware file ({error})", need="a TOML file of devices", where=path.name) from error
