"""The commands that are killed, on inputs that take a second or a few, and what each has measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.torch import load_file

from harness.tests.fake_sweep import made_up_plan, sweep_data
from harness.tests.fuzz.world import write_model, write_trained
from harness.tests.tiny_suite import (
    BESIDE_ANYTHING,
    micro_data,
    save_tiny_heads,
    smoke_suite,
    train_tiny_engine,
)
from harness.tests.tiny_training import ablation_data, write_corpus, write_recipe
from medusa_impl.checkpoints.tensors import tensors_sha256

RESULTS, WORK, OUT = "results", "work", "out"
_LINE_FILES = ("generations.jsonl", "points.jsonl", "cells.jsonl", "arms.jsonl", "parts.jsonl")
# of a line, what a resume may rewrite or what differs between two runs of one thing
_MARKS = ("timing_valid",)


@dataclass(frozen=True)
class Job:
    """A command that writes into the folder where it is run.

    `held` returns what is measured there, by name, half-written lines left out; nothing of it may be lost.
    `result` returns what has to come out as if nothing had happened. Where a sealed record is what is made,
    `spec_file` is its file by which it is told from others.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    held: Callable[[Path], dict[str, Any]]
    result: Callable[[Path], Any]
    spec_file: str | None = None
    prepare: Callable[[Path, Path], None] | None = None


def write_run(inputs: Path, heads: Path) -> None:
    """Write a suite of the smoke model and of its trained heads."""
    _write_toml(inputs / "micro.toml", micro_data(heads, prompts={"source": "random", "limit": 3}))


def write_plan(inputs: Path) -> None:
    """Write an acceptance of two parts on the CPU: a file of tests, and the suite of `write_run`."""
    test = inputs / "test_quick.py"
    test.write_text("def test_quick() -> None:\n    assert True\n", encoding="utf-8")
    of_suite = {"suite": str(inputs / "micro.toml"), "num_prompts": 3, "least_s": 8, "reserve_s": 2}
    parts = [
        {"part": "tests", "files": [str(test)], "limit_s": 120},
        {"part": "suite", "limit_s": 240, **of_suite},
    ]
    plan = {"schema_version": 1, "kind": "gpu", "name": "tiny", "description": "for tests", "device": "cpu"}
    _write_toml(inputs / "gpu.toml", {**plan, "minutes": 10.0, "parts": parts})


def build(inputs: Path) -> None:
    """Write what the commands read."""
    inputs.mkdir(parents=True)
    loaded, engine = train_tiny_engine()
    heads = inputs / "heads.safetensors"
    save_tiny_heads(heads, engine.heads, backbone_sha256=loaded.sha256)
    write_run(inputs, heads)
    _write_toml(inputs / "latency.toml", _latency_data(heads))
    write_plan(inputs)
    write_corpus(inputs / "corpus.safetensors", engine)
    write_recipe(inputs, "joint", num_steps=24, autocast="bfloat16")
    arms = {
        "arms": [{"name": "medusa1", "recipe": "frozen.toml"}, {"name": "ramped", "recipe": "ramped.toml"}]
    }
    _write_toml(inputs / "ablation.toml", ablation_data(inputs, heads, seeds=[0], **arms))
    made_up_plan(inputs)
    changes: dict[str, Any] = {"sampled": None, "decode_points": None}
    data = {name: value for name, value in sweep_data(**changes).items() if value is not None}
    _write_toml(inputs / "sweep.toml", data)
    write_model(inputs / "talk" / "model")
    write_trained(inputs / "talk")
    (inputs / "trained").mkdir()
    shutil.copy(inputs / "talk" / "heads.safetensors", inputs / "trained")
    _write_toml(inputs / "distill.toml", _distill_data(inputs / "talk" / "model"))


def _latency_data(heads: Path) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "latency",
        "name": "tiny",
        "description": "for tests",
        "model": smoke_suite().model_dump(mode="json", exclude_none=True)["model"],
        "heads": {"path": str(heads)},
        "dtypes": ["float32"],
        "modes": ["eager", "packed"],
        "repeats": 2,
        "prompts": {"source": "random", "prompt_tokens": 9},
        "grids": [{"num_nodes": [1, 4, 8], "num_heads": [3], "context_tokens": [24]}],
        "modes_table": {"num_prompts": 2, "max_new_tokens": 6, "context_tokens": 24, "sizes": [1, 8]},
        "disturbance": BESIDE_ANYTHING,
        "batch_table": {
            "batches": [1, 2],
            "tree": {"kind": "chain", "depth": 3},
            "max_new_tokens": 6,
        },
        "interval": {"num_resamples": 100},
    }


def _distill_data(model: Path) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": "recipe",
        "trains": "heads_and_backbone",
        "name": "tiny",
        "description": "for tests",
        "num_workers": 1,
        "model": {"path": str(model)},
        "corpus": {"num_samples": 24, "max_new_tokens": 12, "num_rows": 8, "second_turn_share": 1.0},
        "recipe": {
            "num_heads": 2,
            "num_steps": 2,
            "backbone": "frozen",
            "max_length": 64,
            "batch_sequences": 2,
        },
        "calibration": {"num_prompts": 6, "max_new_tokens": 6},
    }


def _write_toml(path: Path, data: dict[str, Any]) -> None:
    path.write_text(tomli_w.dumps(data), encoding="utf-8")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the whole lines of a file with their numbers."""
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole):
        yield number, json.loads(line)


def _measured(folder: Path) -> dict[str, Any]:
    """Return the lines of all records, by record, file and number."""
    found = {}
    for name in _LINE_FILES:
        for path in sorted((folder / RESULTS).rglob(name)):
            for number, line in _lines(path):
                kept = {key: value for key, value in line.items() if key not in _MARKS}
                found[f"{path.relative_to(folder)}:{number}"] = kept
    return found


def _texts(folder: Path) -> Any:
    found: dict[str, Any] = {}
    for path in (folder / RESULTS).rglob("generations.jsonl"):
        found |= {json.dumps(line["trial"]): line["token_ids"] for _, line in _lines(path)}
    return found


def _keys(file: str, *names: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        lines = [line for path in (folder / RESULTS).rglob(file) for _, line in _lines(path)]
        return sorted(json.dumps([line.get(name) for name in names]) for line in lines)

    return read


def _tensors(folder: Path) -> Any:
    return {
        str(path.relative_to(folder)): tensors_sha256(load_file(path))
        for path in sorted((folder / OUT).rglob("*.safetensors"))
    }


def _steps(folder: Path) -> dict[str, Any]:
    """Return nothing: steps after the last checkpoint are taken again, and come out the same."""
    return {}


def _answers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((folder / WORK).rglob("corpus-*.jsonl")):
        found |= {line["key"]: line["token_ids"] for _, line in _lines(path)}
    return found


def _calibrated(folder: Path) -> Any:
    with np.load(folder / "trained" / "calibration.npz") as file:
        return {name: hashlib.sha256(file[name].tobytes()).hexdigest() for name in sorted(file.files)}


def _of_results(*words: str) -> Callable[[Path], list[str]]:
    def arguments(inputs: Path) -> list[str]:
        verb, file, *more = words
        return [verb, str(inputs / file), "--results", RESULTS, *more]

    return arguments


def _copy_latency(inputs: Path, folder: Path) -> None:
    """Put the latency record where the sweep looks for one."""
    shutil.copytree(inputs / "results" / "latency", folder / RESULTS / "latency")


def _trained(inputs: Path, folder: Path) -> None:
    """Put the heads where the calibration looks for them."""
    shutil.copytree(inputs / "trained", folder / "trained")


def _work_out(verb: str, file: str) -> Callable[[Path], list[str]]:
    return lambda inputs: [verb, str(inputs / file), "--work", WORK, "--out", OUT]


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("reproduce", _of_results("reproduce", "micro.toml"), _measured, _texts, "suite.toml"),
        Job(
            "train",
            _work_out("train", "joint.toml"),
            _steps,
            _tensors,
        ),
        Job(
            "sweep",
            _of_results("sweep", "sweep.toml", "--replay-only"),
            _measured,
            _keys("cells.jsonl", "kind", "curve", "trees"),
            "sweep.toml",
            prepare=_copy_latency,
        ),
        Job(
            "latency",
            _of_results("latency", "latency.toml"),
            _measured,
            _keys("points.jsonl", "mode", "num_nodes", "num_heads", "batch"),
            "spec.toml",
        ),
        Job(
            "distill",
            _work_out("distill", "distill.toml"),
            _answers,
            lambda folder: (sorted(_answers(folder)), sorted(_tensors(folder))),
        ),
        Job(
            "calibrate",
            lambda inputs: ["calibrate", str(inputs / "distill.toml"), "trained", "--work", WORK],
            _answers,
            _calibrated,
            prepare=_trained,
        ),
        Job(
            "ablate",
            _of_results("ablate", "ablation.toml", "--work", WORK),
            _measured,
            _keys("arms.jsonl", "arm", "seed", "heads_sha256"),
            "suite.toml",
        ),
        Job(
            "gpu",
            _of_results("gpu", "gpu.toml"),
            _measured,
            _keys("parts.jsonl", "part", "outcome", "told"),
            "plan.toml",
        ),
    )
}
