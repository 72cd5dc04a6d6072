"""Turns of a gate whose right answers are known, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from harness.judge.gate.timed import is_marked
from harness.paths import shipped
from harness.records.gate.record import SIDES, SideInfo, SideName, Turn
from harness.records.provenance import DeviceInfo
from harness.specs.gate import GateSpec, load_gate_spec

DEVICE = DeviceInfo(kind="cpu", name="A processor", num_cores=2, num_threads=2, memory_bytes=2**34)
TREE_TOKENS = (3, 1, 2, 1, 3, 2, 1, 1, 2, 3, 1, 2)
PARTS = {"backbone": 0.8, "heads": 0.1, "cache": 0.05}


def spec_of(looks: Sequence[int] = (4, 8), **changes: object) -> GateSpec:
    """Return the shipped gate with other looks; no text is scored unless `changes` ask for it."""
    known = {"looks": tuple(looks), "quality_prompts": 0}
    return load_gate_spec(shipped("gate", "gate.toml")).model_copy(update={**known, **changes})


def side(**changes: object) -> SideInfo:
    """Return what a version says of itself."""
    known = SideInfo(
        commit="a" * 40,
        dirty=False,
        device=DEVICE,
        mode="packed",
        dtype="float32",
        prompts_sha256="p",
        backbone_sha256="b",
        replayed_tokens_per_step={"tree": 2.0},
    )
    return known.model_copy(update=changes)


def pair(base: SideInfo, head: SideInfo) -> dict[SideName, SideInfo]:
    """Return both versions by name."""
    return {"base": base, "head": head}


def turns_of(
    spec: GateSpec,
    *,
    num_blocks: int,
    factor: Callable[[str, int], float] = lambda arm, block: 1.0,
    slower_part: str | None = None,
    others: Callable[[int], float] = lambda block: 0.0,
    noise: float = 0.0,
    seed: int = 3,
    tree_tokens: Sequence[int] = TREE_TOKENS,
    text: Callable[[SideName, str, int], str] = lambda side, arm, block: "same",
) -> tuple[Turn, ...]:
    """Return blocks of both versions: the head's steps take `factor` times as long; the machine slows down.

    `slower_part` alone grows where it is named. Step times drift by a third over the gate.
    """
    rng, found = np.random.default_rng(seed), []
    for block in range(num_blocks):
        for arm in spec.timed_arms:
            tokens = [1] * 24 if arm.method == "vanilla" else list(tree_tokens)
            own_s = 0.02 if arm.method == "vanilla" else 0.03
            drift = own_s * (1 + np.arange(len(tokens)) / len(tokens) / 3) * (1 + block / 30)
            for name in SIDES:
                more = factor(arm.name, block) if name == "head" else 1.0
                step_s = drift * more * np.exp(rng.normal(0, noise, len(tokens)))
                marked = [i for i in range(len(tokens)) if is_marked(i, mark_every=spec.mark_every)]
                extra = drift * (more - 1) if slower_part is not None else 0 * drift
                shares = {
                    part: drift * share + (extra if part == slower_part else 0)
                    if slower_part is not None
                    else step_s * share
                    for part, share in PARTS.items()
                }
                found.append(
                    Turn(
                        block=block,
                        prompt_key=f"prompt-{block}",
                        arm=arm.name,
                        side=name,
                        purpose="timed",
                        step_s=tuple(step_s),
                        step_tokens=tuple(tokens),
                        text_sha256=text(name, arm.name, block),
                        parts_s={part: tuple(row[marked]) for part, row in shares.items()},
                        others_share=others(block),
                        peak_memory_bytes=10**9,
                    )
                )
    return tuple(found)
