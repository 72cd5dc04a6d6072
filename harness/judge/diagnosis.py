"""Why an arm is as fast as it is, in one line."""

from __future__ import annotations

from harness.judge.judgement import Comparison

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
