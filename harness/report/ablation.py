"""An ablation's record as Markdown, as a terminal table, and as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.judge.ablation import MEDUSA1_ARM, AblationRow
from harness.judge.judgement import ClaimVerdict, VerdictKind
from harness.records.ablation import AblationRecord
from harness.report.figures.training import CURVES_FILE
from harness.report.formatting import (
    ABSENT,
    VERDICT_COLUMNS,
    cell,
    count,
    page,
    pairs,
    paragraphs,
    ratio_interval,
    section,
    table,
)
from harness.report.provenance import (
    describe_commit,
    describe_device,
    describe_finish,
    describe_intervals,
    describe_origin,
    path_within,
    record_link,
)
from harness.report.tables.ablation import (
    ABLATION_NOTE,
    HEADS_NOTE,
    REFERENCE_NOTE,
    SEEDS_NOTE,
    render_ablation_table,
    render_heads,
    render_references,
    render_seeds,
    row_cells,
)
from harness.report.tables.run import render_verdicts
from harness.report.tables.words import shown
from harness.specs.ablation import START_ARM
from harness.stats import Interval

_README_COLUMNS = (
    "arm",
    "tokens/step, one tree",
    "gain",
    "gain on the original's text",
    "repeats itself",
    "held-out KL, nats",
    "perplexity",
)
_README_NOTE = """\
*tokens/step*: at one tree, replayed from the greedy text that each arm wrote itself. *gain*: over
`medusa1`, whose heads learned from the same tokens on a frozen backbone; *on the original's text* every
arm reads the same answers, so that text which has become easier to draft for adds nothing. *repeats
itself*: 4-grams of an arm's answers that had occurred in the same answer before. *held-out KL*:
KL(original || tuned) a token, and *perplexity*, original to tuned, on the original's greedy answers."""
_SIGNS_ONLY = "**Signs and orders only**: the budget is too small to decide a claim."


def render_ablation(
    record: AblationRecord, rows: Sequence[AblationRow], verdicts: Sequence[ClaimVerdict], *, has_curves: bool
) -> str:
    """Return the whole report of an ablation."""
    return page(
        f"# {record.spec.name}",
        _summary(record),
        section(
            "Recipes side by side",
            outcome_in_words(rows),
            render_ablation_table(rows),
            ABLATION_NOTE.format(seeds="the next table"),
        ),
        section("Seeds", render_seeds(rows), SEEDS_NOTE),
        section("Heads", render_heads(rows), HEADS_NOTE),
        section(
            "Texts by others",
            render_references(rows),
            REFERENCE_NOTE if any(row.categories for row in rows) else "",
        ),
        section("Verdicts", render_verdicts(verdicts) if verdicts else ""),
        section("Curves", f"![losses, lambda_0 and divergence by step]({CURVES_FILE})" if has_curves else ""),
        section("Provenance", _render_provenance(record)),
    )


def outcome_in_words(rows: Sequence[AblationRow]) -> str:
    """Return what became of each way of training the backbone so that it stays what it was.

    A sentence says how far it went from the original, another what was gained by it.
    """
    by_arm = {row.arm: row for row in rows}
    sentences = []
    for name in ("two_stage", "ramped"):
        if (row := by_arm.get(name)) is None:
            continue
        further = [
            f"`{other.arm}` {ratio_interval(other.kl, digits=4)}"
            + (_apart(other.kl_above) if name == "ramped" else "")
            for other in (by_arm.get("direct"), by_arm.get("hard_labels"))
            if other is not None
        ]
        gains = [
            f"{ratio_interval(gain, digits=3)} on {text} ({_against_one(gain)})"
            for gain, text in (
                (row.gain, "its own text"),
                (row.original_text_gain, "the original model's text"),
            )
            if gain is not None
        ]
        distance = f"`{name}` lies {ratio_interval(row.kl, digits=4)} nats a token from the original model"
        sentences.append(f"{', '.join([distance, *further])}.")
        if gains:
            sentences.append(f"It has {' and '.join(gains)} times the tokens/step of `{MEDUSA1_ARM}`.")
    return " ".join(sentences)


def _apart(kl_above: Interval | None) -> str:
    """Return how much further from the original an arm went than `ramped`."""
    return "" if kl_above is None else f" ({ratio_interval(kl_above, digits=4)} more)"


def _against_one(gain: Interval) -> str:
    return "above one" if gain.low > 1 else "below one" if gain.high < 1 else "the interval holds one"


def render_readme_ablation(
    record: AblationRecord,
    rows: Sequence[AblationRow],
    verdicts: Sequence[ClaimVerdict],
    *,
    base: Path,
    elsewhere: Mapping[str, str],
) -> str:
    """Return what the README shows of an ablation.

    That is where it was run, the outcome, the table, the claims that it decides, and the picture. `base` is
    the README's folder, which links are given from; `elsewhere` names the suite that decides a claim instead
    of this one.
    """
    environment, folder = record.environment, record.folder
    origin = (
        f"Suite `{record.spec.name}` with {describe_origin(environment)}; "
        f"{record.spec.answer_tokens:,} answer tokens an arm, "
        f"{count(record.spec.held_out.num_prompts, 'held-out prompt')}."
    )
    if not record.spec.decides_claims:
        origin += f" {_SIGNS_ONLY}"
    parts = [
        origin,
        outcome_in_words(rows),
        render_ablation_table(rows, columns=_README_COLUMNS),
        _README_NOTE,
    ]
    tested = [verdict for verdict in verdicts if verdict.kind is not VerdictKind.NOT_TESTED]
    if decided := [verdict for verdict in tested if verdict.claim_id not in elsewhere]:
        parts.append(render_verdicts(decided, columns=VERDICT_COLUMNS))
    for suite in sorted(set(elsewhere.values())):
        names = ", ".join(verdict.claim_id for verdict in tested if elsewhere.get(verdict.claim_id) == suite)
        parts.append(f"Decided by `{suite}`, whose budget is larger: {names}.")
    link = path_within(folder, base=base)
    if link is not None and (folder / CURVES_FILE).exists():
        parts.append(f"![losses, lambda_0 and divergence by step]({link}/{CURVES_FILE})")
    return paragraphs(*parts, record_link(folder, base=base, label="Full report and raw data"))


def print_ablation(console: Console, rows: Sequence[AblationRow], verdicts: Sequence[ClaimVerdict]) -> None:
    """Print the arms and the tested claims."""
    grid = Table(
        "arm",
        "seeds",
        "tokens/step",
        "gain",
        "gain on the original's text",
        "repeats itself",
        "KL, nats",
        "agrees",
        "perplexity",
    )
    for row in rows:
        cells = row_cells(row)
        grid.add_row(cells[0], *cells[2:6], cells[8], cells[10], *cells[12:14])
    console.print(grid)
    for verdict in verdicts:
        if verdict.kind is not VerdictKind.NOT_TESTED:
            console.print(
                f"{verdict.claim_id}: {shown(verdict)} ({verdict.ours})", highlight=False, markup=False
            )


def ablation_headline(
    record: AblationRecord, rows: Sequence[AblationRow], verdicts: Sequence[ClaimVerdict]
) -> dict[str, Any]:
    """Return the one JSON object that ends a run's output."""
    return {
        "ablation": record.spec.name,
        "answer_tokens": record.spec.answer_tokens,
        "decides_claims": record.spec.decides_claims,
        "finished": record.manifest is not None,
        "arms": {
            row.arm: {
                "tokens_per_step": round(row.tokens_per_step.estimate, 4),
                "gain": None if row.gain is None else round(row.gain.estimate, 4),
                "original_text_gain": None
                if row.original_text_gain is None
                else round(row.original_text_gain.estimate, 4),
                "start_gain": None if row.start_gain is None else round(row.start_gain.estimate, 4),
                "repetition": None if row.repetition is None else round(row.repetition.estimate, 4),
                "kl": round(row.kl.estimate, 6),
                "seeds": row.num_seeds,
            }
            for row in rows
        },
        "verdicts": {verdict.claim_id: verdict.kind.value for verdict in verdicts},
        "record": record.folder.name,
    }


def _summary(record: AblationRecord) -> str:
    spec, environment = record.spec, record.environment
    about = (
        f"{cell(spec.description)} {cell(environment.model_name)} on {cell(describe_device(environment))}; "
        f"{count(len(spec.arms), 'arm')}, {count(len(spec.seeds), 'seed')}, {spec.answer_tokens:,} answer "
        "tokens each, "
        f"{count(spec.held_out.num_prompts, 'held-out prompt')} of {spec.held_out.max_new_tokens} tokens."
    )
    if record.manifest is None:
        about += " **Unfinished**: the table has the arms that are done."
    if not spec.decides_claims:
        about += f" {_SIGNS_ONLY}"
    return about


def _render_provenance(record: AblationRecord) -> str:
    environment = record.environment
    rows: list[tuple[str, object]] = [
        ("command", f"`{environment.command}`"),
        ("commit", describe_commit(environment)),
        ("started, finished", f"{environment.started_utc}, {describe_finish(environment, record.manifest)}"),
        ("device", describe_device(environment)),
        ("engine", f"{environment.engine}, {environment.dtype}"),
        ("packages", pairs(environment.packages)),
        ("model", f"{environment.model_name}, SHA-256 {environment.backbone_sha256[:16]}"),
        ("heads at the start", f"SHA-256 {(environment.heads_sha256 or '')[:16]}"),
        ("texts", f"SHA-256 {environment.prompts_sha256[:16]}"),
        (
            "shared heads read",
            ", ".join(f"{arm}: the {which} LM head" for arm, which in _lm_heads_read(record)),
        ),
        (
            "one tree",
            f"{record.tree.tree().fingerprint}, {count(len(record.tree.paths), 'path')}, "
            f"{record.tree.origin}",
        ),
        *(
            (
                f"{result.label}",
                f"heads {result.heads_sha256[:16]}, adapter {(result.adapter_sha256 or ABSENT)[:16]}, "
                f"{count(result.num_steps, 'step')}",
            )
            for result in record.results
            if result.arm != START_ARM
        ),
        ("intervals", describe_intervals(record.spec.interval, over="texts")),
        ("record", record.folder.name),
    ]
    return table(["", ""], rows)


def _lm_heads_read(record: AblationRecord) -> list[tuple[str, str]]:
    recipes = {result.arm: result.recipe for result in record.results if result.recipe is not None}
    return [
        (arm, str(recipe.get("heads_lm_head", "original")))
        for arm, recipe in recipes.items()
        if recipe.get("architecture") == "shared"
    ]
