"""The table of `medusa-repro train --dry-run`: what each way of training heads takes, and which is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harness.device.clock import device_clock
from harness.device.engine import best_device
from harness.device.limits import measure_device_limits
from harness.errors import UserError
from harness.paths import cache_dir, resolve_path
from harness.specs.hardware import load_hardware, match_device
from harness.specs.recipe import AnyRecipe, HeadsRecipe, JointRecipe
from harness.training.joint_plan import joint_bytes
from harness.training.plan import (
    CorpusSize,
    DeviceRoom,
    HeadsPlan,
    check_memory,
    device_flop_per_s,
    planned_model,
)
from harness.training.room import (
    chosen_plan,
    corpus_size,
    heads_device,
    model_name,
    plans_of,
    room_here,
    room_of,
    size_of_one_step,
    told,
)
from medusa_impl.recipes import FeaturesWay


def print_plan(
    spec: AnyRecipe, *, shape: str | None, device: str | None, work: Path | None, console: Console
) -> dict[str, Any]:
    """Print memory, operations and their time of all three ways, and return them; load nothing.

    Of heads and backbone together, print what is held all the time.
    Raises: UserError for an unknown shape or device, or a plan that does not fit.
    """
    devices = load_hardware()
    if device is not None and device not in devices:
        raise UserError(
            found=f"no device {device!r}",
            need=f"one of {', '.join(sorted(devices))}",
            where="the command line",
        )
    if isinstance(spec, JointRecipe):
        on = best_device() if device is None else torch.device("cuda")
    else:
        on = heads_device(spec.recipe) if device is None else torch.device("cuda")
    room = room_here(on, work=work or cache_dir()) if device is None else room_of(devices[device])
    if isinstance(spec, JointRecipe):
        return _print_joint(spec, room, shape=shape, console=console)
    corpus = _corpus(spec)
    plans = plans_of(spec, device=on, corpus=corpus, shape=shape)
    rates = _rates(plans, on=on, named=device or match_device(room.name))
    first = next(iter(plans.values()))
    steps = (
        f"{first.num_steps:,} steps"
        if first.num_steps is not None
        else "its text is not there, so the operations and the time are those of one step"
    )
    console.print(
        f"{spec.name} with {first.model} on {room.name}, {room.memory_bytes / 1e9:.1f} GB: {steps}",
        soft_wrap=True,
    )
    console.print(_table(plans, rates))
    plan = chosen_plan(spec, plans, room)
    console.print(told(plan, asked=spec.recipe.features), soft_wrap=True)
    return {
        "recipe": spec.name,
        "model": first.model,
        "device": room.name,
        "features": plan.way,
        "ways": {way: _figures(one, rates) for way, one in plans.items()},
    }


def _print_joint(
    spec: JointRecipe, room: DeviceRoom, *, shape: str | None, console: Console
) -> dict[str, Any]:
    """Print what heads and backbone hold all the time, and return it."""
    name = shape or model_name(spec.model)
    parts = joint_bytes(
        planned_model(spec.model, shape=shape), spec.recipe, dtype=getattr(torch, spec.model.dtype)
    )
    needed = sum(parts.values())
    table = Table(title="GB on the device, before activations", title_justify="left")
    for column in ("", "GB"):
        table.add_column(column)
    for part, size in {**parts, "all": needed}.items():
        table.add_row(part, f"{size / 1e9:.2f}")
    console.print(f"{spec.name} with {name} on {room.name}, {room.memory_bytes / 1e9:.1f} GB", soft_wrap=True)
    console.print(table)
    check_memory(parts, room, model=name, do="take a device with more memory, or several by FSDP")
    return {"recipe": spec.name, "model": name, "device": room.name, "device_bytes": needed, "parts": parts}


def _corpus(spec: HeadsRecipe) -> CorpusSize:
    """Return the size of a recipe's text, or of one step's where conversations are not there yet."""
    if spec.conversations is not None:
        try:
            resolve_path(spec.conversations, base_folder=None)
        except UserError:
            return size_of_one_step(spec.recipe)
    return corpus_size(spec)


def _rates(plans: dict[FeaturesWay, HeadsPlan], *, on: torch.device, named: str | None) -> dict[str, float]:
    """Return operations a second by dtype: a GPU's published figures, or this device's, measured now."""
    if named is not None:
        return device_flop_per_s(load_hardware()[named])
    dtypes = {dtype for plan in plans.values() for dtype in plan.total_flops()}
    clock = device_clock(on)
    return {
        dtype: measure_device_limits(on, getattr(torch, dtype), clock=clock).matmul_flop_per_s
        for dtype in sorted(dtypes)
    }


def _figures(plan: HeadsPlan, rates: dict[str, float]) -> dict[str, Any]:
    return {
        "device_bytes": plan.device_bytes,
        "parts": plan.device,
        "disk_bytes": plan.disk_bytes,
        "num_steps": plan.num_steps,
        "step_flops": plan.step_flops,
        "once_flops": plan.once_flops,
        "num_subset_steps": plan.num_subset_steps,
        "subset_flops": plan.subset_flops,
        "total_flops": plan.total_flops(),
        "full_throughput_s": plan.seconds(rates),
    }


def _table(plans: dict[FeaturesWay, HeadsPlan], rates: dict[str, float]) -> Table:
    table = Table(
        title="GB on the device; operations in 1e12; time at full matrix throughput", title_justify="left"
    )
    table.add_column("")
    for way in plans:
        table.add_column(f'features = "{way}"', justify="right")
    chosen = list(plans.values())
    for name in chosen[0].device:
        table.add_row(name, *(f"{plan.device[name] / 1e9:.2f}" for plan in chosen))
    table.add_row("all on the device", *(f"{plan.device_bytes / 1e9:.2f}" for plan in chosen))
    table.add_row("on the disk", *(f"{plan.disk_bytes / 1e9:.2f}" for plan in chosen))
    for dtype in sorted({dtype for plan in chosen for dtype in plan.total_flops()}):
        table.add_row(
            f"operations, {dtype}",
            *(f"{plan.total_flops().get(dtype, 0) / 1e12:,.1f}" for plan in chosen),
        )
    table.add_row("time", *(_time(plan.seconds(rates)) for plan in chosen))
    return table


def _time(seconds: float | None) -> str:
    """Return a time at full matrix throughput, in hours or seconds."""
    if seconds is None:
        return "no figure"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"
