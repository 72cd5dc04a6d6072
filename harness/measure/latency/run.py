"""Record a latency run: every size on the device, then the tables of modes and of batches.

Backbone, heads and whole steps are timed. All sizes after one context share a cache and are timed in turn.
Its keys and values come from a real prefill of random tokens, in chunks, once a group; what a visit to a
size has kept is forgotten at the next one. Every point says how its steps followed each other, and in which
rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.device.clock import Clock, device_clock
from harness.device.doctor import require_own_gpu
from harness.device.engine import Engine, best_device
from harness.device.gpu.watch import GpuWatch
from harness.device.limits import better_limits
from harness.device.locks import Held, device_turns, folder_held
from harness.device.progress import counted, counted_holds
from harness.device.prompts import take_up_date
from harness.files import write_json
from harness.measure.latency.engine import (
    chosen_modes,
    describe_latency,
    facts_of_engine,
    free_memory_bytes,
    load_latency_engine,
    model_description,
    packs_weights,
)
from harness.measure.latency.faults import PREPARING_MODES, UNPREPARED, noting_fault, release
from harness.measure.latency.modes import measure_batches, measure_modes
from harness.measure.latency.prompts import LatencyPrompt, table_prompts
from harness.measure.latency.room import check_device, check_fits, skip_reason
from harness.measure.latency.sittings import Watch, points_of
from harness.measure.latency.timers import measure_group, visits_of
from harness.records.latency import (
    BATCHES_FILE,
    LATENCY,
    MODEL_FILE,
    MODES_FILE,
    OUT_OF_TIME,
    LatencyManifest,
    LatencyPoint,
    LatencyRecord,
    ModelFacts,
    ModeTrials,
    limits_file,
)
from harness.records.store import NO_REPORT, Store
from harness.specs.disturbance import LatencyDisturbance
from harness.specs.latency import DtypeName, LatencySpec, ModeName, PointKey
from medusa_impl.engine.memory import peak_memory_bytes


@dataclass(frozen=True)
class LatencyOptions:
    """What the command line may say about a latency run, besides the spec."""

    results: Path
    resume: Path | None = None
    time_budget_s: float | None = None
    allow_hub: bool = False
    command: str = ""


def run_latency(
    spec: LatencySpec, *, spec_file: Path | None, options: LatencyOptions, console: Console
) -> Path:
    """Run a latency spec, or resume it, and return the folder of its sealed record.

    What a time budget leaves undone is recorded as skipped, with that reason.
    Raises: UserError for input that cannot be run, or a resume of another run.
    """
    if spec.disturbance is None:
        spec = spec.model_copy(update={"disturbance": LatencyDisturbance()})
    started = time.monotonic()
    ends = math.inf if options.time_budget_s is None else started + options.time_budget_s
    device, base_folder = best_device(), spec_file.parent if spec_file is not None else None
    check_device(spec, device)
    if options.resume is not None:
        LatencyRecord(options.resume)  # must be there before minutes go into loading
    gpu = require_own_gpu()
    clock = device_clock(device)
    held = device_turns(device, console=console)
    first = spec.dtypes[0]
    console.print(f"{spec.name}: loading {model_description(spec)} in {first}")
    free_bytes = free_memory_bytes(device)
    if spec.shape is not None:
        check_fits(spec, dtype=first, free_bytes=free_bytes)
    engine = load_latency_engine(
        spec, dtype=first, device=device, base_folder=base_folder, allow_hub=options.allow_hub
    )
    take_up_date(engine.loaded, LATENCY, spec, results=options.results, resume=options.resume)
    prompts = table_prompts(spec, engine, allow_hub=options.allow_hub)
    environment = describe_latency(engine, spec=spec, prompts=prompts, command=options.command)
    store = Store.open(
        options.results, kind=LATENCY, spec=spec, provenance=environment, resume=options.resume
    )
    if store.is_sealed:
        console.print(NO_REPORT.format(store.folder.name), soft_wrap=True)
        return store.folder
    with folder_held(store.folder):
        write_json(store.folder / MODEL_FILE, facts_of_engine(engine))
        done, num_planned, peak = _done(store), 0, 0
        for dtype in spec.dtypes:
            if dtype != first:
                release(device)
                free_bytes = free_memory_bytes(device)
                console.print(f"loading {model_description(spec)} in {dtype}")
                engine = load_latency_engine(
                    spec, dtype=dtype, device=device, base_folder=base_folder, allow_hub=options.allow_hub
                )
            session = _Session(
                spec, engine, dtype, store, clock, held, console, free_bytes, gpu=gpu, ends=ends
            )
            peak = max(peak, session.measure(prompts, done=done, base_folder=base_folder))
            num_planned += session.num_planned
            del engine, session  # two copies of the weights may not fit
        _seal(store, num_planned=num_planned, elapsed_s=time.monotonic() - started, peak_memory_bytes=peak)
    return store.folder


def _done(store: Store[LatencyPoint]) -> set[PointKey]:
    """Return what is on disk, less what an earlier time budget left undone, which is dropped from there."""
    points = store.lines()
    kept = [point for point in points if point.skipped != OUT_OF_TIME]
    if len(kept) < len(points):
        store.rewrite(kept)
    return {point.key for point in kept}


def _seal(store: Store[LatencyPoint], **facts: Any) -> None:
    record = LatencyRecord(store.folder)
    skipped = sum(point.skipped is not None for point in record.points)
    num_measured = len(record.points) - skipped
    store.seal(
        LatencyManifest, spec=record.spec.name, num_measured=num_measured, num_skipped=skipped, **facts
    )


class _Session:
    """One dtype's share of a run; nothing new is begun after `ends`, in monotonic seconds."""

    def __init__(
        self,
        spec: LatencySpec,
        engine: Engine,
        dtype: DtypeName,
        store: Store[LatencyPoint],
        clock: Clock,
        held: Held,
        console: Console,
        free_bytes: int,
        *,
        gpu: GpuWatch | None = None,
        ends: float = math.inf,
    ) -> None:
        self.watch, self.ends = Watch(spec.disturbance, gpu, ends=ends, note=self._say), ends
        self.spec, self.engine, self.dtype, self.store = spec, engine, dtype, store
        self.clock, self.held, self.console, self.free_bytes = clock, held, console, free_bytes
        self.available = engine.runner.available_modes()
        self.modes = chosen_modes(spec, self.available)
        self.plan = spec.points(dtype, self.modes)
        self.device = engine.runner.backbone.device
        self.num_rounds = len(visits_of(spec.repeats))

    @property
    def num_planned(self) -> int:
        """Return how many points of this dtype the record is to hold: planned, or in eager mode instead."""
        return len({*self.plan, *(key for key in map(_in_eager, self.plan) if key in self._on_disk())})

    def _on_disk(self) -> dict[PointKey, LatencyPoint]:
        return {point.key: point for point in LatencyRecord(self.store.folder).points}

    def measure(
        self, prompts: Sequence[LatencyPrompt], *, done: set[PointKey], base_folder: Path | None
    ) -> int:
        """Measure all of this dtype that is not on disk; return the peak memory seen."""
        auto: ModeName = self.available[0]
        self._measure_limits()
        peak = self._measure_points(done)
        self._measure_modes(prompts, auto=auto)
        if self.dtype == self.spec.dtypes[0]:
            self._measure_batches(prompts, auto=auto, base_folder=base_folder)
        peak = max(peak, peak_memory_bytes(self.engine.runner.backbone.device))
        self._measure_limits(again=True)
        return peak

    def _measure_limits(self, *, again: bool = False) -> None:
        """Measure what is not on disk yet, or the better of that and of a second measurement."""
        path = self.store.folder / limits_file(self.dtype, first=self.spec.dtypes[0])
        before = LatencyRecord(self.store.folder).limits(self.dtype)
        if before is None or (again and time.monotonic() < self.ends):
            with self.held(), noting_fault("eager", device=self.device, note=self._say_no("device limits")):
                dtype = self.engine.runner.backbone.dtype
                write_json(path, better_limits(before, self.device, dtype, clock=self.clock))

    def _measure_points(self, done: set[PointKey]) -> int:
        """Time every group that is not on disk; return the peak memory seen."""
        facts, peak = facts_of_engine(self.engine), 0
        packs = packs_weights(self.spec, dtype=self.dtype, device=self.device)
        groups = [list(members) for _, members in groupby(self.plan, key=lambda key: key.group)]
        shown = f"{self.dtype}, groups of points, round by round"
        sittings = [(number, members) for number in range(self.num_rounds) for members in groups]
        for number, members in counted(sittings, shown, total=len(sittings), console=self.console):
            if number:
                peak = max(peak, self._measure_again(members, number))
                continue
            todo = [key for key in members if key not in done]
            reasons = {key: self._reason(key, facts, packs=packs) for key in todo}
            self.store.append(
                *(
                    LatencyPoint(**dict(key), skipped=reason)
                    for key, reason in reasons.items()
                    if reason is not None
                )
            )
            if runnable := [key for key in todo if reasons[key] is None]:
                one = not self._prepares(runnable)
                peak = max(peak, self._measure_group(runnable, range(1 if one else self.num_rounds)))
        return max(peak, self._measure_instead())

    def _measure_again(self, members: Sequence[PointKey], number: int) -> int:
        """Time one more round of a group, unless the time is up; return the peak memory seen.

        Minutes lie between the rounds of a group, so that what the machine's speed does in them shows in the
        rounds. A mode that prepares its steps would prepare them anew: its rounds follow each other.
        """
        found = self._on_disk()
        begun = [key for key in members if key in found and len(found[key].times_a_round) == number]
        if not begun or self._prepares(begun) or time.monotonic() >= self.ends:
            return 0
        return self._measure_group(begun, range(number, number + 1))

    def _prepares(self, keys: Sequence[PointKey]) -> bool:
        return keys[0].mode in PREPARING_MODES

    def _measure_group(self, keys: Sequence[PointKey], rounds: range) -> int:
        """Time the points of one group in some rounds; return the peak memory seen."""
        dtype, mode, context_tokens, batch = keys[0].group
        which = f"rounds {rounds[0] + 1} to {rounds[-1] + 1} of {self.num_rounds}"
        self.console.print(
            f"{dtype} {mode}: context {context_tokens}, batch {batch}, {len(keys)} sizes, {which}",
            highlight=False,
        )
        measure = partial(
            measure_group, self.engine, keys, repeats=self.spec.repeats, rounds=rounds, clock=self.clock
        )
        with self.held():
            sittings = self.watch.sittings(measure, what=f"{dtype} {mode}", modes=(mode,))
        points = points_of(sittings)
        self._keep(points)
        for reason in dict.fromkeys(point.skipped for point in points if point.skipped is not None):
            sizes = [point.num_nodes for point in points if point.skipped == reason]
            self._say(f"{dtype} {mode}, context {context_tokens}, batch {batch}, nodes {sizes}: {reason}")
        return max(point.peak_memory_bytes or 0 for point in points)

    def _measure_instead(self) -> int:
        """Time in eager mode what a mode failed to prepare; return the peak memory seen.

        So a failed capture costs a curve its speed, not its sizes. Each such point says which mode it is of.
        """
        found, peak = self._on_disk(), 0
        failed = [key for key in self.plan if key in found and UNPREPARED in (found[key].skipped or "")]
        asked = {*self.spec.points(self.dtype, ("eager",))} - {*self.plan, *found}
        todo = [key for key in dict.fromkeys(map(_in_eager, failed)) if key in asked]
        for _, members in groupby(todo, key=lambda key: key.group):
            if time.monotonic() < self.ends:
                peak = max(peak, self._measure_group(list(members), range(self.num_rounds)))
        return peak

    def _keep(self, points: Sequence[LatencyPoint]) -> None:
        """Write points, or add their rounds to those that are on disk."""
        found = self._on_disk()
        if not any(point.key in found for point in points):
            self.store.append(*points)
            return
        later = {point.key: point for point in points}
        self.store.rewrite(
            point.with_rounds_of(later[key]) if key in later else point for key, point in found.items()
        )

    def _measure_modes(self, prompts: Sequence[LatencyPrompt], *, auto: ModeName) -> None:
        table = self.spec.modes_table
        record = LatencyRecord(self.store.folder)
        before = record.modes or ModeTrials(auto={}, trials=())
        if table is None or self.dtype in before.auto or self._is_late("table of modes"):
            return
        self.console.print(f"{self.dtype}: the table of modes, {table.num_prompts} prompts", highlight=False)
        timed = {key.mode for key in self.plan}  # a grid may leave a mode to some dtypes
        modes = [mode for mode in self.modes if mode in self.available and mode in timed]
        shown = "table of modes, warm-up and prompts"
        total = 1 + table.num_prompts
        with counted_holds(self.held, shown, total=total, console=self.console) as held:
            trials, again = measure_modes(
                self.engine,
                self.dtype,
                modes,
                prompts[: table.num_prompts],
                max_new_tokens=table.max_new_tokens,
                clock=self.clock,
                held=held,
                watch=self.watch,
            )
        autos, both = {**before.auto, self.dtype: auto}, (*before.trials, *trials)
        after = ModeTrials(auto=autos, trials=both, disturbed=(*before.disturbed, *again))
        write_json(self.store.folder / MODES_FILE, after)

    def _measure_batches(
        self, prompts: Sequence[LatencyPrompt], *, auto: ModeName, base_folder: Path | None
    ) -> None:
        path, table = self.store.folder / BATCHES_FILE, self.spec.batch_table
        if table is None or path.exists() or self._is_late("table of batches"):
            return
        self.console.print(f"{self.dtype}: speed against batch {list(table.batches)}", highlight=False)
        self.engine.runner.use(auto if auto in self.modes else self.modes[0])
        points = LatencyRecord(self.store.folder).points
        shown = "speed against batch, warm-up and groups"
        total = 1 + table.rounds * sum(-(-table.num_texts // batch) for batch in table.batches)
        with counted_holds(self.held, shown, total=total, console=self.console) as held:
            batches = measure_batches(
                self.engine,
                self.spec,
                points,
                prompts,
                dtype=self.dtype,
                clock=self.clock,
                held=held,
                base_folder=base_folder,
                watch=self.watch,
            )
        if batches is not None:
            write_json(path, batches)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say_no(self, what: str) -> Callable[[str], None]:
        return lambda reason: self._say(f"no {what}: {reason}")

    def _is_late(self, what: str) -> bool:
        """Return whether the time budget is used up, and say so of what it leaves undone."""
        is_late = time.monotonic() >= self.ends
        if is_late:
            self._say_no(what)(OUT_OF_TIME)
        return is_late

    def _reason(self, key: PointKey, facts: ModelFacts, *, packs: bool) -> str | None:
        if key.mode not in self.available:
            return f"mode {key.mode} is not available on this device in {key.dtype}"
        if time.monotonic() >= self.ends:
            return OUT_OF_TIME
        return skip_reason(
            key, facts, packs=packs, free_bytes=self.free_bytes, memory_share=self.spec.memory_share
        )


def _in_eager(key: PointKey) -> PointKey:
    return key.model_copy(update={"mode": "eager"})
