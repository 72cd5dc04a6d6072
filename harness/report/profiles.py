"""Where the time of training steps and of decoding steps goes, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from harness.errors import UserError
from harness.records.profiles.step import OWN_CODE_BOUND, SizeFactors, SizeProfile, StepProfile
from harness.records.profiles.training import (
    HEADS_BOUND,
    PartProfile,
    StageProfile,
    TrainingProfile,
    read_training_profile,
)
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    milliseconds,
    paragraphs,
    percent,
    ratio,
    significant,
    table,
)
from harness.report.provenance import describe_commit, describe_device

_HEADERS = (
    "recipe",
    "stage",
    "positions/s",
    "ms a step",
    "of matrix throughput",
    "the step's parts",
    "commit",
)
_NOTE = f"""\
*of matrix throughput*: the operations of all matrix products, counted as they run, over what the device does
in the same time on one large product, measured in the same run. Heads alone on cached states should reach
{HEADS_BOUND:.0%} over the whole recipe. *the step's parts*: the share of the step's time, and in brackets the
share of the matrix throughput that the part reaches while it runs.""".replace("%", " %")

_PARTS_NOTE = """\
Median (mean) milliseconds of a step's parts. *mask*: positions and attention mask. *acceptance* ends with the
tokens on the host. *cache*: compaction to the kept path. *host*: what no part covers. On a GPU each mark
waits for the device, so these steps are a little longer than the unmarked ones."""
_SHARES_NOTE = "Shares of the summed step time. *own code* is all but the calls of backbone and heads."
_FACTORS_NOTE = """\
*step cost*: the backbone's call against one node's. *overhead*: mean latency of unmarked steps against
vanilla's, heads and bookkeeping included; a tree that yields as many tokens a step has a speedup of 1.
*tokens/step predicted*: a replay of the suite's calibration trace, on which the trees were grown, so a little
flattering. *speedup predicted* is their quotient, composed and not measured."""


def committed_profiles(results: Path) -> tuple[Path, ...]:
    """Return the training profiles of a results folder.

    Raises: UserError where there is none.
    """
    found = tuple(sorted((results / "profile").glob("training-*.json")))
    if not found:
        raise UserError(
            found="no training profile",
            need="one under results/profile",
            do="run medusa-repro profile-training",
        )
    return found


def render_readme_training(paths: Sequence[Path], *, base: Path) -> str:
    """Return the table of some profiles, each linked from the README's folder `base`."""
    profiles = [read_training_profile(path) for path in paths]
    rows = [
        row
        for path, profile in zip(paths, profiles, strict=True)
        for row in _rows(profile, link=_link(path, base=base))
    ]
    devices = dict.fromkeys(cell(describe_device(profile.environment)) for profile in profiles)
    where = [f" on {profile.environment.device.name}" if len(devices) > 1 else "" for profile in profiles]
    whole = [
        f"`{one.recipe}` {percent(one.share)}{place}" for one, place in zip(profiles, where, strict=True)
    ]
    return paragraphs(
        f"On {'; '.join(devices)}. Over the whole recipe: {', '.join(whole)}.", table(_HEADERS, rows), _NOTE
    )


def _rows(profile: TrainingProfile, *, link: str) -> list[tuple[object, ...]]:
    return [
        (
            link.format(profile.recipe),
            f"{stage.name}, {percent(stage.step_rate)} of the steps",
            significant(stage.num_positions / stage.median_step_s),
            milliseconds(stage.median_step_s),
            percent(profile.stage_share(stage)),
            ", ".join(_part(profile, stage, part) for part in stage.parts if any(part.seconds)),
            describe_commit(profile.environment),
        )
        for stage in profile.stages
    ]


def _part(profile: TrainingProfile, stage: StageProfile, part: PartProfile) -> str:
    reached = percent(profile.part_share(part)) if part.flops else ABSENT
    return f"{part.name} {percent(median(part.seconds) / stage.median_step_s)} ({reached})"


def _link(path: Path, *, base: Path) -> str:
    resolved = path.resolve()
    return (
        f"[`{{}}`]({resolved.relative_to(base.resolve()).as_posix()})"
        if resolved.is_relative_to(base.resolve())
        else "`{}`"
    )


def training_headline(profile: TrainingProfile) -> dict[str, Any]:
    """Return the one JSON object that ends the command's output.

    Units: milliseconds (medians), GFLOP a step and GFLOP/s; shares of the matrix throughput.
    """
    return {
        "recipe": profile.recipe,
        "kind": profile.kind,
        "device": profile.environment.device.name,
        "share": profile.share,
        "bound": HEADS_BOUND if profile.kind == "heads" else None,
        "gflop_per_s": {limit.dtype: limit.flop_per_s / 1e9 for limit in profile.throughput},
        "stages": [
            {
                "name": stage.name,
                "share": profile.stage_share(stage),
                "num_steps": len(stage.step_s),
                "step_ms": 1e3 * stage.median_step_s,
                "positions_per_s": stage.num_positions / stage.median_step_s,
                "gflop": {dtype: count / 1e9 for dtype, count in sorted(stage.flops.items())},
                "parts": {
                    part.name: {"ms": 1e3 * median(part.seconds), "share": profile.part_share(part)}
                    for part in stage.parts
                    if any(part.seconds)
                },
            }
            for stage in profile.stages
        ],
    }


def print_training_profile(console: Console, profile: TrainingProfile) -> None:
    """Print one table a stage: where its time goes, what is counted in it, what each part loses."""
    for stage in profile.stages:
        rate = significant(stage.num_positions / stage.median_step_s)
        title = (
            f"{stage.name}: {milliseconds(stage.median_step_s)} ms a step, {rate} positions/s, "
            f"{percent(stage.step_rate)} of the steps"
        )
        shown = Table(
            Column("part", no_wrap=True),
            "ms",
            "of the step",
            "GFLOP",
            "of matrix throughput",
            "lost of the step",
            title=title,
        )
        for part in (part for part in stage.parts if any(part.seconds)):
            lost_s = median(part.seconds) - profile.least_s(part.flops)
            shown.add_row(
                part.name,
                milliseconds(median(part.seconds)),
                percent(median(part.seconds) / stage.median_step_s),
                _gflop(part.flops),
                percent(profile.part_share(part)) if part.flops else ABSENT,
                percent(lost_s / stage.median_step_s),
            )
        share = profile.stage_share(stage)
        shown.add_section()
        shown.add_row(
            "step",
            milliseconds(stage.median_step_s),
            percent(1),
            _gflop(stage.flops),
            percent(share),
            percent(1 - share),
        )
        console.print(shown)
    for limit in profile.throughput:
        found = (
            f"{limit.before_flop_per_s / 1e9:,.0f} before the steps, "
            f"{limit.after_flop_per_s / 1e9:,.0f} after"
        )
        console.print(
            f"matrix throughput, {limit.dtype}: {found}, GFLOP/s; the better counts",
            highlight=False,
            soft_wrap=True,
        )
    bound = f"; at least {percent(HEADS_BOUND)} are needed" if profile.kind == "heads" else ""
    console.print(
        f"over the recipe: {percent(profile.share)} of the matrix throughput{bound}",
        highlight=False,
        soft_wrap=True,
    )


def _gflop(flops: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{significant(count / 1e9)} {dtype}" for dtype, count in sorted(flops.items())) or ABSENT
    )


def render_step_profile(profile: StepProfile) -> str:
    """Return the profile as Markdown: parts in time and in share, and what each size must yield."""
    environment = profile.environment
    head = (
        f"{environment.model_name}, {environment.dtype}, {environment.engine} mode, on "
        f"{describe_device(environment)}; commit {describe_commit(environment)}. Greedy steps after "
        f"{count(len(profile.context_tokens), 'text')} of {min(profile.context_tokens)} to "
        f"{max(profile.context_tokens)} tokens, sizes in turn, "
        f"{min(len(size.step_s) for size in profile.sizes)} or more marked steps a size. One node is "
        "vanilla decoding."
    )
    parts = list(profile.sizes[0].seconds)
    times = [
        (size.num_nodes, _time(size.unmarked_step_s), *map(_time, size.seconds.values()))
        for size in profile.sizes
    ]
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
        "sizes": [
            _figures(size, factors) for size, factors in zip(profile.sizes, profile.factors, strict=True)
        ],
    }


def _factors_table(profile: StepProfile) -> str:
    has_idle = any(size.idle_share is not None for size in profile.sizes)
    headers = [
        "nodes",
        "depth",
        "step cost",
        "overhead = tokens/step needed",
        "tokens/step predicted",
        "speedup predicted",
    ]
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
    more = [str(size.num_nodes) for size in profile.sizes if size.own_code_share > OWN_CODE_BOUND]
    found = f"takes more at {', '.join(more)} nodes" if more else "does so at every size"
    return f"Own code should take at most {percent(OWN_CODE_BOUND)} of a step; it {found}."


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
