"""Figures that another record has too, as counts and seconds by prompt; ratios are formed from totals.

A figure is a statistic of column totals over prompts, so that it can be formed on any prompts, and over two
records on the prompts that both decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import numpy as np
from scipy import stats

from harness.judge.step_costs import paired, separate_s_by_prompt
from harness.judge.totals import PromptTotals, prompt_totals
from harness.records.latency import STOCK, LatencyPoint, LatencyRecord, ModeTrial
from harness.records.run import RunRecord
from harness.specs.suite import IntervalSpec
from harness.stats import Floats, Interval, Resamples

FigureName = Literal[
    "tokens/step",
    "speedup",
    "overhead",
    "step cost",
    "tokens/s",
    "wall tokens/s",
    "over generate",
    "vanilla steps, s",
    "tree steps, s",
]
COUNTS: tuple[FigureName, ...] = ("tokens/step",)
"""The figures that hold no time, and so bend under no neighbour and on no other machine."""


def _first(a: Floats) -> Floats:
    return a


def _ratio(a: Floats, b: Floats) -> Floats:
    return a / b


def _ratios(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    return a / b / (c / d)


@dataclass(frozen=True)
class Material:
    """What one figure of one arm (or dtype and mode) is formed from.

    `columns` holds its counts and seconds by prompt, `texts` what was decoded there, of the arm and of its
    baseline. Where `errors` holds the standard errors of the first column, the units are no sample but sizes
    that were all timed, each `num_repeats` times or more in a row: their spread says how well this run knows
    them, and nothing of another run.
    """

    subject: str
    name: FigureName
    statistic: Callable[..., Floats]
    columns: Mapping[str, tuple[float, ...]]
    texts: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, float] | None = None
    num_repeats: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Return what names the figure among those of its record."""
        return self.subject, self.name

    def totals(self, keys: Sequence[str]) -> Floats:
        """Return the columns on some prompts. Shapes: [P, C]."""
        return np.array([self.columns[key] for key in keys], dtype=np.float64)

    def on(self, keys: Sequence[str], *, spec: IntervalSpec) -> Interval | None:
        """Return the figure on some prompts with its interval; None where it has none there."""
        table = self.totals(keys)
        if not len(table) or not (table.sum(axis=0) > 0).all():
            return None
        estimate = float(self.statistic(*table.sum(axis=0)))
        if self.errors is not None:
            error = math.sqrt(sum(self.errors[key] ** 2 for key in keys))
            half = float(stats.norm.ppf((1 + spec.level) / 2)) * error
            bounds = (estimate - half, estimate + half) if half else (-math.inf, math.inf)
            return Interval(
                estimate=estimate,
                low=bounds[0],
                high=bounds[1],
                level=spec.level,
                num_prompts=self.num_repeats,
            )
        resamples = Resamples(len(keys), spec=spec)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = self.statistic(*resamples.totals(table).T)
        return resamples.interval(estimate, _known(draws, estimate))


def _known(draws: Floats, estimate: float) -> Floats:
    """Return draws without the cases 0 / 0, which prompts without a step give; the estimate stands there."""
    return np.where(np.isnan(draws), estimate, draws)


def change(a: Material, b: Material, keys: Sequence[str], *, spec: IntervalSpec) -> Interval | None:
    """Return B's figure over A's on the same prompts, both resampled together; None where one has none."""
    mine, theirs = a.totals(keys), b.totals(keys)
    if len(keys) < 2 or not (mine.sum(axis=0) > 0).all() or not (theirs.sum(axis=0) > 0).all():
        return None
    estimate = float(b.statistic(*theirs.sum(axis=0)) / a.statistic(*mine.sum(axis=0)))
    resamples = Resamples(len(keys), spec=spec)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = b.statistic(*resamples.totals(theirs).T) / a.statistic(*resamples.totals(mine).T)
    return resamples.interval(estimate, _known(draws, estimate))


def run_materials(record: RunRecord) -> dict[tuple[str, str], Material]:
    """Return the figures of a run's arms; times only where its suite reports speed."""
    texts: dict[tuple[str, str], list[Any]] = {}
    for one in record.generations:
        name = one.trial.arm, one.trial.prompt_key
        texts.setdefault(name, []).append((one.trial.seed, one.token_ids))
    return {made.key: made for arm in record.suite.arms for made in _of_arm(record, arm.name, texts=texts)}


def _of_arm(
    record: RunRecord, arm: str, *, texts: Mapping[tuple[str, str], Sequence[Any]]
) -> Iterator[Material]:
    def text_of(key: str, *arms: str) -> Any:
        return tuple(frozenset(texts.get((name, key), ())) for name in arms)  # of all rounds alike

    def material(
        name: FigureName, how: Callable[..., Floats], rows: Mapping[str, tuple[float, ...]]
    ) -> Material:
        arms = (arm,) if baseline is None else (arm, baseline)
        return Material(arm, name, how, rows, {key: text_of(key, *arms) for key in rows})

    baseline = record.suite.arm(arm).baseline
    counts = prompt_totals(record, arm, timed=False)
    yield material("tokens/step", _ratio, _columns(counts, "decode_tokens", "steps"))
    if not record.suite.reports_speed:
        return
    own = prompt_totals(record, arm, timed=True)
    yield material("tokens/s", _ratio, _columns(own, "decode_tokens", "decode_s"))
    yield material("wall tokens/s", _ratio, _columns(own, "kept_tokens", "wall_s"))
    if baseline is None:
        return
    base = prompt_totals(record, baseline, timed=True)
    yield material("speedup", _ratios, _joined(own, base, "decode_tokens", "decode_s"))
    yield material("overhead", _ratios, _joined(own, base, "decode_s", "steps"))
    costs = [separate_s_by_prompt(record, name, "backbone_s") for name in (arm, baseline)]
    if costs[0] is not None and costs[1] is not None:
        shared = [key for key in costs[0] if key in costs[1]]
        yield material("step cost", _ratio, {key: (costs[0][key], costs[1][key]) for key in shared})


def _columns(totals: Mapping[str, PromptTotals], *names: str) -> dict[str, tuple[float, ...]]:
    return {key: tuple(float(getattr(one, name)) for name in names) for key, one in totals.items()}


def _joined(
    own: Mapping[str, PromptTotals], base: Mapping[str, PromptTotals], *names: str
) -> dict[str, tuple[float, ...]]:
    """Return some counts of an arm and then of its baseline, on the prompts that both have."""
    mine, theirs = _columns(own, *names), _columns(base, *names)
    return {key: (*mine[key], *theirs[key]) for key in mine if key in theirs}


def latency_materials(record: LatencyRecord) -> dict[tuple[str, str], Material]:
    """Return the figures of a latency record: its table of modes, and its steps summed over the sizes."""
    made = [*_of_modes(record), *_of_points(record)]
    return {one.key: one for one in made}


def _of_modes(record: LatencyRecord) -> Iterator[Material]:
    trials: dict[tuple[str, str], dict[str, ModeTrial]] = {}
    for trial in record.modes.trials if record.modes is not None else ():
        trials.setdefault((trial.dtype, trial.mode), {})[trial.prompt_key] = trial
    for (dtype, mode), own in trials.items():
        texts = {key: one.token_ids for key, one in own.items()}
        rows = {key: _tokens_and_seconds(one) for key, one in own.items()}
        yield Material(f"{dtype} {mode}", "tokens/s", _ratio, rows, texts)
        stock = trials.get((dtype, STOCK), {})
        if mode != STOCK and stock:
            over = {key: (*rows[key], *_tokens_and_seconds(stock[key])) for key in rows if key in stock}
            yield Material(f"{dtype} {mode}", "over generate", _ratios, over, texts)


def _tokens_and_seconds(trial: ModeTrial) -> tuple[float, float]:
    return float(sum(trial.step_tokens)), math.fsum(trial.step_times_s)


def _of_points(record: LatencyRecord) -> Iterator[Material]:
    groups: dict[tuple[str, FigureName], dict[str, LatencyPoint]] = {}
    for point in record.points:
        if point.step_s and min(point.step_s) > 0:
            name: FigureName = "vanilla steps, s" if point.num_nodes == 1 else "tree steps, s"
            size = (point.num_nodes, point.num_heads, point.context_tokens, point.batch)
            groups.setdefault((f"{point.dtype} {point.mode}", name), {})[repr(size)] = point
    for (subject, name), points in groups.items():
        rows = {key: (median(point.step_s),) for key, point in points.items()}
        spread = {key: paired(point.step_s) for key, point in points.items()}
        errors = {key: 0.0 if one is None else one.error for key, one in spread.items()}
        repeats = min(len(point.step_s) for point in points.values())
        yield Material(subject, name, _first, rows, dict.fromkeys(rows), errors, repeats)
