"""How a part ended, and what there is to say of it in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from harness.errors import ExitCode, UserError
from harness.measure.gpu.process import Ended
from harness.records.folder import ASKED_FILE, MANIFEST_FILE
from harness.records.gpu.parts import Outcome
from harness.records.gpu.record import GpuRecord
from harness.records.latency import OUT_OF_TIME, LatencyPoint, LatencyRecord
from harness.records.profiles.kernels import Race
from harness.specs.gpu import KernelsPart, Part, TestsPart

_MOST_NODES = 64  # of the tree whose overhead is told, as the paper's trees


def newest_record(home: Path, *, since: float) -> Path | None:
    """Return the record that a part has written to, below the folder of its name; None where there is none.

    Units: seconds since the epoch, as files have them.
    """
    times: dict[Path, float] = {}
    for folder in home.glob("*/*"):
        if folder.is_dir() and not folder.name.startswith("."):
            times[folder] = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
    written = [folder for folder, at in times.items() if at >= since - 1]  # file systems round
    return max(written, key=lambda folder: times[folder], default=None)


def outcome_of(one: Part, ended: Ended, *, folder: Path, record: Path | None) -> Outcome:
    """Return how a part ended.

    `folder` is the acceptance's own record, `record` the part's own one, None where it makes none.
    """
    if ended.overran:
        return "stopped"
    if ended.code == ExitCode.INVALID_MEASUREMENT and not isinstance(one, TestsPart):
        return "invalid"
    if ended.code != ExitCode.OK:
        return "failed"
    if isinstance(one, TestsPart):
        counts = GpuRecord(folder).tests
        return "ok" if counts is not None and counts.num_passed > 0 else "failed"
    if isinstance(one, KernelsPart):
        kernels = GpuRecord(folder).kernels
        return "short" if kernels is not None and kernels.num_left_out else "ok"
    return "short" if record is not None and _is_short(record) else "ok"


def _is_short(record: Path) -> bool:
    """Return whether a record ended by its time budget."""
    if (record / ASKED_FILE).exists():
        return True
    return (record / "points.jsonl").exists() and _num_left_out(record) > 0


def _num_left_out(record: Path) -> int:
    return sum(point.skipped == OUT_OF_TIME for point in LatencyRecord(record).points)


def told_of(one: Part, ended: Ended, *, folder: Path, record: Path | None) -> str:
    """Return what there is to say of a part, in one line."""
    said: list[str] = []
    if ended.overran:
        said.append(
            "stopped at its limit" + (", and killed since it did not end" if ended.was_killed else "")
        )
    elif ended.code != ExitCode.OK:
        said.append(ended.complaint or f"ended with exit code {ended.code}")
    tell: Mapping[str, Callable[[], str]] = {
        "tests": lambda: _told_tests(folder),
        "limits": lambda: _told_limits(folder),
        "latency": lambda: _told_latency(record),
        "suite": lambda: _told_suite(ended),
        "rates": lambda: _told_rates(folder),
        "kernels": lambda: _told_kernels(folder),
    }
    try:
        said.append(tell[one.part]())
    except UserError as error:  # half a file that a kill left
        said.append(str(error))
    if record is not None and not (record / MANIFEST_FILE).exists():
        said.append("its record is unfinished, and its own command resumes it")
    return "; ".join(filter(None, said))


def _told_tests(folder: Path) -> str:
    counts = GpuRecord(folder).tests
    if counts is None:
        return "no counts"
    failed = f" ({', '.join(counts.failed[:3])})" if counts.failed else ""
    return f"{counts.num_passed} passed, {counts.num_failed} failed{failed}, {counts.num_skipped} skipped"


def _told_limits(folder: Path) -> str:
    found = GpuRecord(folder).limits
    return ", ".join(
        f"{dtype} reads {one.read_bandwidth_bytes_per_s / 1e9:,.0f} GB/s and multiplies "
        f"{one.matmul_flop_per_s / 1e12:,.2f} TFLOP/s"
        for dtype, one in found.items()
    )


def _told_latency(record: Path | None) -> str:
    if record is None:
        return ""
    points = LatencyRecord(record).points
    num_timed, late = sum(point.skipped is None for point in points), _num_left_out(record)
    others = len(points) - num_timed - late
    counted = f"{num_timed} sizes timed, {late} left out for want of time, {others} skipped for other reasons"
    return "; ".join(filter(None, [counted, told_steps(points)]))


def told_steps(points: Sequence[LatencyPoint]) -> str:
    """Return what a vanilla step takes at the smallest batch and the longest context, and the overhead there.

    The overhead is a whole step's, heads included, at the most nodes up to 64; medians over medians.
    """
    timed = [point for point in points if point.step_s]
    one = min(
        (point for point in timed if point.num_nodes == 1),
        key=lambda point: (point.batch, -point.context_tokens),
        default=None,
    )
    if one is None:
        return ""
    step_s = median(one.step_s)
    told = f"{one.mode}, batch {one.batch}, context {one.context_tokens}: a step takes {1000 * step_s:.3g} ms"
    trees = [point for point in timed if point.group == one.group and 1 < point.num_nodes <= _MOST_NODES]
    if not trees:
        return told
    most = max(trees, key=lambda point: (point.num_nodes, point.num_heads))
    return f"{told}, {median(most.step_s) / step_s:.2f} times that at {most.num_nodes} nodes"


def _told_suite(ended: Ended) -> str:
    """Return what the suite's last line says of validity and speed."""
    try:
        last = json.loads(ended.last_line)
        failed = ", ".join(last["failed_checks"])
        if failed:
            return f"checks that failed: {failed}"
        arm = last["headline_arm"] or {}
        speedup = arm.get("speedup", {}).get("estimate")
        return "valid" if speedup is None else f"valid; {arm['arm']} has a speedup of {speedup:.2f}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _told_rates(folder: Path) -> str:
    record, said = GpuRecord(folder), []
    if record.corpus is not None:
        said.append(f"corpus {record.corpus.tokens_per_s:,.0f} tokens/s")
    for stage in record.training.stages if record.training is not None else ():
        said.append(f"training, {stage.name}, {stage.num_positions / stage.median_step_s:,.0f} positions/s")
    return ", ".join(said)


def _told_kernels(folder: Path) -> str:
    """Return how many races there were, and in how many another way than the engine's was the fastest."""
    kernels = GpuRecord(folder).kernels
    if kernels is None:
        return ""
    won = [race for race in kernels.races if _is_beaten(race)]
    told = f"{len(kernels.races)} races in {kernels.dtype}, the engine's way is not the fastest in {len(won)}"
    return f"{told}, {kernels.num_left_out} left out for want of time" if kernels.num_left_out else told


def _is_beaten(race: Race) -> bool:
    times = [median(one.call_s) if one.call_s else math.inf for one in race.contenders]
    return min(times) < times[0]
