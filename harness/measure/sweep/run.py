"""Run a sweep: compose what a replay gives, then decode on the device what it cannot.

Every cell is on disk as soon as it is done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from harness.compose.cells import compose
from harness.compose.composer import KnotPrices
from harness.compose.devices import StepTimes
from harness.compose.plan import SweepPlan, plan_sweep, tree_rates
from harness.device.engine import best_device
from harness.device.locks import folder_held
from harness.device.machine import device_info, origin
from harness.device.progress import progress_bar
from harness.errors import UserError
from harness.files import file_sha256, write_bytes
from harness.measure.sweep.cells import CellRunner
from harness.measure.sweep.tasks import CellInputs, DecodedTask, RunTask, SampledTask
from harness.paths import resolve_path
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.provenance import DeviceInfo
from harness.records.store import NO_REPORT, Store
from harness.records.sweep import (
    SWEEP,
    TREES_FILE,
    SweepManifest,
    SweepOrigin,
    SweepRecord,
    SweepTrees,
    TraceFacts,
)
from harness.records.sweep_cells import AnyCell, FailedCell, decoded_key
from harness.records.trace import Trace
from harness.specs.suite import load_suite
from harness.specs.sweep import SweepSpec


@dataclass(frozen=True)
class SweepOptions:
    """What the command line may say about a sweep, besides the spec.

    `replay_only` leaves out all that the device would have to run.
    """

    results: Path
    resume: Path | None = None
    replay_only: bool = False
    cache: Path | None = None
    allow_hub: bool = False
    command: str = ""


class Executor(Protocol):
    """Where run cells are run. Cells may come in any order, each once."""

    @property
    def name(self) -> Literal["local", "ray"]: ...
    def ready(
        self, spec: SweepSpec, *, base_folder: Path | None, options: SweepOptions, console: Console
    ) -> Mapping[str | None, DeviceInfo]:
        """Return the device by accelerator type, when all is there to begin.

        The type is None for a machine that has no need of one.
        """
        ...

    def run(
        self, inputs: CellInputs, tasks: Sequence[RunTask], *, on_start: Callable[[str], None]
    ) -> Generator[AnyCell]:
        """Yield the cell of every task as it is done; closing it early gives up the others."""
        ...


class LocalExecutor:
    """This machine, one cell after another."""

    name: Literal["local"] = "local"

    def ready(
        self, spec: SweepSpec, *, base_folder: Path | None, options: SweepOptions, console: Console
    ) -> Mapping[str | None, DeviceInfo]:
        """Return this machine's device."""
        return {None: device_info(best_device())}

    def run(
        self, inputs: CellInputs, tasks: Sequence[RunTask], *, on_start: Callable[[str], None]
    ) -> Generator[AnyCell]:
        """Yield the cells in the order of their tasks."""
        if not tasks:
            return
        on_start("loading the model")
        runner = CellRunner(inputs)
        for task in tasks:
            on_start(task.words)
            yield runner.run(task)


def _planned(
    spec: SweepSpec, *, base_folder: Path | None, options: SweepOptions, console: Console
) -> SweepPlan:
    """Plan a sweep and say so; a results folder without latency records leaves predictions alone."""
    console.print(f"{spec.name}: traces, trees and searches")
    plan = plan_sweep(spec, base_folder=base_folder, results=options.results, cache=options.cache)
    if spec.measured is not None and all(curve.label.kind != "measured" for curve in plan.curves):
        where = f"{options.results.name}/latency"
        note = f"found no latency record in {where}: no measured device is in this sweep"
        console.print(note, soft_wrap=True)
    return plan


def run_sweep(
    spec: SweepSpec,
    *,
    spec_file: Path | None,
    options: SweepOptions,
    console: Console,
    executor: Executor | None = None,
) -> Path:
    """Run a sweep, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that does not belong together, or a resume of another sweep.
    """
    started = time.monotonic()
    executor = executor or LocalExecutor()
    base_folder = spec_file.parent if spec_file is not None else None
    if options.replay_only:
        spec = spec.model_copy(update={"sampled": None, "decoded": None, "cluster": None})
    runs_cells = spec.sampled is not None or spec.decoded is not None
    devices = (
        executor.ready(spec, base_folder=base_folder, options=options, console=console) if runs_cells else {}
    )
    plan = _planned(spec, base_folder=base_folder, options=options, console=console)
    provenance = describe_sweep(plan, command=options.command, executor=executor.name)
    store = Store.open(options.results, kind=SWEEP, spec=spec, provenance=provenance, resume=options.resume)
    if store.is_sealed:
        console.print(NO_REPORT.format(store.folder.name), soft_wrap=True)
        return store.folder
    with folder_held(store.folder):
        done = _take_up(store, tree_rates(plan))
        tasks, without_curve = plan_runs(plan, devices=devices, base_folder=base_folder)
        runs = [one.key for one in (*tasks, *without_curve)]
        num_planned = len(plan.cells) + len(plan.refused) + len(runs)
        with progress_bar(console) as progress:
            kept = {key for key in done if key.split()[0] in ("composed", "curve")}
            num_composed = len(plan.cells) + len(plan.refused)
            composing = progress.add_task("composed", total=num_composed, completed=len(kept))
            for cell in compose(plan, done=done):
                store.append(cell)
                progress.advance(composing)
            if any(key not in done for key in runs):
                running = progress.add_task(
                    "run", total=len(runs), completed=sum(key in done for key in runs)
                )
                todo = [task for task in tasks if task.key not in done]
                inputs = cell_inputs(plan, base_folder=base_folder, allow_hub=options.allow_hub)
                with contextlib.closing(
                    executor.run(inputs, todo, on_start=_shower(progress, running))
                ) as run:
                    for cell in chain(run, (failed for failed in without_curve if failed.key not in done)):
                        store.append(cell)
                        progress.advance(running)
        _seal(store, spec, num_planned=num_planned, elapsed_s=time.monotonic() - started)
    return store.folder


def _seal(store: Store[AnyCell], spec: SweepSpec, *, num_planned: int, elapsed_s: float) -> None:
    record = SweepRecord(store.folder)
    store.seal(
        SweepManifest,
        sweep=spec.name,
        num_planned=num_planned,
        num_done=len(record.cells) - len(record.failed),
        num_failed=len(record.failed),
        num_points=record.num_points,
        elapsed_s=elapsed_s,
    )


def _take_up(store: Store[AnyCell], trees: SweepTrees) -> frozenset[str]:
    """Write the trees where they are not there yet and return the keys of the cells that are done.

    Raises: UserError where the sweep was begun with other trees: cells name trees by their index.
    """
    done = frozenset(cell.key for cell in store.lines())
    if not (store.folder / TREES_FILE).exists():
        # one line: it holds a thousand paths
        write_bytes(store.folder / TREES_FILE, (trees.model_dump_json() + "\n").encode())
    elif SweepRecord(store.folder).trees.trees != trees.trees:
        need = "those that the sweep began with"
        raise UserError(found="other trees", need=need, where=store.folder.name, do="start a new sweep")
    return done


def describe_sweep(
    plan: SweepPlan, *, command: str, executor: Literal["local", "ray"] = "local"
) -> SweepOrigin:
    """Return where the record will come from."""
    return SweepOrigin(
        **origin(best_device(), command=command),
        executor=executor,
        inputs={name: file_sha256(path) for name, path in plan.inputs.items()},
        trace=_facts(plan.composer.index.trace),
        calibration=_facts(plan.calibration.trace),
        roofline_error=plan.error,
        step_model=plan.model,
    )


def _facts(trace: Trace) -> TraceFacts:
    return TraceFacts(
        model_sha256=trace.provenance.model_hash,
        heads_sha256=trace.provenance.heads_hash,
        dtype=trace.provenance.dtype,
        max_new_tokens=trace.provenance.max_new_tokens,
        num_prompts=len(trace.prompts),
        num_positions=trace.num_positions,
        num_heads=trace.num_heads,
    )


def _shower(progress: Progress, task: TaskID) -> Callable[[str], None]:
    return lambda words: progress.update(task, description=escape(words))


def plan_runs(
    plan: SweepPlan, *, devices: Mapping[str | None, DeviceInfo], base_folder: Path | None
) -> tuple[tuple[RunTask, ...], tuple[FailedCell, ...]]:
    """Return what is run, in order, and the cells that cannot be.

    There is a failed cell for each device that has no measured curve to check a composition with. Every
    device decodes points that are drawn on its own curve, which one of another machine is not, whatever its
    name; `devices` gives them by accelerator type.
    """
    spec, tasks, without_curve = plan.spec, list[RunTask](), list[FailedCell]()
    for setting in spec.sampled.settings if spec.sampled is not None else ():
        tree = plan.run_tree if setting.rule != "vanilla" else None
        tasks.append(SampledTask(setting, tree=tree, index=plan.indices[tree] if tree is not None else None))
    if spec.decoded is None:
        return tuple(tasks), ()
    dtype = load_suite(resolve_path(spec.suite, base_folder=base_folder)).model.dtype
    for accelerator_type, device in devices.items():
        curve, others = own_curve(plan, dtype=dtype, device=device)
        if curve is not None:
            tasks += [
                DecodedTask(plan.drafts[index], index, curve, accelerator_type)
                for index in drawn_points(plan, curve)
            ]
            continue
        where = f"of {accelerator_type} nodes" if accelerator_type is not None else "of this device"
        message = (
            f"no latency record {where} for {spec.shape} in {dtype}: nothing to check a composition with"
        ) + "".join(f"; {source} is of {why}" for source, why in others.items())
        key = decoded_key("none", accelerator_type=accelerator_type)
        without_curve.append(
            FailedCell(key=key, words="points decoded for real", error_type="UserError", message=message)
        )
    return tuple(tasks), tuple(without_curve)


def cell_inputs(plan: SweepPlan, *, base_folder: Path | None, allow_hub: bool) -> CellInputs:
    """Return what the run cells of a plan share."""
    suite_file = resolve_path(plan.spec.suite, base_folder=base_folder)
    return CellInputs(
        spec=plan.spec,
        suite=load_suite(suite_file),
        base_folder=suite_file.parent,
        trace=plan.composer.index.trace,
        knots=tuple(plan.composer.knots.astype(int).tolist()),
        allow_hub=allow_hub,
    )


def own_curve(plan: SweepPlan, *, dtype: str, device: DeviceInfo) -> tuple[StepTimes | None, dict[str, str]]:
    """Return a machine's own measured curve of the trace's model in a dtype; None where there is none.

    With it come the records of the device's name that are of another machine, and why they are.
    """
    wanted = (device.name, plan.spec.shape, dtype)
    others: dict[str, str] = {}
    for label, curve in ((curve.label, curve) for curve in plan.curves):
        if label.machine is None or (label.machine.device.name, label.shape, label.dtype) != wanted:
            continue
        why = not_comparable(label.machine, MeasuredMachine(device))
        if why is None:
            return curve, {}
        others[label.source] = why
    return None, others


def drawn_points(plan: SweepPlan, curve: StepTimes) -> tuple[int, ...]:
    """Return the indices of the trees to decode, drawn by the spec's seed.

    They are drawn from all that the curve covers; the root alone is left out.
    """
    wanted = plan.spec.decoded
    assert wanted is not None
    prices = KnotPrices(curve, knots=plan.composer.knots, context="trace", batch=1)
    offered = [
        index
        for index, tree in enumerate(plan.drafts)
        if tree.depth and prices.step(tree.num_nodes, tree.depth) is not None
    ]
    rng = np.random.default_rng(wanted.seed)
    return tuple(
        sorted(rng.choice(offered, size=min(wanted.num_points, len(offered)), replace=False).tolist())
    )
