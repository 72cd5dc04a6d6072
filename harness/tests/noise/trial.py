"""What a suite says next to a neighbour that takes a core, held against what it says on a quiet machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from harness.files import Frozen
from harness.judge.judgement import Judgement
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.report.formatting import ABSENT, ratio_interval, table
from harness.stats import Interval

Load = Literal["quiet", "bursts", "steady"]
BURST_SHARE, BURST_MEAN_S = 1 / 3, 2.0
BURNER = Path(__file__).with_name("burner.py")


class Wanted(Frozen):
    """One run of the trial: next to which load, with which seed of its bursts."""

    number: int
    load: Load
    seed: int = 0


class Told(Frozen):
    """What one run said: its speedups by arm, none where it withheld them, and why."""

    wanted: Wanted
    speedups: dict[str, Interval]
    tokens_per_step: dict[str, float]
    withheld: str | None
    valid_texts: bool
    num_blocks: int
    num_quiet: int
    minutes: float
    record: str


def plan(*, num_bursts: int, num_steady: int) -> list[Wanted]:
    """Return the runs in their order: a quiet one first and last."""
    loads: list[tuple[Load, int]] = [("quiet", 0)]
    loads += [("bursts", seed) for seed in range(1, num_bursts + 1)]
    loads += [("steady", seed) for seed in range(1, num_steady + 1)]
    loads.append(("quiet", 1))
    return [Wanted(number=number, load=load, seed=seed) for number, (load, seed) in enumerate(loads)]


@contextlib.contextmanager
def loaded(wanted: Wanted) -> Iterator[None]:
    """Hold the neighbour that a run is to have."""
    if wanted.load == "quiet":
        yield
        return
    share = BURST_SHARE if wanted.load == "bursts" else 1.0
    words = [str(wanted.seed), str(share), str(BURST_MEAN_S)]
    with subprocess.Popen([sys.executable, str(BURNER), *words]) as neighbour:
        try:
            yield
        finally:
            neighbour.kill()


def run_one(wanted: Wanted, suite: str, *, results: Path, minutes: float) -> Told:
    """Run the suite in a process of its own, next to its load, and return what it said.

    Raises: RuntimeError where it left no record.
    """
    home, started = results / f"{wanted.number:02}-{wanted.load}", time.monotonic()
    words = ["-m", "harness", "reproduce", suite, "--results", str(home), "--time-budget", str(minutes)]
    with loaded(wanted):
        ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    found = sorted(home.glob("*/*/*/manifest.json"))
    if not found:
        raise RuntimeError(f"run {wanted.number} left no record: {ended.stderr[-500:]}")
    record = RunRecord.open(found[-1].parent)
    return told(wanted, record, judge(record), minutes=(time.monotonic() - started) / 60)


def told(wanted: Wanted, record: RunRecord, judgement: Judgement, *, minutes: float) -> Told:
    """Return what a judged record says."""
    return Told(
        wanted=wanted,
        speedups={one.arm: one.speedup for one in judgement.comparisons},
        tokens_per_step={one.arm: one.acceleration_rate.estimate for one in judgement.arms},
        withheld=judgement.withheld,
        valid_texts=judgement.valid_texts,
        num_blocks=len(record.tries),
        num_quiet=sum(one.is_quiet for one in record.tries),
        minutes=minutes,
        record=record.folder.name,
    )


def misses(run: Told, quiet: Told) -> list[str]:
    """Return what a run says that the quiet one contradicts; a run without speeds contradicts nothing."""
    found = [
        f"{arm}: {ratio_interval(speedup)} holds not the quiet {quiet.speedups[arm].estimate:.2f}"
        for arm, speedup in run.speedups.items()
        if not speedup.low <= quiet.speedups[arm].estimate <= speedup.high
    ]
    if not run.valid_texts:
        found.append("its texts are invalid")
    if run.tokens_per_step != quiet.tokens_per_step:
        found.append("its tokens/step are others")
    return found


def is_fit(first: Told, last: Told) -> bool:
    """Return whether the two quiet runs agree, so that others can be held against the first."""
    return (
        bool(first.speedups) and bool(last.speedups) and not misses(last, first) and not misses(first, last)
    )


def rendered(runs: Sequence[Told]) -> str:
    """Return the trial as a table, and what was missed."""
    arms = sorted({arm for run in runs for arm in run.speedups})
    quiet, rows = runs[0], []
    for run in runs:
        load = run.wanted.load + (f", seed {run.wanted.seed}" if run.wanted.load == "bursts" else "")
        speeds = [ratio_interval(run.speedups[arm]) if arm in run.speedups else ABSENT for arm in arms]
        found = "; ".join(misses(run, quiet)) or ("withheld" if run.withheld else "holds")
        rows.append([load, f"{run.num_quiet} of {run.num_blocks}", *speeds, f"{run.minutes:.1f}", found])
    headers = ["load", "quiet blocks", *(f"`{arm}`" for arm in arms), "minutes", "against the first run"]
    fit = "agree" if is_fit(runs[0], runs[-1]) else "**disagree: the machine is unfit for this trial**"
    num_missed = sum(bool(misses(run, quiet)) for run in runs[1:])
    num_withheld = sum(run.withheld is not None for run in runs)
    return (
        f"{table(headers, rows)}\n\nThe first and the last run, both quiet, {fit}. Of {len(runs) - 1} runs "
        f"after the first {num_missed} said what it contradicts, and {num_withheld} withheld their speeds.\n"
    )


def saved(file: Path, runs: Sequence[Told]) -> None:
    """Write the runs so far."""
    file.write_text("".join(f"{json.dumps(run.model_dump(mode='json'))}\n" for run in runs), encoding="utf-8")


def taken_up(file: Path) -> list[Told]:
    """Return the runs that a file holds; none where there is no such file."""
    if not file.is_file():
        return []
    return [Told.model_validate_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
