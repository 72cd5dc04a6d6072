"""What a machine has no room or no device for, told before anything is loaded or timed."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from harness.device.engine import best_device
from harness.errors import UserError
from harness.measure.latency.engine import (
    chosen_modes,
    free_memory_bytes,
    packs_weights,
    planned_facts,
)
from harness.records.latency import ModelFacts
from harness.specs.latency import DtypeName, LatencySpec, PointKey


def check_fits(spec: LatencySpec, *, dtype: DtypeName, free_bytes: int) -> None:
    """Refuse, before random weights are made, a shape of which no point fits into memory."""
    facts = planned_facts(spec)
    needed = min(
        facts.needed_bytes(key, packs=False) for key in spec.points(dtype, chosen_modes(spec, ("eager",)))
    )
    if needed > spec.memory_share * free_bytes:
        raise UserError(
            found=f"{facts.name} in {dtype}, which needs {needed / 1e9:.1f} GB at its smallest size",
            need=f"at most {spec.memory_share:g} of the free {free_bytes / 1e9:.1f} GB",
            where="this machine",
            do="choose a smaller shape or dtype",
        )


def check_device(spec: LatencySpec, device: torch.device) -> None:
    """Refuse, before anything is loaded, a spec that names CUDA graphs on a machine without a CUDA device."""
    graphs = [mode for mode in spec.modes if mode.endswith("_graph")] if spec.modes != "auto" else []
    if graphs and device.type != "cuda":
        raise UserError(
            found="no CUDA device",
            need=f"one: the mode {graphs[0]} records CUDA graphs",
            where=f"the modes of {spec.name!r}",
            do="run it on a machine with a CUDA device, or give --modes eager",
        )


def print_latency_plan(
    spec: LatencySpec, *, console: Console, base_folder: Path | None = None
) -> dict[str, int]:
    """Print every point with its memory and why it would be skipped, and return the counts.

    Nothing is loaded. Whether a mode is on offer shows only when the model is; `auto` is shown as `eager`.
    """
    device, facts = best_device(), planned_facts(spec, base_folder=base_folder)
    free_bytes = free_memory_bytes(device)
    table = Table("dtype", "mode", "batch", "context", "nodes", "heads", "GB", "skipped")
    counts = {"points": 0, "skipped": 0}
    for dtype in spec.dtypes:
        packs = packs_weights(spec, dtype=dtype, device=device)
        for key in spec.points(dtype, chosen_modes(spec, ("eager",))):
            reason = skip_reason(
                key, facts, packs=packs, free_bytes=free_bytes, memory_share=spec.memory_share
            )
            sizes = (key.batch, key.context_tokens, key.num_nodes, key.num_heads)
            table.add_row(
                dtype,
                key.mode,
                *map(str, sizes),
                f"{facts.needed_bytes(key, packs=packs) / 1e9:.2f}",
                reason or "",
            )
            counts = {"points": counts["points"] + 1, "skipped": counts["skipped"] + (reason is not None)}
    console.print(table)
    console.print(
        f"{facts.name}: {counts['points']} points, {counts['skipped']} skipped; {free_bytes / 1e9:.2f} GB "
        "free",
        highlight=False,
    )
    return counts


def skip_reason(
    key: PointKey, facts: ModelFacts, *, packs: bool, free_bytes: int, memory_share: float
) -> str | None:
    """Return why a point must not be tried, or None: too many positions for real weights, or too much memory.

    Random weights have learned no positions, so that they are timed at any length.
    """
    last = key.context_tokens + key.num_nodes
    if facts.max_positions is not None and not facts.random_weights and last > facts.max_positions:
        return f"needs {last} positions, the model has {facts.max_positions}"
    needed = facts.needed_bytes(key, packs=packs)
    if needed > memory_share * free_bytes:
        return f"needs {needed / 1e9:.2f} GB, {memory_share:g} of the free {free_bytes / 1e9:.2f} GB is less"
    return None
