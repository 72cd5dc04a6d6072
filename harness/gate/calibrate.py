"""A runner's own noise: its calibration on disk, and margins that are below it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import canonical_sha256, write_json
from harness.paths import cache_dir
from harness.records.gate.record import Calibration, read_calibration
from harness.records.machines.identity import identity_of, machine_slug
from harness.records.provenance import DeviceInfo
from harness.records.store import portable
from harness.specs.gate import GateSpec

# of a gate's data, those that no noise hangs on
_WORDS = ("description", "minutes", "margins", "quality_prompts", "alpha", "must_see", "power")


def same_device(one: DeviceInfo, other: DeviceInfo) -> bool:
    """Return whether two devices are one machine, which runs as many threads: so figures may be compared."""
    mine, theirs = identity_of(one), identity_of(other)
    is_same = not mine.differences(theirs) and not mine.untold(theirs)
    return is_same and one.num_threads == other.num_threads


def gate_sha256(spec: GateSpec) -> str:
    """Return what stands for all that a gate measures: the noise of another one is another noise."""
    return data_sha256(portable(spec))


def data_sha256(data: Mapping[str, Any]) -> str:
    """Return the same of a gate's data, as its record holds them."""
    return canonical_sha256({name: value for name, value in data.items() if name not in _WORDS})


def calibration_file(spec: GateSpec, device: DeviceInfo) -> Path:
    """Return where a device's calibration of a gate lies, which need not exist."""
    name = f"{spec.name}-{machine_slug(device)}-{device.num_threads}t.json"
    return cache_dir() / "gate" / "calibrations" / name


def keep_calibration(spec: GateSpec, calibration: Calibration) -> Path:
    """Write a calibration where the gate finds it, and return its file."""
    file = calibration_file(spec, calibration.device)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, calibration)
    return file


def calibration_of(spec: GateSpec, device: DeviceInfo) -> Calibration | None:
    """Return this device's calibration of what the gate measures now; None without one."""
    file = calibration_file(spec, device)
    if not file.exists():
        return None
    found = read_calibration(file)
    fits = found.gate_sha256 == gate_sha256(spec) and same_device(found.device, device)
    return found if fits else None


def check_margins(spec: GateSpec, calibration: Calibration) -> None:
    """Refuse a margin below the runner's noise floor: a change of nothing would not stay within it.

    Raises: UserError that names the quantity whose margin lies lowest under its floor.
    """
    below = []
    for name, noise in calibration.floors.items():
        margin = next((one.margin for one in spec.margins if one.quantity == name.split("/")[0]), None)
        if margin is not None and margin < noise.floor:
            below.append((margin - noise.floor, name, margin, noise.floor))
    if below:
        _, name, margin, floor = min(below)
        raise UserError(
            found=f"a margin of {margin:g} for {name}",
            need=f"at least {floor:.3g}, the noise floor of this runner by its calibration",
            where=f"the gate {spec.name!r}",
            do="raise it in a gate of your own, use a quieter runner, or calibrate this one again",
        )
