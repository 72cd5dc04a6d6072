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
from harness.report.formatting import (
    ABSENT,
    cell,
    count,
    finished_words,
    megabytes,
    percent,
    section,
    significant,
    table,
)
from harness.report.provenance import describe_commit, describe_device
from harness.report.run_tables import render_verdicts
from harness.specs.ablation import START_ARM
from harness.stats import Interval

CURVES_FILE = "curves.png"
_HEADERS = (
    "arm",
    "recipe",
    "seeds",
    "tokens/step, one tree",
    "gain",
    "gain on the original's text",
    "over the start",
    "over the start on the original's text",
    "repeats itself",
    "tokens/step, own best tree",
    "held-out KL, nats",
    "KL above ramped's",
    "first choice agrees",
    "perplexity",
    "on texts of another hand",
    "top-1 of each head",
)
_NOTE = """\
*tokens/step*: replayed from the greedy text that each arm wrote itself on prompts that no arm saw; *one \
tree* is the same for all, *own
best tree* is grown on one half of an arm's texts and judged on the other, both ways. *gain*: over \
`medusa1`, whose heads trained on the
same tokens on a frozen backbone; *over the start*: over the heads that all arms begin with, which had seen \
this corpus before, so that
training on may also set them back; *on the original's text* every arm reads the same answers, so that
text which has become easier to draft for adds nothing. *repeats itself*: 4-grams of an arm's answers that \
stood in the same answer
before. *held-out KL*: KL(original || tuned) a token on the original's own
greedy answers, *above ramped's* paired by text; *perplexity* of these answers, original to tuned: hard \
labels lower it, since they
are such answers; *on texts of another hand*: of MT-Bench's reference answers. Intervals are over texts, \
seeds pooled; {seeds} has the
seeds."""
_SEEDS_NOTE = (
    "Each seed draws its own answers, their order and the first adapter: how far its figures "
    "lie apart is what another training gives."
)
_SIGNS_ONLY = "**Signs and orders only**: the budget is too small to decide a claim."
_RANKS_SHOWN = (1, 2, 3, 5, 10)
_HEADS_NOTE = (
    "Share of the held-out answers' tokens among a head's 1, 2, 3, 5 and 10 best, over the whole vocabulary."
)
_REFERENCE_NOTE = "Texts of another hand: MT-Bench's reference answers, both turns, original to tuned."


def render_ablation(
    record: AblationRecord, rows: Sequence[AblationRow], verdicts: Sequence[ClaimVerdict], *, has_curves: bool
) -> str:
    """Return the whole report: what was compared, the table, seeds, texts of another hand, verdicts, curves,
    provenance.
    """
    parts = [
        f"# {record.spec.name}",
        _summary(record),
        section(
            "Recipes side by side",
            outcome_in_words(rows),
            render_ablation_table(rows),
            _NOTE.format(seeds="the next table"),
        ),
        section("Seeds", _render_seeds(rows), _SEEDS_NOTE),
        section("Heads", _render_heads(rows), _HEADS_NOTE),
        section(
            "Texts of another hand",
            _render_references(rows),
            _REFERENCE_NOTE if any(row.categories for row in rows) else "",
        ),
        section("Verdicts", render_verdicts(verdicts) if verdicts else ""),
        section("Curves", f"![losses, lambda_0 and divergence by step]({CURVES_FILE})" if has_curves else ""),
        section("Provenance", _render_provenance(record)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_ablation_table(rows: Sequence[AblationRow]) -> str:
    """Return the table that compares the arms: one row each."""
    return table(_HEADERS, [_cells(row) for row in rows])


def outcome_in_words(rows: Sequence[AblationRow]) -> str:
    """Return a sentence for each way of training the backbone to stay: how far it went from the original, and
    what was gained by it.
    """
    by_arm = {row.arm: row for row in rows}
    sentences = []
    for name in ("two_stage", "ramped"):
        if (row := by_arm.get(name)) is None:
            continue
        further = [
            f"`{other}`'s "
            f"{_four(by_arm[other].kl)}{_apart(by_arm[other].kl_above) if name == 'ramped' else ''}"
            for other in ("direct", "hard_labels")
            if other in by_arm
        ]
        beside = f" beside {' and '.join(further)}" if further else ""
        gains = [
            f"{_three(gain)} on {words} ({_against_one(gain)})"
            for gain, words in ((row.gain, "its own text"), (row.original_text_gain, "the original's"))
            if gain is not None
        ]
        yields = f", and yields {', '.join(gains)} times the tokens/step of `{MEDUSA1_ARM}`" if gains else ""
        sentences.append(f"`{name}` lies {_four(row.kl)} nats a token from the original{beside}{yields}.")
    return " ".join(sentences)


def _apart(kl_above: Interval | None) -> str:
    return "" if kl_above is None else f" ({_four(kl_above)} more)"


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
    """Return what the README shows of an ablation: where it was run, the outcome, the table, the claims that
    it decides, the picture.

    `base` is the README's folder, which links are given from; `elsewhere` names the suite that decides a
    claim in this one's place.
    """
    environment, folder = record.environment, record.folder.resolve()
    origin = (
        f"Suite `{record.spec.name}` with {cell(environment.model_name)} on "
        f"{cell(describe_device(environment))}, "
        f"{environment.started_utc[:10]}, commit {describe_commit(environment)}; "
        f"{record.spec.answer_tokens:,} answer tokens an arm, "
        f"{count(record.spec.held_out.num_prompts, 'held-out prompt')}."
    )
    if not record.spec.decides_claims:
        origin += f" {_SIGNS_ONLY}"
    parts = [origin, outcome_in_words(rows), render_ablation_table(rows), _NOTE.format(seeds="the report")]
    tested = [verdict for verdict in verdicts if verdict.kind is not VerdictKind.NOT_TESTED]
    if decided := [verdict for verdict in tested if verdict.claim_id not in elsewhere]:
        parts.append(render_verdicts(decided))
    for suite in sorted(set(elsewhere.values())):
        names = ", ".join(verdict.claim_id for verdict in tested if elsewhere.get(verdict.claim_id) == suite)
        parts.append(f"Decided by `{suite}`, whose budget is larger: {names}.")
    if folder.is_relative_to(base.resolve()):
        link = folder.relative_to(base.resolve()).as_posix()
        if (folder / CURVES_FILE).exists():
            parts.append(f"![losses, lambda_0 and divergence by step]({link}/{CURVES_FILE})")
        parts.append(f"Full report and raw data: [`{folder.name}`]({link}/report.md).")
    else:
        parts.append(f"From the record `{folder.name}`.")
    return "\n\n".join(part for part in parts if part)


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
        cells = _cells(row)
        grid.add_row(cells[0], *cells[2:6], cells[8], cells[10], *cells[12:14])
    console.print(grid)
    for verdict in verdicts:
        if verdict.kind is not VerdictKind.NOT_TESTED:
            console.print(
                f"{verdict.claim_id}: {verdict.kind.value} ({verdict.ours})", highlight=False, markup=False
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
    words = (
        f"{cell(spec.description)} {cell(environment.model_name)} on {cell(describe_device(environment))}; "
        f"{count(len(spec.arms), 'arm')}, {count(len(spec.seeds), 'seed')}, {spec.answer_tokens:,} answer "
        "tokens each, "
        f"{count(spec.held_out.num_prompts, 'held-out prompt')} of {spec.held_out.max_new_tokens} tokens."
    )
    if record.manifest is None:
        words += " **Unfinished**: the table has the arms that are done."
    if not spec.decides_claims:
        words += f" {_SIGNS_ONLY}"
    return words


def _cells(row: AblationRow) -> tuple[str, ...]:
    return (
        row.arm,
        row.recipe_name or ABSENT,
        str(row.num_seeds) if row.arm != START_ARM else ABSENT,
        _three(row.tokens_per_step),
        _three(row.gain),
        _three(row.original_text_gain),
        _three(row.start_gain),
        _three(row.original_text_start_gain),
        ABSENT if row.repetition is None else percent(row.repetition.estimate),
        _three(row.best_tokens_per_step),
        _four(row.kl),
        _four(row.kl_above),
        percent(row.agreement_rate),
        _from_to(row.perplexity),
        ABSENT if row.reference_perplexity is None else _from_to(row.reference_perplexity),
        ", ".join(percent(accuracies[0]) for accuracies in row.top_accuracies),
    )


def _render_seeds(rows: Sequence[AblationRow]) -> str:
    kept = [row for row in rows if row.arm != START_ARM]
    cells = [
        (
            row.arm,
            ", ".join(f"{rate:.3f}" for rate in row.seed_tokens_per_step),
            ", ".join(f"{kl:.4f}" for kl in row.seed_kl),
            percent(row.equal_texts_rate),
            f"{row.num_answer_tokens:,.0f}",
            significant(row.tokens_per_s),
            megabytes(row.memory_bytes),
        )
        for row in kept
    ]
    headers = [
        "arm",
        "tokens/step of each seed",
        "KL of each seed",
        "greedy texts unchanged",
        "answer tokens",
        "tokens/s trained",
        "MB at most",
    ]
    return table(headers, cells) if cells else ""


def _render_heads(rows: Sequence[AblationRow]) -> str:
    num_heads = len(rows[0].top_accuracies)
    cells = [
        (
            row.arm,
            *(
                ", ".join(percent(accuracies[rank - 1]) for rank in _RANKS_SHOWN)
                for accuracies in row.top_accuracies
            ),
        )
        for row in rows
    ]
    return table(["arm", *(f"head {head + 1}" for head in range(num_heads))], cells)


def _render_references(rows: Sequence[AblationRow]) -> str:
    names = sorted({change.category for row in rows for change in row.categories})
    if not names:
        return ""
    cells = []
    for row in rows:
        by_name = {change.category: change for change in row.categories}
        shown = [
            _from_to((by_name[name].original_perplexity, by_name[name].tuned_perplexity))
            if name in by_name
            else ABSENT
            for name in names
        ]
        total = ABSENT if row.reference_perplexity is None else _from_to(row.reference_perplexity)
        cells.append((row.arm, _four(row.reference_kl), total, *shown))
    return table(["arm", "KL, nats", "perplexity", *names], cells)


def _render_provenance(record: AblationRecord) -> str:
    environment, manifest = record.environment, record.manifest
    started, finished = environment.started_utc, "not finished"
    if manifest is not None:
        finished = finished_words(started, manifest.finished_utc, elapsed_s=manifest.elapsed_s)
    rows: list[tuple[str, object]] = [
        ("command", f"`{environment.command}`"),
        ("commit", describe_commit(environment)),
        ("started, finished", f"{started}, {finished}"),
        ("device", describe_device(environment)),
        ("engine", f"{environment.engine}, {environment.dtype}"),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in sorted(environment.packages.items())),
        ),
        ("model", f"{environment.model_name}, SHA-256 {environment.backbone_sha256[:16]}"),
        ("heads at the start", f"SHA-256 {(environment.heads_sha256 or '')[:16]}"),
        ("texts", f"SHA-256 {environment.prompts_sha256[:16]}"),
        (
            "shared heads read",
            ", ".join(f"{arm}: the {words} LM head" for arm, words in _lm_heads_read(record)),
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
        (
            "intervals",
            f"{100 * record.spec.interval.level:g} % bootstrap over texts, "
            f"{record.spec.interval.num_resamples:,} resamples",
        ),
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


def _from_to(values: tuple[float, float]) -> str:
    return f"{significant(values[0], digits=4)} to {significant(values[1], digits=4)}"


def _three(interval: Interval | None) -> str:
    return (
        ABSENT if interval is None else f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    )


def _four(interval: Interval | None) -> str:
    return (
        ABSENT if interval is None else f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
    )
