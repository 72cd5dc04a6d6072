"""Devices as data: `suites/hardware.toml`, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import read_toml
from harness.paths import shipped
from harness.specs.bounds import Spec

HARDWARE_FILE = shipped("hardware.toml")


class DeviceSpec(Spec):
    """One device's published limits, with the source of each figure.

    `name` and `aliases` are what drivers print for it, so that a measured device finds its row; `dtypes` are
    those that its half-precision throughput is of.
    Units: GB/s are 1e9 bytes a second; TFLOP/s 1e12 dense half-precision operations a second; `memory_gb` as
    sold.
    """

    name: str
    aliases: tuple[str, ...] = ()
    read_bandwidth_gb_per_s: float = Field(gt=0, le=1e9)
    dense_fp16_tflop_per_s: float = Field(gt=0, le=1e9)
    dtypes: tuple[Literal["float16", "bfloat16"], ...] = Field(min_length=1)
    memory_gb: int = Field(gt=0, le=10**9)
    source: str = Field(min_length=1)

    @property
    def limits(self) -> Limits:
        """The limits in bytes and operations a second."""
        return Limits(
            bytes_per_s=self.read_bandwidth_gb_per_s * 1e9, flop_per_s=self.dense_fp16_tflop_per_s * 1e12
        )


class _HardwareFile(Spec):
    schema_version: Literal[1]
    devices: dict[str, DeviceSpec]

    @model_validator(mode="after")
    def _names_differ(self) -> _HardwareFile:
        names = [
            name.casefold() for device in self.devices.values() for name in (device.name, *device.aliases)
        ]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]!r} names two devices")
        return self


def load_hardware(path: Path | None = None) -> dict[str, DeviceSpec]:
    """Return the devices of a hardware file by key; without a path those that ship.

    Raises: UserError for an unreadable file, an unknown key or a figure that is none.
    """
    return dict(read_toml(path or HARDWARE_FILE, _HardwareFile, noun="a hardware file").devices)


def match_device(name: str, devices: Mapping[str, DeviceSpec] | None = None) -> str | None:
    """Return the key of the device that drivers call by that name, or None.

    Without `devices` it is looked for among those that ship.
    The whole name has to match: an A10G is no A10, and a slice of a GPU is not the GPU.
    """
    devices = load_hardware() if devices is None else devices
    wanted = name.strip().casefold()
    for key, device in devices.items():
        if wanted in {known.casefold() for known in (device.name, *device.aliases)}:
            return key
    return None


@dataclass(frozen=True)
class Limits:
    """What a device can do at most; `ridge` is the intensity above which it is bound by arithmetic."""

    bytes_per_s: float
    flop_per_s: float

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.flop_per_s > 0):
            raise UserError(
                found=f"{self.bytes_per_s} bytes/s and {self.flop_per_s} flop/s", need="limits above 0"
            )
