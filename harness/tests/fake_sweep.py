"""A small sweep whose answers are known: a made-up trace, the made-up latency record of `fake_latency`, cells
that were run on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from harness.compose.cells import compose
from harness.compose.plan import SweepPlan, plan_sweep, tree_rates
from harness.files import file_sha256, write_bytes, write_json
from harness.records.provenance import DeviceInfo
from harness.records.sweep import (
    CELLS_FILE,
    ORIGIN_FILE,
    SPEC_FILE,
    TREES_FILE,
    SweepManifest,
    SweepOrigin,
    SweepRecord,
    TraceFacts,
)
from harness.records.sweep_cells import (
    AnyCell,
    DecodedCell,
    DecodedRow,
    FailedCell,
    SampledCell,
    SampledRow,
    StepDifference,
)
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.specs.sweep import SampledSetting, SweepSpec, parse_sweep
from harness.tests.fake_latency import SHAPE, write_fake_latency

MODEL, HEADS = "b" * 64, "c" * 64  # the hashes of fake_latency's environment
NUM_HEADS = 4


def made_up_trace(
    seed: int, *, num_prompts: int = 6, tokens: int = 40, first_context: int = 240, num_heads: int = NUM_HEADS
) -> Trace:
    """Prompts on either side of 256 known tokens; later heads are worse."""
    rng = np.random.default_rng(seed)
    prompts = []
    for number in range(num_prompts):
        kept = tokens - number % 3
        beyond = np.arange(1, kept + 1)[:, None] + np.arange(1, num_heads + 1) > kept
        ranks = np.minimum(
            rng.pareto(1.0 / np.arange(1, num_heads + 1) ** 0.5, (kept, num_heads)), 500
        ).astype(np.int32)
        ranks[beyond] = -1
        prompts.append(
            PromptTrace(
                key=f"p{number}",
                category=("writing", "math")[number % 2],
                prompt_tokens=first_context + 10 * number,
                tokens=np.arange(kept),
                ended_by="budget" if kept == tokens else "eos",
                ranks=ranks,
            )
        )
    provenance = TraceProvenance(model_hash=MODEL, heads_hash=HEADS, dtype="float32", max_new_tokens=tokens)
    return Trace(provenance=provenance, prompts=tuple(prompts))


def sweep_data(**changes: Any) -> dict[str, Any]:
    """A sweep of few trees on one measured and two predicted devices; a change to None leaves a key out."""
    data = {
        "schema_version": 1,
        "kind": "sweep",
        "name": "fake",
        "description": "A made-up sweep with known right answers.",
        "suite": "suite.toml",
        "shape": SHAPE,
        "trace": "trace.npz",
        "calibration_trace": "calibration.npz",
        "num_heads": [1, 2, 4],
        "batches": [1],
        "break_even_batches": [1, 2, 4],
        "trees": [
            {"kind": "chain", "depths": [1, 3]},
            {"kind": "cartesian", "widths": [[2, 2]], "max_nodes": [8]},
            {"kind": "random_dense", "num_nodes": [16], "draws": 2, "seed": 3},
            {"kind": "grown", "num_nodes": [2, 8, 16, 96]},
        ],
        "search": {"max_nodes": 32},
        "measured": {"records": "all"},
        "predicted": {
            "devices": ["a100-80gb-pcie", "t4"],
            "shapes": [SHAPE, "vicuna-7b-v1.5", "vicuna-13b-v1.5"],
            "heads": {"architecture": "shared"},
        },
        "sampled": {
            "tree_nodes": 8,
            "num_prompts": 4,
            "seeds": [1, 2],
            "max_new_tokens": 12,
            "vanilla": [0.7],
            "rejection": [0.3, 0.5, 0.7, 1.0],
            "typical": [
                {"temperatures": [0.7], "epsilons": [0.01, 0.05, 0.09, 0.15, 0.25]},
                {"temperatures": [0.3, 0.5, 0.7, 1.0], "epsilons": [0.09], "deltas": [0.3]},
            ],
        },
        "interval": {"level": 0.95, "num_resamples": 200},
        **changes,
    }
    return {name: value for name, value in data.items() if value is not None}


def made_up_spec(**changes: Any) -> SweepSpec:
    """The spec of that data."""
    return parse_sweep(tomli_w.dumps(sweep_data(**changes)), where="the test")


def made_up_plan(folder: Path, *, levels: Sequence[float] = (1.0,), **changes: Any) -> SweepPlan:
    """A plan on traces and a latency record that are written into a folder; `levels` are of its rounds."""
    if not (folder / "trace.npz").exists():
        made_up_trace(1).save(folder / "trace.npz")
        made_up_trace(2, num_prompts=12).save(folder / "calibration.npz")
        write_fake_latency(
            folder / "results" / "latency" / "fake" / "made-up-machine" / "20240119T120000Z-01234567",
            levels=levels,
        )
    return plan_sweep(made_up_spec(**changes), base_folder=folder, results=folder / "results")


def sampled_cell(
    setting: SampledSetting, *, tokens_per_step: float, likelihood: float, tree: int = 0
) -> SampledCell:
    """A cell of four prompts and two seeds, nearly that many tokens a step and nats a token, each prompt a
    little its own way.
    """
    rows = []
    for number in range(4):
        for seed in (1, 2) if setting.rule != "greedy" else (None,):
            steps = 20
            gained = round(tokens_per_step * steps * (1 + 0.01 * (number - 1.5)))
            step_tokens = [gained // steps + (step < gained % steps) for step in range(steps)]
            rows.append(
                SampledRow(
                    prompt_key=f"p{number}",
                    category="writing",
                    seed=seed,
                    prompt_tokens=9,
                    num_tokens=gained + 1,
                    ended_by="budget",
                    step_tokens=tuple(step_tokens),
                    log_likelihood=(likelihood + 0.001 * number) * (gained + 1),
                    text_sha256="0" * 16,
                )
            )
    return SampledCell(
        setting=setting, tree=None if setting.rule == "vanilla" else tree, rows=tuple(rows), elapsed_s=1.0
    )


def sampled_cells(
    spec: SweepSpec,
    *,
    rate: Callable[[SampledSetting], float] | None = None,
    likelihood: Callable[[SampledSetting], float] | None = None,
    tree: int = 0,
) -> list[SampledCell]:
    """Cells of every setting; by default the paper's trends: epsilon up, tokens/step down and likelihood up,
    and so on.
    """

    def usual(setting: SampledSetting) -> float:
        epsilon = setting.epsilon or 0.0
        return {
            "greedy": 2.0,
            "vanilla": 1.0,
            "rejection": 2.5 - setting.temperature,
            "typical": 2.2 - 4 * epsilon + setting.temperature,
        }[setting.rule]

    def likely(setting: SampledSetting) -> float:
        return -1.0 + 2 * (setting.epsilon or 0.0)

    assert spec.sampled is not None
    return [
        sampled_cell(
            setting,
            tokens_per_step=(rate or usual)(setting),
            likelihood=(likelihood or likely)(setting),
            tree=tree,
        )
        for setting in spec.sampled.settings
    ]


def decoded_cell(plan: SweepPlan, place: int, *, gap: float = 0.0, bugs: int = 0) -> DecodedCell:
    """A decoded point whose composition is off by that share, on as many prompts as it takes."""
    curve = next(curve.label for curve in plan.curves if curve.label.kind == "measured")
    rows = tuple(
        DecodedRow(
            prompt_key=f"p{number}",
            num_tokens=40,
            vanilla_s=1.5 + 0.01 * number,
            medusa_s=1.0 + 0.012 * (number % 2),
            medusa_steps=20,
            composed_vanilla_s=(1.5 + 0.01 * number) * (1 + gap),
            composed_medusa_s=1.0 + 0.012 * (number % 2),
        )
        for number in range(6)
    )
    differences = tuple(
        StepDifference(
            prompt_key=f"p{number}",
            position=5,
            decoded_steps=20,
            replayed_steps=21,
            kind="bug" if number < bugs else "tie",
        )
        for number in range(bugs + 1)
    )
    return DecodedCell(curve=curve, tree=place, rows=rows, differences=differences, elapsed_s=2.0)


def write_sweep(
    folder: Path, plan: SweepPlan, *, extra: Sequence[AnyCell] | None = None, sealed: bool = True
) -> SweepRecord:
    """Write a record of a plan: composed cells as the plan gives them, the run ones as `extra` or the usual
    made-up ones.
    """
    folder.mkdir(parents=True)
    spec = plan.spec
    runs: Sequence[AnyCell] = (
        extra
        if extra is not None
        else (*sampled_cells(spec, tree=1), decoded_cell(plan, 1), decoded_cell(plan, 2, gap=0.2))
    )
    cells = [*compose(plan), *runs]
    write_bytes(folder / SPEC_FILE, tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True)).encode())
    write_json(folder / ORIGIN_FILE, made_up_origin(plan))
    write_json(folder / TREES_FILE, tree_rates(plan))
    write_bytes(folder / CELLS_FILE, "".join(cell.model_dump_json() + "\n" for cell in cells).encode())
    if sealed:
        failed = sum(isinstance(cell, FailedCell) for cell in cells)
        record = SweepRecord(folder)
        manifest = SweepManifest(
            sweep=spec.name,
            num_planned=len(cells),
            num_done=len(cells) - failed,
            num_failed=failed,
            num_points=record.num_points,
            finished_utc="2024-01-19T12:30:00Z",
            elapsed_s=90.0,
            sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
        )
        write_json(folder / "manifest.json", manifest)
    return SweepRecord(folder)


def made_up_origin(plan: SweepPlan) -> SweepOrigin:
    """A made-up machine."""

    def facts(trace: Trace) -> TraceFacts:
        return TraceFacts(
            model_sha256=trace.provenance.model_hash,
            heads_sha256=trace.provenance.heads_hash,
            dtype=trace.provenance.dtype,
            max_new_tokens=trace.provenance.max_new_tokens,
            num_prompts=len(trace.prompts),
            num_positions=trace.num_positions,
            num_heads=trace.num_heads,
        )

    return SweepOrigin(
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        command="medusa-repro sweep fake.toml",
        python="3.11.9",
        packages={"numpy": "2.4.6"},
        device=DeviceInfo(
            kind="cpu", name="made-up CPU", num_cores=2, num_threads=2, memory_bytes=8_000_000_000
        ),
        inputs={name: file_sha256(path) for name, path in plan.inputs.items()},
        trace=facts(plan.composer.index.trace),
        calibration=facts(plan.calibration.trace),
        roofline_error=plan.error,
        step_model=plan.model,
        started_utc="2024-01-19T12:28:30Z",
    )


def is_sqrt(setting: SampledSetting) -> bool:
    """Whether delta is the square root of epsilon."""
    return (
        setting.epsilon is not None
        and setting.delta is not None
        and math.isclose(setting.delta, math.sqrt(setting.epsilon))
    )
