"""An ablation's tables, each usable alone: arms, seeds, heads, texts that neither model wrote."""

from __future__ import annotations

from collections.abc import Sequence

from harness.judge.ablation import AblationRow
from harness.report.formatting import ABSENT, megabytes, percent, ratio_interval, significant, table
from harness.specs.ablation import START_ARM

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
    "on texts by others",
    "top-1 of each head",
)
ABLATION_NOTE = """\
*tokens/step*: replayed from the greedy text that each arm wrote itself, on prompts that no arm saw. *one
tree* is the same for all arms; *own best tree* is grown on one half of an arm's texts and judged on the other
half, both ways. *gain*: over `medusa1`, whose heads trained on the same tokens on a frozen backbone. *over
the start*: over the heads that all arms begin with. These had seen this corpus before, so that training on
may also make them worse. *on the original's text*: every arm reads the same answers of the original model, so
that text which has become easier to draft for adds nothing. *repeats itself*: the share of the 4-grams of an
arm's answers that had occurred in the same answer before. *held-out KL*: KL(original || tuned) a token on the
original's own greedy answers; *above ramped's* is paired by text. *perplexity*: of these answers, original to
tuned; hard labels lower it, since they are such answers. *on texts by others*: of MT-Bench's reference
answers. Intervals are over texts, seeds pooled; {seeds} shows each seed."""
SEEDS_NOTE = (
    "Each seed draws its own answers, their order and the first adapter: the spread of its figures says what "
    "another training would give."
)
_RANKS_SHOWN = (1, 2, 3, 5, 10)
HEADS_NOTE = (
    "Share of the held-out answers' tokens among a head's 1, 2, 3, 5 and 10 best, over the whole vocabulary."
)
REFERENCE_NOTE = (
    "MT-Bench's reference answers, both turns. Perplexities are those of the original and the tuned model."
)


def render_ablation_table(rows: Sequence[AblationRow], *, columns: Sequence[str] | None = None) -> str:
    """Return the table of the arms, one row each, with all columns or those that `columns` names."""
    return table(_HEADERS, [row_cells(row) for row in rows], columns=columns)


def row_cells(row: AblationRow) -> tuple[str, ...]:
    """Return an arm's figures as the cells of its row."""
    return (
        row.arm,
        row.recipe_name or ABSENT,
        str(row.num_seeds) if row.arm != START_ARM else ABSENT,
        ratio_interval(row.tokens_per_step, digits=3),
        ratio_interval(row.gain, digits=3),
        ratio_interval(row.original_text_gain, digits=3),
        ratio_interval(row.start_gain, digits=3),
        ratio_interval(row.original_text_start_gain, digits=3),
        ABSENT if row.repetition is None else percent(row.repetition.estimate),
        ratio_interval(row.best_tokens_per_step, digits=3),
        ratio_interval(row.kl, digits=4),
        ratio_interval(row.kl_above, digits=4),
        percent(row.agreement_rate),
        _from_to(row.perplexity),
        ABSENT if row.reference_perplexity is None else _from_to(row.reference_perplexity),
        ", ".join(percent(accuracies[0]) for accuracies in row.top_accuracies),
    )


def render_seeds(rows: Sequence[AblationRow]) -> str:
    """Return what each seed's training gave; empty where only the start was measured."""
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
        "tokens/s in training",
        "peak memory, MB",
    ]
    return table(headers, cells) if cells else ""


def render_heads(rows: Sequence[AblationRow]) -> str:
    """Return each head's share of targets among its best few tokens."""
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


def render_references(rows: Sequence[AblationRow]) -> str:
    """Return divergence and perplexity on texts by others, by category; empty where there are none."""
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
        cells.append((row.arm, ratio_interval(row.reference_kl, digits=4), total, *shown))
    return table(["arm", "KL, nats", "perplexity", *names], cells)


def _from_to(values: tuple[float, float]) -> str:
    return f"{significant(values[0], digits=4)} to {significant(values[1], digits=4)}"
