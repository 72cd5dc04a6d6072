"""What tests of the device half share: a tiny trained engine, small suites on it, the command line in this
process, and known clocks.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import tomli_w
import torch
from rich.console import Console

from harness.cli.app import main
from harness.device.arms import ArmRunner, TimedGeneration
from harness.device.engine import Engine, LoadedModel, load_engine, load_model
from harness.device.prompts import warmup_prompts
from harness.measure.run import RunOptions, run_suite
from harness.paths import code_folder, shipped
from harness.records.run import RunRecord
from harness.records.store import Store
from harness.records.trials import Failure, Generation
from harness.specs.suite import SuiteSpec, load_suite, parse_suite
from harness.training.tiny_heads import train_tiny_heads
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training_log import TrainingFigures

SMOKE_FILE = shipped("smoke.toml")
QUIET = Console(quiet=True)


def smoke_suite() -> SuiteSpec:
    """The shipped smoke suite."""
    return load_suite(SMOKE_FILE)


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, both streams."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line that says what went wrong; fails where there is none, several, or a traceback."""
        assert "Traceback" not in self.err
        lines = [
            line
            for line in self.err.splitlines()
            if line.startswith(("error:", "defect:", "invalid measurement:", "interrupted:"))
        ]
        assert len(lines) == 1 and self.err.rstrip().endswith(lines[0]), self.err
        return lines[0]


def command(*arguments: str | Path) -> Ran:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = patch.object(sys, "argv", ["medusa-repro", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), small_device_limits():
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code=code, out=out.getvalue(), err=err.getvalue())


@dataclass(frozen=True)
class SmokeRun:
    """The smoke suite run once through the command line, and the prompts that were decoded before anything
    was recorded.
    """

    ran: Ran
    record: RunRecord
    warmed_up: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MicroRun:
    """A small finished run and the data of its suite."""

    data: dict[str, Any]
    record: RunRecord


def run_smoke(results: Path) -> SmokeRun:
    """Run `medusa-repro reproduce smoke` as a user does, noting every prompt that is decoded before the first
    outcome is on disk.
    """
    decoded: list[tuple[int, ...]] = []
    recorded: list[Generation | Failure] = []
    generate, append = ArmRunner.generate, Store.append

    def noting_generate(runner: ArmRunner, prompt_ids: Sequence[int], **options: Any) -> TimedGeneration:
        if not recorded:
            decoded.append(tuple(prompt_ids))
        return generate(runner, prompt_ids, **options)

    def noting_append(store: Store[Generation | Failure], outcome: Generation | Failure) -> None:
        if not recorded:
            decoded.pop()  # the generation that the first outcome is of
        recorded.append(outcome)
        append(store, outcome)

    with patch.object(ArmRunner, "generate", noting_generate), patch.object(Store, "append", noting_append):
        ran = command("reproduce", "smoke", "--results", results)
    (folder,) = results.glob("smoke/*/*")
    return SmokeRun(ran=ran, record=RunRecord(folder), warmed_up=tuple(decoded))


def train_tiny_engine() -> tuple[LoadedModel, Engine]:
    """The smoke suite's model with heads trained on the spot."""
    suite = smoke_suite()
    loaded = load_model(suite.model, device=torch.device("cpu"))
    heads = train_tiny_heads(loaded, suite, prompts=warmup_prompts(suite, loaded))
    return loaded, load_engine(suite, loaded, base_folder=None, heads=heads)


def save_tiny_heads(path: Path, heads: MedusaHeads, *, backbone_sha256: str) -> None:
    """Write heads with a provenance that says they come from a test."""
    figures = TrainingFigures(
        num_steps=1,
        num_subset_steps=0,
        subset_size=None,
        num_positions_seen=1,
        num_targets_outside=0,
        num_train_rows=1,
        num_held_out_rows=0,
        num_train_answers=1,
        num_held_out_answers=0,
        num_corpus_tokens=1,
        final_loss=1.0,
        held_out=None,
    )
    recipe = Medusa1Settings(num_heads=heads.num_heads, num_epochs=None, num_steps=1)
    provenance = HeadsProvenance(
        backbone_name="tiny", backbone_sha256=backbone_sha256, recipe=recipe, training=figures
    )
    save_heads(path, heads, provenance=provenance)


VANILLA: dict[str, Any] = {"name": "vanilla", "method": "vanilla"}
CHAIN: dict[str, Any] = {
    "name": "chain",
    "method": "medusa",
    "baseline": "vanilla",
    "tree": {"kind": "chain", "depth": 4},
    "acceptance": {"rule": "greedy"},
}
SAMPLED: dict[str, Any] = {"name": "sampled", "method": "vanilla", "temperature": 0.7, "seeds": [1, 2]}
FASTEST: dict[str, Any] = {**CHAIN, "name": "fastest", "tree": {"kind": "fastest", "max_nodes": 8}}


# A rule that nothing breaks: steps of a tiny model last as long as whatever else the machine does.
BESIDE_ANYTHING = {"max_others_share": 1.0, "max_others_cores": 1000.0, "max_repeats": 0}
UNDISTURBED = {**BESIDE_ANYTHING, "max_long_share": 1.0}


def micro_data(
    heads_file: Path, *, arms: list[dict[str, Any]] | None = None, **changes: Any
) -> dict[str, Any]:
    """A suite that runs in about a second: the smoke model, its heads from a file, few prompts and tokens."""
    smoke = smoke_suite().model_dump(mode="json", exclude_none=True)
    return {
        "schema_version": 1,
        "kind": "suite",
        "name": "micro",
        "description": "for tests",
        "reports_speed": False,
        "max_new_tokens": 12,
        "model": smoke["model"],
        "heads": {"path": str(heads_file), "num_heads": 4},
        "prompts": {"source": "random", "limit": 4},
        "interval": {"num_resamples": 100},
        "disturbance": UNDISTURBED,
        "probes": {
            "step_nodes": [1, 2, 4, 8],
            "step_context_tokens": 16,
            "step_repeats": 1,
            "profile_prompts": 1,
        },
        "arms": arms if arms is not None else [VANILLA, CHAIN, SAMPLED],
        **changes,
    }


def write_suite(path: Path, data: dict[str, Any]) -> Path:
    """Write a suite file."""
    path.write_text(tomli_w.dumps(data), encoding="utf-8")
    return path


def run(data: dict[str, Any], results: Path, **options: Any) -> Path:
    """Run a suite quietly and return its record folder."""
    suite = parse_suite(tomli_w.dumps(data), where="the test")
    with small_device_limits():
        return run_suite(
            suite, suite_file=None, options=RunOptions(results=results, **options), console=QUIET
        )


class WorkClock:
    """A clock that advances by one second for every token that goes through the backbone, and by nothing
    else.

    So the prefill of T tokens takes T seconds, a vanilla step 1, and a step of a tree of N nodes N.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.now_s = 0.0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now_s += kwargs["input_ids"].shape[1]

    def __call__(self) -> float:
        return self.now_s

    def __enter__(self) -> WorkClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()


class TickClock:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return float(self.reads)


# What Python imports before all others in processes that are not forked.
_SITE = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

class Finding:  # an object and no function, which pytest would bind as a method
    def __call__(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        spec = find(name, path, target)
        if name == "harness.device.limits":
            run = spec.loader.exec_module

            def run_small(module):
                run(module)
                module._BANDWIDTH_BYTES, module._MATMUL_SIZE, module._ROW_SHAPE = 2**20, 64, (8, 8)

            spec.loader.exec_module = run_small
        return spec

PathFinder.find_spec = Finding()
"""


def small_device_limits_of_others(
    place: Path, *, hidden: tuple[str, ...] = (), more: str = ""
) -> dict[str, str]:
    """Return the environment in which other processes measure small limits, too, and find no hidden package.

    A file in `place` sees to it; `more` is run at its end.
    """
    (place / "sitecustomize.py").write_text(f"HIDDEN = {hidden}\n{_SITE}{more}", encoding="utf-8")
    return {"PYTHONPATH": f"{place}{os.pathsep}{code_folder().parent}"}


@contextlib.contextmanager
def small_device_limits() -> Iterator[None]:
    """Measure the device's limits with small blocks: these tests look at no figure of theirs."""
    with (
        patch("harness.device.limits._BANDWIDTH_BYTES", 2**20),
        patch("harness.device.limits._MATMUL_SIZE", 64),
        patch("harness.device.limits._ROW_SHAPE", (8, 8)),
    ):
        yield
