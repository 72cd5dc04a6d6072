"""From a record to the metrics of its arms and the comparisons with their baselines: counts first, ratios
formed once from totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan
from statistics import fmean, median

import numpy as np

from harness.compose.replay import replay
from harness.judge.judgement import ArmMetrics, CategoryMetrics, Comparison
from harness.records.run import Generation, RunRecord, StepCost
from harness.specs.suite import ArmSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_ratio_of_ratios

LOW_ACCEPTANCE_TOKENS_PER_STEP = (
    1.3  # under 0.3 drafted tokens kept a step: less than a first head of 30 % gives alone
)
DEAR_STEP_COST = 1.5  # the verification alone takes a third of the tokens it yields at 1.5 a step
DEAR_OWN_OVERHEAD = (
    1.25  # overhead over step cost: what heads, candidates, acceptance and compaction add to the backbone
)
SLOW_BASELINE_BANDWIDTH_SHARE = (
    0.4  # vanilla reads its weights at less than this share of the measured bandwidth
)


@dataclass(frozen=True)
class PromptTotals:
    """One arm on one prompt, all rounds and seeds pooled.

    Units: `decode_tokens` are kept tokens less the first of each generation, on the decode clock;
    `kept_tokens` count it.
    """

    prompt_key: str
    category: str | None
    kept_tokens: int
    decode_tokens: int
    steps: int
    decode_s: float
    wall_s: float


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


def prompt_totals(record: RunRecord, arm: str, *, timed: bool) -> dict[str, PromptTotals]:
    """The totals of an arm by prompt key; with `timed` only generations whose timing is valid count."""
    grouped: dict[str, list[Generation]] = {}
    for generation in record.generations:
        if generation.trial.arm == arm and (generation.timing_valid or not timed):
            grouped.setdefault(generation.trial.prompt_key, []).append(generation)
    return {
        key: PromptTotals(
            prompt_key=key,
            category=generations[0].category,
            kept_tokens=sum(generation.num_tokens for generation in generations),
            decode_tokens=sum(generation.num_tokens - 1 for generation in generations),
            steps=sum(generation.num_steps for generation in generations),
            decode_s=sum(generation.decode_s for generation in generations),
            wall_s=sum(generation.wall_s for generation in generations),
        )
        for key, generations in sorted(grouped.items())
    }


def paired_totals(
    record: RunRecord, arm: str, *, baseline: str, timed: bool
) -> tuple[list[PromptTotals], list[PromptTotals]]:
    """The totals of two arms on the prompts that both have, in the same order."""
    own, base = (prompt_totals(record, name, timed=timed) for name in (arm, baseline))
    shared = [key for key in own if key in base]
    return [own[key] for key in shared], [base[key] for key in shared]


def comparisons(record: RunRecord) -> tuple[Comparison, ...]:
    """Every arm against its baseline, paired by prompt; none where the suite reports no speed.

    An arm without a prompt that both it and its baseline decoded with valid timing is left out.
    """
    if not record.suite.reports_speed:
        return ()
    made = (
        compare(record, arm.name, baseline=arm.baseline)
        for arm in record.suite.arms
        if arm.baseline is not None
    )
    return tuple(comparison for comparison in made if comparison is not None)


def compare(record: RunRecord, arm: str, *, baseline: str) -> Comparison | None:
    """Compare an arm with a vanilla arm, its own baseline or another, on the prompts that both have timed;
    None without any.
    """
    own, base = paired_totals(record, arm, baseline=baseline, timed=True)
    if not _has_steps(own) or not _has_steps(base):
        return None

    def over_baseline(numerator: str, denominator: str) -> Interval:
        return bootstrap_ratio_of_ratios(
            _column(own, numerator),
            _column(own, denominator),
            base_numerator=_column(base, numerator),
            base_denominator=_column(base, denominator),
            spec=record.suite.interval,
            rng=_rng(record),
        )

    speedup = over_baseline("decode_tokens", "decode_s")
    overhead = over_baseline("decode_s", "steps")
    rates = [
        _column(totals, "decode_tokens").sum() / _column(totals, "steps").sum() for totals in (own, base)
    ]
    return Comparison(
        arm=arm,
        baseline=baseline,
        speedup=speedup,
        wall_speedup=over_baseline("kept_tokens", "wall_s"),
        overhead=overhead,
        separate_overhead=separate_costs(record, arm).overhead
        if record.suite.arm(arm).baseline == baseline
        else None,
        identity_gap=float(
            abs(speedup.estimate - rates[0] / rates[1] / overhead.estimate) / speedup.estimate
        ),
    )


def original_baseline(record: RunRecord, arm: ArmSpec) -> ArmSpec | None:
    """Return the original backbone's vanilla arm of the arm's temperature: the second baseline of an arm on
    the tuned one.
    """
    found = (
        other for other in record.suite.arms if other.method == "vanilla" and other.backbone == "original"
    )
    return next((other for other in found if other.temperature == arm.sampling_temperature), None)


def arm_metrics(record: RunRecord) -> tuple[ArmMetrics, ...]:
    """The metrics of every arm of the suite, in its order.

    An arm that finished no generation, or took no step, has an acceleration rate of nan over (-inf, inf).
    """
    compared = {comparison.arm: comparison for comparison in comparisons(record)}
    shares = {arm.name: bandwidth_share(record, arm.name) for arm in record.suite.arms}
    return tuple(
        _arm_metrics(record, arm, comparison=compared.get(arm.name), shares=shares)
        for arm in record.suite.arms
    )


def separate_costs(record: RunRecord, arm: str) -> SeparateCosts:
    """Step cost (backbone alone) and overhead (whole step) of an arm from separately timed steps, over those
    of one node.

    An arm is timed at several contexts (one a block); each context's median stands for it, and the ratio is
    that of sums over the contexts that arm and baseline share. Vanilla's rows are those of one node; a Medusa
    arm without a row of its own takes the backbone time of its node count. Arms on another engine have
    neither figure.
    Units: ratios; seconds where the name ends in `_s`.
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
        step_cost=_ratio_of_sums(*zip(*backbone, strict=True)),
        overhead=_ratio_of_sums(*zip(*steps, strict=True)) if timed_itself else None,
        backbone_s=fmean(own_s for own_s, _ in backbone),
        step_s=fmean(own_s for own_s, _ in steps) if timed_itself else None,
        num_contexts=len(shared),
    )


def num_nodes(record: RunRecord, arm: str) -> int:
    """Tokens that one step of the arm scores, root counted; 1 for every arm without a tree."""
    return len(record.trees[arm].paths) if record.suite.arm(arm).method == "medusa" else 1


def bandwidth_share(record: RunRecord, arm: str) -> float | None:
    """The share of a median step in which the weights could just have been read at the measured bandwidth;
    near 1 is memory-bound.

    Paper: Appendix G. None where no speed is reported, no step was timed, or the bandwidth was not measured.
    """
    times = [time for generation in _timed(record, arm) for time in generation.step_times_s]
    if record.device_limits is None or not times or not median(times) > 0:
        return None
    spec, environment = record.suite.arm(arm), record.environment
    origin = environment.tuned if spec.backbone == "tuned" and environment.tuned is not None else environment
    read_bytes = origin.weight_bytes + (origin.heads_bytes if spec.method == "medusa" else 0)
    return read_bytes / record.device_limits.read_bandwidth_bytes_per_s / median(times)


def replayed_tokens_per_step(record: RunRecord, arm: str) -> float | None:
    """The acceleration rate of the arm's tree replayed on the trace of its backbone; None unless the arm is a
    greedy Medusa arm.
    """
    spec = record.suite.arm(arm)
    trace = record.trace_of(spec.backbone)
    if trace is None or spec.method != "medusa" or spec.sampling_temperature > 0 or arm not in record.trees:
        return None
    if all(prompt.num_kept_tokens == 1 for prompt in trace.prompts):
        return None
    return replay(trace, record.trees[arm].tree(), num_heads=spec.num_heads).tokens_per_step


def diagnose(
    *,
    acceleration_rate: float,
    comparison: Comparison | None,
    drafts: bool,
    step_cost: float | None,
    bandwidth_share: float | None,
    baseline_bandwidth_share: float | None,
) -> str:
    """One line that says why an arm is as fast as it is; thresholds are the constants of this module.

    `comparison` is None for a baseline, or where no speed is reported; `drafts` says whether the arm drafts
    tokens at all.
    """
    if comparison is None:
        if bandwidth_share is None:
            return f"{acceleration_rate:.2f} tokens a step; no speed is reported"
        kind = "slow baseline" if bandwidth_share < SLOW_BASELINE_BANDWIDTH_SHARE else "memory-bound baseline"
        return f"{kind}: reads its weights at {bandwidth_share:.0%} of the measured bandwidth"
    overhead = comparison.overhead.estimate
    if not drafts:
        return f"another engine, no drafts: a step costs {overhead:.2f}x"
    balance = f"a step costs {overhead:.2f}x and yields {acceleration_rate:.2f} tokens"
    causes = _causes(
        acceleration_rate, overhead=overhead, step_cost=step_cost, baseline_share=baseline_bandwidth_share
    )
    because = f" ({', '.join(causes)})" if causes else ""
    if comparison.speedup.estimate < 1:
        return f"slower than vanilla: {balance}; needs > {overhead:.2f}{because}"
    return f"{causes[0] if causes else 'balanced'}: {balance}"


def _causes(
    acceleration_rate: float, *, overhead: float, step_cost: float | None, baseline_share: float | None
) -> list[str]:
    causes = []
    if acceleration_rate < LOW_ACCEPTANCE_TOKENS_PER_STEP:
        causes.append("low acceptance")
    if step_cost is not None and step_cost > DEAR_STEP_COST:
        causes.append("dear verification")
    if step_cost is not None and overhead / step_cost > DEAR_OWN_OVERHEAD:
        causes.append("dear heads and bookkeeping")
    if baseline_share is not None and baseline_share < SLOW_BASELINE_BANDWIDTH_SHARE:
        causes.append("slow baseline")
    return causes


def _arm_metrics(
    record: RunRecord, arm: ArmSpec, *, comparison: Comparison | None, shares: Mapping[str, float | None]
) -> ArmMetrics:
    generations = [generation for generation in record.generations if generation.trial.arm == arm.name]
    totals = list(prompt_totals(record, arm.name, timed=False).values())
    timed_totals = (
        list(prompt_totals(record, arm.name, timed=True).values()) if record.suite.reports_speed else []
    )
    timed = _timed(record, arm.name)
    step_times = [time for generation in timed for time in generation.step_times_s]
    rate = _rate(record, totals)
    separate = (
        separate_costs(record, arm.name)
        if record.suite.reports_speed
        else SeparateCosts(step_cost=None, overhead=None)
    )
    return ArmMetrics(
        arm=arm.name,
        method=arm.method,
        num_generations=len(generations),
        num_failures=sum(failure.trial.arm == arm.name for failure in record.failures),
        num_prompts=len(totals),
        num_nodes=num_nodes(record, arm.name),
        tokens=sum(total.kept_tokens for total in totals),
        steps=sum(total.steps for total in totals),
        acceleration_rate=rate,
        tokens_per_s=_tokens_per_s(record, timed_totals),
        wall_tokens_per_s=_ratio_of_sums(
            (total.kept_tokens for total in timed_totals), (total.wall_s for total in timed_totals)
        ),
        first_token_s=median(generation.prefill_s for generation in timed) if timed else None,
        step_p50_s=float(np.quantile(step_times, 0.50)) if step_times else None,
        step_p95_s=float(np.quantile(step_times, 0.95)) if step_times else None,
        step_cost=separate.step_cost,
        bandwidth_share=shares[arm.name],
        peak_memory_bytes=max(
            (size for generation in generations if (size := generation.peak_memory_bytes) is not None),
            default=None,
        ),
        cache_bytes=max(
            (size for generation in generations if (size := generation.cache_bytes) is not None), default=None
        ),
        replayed_tokens_per_step=replayed_tokens_per_step(record, arm.name),
        calibrated_tokens_per_step=record.trees[arm.name].predicted_tokens_per_step
        if arm.name in record.trees
        else None,
        categories=_categories(record, arm),
        diagnosis=diagnose(
            acceleration_rate=rate.estimate,
            comparison=comparison,
            drafts=arm.method in ("medusa", "hf_prompt_lookup"),
            step_cost=separate.step_cost,
            bandwidth_share=shares[arm.name] if arm.baseline is None else None,
            baseline_bandwidth_share=shares[arm.baseline] if arm.baseline is not None else None,
        ),
    )


def _categories(record: RunRecord, arm: ArmSpec) -> tuple[CategoryMetrics, ...]:
    totals = prompt_totals(record, arm.name, timed=False).values()
    own, base = (
        paired_totals(record, arm.name, baseline=arm.baseline, timed=True)
        if arm.baseline is not None
        else ([], [])
    )
    rows = []
    for category in dict.fromkeys(total.category for total in totals):
        chosen = [total for total in totals if total.category == category]
        if category is None or not _has_steps(chosen):
            continue
        speeds = [
            _ratio_of_sums(
                (total.decode_tokens for total in side if total.category == category),
                (total.decode_s for total in side if total.category == category),
            )
            for side in (own, base)
        ]
        is_fast = record.suite.reports_speed and all(speeds)
        rows.append(
            CategoryMetrics(
                category=category,
                num_prompts=len(chosen),
                acceleration_rate=sum(total.decode_tokens for total in chosen)
                / sum(total.steps for total in chosen),
                speedup=speeds[0] / speeds[1] if is_fast and speeds[0] and speeds[1] else None,
            )
        )
    return tuple(rows)


def _rate(record: RunRecord, totals: list[PromptTotals]) -> Interval:
    if not _has_steps(totals):
        return Interval(
            estimate=nan, low=-np.inf, high=np.inf, level=record.suite.interval.level, num_prompts=len(totals)
        )
    return bootstrap_ratio(
        _column(totals, "decode_tokens"),
        _column(totals, "steps"),
        spec=record.suite.interval,
        rng=_rng(record),
    )


def _tokens_per_s(record: RunRecord, totals: list[PromptTotals]) -> Interval | None:
    if not _has_steps(totals):
        return None
    return bootstrap_ratio(
        _column(totals, "decode_tokens"),
        _column(totals, "decode_s"),
        spec=record.suite.interval,
        rng=_rng(record),
    )


def _rng(record: RunRecord) -> np.random.Generator:
    """A fresh generator of the suite's seed: no interval depends on which were formed before it."""
    return np.random.default_rng(record.suite.interval.seed)


def _timed(record: RunRecord, arm: str) -> list[Generation]:
    if not record.suite.reports_speed:
        return []
    return [
        generation
        for generation in record.generations
        if generation.trial.arm == arm and generation.timing_valid
    ]


def _cost_rows(rows: Iterable[StepCost], *, arm: str, num_nodes: int) -> dict[int, StepCost]:
    """Rows by context: the arm's own; else those of as many nodes, rather ones that timed the whole step."""
    timed_rows = [row for row in rows if row.backbone_s]
    own = [row for row in timed_rows if row.arm == arm]
    same_size = sorted(
        (row for row in timed_rows if row.num_nodes == num_nodes), key=lambda row: bool(row.step_s)
    )
    return {row.context_tokens: row for row in own or same_size}


def _ratio_of_sums(numerator: Iterable[float], denominator: Iterable[float]) -> float | None:
    total = sum(denominator)
    return sum(numerator) / total if total > 0 else None


def _has_steps(totals: list[PromptTotals]) -> bool:
    return sum(total.steps for total in totals) > 0


def _column(totals: list[PromptTotals], name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([getattr(total, name) for total in totals], dtype=np.float64)
