"""The metrics of a run's arms and the comparisons with their baselines; ratios are formed from totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from statistics import median

import numpy as np

from harness.compose.replay import replay
from harness.judge.judgement import ArmMetrics, CategoryMetrics, Comparison
from harness.judge.step_costs import SeparateCosts, bandwidth_share, num_nodes, separate_costs
from harness.judge.totals import (
    PromptTotals,
    column,
    has_steps,
    paired_totals,
    prompt_totals,
    ratio_of_sums,
    timed_generations,
)
from harness.records.run import RunRecord
from harness.specs.suite import ArmSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_ratio_of_ratios

# Less than 0.3 drafted tokens kept a step is less than a first head that is right in 30 % gives alone.
LOW_ACCEPTANCE_TOKENS_PER_STEP = 1.3
# From here on the verification alone takes a third of the speed that its tokens give.
COSTLY_STEP_COST = 1.5
# Overhead over step cost: what heads, candidates, acceptance and compaction add to the backbone.
COSTLY_OWN_OVERHEAD = 1.25
# Below this share of the measured bandwidth vanilla wastes more than half of its time, and flatters speedups.
SLOW_BASELINE_BANDWIDTH_SHARE = 0.4


def comparisons(record: RunRecord) -> tuple[Comparison, ...]:
    """Return every arm against its baseline, paired by prompt; none where the suite reports no speed.

    An arm without a prompt that both it and its baseline decoded with valid timing is left out.
    """
    if not record.reports_speed:
        return ()
    made = (
        compare(record, arm.name, baseline=arm.baseline)
        for arm in record.suite.arms
        if arm.baseline is not None
    )
    return tuple(comparison for comparison in made if comparison is not None)


def compare(record: RunRecord, arm: str, *, baseline: str) -> Comparison | None:
    """Return an arm against a vanilla arm, its own baseline or another, on the prompts that both timed.

    None where there is no such prompt.
    """
    own, base = paired_totals(record, arm, baseline=baseline, timed=True)
    if not has_steps(own) or not has_steps(base):
        return None

    def over_baseline(numerator: str, denominator: str) -> Interval:
        return bootstrap_ratio_of_ratios(
            column(own, numerator),
            column(own, denominator),
            base_numerator=column(base, numerator),
            base_denominator=column(base, denominator),
            spec=record.suite.interval,
            rng=_rng(record),
        )

    speedup = over_baseline("decode_tokens", "decode_s")
    overhead = over_baseline("decode_s", "steps")
    median_overhead = _median_step(record, arm, own) / _median_step(record, baseline, base)
    rates = [column(totals, "decode_tokens").sum() / column(totals, "steps").sum() for totals in (own, base)]
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
        speedup_by_medians=speedup.estimate * overhead.estimate / median_overhead,
    )


def _median_step(record: RunRecord, arm: str, totals: Sequence[PromptTotals]) -> float:
    """Return the median step of an arm over the prompts of some totals, in seconds."""
    keys = {total.prompt_key for total in totals}
    generations = (one for one in timed_generations(record, arm) if one.trial.prompt_key in keys)
    return median(time for one in generations for time in one.step_times_s)


def original_baseline(record: RunRecord, arm: ArmSpec) -> ArmSpec | None:
    """Return the original backbone's vanilla arm of the arm's temperature.

    It is the second baseline of an arm on the tuned backbone.
    """
    found = (
        other for other in record.suite.arms if other.method == "vanilla" and other.backbone == "original"
    )
    return next((other for other in found if other.temperature == arm.sampling_temperature), None)


def arm_metrics(record: RunRecord) -> tuple[ArmMetrics, ...]:
    """Return the metrics of every arm of the suite, in its order.

    An arm that finished no generation, or took no step, has an acceleration rate of nan over (-inf, inf).
    """
    compared = {comparison.arm: comparison for comparison in comparisons(record)}
    shares = {arm.name: bandwidth_share(record, arm.name) for arm in record.suite.arms}
    return tuple(
        _arm_metrics(record, arm, comparison=compared.get(arm.name), shares=shares)
        for arm in record.suite.arms
    )


def replayed_tokens_per_step(record: RunRecord, arm: str) -> float | None:
    """Return the acceleration rate of the arm's tree replayed on the trace of its backbone.

    None unless the arm is a greedy Medusa arm.
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
    """Return one line that says why an arm is as fast as it is.

    The thresholds are the constants of this module. `comparison` is None for a baseline, or where no speed is
    reported; `drafts` says whether the arm drafts tokens at all.
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
    if step_cost is not None and step_cost > COSTLY_STEP_COST:
        causes.append("costly verification")
    if step_cost is not None and overhead / step_cost > COSTLY_OWN_OVERHEAD:
        causes.append("costly heads and bookkeeping")
    if baseline_share is not None and baseline_share < SLOW_BASELINE_BANDWIDTH_SHARE:
        causes.append("slow baseline")
    return causes


def _arm_metrics(
    record: RunRecord, arm: ArmSpec, *, comparison: Comparison | None, shares: Mapping[str, float | None]
) -> ArmMetrics:
    generations = [generation for generation in record.generations if generation.trial.arm == arm.name]
    totals = list(prompt_totals(record, arm.name, timed=False).values())
    timed_totals = list(prompt_totals(record, arm.name, timed=True).values()) if record.reports_speed else []
    timed = timed_generations(record, arm.name)
    step_times = [time for generation in timed for time in generation.step_times_s]
    rate = _rate(record, totals)
    separate = (
        separate_costs(record, arm.name)
        if record.reports_speed
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
        wall_tokens_per_s=ratio_of_sums(
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
        if category is None or not has_steps(chosen):
            continue
        speeds = [
            ratio_of_sums(
                (total.decode_tokens for total in side if total.category == category),
                (total.decode_s for total in side if total.category == category),
            )
            for side in (own, base)
        ]
        is_fast = record.reports_speed and all(speeds)
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


def _rate(record: RunRecord, totals: Sequence[PromptTotals]) -> Interval:
    if not has_steps(totals):
        return Interval(
            estimate=nan, low=-np.inf, high=np.inf, level=record.suite.interval.level, num_prompts=len(totals)
        )
    return bootstrap_ratio(
        column(totals, "decode_tokens"),
        column(totals, "steps"),
        spec=record.suite.interval,
        rng=_rng(record),
    )


def _tokens_per_s(record: RunRecord, totals: Sequence[PromptTotals]) -> Interval | None:
    if not has_steps(totals):
        return None
    return bootstrap_ratio(
        column(totals, "decode_tokens"),
        column(totals, "decode_s"),
        spec=record.suite.interval,
        rng=_rng(record),
    )


def _rng(record: RunRecord) -> np.random.Generator:
    """Return a fresh generator of the suite's seed: no interval depends on those formed before it."""
    return np.random.default_rng(record.suite.interval.seed)
