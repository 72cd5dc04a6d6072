"""A step's profile as tables and as one JSON object: pure functions of its record."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from harness.records.step_profile import OWN_CODE_BOUND, SizeFactors, SizeProfile, StepProfile
from harness.report.formatting import ABSENT, count, milliseconds, percent, ratio, table
from harness.report.provenance import describe_commit, describe_device

_PARTS_NOTE = """\
Median (mean) milliseconds of a step's parts. *mask*: positions and attention mask. *acceptance* ends with the tokens on the host.
*cache*: compaction to the kept path. *host*: what no part covers. On a GPU each mark waits for the device, so these steps are a little
longer than the unmarked ones."""
_SHARES_NOTE = "Shares of the summed step time. *own code* is all but the calls of backbone and heads."
_FACTORS_NOTE = """\
*step cost*: the backbone's call against one node's. *overhead*: mean latency of unmarked steps against vanilla's, heads and bookkeeping
included; a tree that yields as many tokens a step has a speedup of 1. *tokens/step predicted*: a replay of the suite's calibration
trace, on which the trees were grown, so a little flattering. *speedup predicted* is their quotient, composed and not measured."""


def render_step_profile(profile: StepProfile) -> str:
    """Return the profile as Markdown: parts in time, parts in share, and what each size costs and must yield."""
    environment = profile.environment
    head = (
        f"{environment.model_name}, {environment.dtype}, {environment.engine} mode, on {describe_device(environment)}; commit "
        f"{describe_commit(environment)}. Greedy steps behind {count(len(profile.context_tokens), 'text')} of "
        f"{min(profile.context_tokens)} to {max(profile.context_tokens)} tokens, sizes in turn, "
        f"{min(len(size.step_s) for size in profile.sizes)} or more marked steps a size. One node is vanilla decoding."
    )
    parts = list(profile.sizes[0].seconds)
    times = [(size.num_nodes, _time(size.unmarked_step_s), *map(_time, size.seconds.values())) for size in profile.sizes]
    shares = [(size.num_nodes, *_shares(size), percent(size.own_code_share)) for size in profile.sizes]
    return "\n\n".join(
        [
            head,
            table(["nodes", "unmarked step", *parts], times),
            _PARTS_NOTE,
            table(["nodes", *parts, "own code"], shares),
            f"{_SHARES_NOTE} {_bound_line(profile)}",
            _factors_table(profile),
            _FACTORS_NOTE,
        ]
    )


def profile_headline(profile: StepProfile) -> dict[str, Any]:
    """Return the one JSON object that ends the command's output.

    Units: milliseconds; parts are medians.
    """
    return {
        "suite": profile.suite,
        "device": profile.environment.device.name,
        "mode": profile.environment.engine,
        "dtype": profile.environment.dtype,
        "sizes": [_figures(size, factors) for size, factors in zip(profile.sizes, profile.factors, strict=True)],
    }


def _factors_table(profile: StepProfile) -> str:
    has_idle = any(size.idle_share is not None for size in profile.sizes)
    headers = ["nodes", "depth", "step cost", "overhead = tokens/step needed", "tokens/step predicted", "speedup predicted"]
    rows = [
        [
            factors.num_nodes,
            factors.depth,
            ratio(factors.step_cost),
            ratio(factors.overhead),
            ratio(factors.predicted_tokens_per_step),
            ratio(factors.predicted_speedup),
            *([percent(factors.idle_share)] if has_idle else []),
        ]
        for factors in profile.factors
    ]
    return table([*headers, "device idle"] if has_idle else headers, rows)


def _bound_line(profile: StepProfile) -> str:
    beyond = [str(size.num_nodes) for size in profile.sizes if size.own_code_share > OWN_CODE_BOUND]
    found = f"found more at {', '.join(beyond)} nodes" if beyond else "met at every size"
    return f"Own code may take {percent(OWN_CODE_BOUND)} of a step: {found}."


def _time(seconds: tuple[float, ...]) -> str:
    return f"{milliseconds(median(seconds))} ({milliseconds(fmean(seconds))})" if any(seconds) else ABSENT


def _shares(size: SizeProfile) -> list[str]:
    total = sum(size.step_s)
    return [percent(sum(seconds) / total) if any(seconds) else ABSENT for seconds in size.seconds.values()]


def _figures(size: SizeProfile, factors: SizeFactors) -> dict[str, Any]:
    return {
        "num_nodes": factors.num_nodes,
        "depth": factors.depth,
        "num_steps": len(size.step_s),
        "mean_step_ms": 1e3 * size.mean_step_s,
        **{f"{part}_ms": 1e3 * median(seconds) for part, seconds in size.seconds.items()},
        "own_code_share": factors.own_code_share,
        "idle_share": factors.idle_share,
        "step_cost": factors.step_cost,
        "overhead": factors.overhead,
        "predicted_tokens_per_step": factors.predicted_tokens_per_step,
        "predicted_speedup": factors.predicted_speedup,
    }
