"""Curves of a made-up device whose costs are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from harness.compose.prices.fitted import TimedCurve, TimedStep
from harness.compose.prices.kernels import KernelTimes
from harness.records.step_model import EngineCosts, ErrorBand, LeftOut, StepModel
from harness.specs.hardware import Limits
from harness.specs.latency import DtypeName, HeadsForm
from harness.specs.shapes import load_shapes

LIMITS = Limits(bytes_per_s=2e12, flop_per_s=3e14)
HEADS = HeadsForm(num_heads=5, architecture="own")
PLANTED = EngineCosts(
    operator_s=8e-6,
    tree_layer_s=25e-6,
    product_share=0.8,
    arithmetic_share=0.6,
    attention_share=0.5,
    tree_attention_share=0.3,
    vanilla_own_s=1e-3,
    tree_own_s=3e-3,
)
NODES, CONTEXTS, BATCHES = (1, 4, 16, 64, 128), (128, 4096), (1, 16)


def times(shape: str, *, costs: EngineCosts = PLANTED, dtype: DtypeName = "bfloat16") -> KernelTimes:
    """The model's times of a published shape on the made-up device."""
    sizes = load_shapes()[shape].roofline_shape
    return KernelTimes(sizes, LIMITS, costs=costs, heads=HEADS, dtype=dtype)


def curve(shape: str, *, slower: float = 1.0, costs: EngineCosts = PLANTED, **changes: Any) -> TimedCurve:
    """A curve as that device would be measured, every time so many times as long."""
    known, steps = times(shape, costs=costs), list[TimedStep]()
    for num_nodes, context, batch in product(NODES, CONTEXTS, BATCHES):
        num_heads = 0 if num_nodes == 1 else HEADS.num_heads
        at = {"context_tokens": context, "batch": batch}
        heads_s = known.heads_seconds(num_heads=num_heads, batch=batch)
        step_s = known.step_seconds(num_nodes=num_nodes, num_heads=num_heads, **at)
        steps.append(
            TimedStep(
                num_nodes=num_nodes,
                num_heads=num_heads,
                **at,
                backbone_s=slower * known.backbone_seconds(num_nodes=num_nodes, **at),
                heads_s=slower * heads_s if num_heads else None,
                step_s=slower * step_s,
            )
        )
    found = TimedCurve(
        source="made-up",
        kind="cuda",
        device="made-up GPU",
        shape=shape,
        sizes=load_shapes()[shape].roofline_shape,
        heads=HEADS,
        dtype="bfloat16",
        mode="cuda_graph",
        limits=LIMITS,
        steps=tuple(steps),
    )
    return replace(found, **changes)


def known_error(
    *, overhead: tuple[float, float] | None, seconds: tuple[float, float] = (0.8, 1.5)
) -> StepModel:
    """A model of the planted costs whose error is given."""
    one = LeftOut(
        curve="another",
        num_points=4,
        median_ratio=1.0,
        roofline_ratio=2.0,
        seconds=ErrorBand(low=seconds[0], high=seconds[1]),
        overhead=None if overhead is None else ErrorBand(low=overhead[0], high=overhead[1]),
    )
    return StepModel(device_kind="cuda", costs=PLANTED, curves=("a", "b"), sources=("r",), left_out=(one,))
