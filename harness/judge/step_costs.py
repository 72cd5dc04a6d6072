"""What a step costs an arm, and how fast the arm reads its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import fmean, median
from typing import Literal

import numpy as np

from harness.judge.totals import ratio_of_sums, timed_generations
from harness.records.probes import StepCost
from harness.records.run import RunRecord


@dataclass(frozen=True)
class SeparateCosts:
    """Separately timed steps of an arm over those of one node; None where they were not timed.

    `backbone_s` and `step_s` are means of the contexts' medians; `num_contexts` counts the contexts at which
    arm and baseline both stood.
    """

    step_cost: float | None
    overhead: float | None
    backbone_s: float | None = None
    step_s: float | None = None
    num_contexts: int = 0


def separate_costs(record: RunRecord, arm: str) -> SeparateCosts:
    """Return an arm's step cost (backbone alone) and overhead (whole step), timed apart from decoding.

    An arm is timed at several contexts (one a block); each context's median stands for it, and the ratio is
    that of sums over the contexts that arm and baseline share. Vanilla's rows are those of one node; a Medusa
    arm without a row of its own takes the backbone time of its node count. Arms on another engine have
    neither figure.
    Units: ratios over the steps of one node; seconds where the name ends in `_s`.
    """
    rows = (
        record.step_costs.costs
        if record.step_costs is not None and record.suite.arm(arm).method in ("vanilla", "medusa")
        else ()
    )
    others = {other.name for other in record.suite.arms if other.backbone != record.suite.arm(arm).backbone}
    rows = tuple(row for row in rows if row.arm not in others)
    own = _cost_rows(rows, arm=arm, num_nodes=num_nodes(record, arm))
    base = _cost_rows(rows, arm=record.suite.arm(arm).baseline or arm, num_nodes=1)
    shared = sorted(own.keys() & base.keys())
    if not shared:
        return SeparateCosts(step_cost=None, overhead=None)
    backbone = [(median(own[context].backbone_s), median(base[context].backbone_s)) for context in shared]
    steps = [
        (median(own[key].step_s), median(base[key].step_s))
        for key in shared
        if own[key].step_s and base[key].step_s
    ]
    timed_itself = steps and all(own[context].arm == arm for context in shared)
    return SeparateCosts(
        step_cost=ratio_of_sums(*zip(*backbone, strict=True)),
        overhead=ratio_of_sums(*zip(*steps, strict=True)) if timed_itself else None,
        backbone_s=fmean(own_s for own_s, _ in backbone),
        step_s=fmean(own_s for own_s, _ in steps) if timed_itself else None,
        num_contexts=len(shared),
    )


def separate_s_by_prompt(
    record: RunRecord, arm: str, part: Literal["step_s", "backbone_s"] = "step_s"
) -> dict[str, float] | None:
    """Return an arm's separately timed step, or its backbone's part, by prompt: means of blocks' medians.

    Records from before prompts were noted have a row a block, in the order of the blocks. None where rows and
    blocks do not match.
    Units: seconds.
    """
    costs = record.step_costs.costs if record.step_costs is not None else ()
    rows = [row for row in costs if row.arm == arm and row.step_s]
    blocks = list(dict.fromkeys((one.trial.round, one.trial.prompt_key) for one in record.outcomes))
    keys = [row.prompt_key for row in rows if row.prompt_key is not None]
    if len(keys) < len(rows):
        if len(rows) != len(blocks):
            return None
        keys = [key for _, key in blocks]
    found: dict[str, list[float]] = {}
    for key, row in zip(keys, rows, strict=True):
        found.setdefault(key, []).append(median(getattr(row, part)))
    return {key: fmean(medians) for key, medians in found.items()} or None


def num_nodes(record: RunRecord, arm: str) -> int:
    """Return the tokens that one step of the arm scores, root counted; 1 for an arm without a tree."""
    return len(record.trees[arm].paths) if record.suite.arm(arm).method == "medusa" else 1


def bandwidth_share(record: RunRecord, arm: str) -> float | None:
    """Return the share of a median step in which the weights could just have been read.

    Near 1 is memory-bound. None where no speed is reported, no step was timed, or the bandwidth was not
    measured.
    Paper: Appendix G.
    """
    times = [time for generation in timed_generations(record, arm) for time in generation.step_times_s]
    if record.device_limits is None or not times or not median(times) > 0:
        return None
    spec, environment = record.suite.arm(arm), record.environment
    origin = environment.tuned if spec.backbone == "tuned" and environment.tuned is not None else environment
    read_bytes = origin.weight_bytes + (origin.heads_bytes if spec.method == "medusa" else 0)
    return read_bytes / record.device_limits.read_bandwidth_bytes_per_s / median(times)


@dataclass(frozen=True)
class Paired:
    """A figure that every prompt gives once: the median over prompts, and the standard error of it.

    The error is that of a normal spread as wide as the middle half of the prompts, so that single disturbed
    prompts change neither.
    """

    median: float
    error: float


def paired(values: Sequence[float]) -> Paired | None:
    """Return the median of the prompts' values; None for fewer than four, which show no spread."""
    if len(values) < 4:
        return None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Paired(float(middle), float(1.2533 * (high - low) / 1.349 / sqrt(len(values))))


def median_steps(record: RunRecord, arm: str) -> dict[str, float]:
    """Return an arm's median decoding step by prompt, in seconds; prompts without steps are left out."""
    times: dict[str, list[float]] = {}
    for one in timed_generations(record, arm):
        times.setdefault(one.trial.prompt_key, []).extend(one.step_times_s)
    return {key: median(steps) for key, steps in times.items() if steps and median(steps) > 0}


def steps_over(record: RunRecord, arm: str, *, of: str) -> Paired | None:
    """Return the logarithm of an arm's median decoding step over another arm's on the same prompt."""
    own, base = median_steps(record, arm), median_steps(record, of)
    return paired([log(own[key] / base[key]) for key in own if key in base])


def decoded_over_apart(record: RunRecord, arm: str) -> Paired | None:
    """Return the logarithm of an arm's median decoding step over its separately timed one, by prompt.

    Where separate steps are not known by prompt, their median stands for all. None where none were timed.
    """
    rows = _timed_apart(record, arm)
    if not rows:
        return None
    steps = median_steps(record, arm)
    of_all = median(median(row.step_s) for row in rows)
    apart = separate_s_by_prompt(record, arm) or dict.fromkeys(steps, of_all)
    return paired([log(steps[key] / apart[key]) for key in steps if key in apart])


def own_part_s(record: RunRecord, arm: str) -> float | None:
    """Return what an arm's separately timed step takes on top of its backbone, the median, in seconds.

    It is heads, candidates, acceptance and compaction.
    """
    rows = _timed_apart(record, arm)
    parts = [whole - part for row in rows for whole, part in zip(row.step_s, row.backbone_s, strict=False)]
    return median(parts) if parts else None


def priced(record: RunRecord, num_nodes: int, *, part: Literal["step", "own"]) -> float | None:
    """Return what `step_costs` says of a step of so many nodes, in seconds, between the sizes it timed.

    The part is the whole step, or what it takes besides the backbone; for one node, which drafts nothing, the
    whole step is the backbone's. None beyond the sizes that were timed.
    """
    costs = record.step_costs.costs if record.step_costs is not None else ()
    known: dict[int, float] = {}
    for row in costs:
        if row.arm is None and row.num_nodes == 1 and part == "step":
            known[1] = median(row.backbone_s)
        elif row.arm is None and row.step_s:
            own = [whole - alone for whole, alone in zip(row.step_s, row.backbone_s, strict=False)]
            known[row.num_nodes] = median(row.step_s if part == "step" else own)
    sizes = sorted(known)
    if not sizes or not sizes[0] <= num_nodes <= sizes[-1]:
        return None
    return float(np.interp(num_nodes, sizes, [known[size] for size in sizes]))


def processor_shares(record: RunRecord, arm: str) -> dict[str, float]:
    """Return the share of an arm's time for which the decoding thread had a processor, by prompt.

    Generations of older records, which do not tell, are left out.
    """
    found: dict[str, list[float]] = {}
    for one in timed_generations(record, arm):
        if one.processor_s is not None and one.wall_s > 0:
            found.setdefault(one.trial.prompt_key, []).append(one.processor_s / one.wall_s)
    return {key: fmean(shares) for key, shares in found.items()}


def _timed_apart(record: RunRecord, arm: str) -> list[StepCost]:
    """Return the rows of an arm's separately timed whole steps."""
    costs = record.step_costs.costs if record.step_costs is not None else ()
    return [row for row in costs if row.arm == arm and row.step_s]


def _cost_rows(rows: Iterable[StepCost], *, arm: str, num_nodes: int) -> dict[int, StepCost]:
    """Return timed rows by context: the arm's own, else those of as many nodes.

    Of these, rows that timed the whole step come last and so win.
    """
    timed_rows = [row for row in rows if row.backbone_s]
    own = [row for row in timed_rows if row.arm == arm]
    same_size = sorted(
        (row for row in timed_rows if row.num_nodes == num_nodes), key=lambda row: bool(row.step_s)
    )
    return {row.context_tokens: row for row in own or same_size}
