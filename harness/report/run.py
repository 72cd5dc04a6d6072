"""A run's record and its judgement as one Markdown report, and as one JSON object for the last line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.judge.anatomy.oracle import oracles
from harness.judge.judgement import ArmMetrics, CheckStatus, Judgement
from harness.records.run import RunRecord
from harness.report.anatomy.acceptance import render_acceptance
from harness.report.anatomy.oracle import oracle_sentence, render_oracles
from harness.report.figures.run import ACCEPTANCE_FILE, SPEED_FILE, speed_title
from harness.report.formatting import cell, count, heading, megabytes, page, ratio_interval, section
from harness.report.limits import under_measured_note
from harness.report.noise import render_disturbance
from harness.report.provenance import describe_commit, describe_device, relative_folder, render_provenance
from harness.report.run_evidence import (
    render_checks,
    render_failures,
    render_heads,
    render_likelihoods,
    render_parity,
    render_predictions,
    render_profile,
    render_step_costs,
)
from harness.report.tables.run import (
    CONSISTENCY_NOTE,
    VERDICT_NOTE,
    arms_note,
    comparisons_by_arm,
    count_verdicts,
    estimates_note,
    headline_arm,
    render_arms_table,
    render_category_tables,
    render_consistency_table,
    render_latency_table,
    render_not_tested_table,
    render_verdict_table,
    verdicts_in_words,
)
from harness.stats import Interval


def render_report(record: RunRecord, judgement: Judgement, *, figures: Sequence[str] = ()) -> str:
    """Return the whole report of a run; `figures` are those of `figures.run` that were drawn next to it."""
    not_tested, own = render_not_tested_table(judgement), render_consistency_table(judgement)
    return page(
        render_heading(record),
        render_summary(record, judgement),
        _picture(SPEED_FILE, speed_title(record, judgement), among=figures),
        section("Verdicts", _invalid_note(judgement), render_verdict_table(judgement), VERDICT_NOTE),
        section("Is the paper consistent?", own, CONSISTENCY_NOTE) if own else "",
        section(
            "Not tested",
            not_tested and "Claims that this suite cannot decide, and what each would take.",
            not_tested,
        ),
        section("Arms", _invalid_note(judgement), *_arms(record, judgement)),
        section(
            "Acceptance",
            _picture(ACCEPTANCE_FILE, "How acceptance falls with depth", among=figures),
            render_acceptance(record),
        ),
        section("How far from the best", render_oracles(record, judgement)),
        section("Per category of prompt", render_category_tables(record, judgement)),
        section("Predicted against measured", render_predictions(record, judgement)),
        section("Where a step goes", render_profile(record)),
        section("Step cost", render_step_costs(record)),
        section("Draft heads", render_heads(record)),
        section("Disturbance", render_disturbance(record)),
        section("Parity", render_parity(judgement)),
        section("Likelihood of sampled text", render_likelihoods(record)),
        section("Checks", render_checks(judgement)),
        section("Failures", render_failures(record)),
        section("Provenance", render_provenance(record)),
    )


def _picture(name: str, title: str, *, among: Sequence[str]) -> str:
    return f"![{cell(' '.join(title.split()))}](figures/{name})" if name in among else ""


def render_heading(record: RunRecord) -> str:
    """Return the title with suite, device and date, and the commit in words."""
    environment, suite = record.environment, record.suite
    return heading(
        f"Medusa claims tested: suite `{suite.name}`",
        suite.description,
        {
            "Model": f"{cell(environment.model_name)}, {environment.dtype}",
            "Device": cell(describe_device(environment)),
            "Date": environment.started_utc[:10],
            "Commit": describe_commit(environment),
        },
    )


def render_summary(record: RunRecord, judgement: Judgement) -> str:
    """Return what the run says in a few lines.

    A run with failed checks names them first: no figure at all where its texts are invalid, no speed where
    only its times are.
    """
    verdicts = f"Verdicts: {verdicts_in_words(judgement)}"
    reasons = "\n".join(
        f"- **{cell(check.name)}**: found {cell(check.found)}; need {cell(check.need)}"
        for check in judgement.failed
    )
    how_many = f"{count(len(judgement.failed), 'validity check')} of {len(judgement.checks)} failed"
    if not judgement.valid_texts:
        start = f"**INVALID.** {how_many}, so no figure below may be cited:"
        return section("Summary", start, reasons, verdicts)
    if judgement.withheld is not None:
        start = (
            f"**Texts valid, speeds withheld.** {how_many}, all of them of times, so no speed is shown. "
            "Tokens/step, replays, parity and likelihoods do not depend on times, and stand:"
        )
        return section("Summary", start, reasons, verdicts, render_headline_arm(record, judgement))
    passed = sum(check.status is CheckStatus.PASSED for check in judgement.checks)
    skipped = sum(check.status is CheckStatus.SKIPPED for check in judgement.checks)
    rest = f", {skipped} skipped because they do not apply" if skipped else ""
    start = f"**Valid**: {count(passed, 'validity check')} passed, none failed{rest}."
    return section(
        "Summary", start, verdicts, render_headline_arm(record, judgement), _no_speed_reason(record)
    )


def headline(judgement: Judgement, record: RunRecord, *, base: Path | None = None) -> dict[str, Any]:
    """Return the one JSON object that ends a run's output; it has valid figures only.

    `base` is the folder that the record's path is given from (default: the working directory).
    """
    told = headline_arm(record, judgement) if judgement.valid_texts else None
    return {
        "suite": judgement.suite,
        "valid": {"texts": judgement.valid_texts, "speeds": judgement.valid_speeds},
        "failed_checks": [check.name for check in judgement.failed],
        "num_failures": len(record.failures),
        "verdicts": count_verdicts(judgement),
        "headline_arm": told and _headline_figures(told, record, judgement),
        "record": relative_folder(record.folder, base=base or Path.cwd()),
    }


def _headline_figures(arm: ArmMetrics, record: RunRecord, judgement: Judgement) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "arm": arm.arm,
        "num_nodes": arm.num_nodes,
        "tokens_per_step": _bounds(arm.acceleration_rate),
    }
    if record.reports_speed:
        comparison = comparisons_by_arm(judgement)[arm.arm]
        figures |= {
            "baseline": comparison.baseline,
            "speedup": _bounds(comparison.speedup),
            "overhead": _bounds(comparison.overhead),
            "tokens_per_s": arm.tokens_per_s and _bounds(arm.tokens_per_s),
        }
    return figures


def _bounds(interval: Interval) -> dict[str, float | None]:
    figures = {name: getattr(interval, name) for name in ("estimate", "low", "high")}
    rounded = {name: round(figure, 4) if math.isfinite(figure) else None for name, figure in figures.items()}
    return {**rounded, "level": interval.level}


def render_headline_arm(record: RunRecord, judgement: Judgement) -> str:
    """Return a sentence on the arm that the run is told by, with its intervals; empty where there is none."""
    arm = headline_arm(record, judgement)
    if arm is None:
        return ""
    rate = arm.acceleration_rate
    spread = (
        f"Brackets hold {100 * rate.level:g} % bootstrap intervals over {count(rate.num_prompts, 'prompt')}."
    )
    text = f"Arm `{arm.arm}` ({count(arm.num_nodes, 'node')}): {ratio_interval(rate)} tokens/step"
    if not record.reports_speed:
        return f"{text}. {spread}"
    comparison = comparisons_by_arm(judgement)[arm.arm]
    if (num_timed := comparison.speedup.num_prompts) != rate.num_prompts:
        spread += f" Speeds are of the {num_timed} prompts with a quiet block, tokens/step of all."
    return (
        f"{text} at {ratio_interval(comparison.overhead)} times the step latency: **speedup "
        f"{ratio_interval(comparison.speedup)}** over "
        f"`{comparison.baseline}` (decode clock). {spread}{_oracle_of(record, arm.arm)}"
    )


def _oracle_of(record: RunRecord, arm: str) -> str:
    found = next((one for one in oracles(record) if one.arm == arm), None)
    return f" {oracle_sentence(found)}" if found is not None else ""


def _no_speed_reason(record: RunRecord) -> str:
    if record.reports_speed:
        return ""
    why = (
        "its model is tiny and random, so times would say nothing about decoding"
        if record.suite.model.tiny
        else "its suite file says so"
    )
    return f"This suite reports no speed: {why}."


def _invalid_note(judgement: Judgement) -> str:
    return (
        ""
        if judgement.valid_texts
        else "**This run is invalid (see the summary); the figures are shown for diagnosis only.**"
    )


def _arms(record: RunRecord, judgement: Judgement) -> list[str]:
    if not judgement.arms:
        return [render_arms_table(record, judgement)]
    environment, speed = record.environment, record.reports_speed
    parts = (
        f"weights take {megabytes(environment.weight_bytes)} MB, their prepacked copies "
        f"{megabytes(environment.packed_bytes)} MB, "
    )
    parts += (
        f"draft heads read {megabytes(environment.heads_bytes)} MB an evaluation, a shared LM head included"
    )
    return [
        render_arms_table(record, judgement),
        arms_note(record),
        estimates_note(judgement),
        f"{'Latency and memory' if speed else 'Memory'} ({parts}):",
        render_latency_table(record, judgement),
        under_measured_note(record.device_limits) if speed else "",
    ]
