"""A complete, sealed latency record with known right answers, made without a model or a clock.

A backbone step over N nodes takes 10 + N / 8 ms at context 256 and 2 ms more at context 1024, batch 2 takes 4
ms more; K heads take K / 2 ms; what is left of a step takes 1 ms. So every figure of the curve is known,
between measured sizes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from harness.files import file_sha256, write_bytes, write_json
from harness.records.latency import (
    BATCHES_FILE,
    MODEL_FILE,
    MODES_FILE,
    POINTS_FILE,
    BatchTrial,
    BatchTrials,
    LatencyManifest,
    LatencyPoint,
    LatencyRecord,
    ModelFacts,
    ModeTrial,
    ModeTrials,
    facts_of_shape,
)
from harness.records.probes import DeviceLimits
from harness.records.provenance import DeviceInfo, Environment
from harness.records.run import ArmTree
from harness.specs.latency import DtypeName, LatencySpec, PointKey
from harness.specs.shapes import load_shapes

SHAPE = "smollm2-135m-instruct"
BANDWIDTH_BYTES_PER_S = 40e9
BATCH_SPEEDUPS = {1: 1.5, 2: 1.2, 4: 0.9, 8: 0.7}
TOKENS_PER_S = {"hf_generate": 10.0, "eager": 12.0, "packed": 20.0}


def backbone_s(num_nodes: int, *, context_tokens: int = 256, batch: int = 1) -> float:
    """The time of the made-up backbone."""
    return (10 + num_nodes / 8 + (2 if context_tokens == 1024 else 0) + 4 * (batch - 1)) / 1000


def heads_s(num_heads: int) -> float:
    """The time of the made-up heads."""
    return num_heads / 2000


def step_s(num_nodes: int, num_heads: int, *, context_tokens: int = 256, batch: int = 1) -> float:
    """The time of a made-up whole step."""
    return backbone_s(num_nodes, context_tokens=context_tokens, batch=batch) + heads_s(num_heads) + 0.001


def spec_data(**changes: Any) -> dict[str, Any]:
    """A spec of two modes, two contexts and two batches; a change to None leaves a key out."""
    data = {
        "schema_version": 1,
        "kind": "latency",
        "name": "fake",
        "description": "A made-up run with known right answers.",
        "model": {"asset": SHAPE},
        "heads": {"path": "heads", "architecture": "shared"},
        "dtypes": ["float32"],
        "modes": ["eager", "packed"],
        "repeats": 3,
        "prompts": {"source": "mt_bench"},
        "grids": [
            {"num_nodes": [1, 8, 64], "num_heads": [5], "context_tokens": [256, 1024]},
            {"num_nodes": [1, 16], "num_heads": [2], "context_tokens": [256], "batch": [2]},
            {"num_nodes": [8], "num_heads": [0, 1], "context_tokens": [256], "modes": ["packed"]},
        ],
        "modes_table": {"num_prompts": 3, "max_new_tokens": 6, "context_tokens": 256, "sizes": [1, 8, 32]},
        "batch_table": {"tree": {"kind": "chain", "depth": 2}, "max_new_tokens": 6},
        **changes,
    }
    return {name: value for name, value in data.items() if value is not None}


def fake_point(key: PointKey, *, levels: Sequence[float] = (1.0,)) -> LatencyPoint:
    """A point's raw times: in each round three around the truth, whose median it is, at the round's level.

    One node meets the levels in their order and other sizes the other way round.
    """
    met = levels if key.num_nodes == 1 else levels[::-1]

    def around(seconds: float) -> tuple[float, ...]:
        return tuple(seconds * level * factor for level in met for factor in (1.5, 1, 0.9))

    place = {"context_tokens": key.context_tokens, "batch": key.batch}
    has_step = key.num_heads > 0 or key.num_nodes == 1
    return LatencyPoint(
        **dict(key),
        backbone_s=around(backbone_s(key.num_nodes, **place)),
        heads_s=around(heads_s(key.num_heads)) if key.num_heads else (),
        step_s=around(step_s(key.num_nodes, key.num_heads, **place)) if has_step else (),
        times_a_round=(3,) * len(levels) if len(levels) > 1 else (),
        peak_memory_bytes=2**30,
    )


def fake_facts() -> ModelFacts:
    """The embedded model under five heads that share its unembedding."""
    spec = LatencySpec.model_validate(spec_data())
    return facts_of_shape(load_shapes()[SHAPE], heads=spec.heads.form, random_weights=False)


def fake_modes(dtype: DtypeName = "float32") -> ModeTrials:
    """Three prompts, five tokens after the first of each, every mode at its own speed."""
    trials = [
        ModeTrial.model_validate(
            {
                "dtype": dtype,
                "mode": mode,
                "prompt_key": f"p{prompt}",
                "prompt_tokens": 9,
                "token_ids": (1, 2, 3, 4, 5, 6 if (mode, prompt) != ("eager", 0) else 7),
                "step_tokens": (1,) * 5,
                "step_times_s": (1 / rate,) * 5,
                "prefill_s": 1.0,
            }
        )
        for prompt in range(3)
        for mode, rate in TOKENS_PER_S.items()
    ]
    return ModeTrials(auto={dtype: "packed"}, trials=tuple(trials))


def fake_batches(speedups: Mapping[int, float] | None = None) -> BatchTrials:
    """Eight texts of five tokens after the first; a vanilla step takes a second whatever the batch."""
    trials = []
    for batch, speedup in (speedups or BATCH_SPEEDUPS).items():
        for start in range(0, 8, batch):
            keys = tuple(f"p{number}" for number in range(start, start + batch))
            common: dict[str, Any] = {
                "batch": batch,
                "round": 0,
                "prompt_keys": keys,
                "num_tokens": 5 * batch,
            }
            trials.append(BatchTrial(method="vanilla", num_steps=5, decode_s=5.0, **common))
            trials.append(BatchTrial(method="medusa", num_steps=2, decode_s=5.0 / speedup, **common))
    tree = ArmTree(paths=((), (0,), (0, 0)), origin="chain of 2")
    return BatchTrials(dtype="float32", mode="packed", tree=tree, trials=tuple(trials))


def write_fake_latency(
    folder: Path,
    *,
    skipped: Mapping[int, str] | None = None,
    levels: Sequence[float] = (1.0,),
    **changes: Any,
) -> LatencyRecord:
    """Write a sealed record; `skipped` gives numbers of nodes a reason not to be measured, `levels` are those
    of the rounds, `changes` go into the spec.
    """
    folder.mkdir(parents=True)
    data = spec_data(**changes)
    spec = LatencySpec.model_validate(data)
    write_bytes(folder / "spec.toml", tomli_w.dumps(data).encode())
    write_json(folder / "environment.json", fake_environment())
    write_json(folder / MODEL_FILE, fake_facts())
    limits = DeviceLimits(
        read_bandwidth_bytes_per_s=BANDWIDTH_BYTES_PER_S, matmul_flop_per_s=2e12, method="made up"
    )
    write_json(folder / "device_limits.json", limits)
    reasons = skipped or {}
    points = [
        LatencyPoint(**dict(key), skipped=reasons[key.num_nodes])
        if key.num_nodes in reasons
        else fake_point(key, levels=levels)
        for key in spec.points("float32", ("eager", "packed"))
    ]
    write_bytes(
        folder / POINTS_FILE,
        "".join(point.model_dump_json(exclude_none=True) + "\n" for point in points).encode(),
    )
    if spec.modes_table is not None:
        write_json(folder / MODES_FILE, fake_modes())
    if spec.batch_table is not None:
        write_json(folder / BATCHES_FILE, fake_batches())
    num_skipped = sum(point.skipped is not None for point in points)
    manifest = LatencyManifest(
        spec=spec.name,
        num_planned=len(points),
        num_measured=len(points) - num_skipped,
        num_skipped=num_skipped,
        finished_utc="2024-01-19T12:00:00Z",
        elapsed_s=480.0,
        peak_memory_bytes=2**30,
        sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
    )
    write_json(folder / "manifest.json", manifest)
    return LatencyRecord(folder)


def fake_environment() -> Environment:
    """A made-up machine."""
    return Environment(
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        command="medusa-repro latency fake.toml",
        python="3.11.9",
        packages={"torch": "2.13.0"},
        device=DeviceInfo(
            kind="cpu", name="made-up CPU", num_cores=2, num_threads=2, memory_bytes=8_000_000_000
        ),
        engine="eager, packed",
        dtype="float32",
        blas="mkl",
        variables={"OMP_NUM_THREADS": "2"},
        backbone_sha256="b" * 64,
        heads_sha256="c" * 64,
        prompts_sha256="d" * 64,
        model_name="made-up model",
        weight_bytes=538_000_000,
        heads_bytes=120_000_000,
        started_utc="2024-01-19T11:50:00Z",
    )
