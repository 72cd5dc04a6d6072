"""From an ablation's record to its figures: ratios from totals, and intervals over texts.

Seeds of an arm are pooled text by text, so an interval says what other texts would have given with these
trainings. What other seeds would have given, the spread over seeds says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.compose.trees import MAX_RANK
from harness.judge.claims.evidence import SearchSplit, halves, replay_counts, replays
from harness.judge.claims.findings import NotTestable
from harness.records.ablation import AblationRecord, ArmResult, TextChange
from harness.records.trace import Trace
from harness.specs.ablation import START_ARM
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio, bootstrap_ratio_of_ratios, bootstrap_totals
from medusa_impl.tree import DraftTree

Floats = NDArray[np.float64]
TextKind = Literal["own", "original"]
MEDUSA1_ARM = "medusa1"  # its heads alone train on, on as many tokens as every other arm
NGRAM_TOKENS = 4  # long enough that ordinary phrases seldom recur, short enough to find loops


@dataclass(frozen=True)
class Columns:
    """A ratio's numerator and denominator, one entry a text, all seeds of an arm added up.

    `seeds` holds the ratio of each seed alone.
    """

    numerator: Floats
    denominator: Floats
    seeds: tuple[float, ...]

    def interval(self, spec: IntervalSpec) -> Interval:
        """Return the ratio of totals with its interval over texts."""
        return bootstrap_ratio(
            self.numerator, self.denominator, spec=spec, rng=np.random.default_rng(spec.seed)
        )

    def over(self, other: Columns, *, spec: IntervalSpec) -> Interval:
        """Return this ratio over another on the same texts."""
        return bootstrap_ratio_of_ratios(
            self.numerator,
            self.denominator,
            base_numerator=other.numerator,
            base_denominator=other.denominator,
            spec=spec,
            rng=np.random.default_rng(spec.seed),
        )

    def less(self, other: Columns, *, spec: IntervalSpec) -> Interval:
        """Return this ratio less another on the same texts."""
        return bootstrap_totals(
            lambda a, b, c, d: a / b - c / d,
            self.numerator,
            self.denominator,
            other.numerator,
            other.denominator,
            spec=spec,
            rng=np.random.default_rng(spec.seed),
        )


@dataclass(frozen=True)
class CategoryChange:
    """Perplexities of one category of texts."""

    category: str
    num_texts: int
    original_perplexity: float
    tuned_perplexity: float


@dataclass(frozen=True)
class AblationRow:
    """One arm in figures; None where an arm or a text is missing, or too short.

    `kl` is KL(original || tuned) in nats a token on the original's own held-out answers, and `kl_above` the
    arm's divergence less that of the arm `ramped`, paired by text. Perplexities are on those answers, and on
    texts that others wrote. `top_accuracies[k][r]` is the share of head k + 1's held-out targets among its r
    + 1 best.
    `gain` is tokens/step at the fixed tree over the arm `medusa1`'s, and `original_text_gain` the same with
    every arm reading the original's answers instead of its own. `start_gain` and `original_text_start_gain`
    are over the start's, which training on may have made better or worse. `repetition` is the share of the
    own text's 4-grams that had occurred in the same answer before.
    """

    arm: str
    recipe_name: str | None
    num_seeds: int
    num_answer_tokens: float
    tokens_per_step: Interval
    gain: Interval | None
    original_text_gain: Interval | None
    start_gain: Interval | None
    original_text_start_gain: Interval | None
    repetition: Interval | None
    best_tokens_per_step: Interval | None
    kl: Interval
    kl_above: Interval | None
    agreement_rate: float
    equal_texts_rate: float
    perplexity: tuple[float, float]
    reference_perplexity: tuple[float, float] | None
    reference_kl: Interval | None
    categories: tuple[CategoryChange, ...]
    top_accuracies: tuple[tuple[float | None, ...], ...]
    seed_tokens_per_step: tuple[float, ...]
    seed_kl: tuple[float, ...]
    tokens_per_s: float | None
    memory_bytes: int | None


def ablation_rows(record: AblationRecord) -> tuple[AblationRow, ...]:
    """Return the figures of every arm that was run, in the suite's order, the start first."""
    names = [START_ARM, *(arm.name for arm in record.spec.arms)]
    return tuple(_row(record, name) for name in names if record.of(name))


def _row(record: AblationRecord, arm: str) -> AblationRow:
    results, spec = record.of(arm), record.spec.interval
    rate, kl = rate_columns(record, arm), change_columns(record, arm, kl_of)
    held_out = [text for result in results for text in result.held_out]
    references = [text for result in results for text in result.references]
    greedy = [text for result in results for text in result.greedy]
    seconds, memory = (
        sum(result.train_s for result in results),
        [r.memory_bytes for r in results if r.memory_bytes is not None],
    )
    return AblationRow(
        arm=arm,
        recipe_name=results[0].recipe_name,
        num_seeds=len(results),
        num_answer_tokens=sum(result.num_answer_tokens for result in results) / len(results),
        tokens_per_step=rate.interval(spec),
        gain=_gain(record, arm, over=MEDUSA1_ARM, text="own"),
        original_text_gain=_gain(record, arm, over=MEDUSA1_ARM, text="original"),
        start_gain=_gain(record, arm, over=START_ARM, text="own"),
        original_text_start_gain=_gain(record, arm, over=START_ARM, text="original"),
        repetition=_or_none(lambda: repetition_columns(record, arm).interval(spec)),
        best_tokens_per_step=_or_none(lambda: best_rate_columns(record, arm).interval(spec)),
        kl=kl.interval(spec),
        kl_above=kl.less(change_columns(record, "ramped", kl_of), spec=spec)
        if arm != "ramped" and record.of("ramped")
        else None,
        agreement_rate=sum(text.num_agreements for text in held_out)
        / sum(text.num_positions for text in held_out),
        equal_texts_rate=sum(text.is_equal for text in greedy) / len(greedy),
        perplexity=perplexities(held_out),
        reference_perplexity=perplexities(references) if references else None,
        reference_kl=change_columns(record, arm, kl_of, references=True).interval(spec)
        if references
        else None,
        categories=_categories(references),
        top_accuracies=head_accuracies(results),
        seed_tokens_per_step=rate.seeds,
        seed_kl=kl.seeds,
        tokens_per_s=sum(result.num_answer_tokens for result in results) / seconds if seconds else None,
        memory_bytes=max(memory, default=None),
    )


def _gain(record: AblationRecord, arm: str, *, over: str, text: TextKind) -> Interval | None:
    """Return an arm's tokens/step over another's.

    None for that arm itself, for the start, and where one of them is missing.
    """
    if arm in (over, START_ARM):
        return None
    return _or_none(
        lambda: rate_columns(record, arm, text=text).over(
            rate_columns(record, over, text=text), spec=record.spec.interval
        )
    )


def _or_none(figure: Callable[[], Interval]) -> Interval | None:
    """Return a figure, or None where the record lacks what it needs."""
    try:
        return figure()
    except NotTestable:
        return None


def kl_of(text: TextChange) -> float:
    """Return a text's summed divergence."""
    return text.kl_sum


def change_columns(
    record: AblationRecord, arm: str, total: Callable[[TextChange], float], *, references: bool = False
) -> Columns:
    """Return a sum of the text changes over their positions, by text.

    Raises: NotTestable where the arm was not run or has no such text.
    """
    tables = [result.references if references else result.held_out for result in _results(record, arm)]
    if not all(tables):
        raise NotTestable(f"arm {arm} was measured on no such text")
    return _pooled(
        [({text.key: (total(text), float(text.num_positions)) for text in table}) for table in tables]
    )


def rate_columns(
    record: AblationRecord, arm: str, *, tree: DraftTree | None = None, text: TextKind = "own"
) -> Columns:
    """Return decoded tokens over steps by prompt, by replay at one tree: the record's, or another.

    On its `own` greedy text an arm also gains where that text has become more predictable; on the `original`
    model's answers, which every arm reads alike, only where heads and states predict better.
    Raises: NotTestable where the arm was not run or the tree is deeper than its heads.
    """
    fixed = tree if tree is not None else record.tree.tree()
    return _pooled([_counts(_trace(record, result, text), fixed) for result in _results(record, arm)])


def best_rate_columns(
    record: AblationRecord,
    arm: str,
    *,
    num_nodes: int | None = None,
    max_depth: int | None = None,
    text: TextKind = "own",
) -> Columns:
    """Return decoded tokens over steps at each seed's own best tree.

    The tree is grown on half of the seed's prompts and judged on the others, both ways. The halves share
    every category, every other prompt of it each.
    Raises: NotTestable where the arm was not run, has fewer than four prompts, or its heads make no tree of
    that size.
    """
    size = num_nodes or record.spec.best_tree_nodes
    tables = []
    for result in _results(record, arm):
        trace = _trace(record, result, text)
        by_category = sorted(trace.prompts, key=lambda prompt: (prompt.category or "", prompt.key))
        both = halves(trace.provenance, by_category)
        counts: dict[str, tuple[float, float]] = {}
        for growth, judged in (both, both[::-1]):
            split = SearchSplit(growth=growth, held_out=judged, origin="trees grown on the other half")
            counts |= _counts(judged, split.grow(size, max_rank=MAX_RANK, max_depth=max_depth).tree)
        tables.append(counts)
    return _pooled(tables)


def repetition_columns(record: AblationRecord, arm: str) -> Columns:
    """Return how many 4-grams of the arm's own greedy answers had occurred before, over all of them.

    Both are by prompt; a 4-gram counts where it occurred earlier in the same answer.
    """
    tables = []
    for result in _results(record, arm):
        counts: dict[str, tuple[float, float]] = {}
        for prompt in record.trace(result).prompts:
            ids = prompt.tokens.tolist()
            grams = [tuple(ids[start : start + NGRAM_TOKENS]) for start in range(len(ids) - NGRAM_TOKENS + 1)]
            counts[prompt.key] = (float(len(grams) - len(set(grams))), float(len(grams)))
        tables.append(counts)
    return _pooled(tables)


def perplexities(texts: Sequence[TextChange]) -> tuple[float, float]:
    """Return the texts' perplexity under the original and under the tuned model.

    It is exp of the mean negative log-likelihood over all positions of the texts.
    """
    count = sum(text.num_positions for text in texts)
    before, after = (
        sum(getattr(text, name) for text in texts) / count for name in ("original_nll_sum", "tuned_nll_sum")
    )
    return float(np.exp(before)), float(np.exp(after))


def head_accuracies(results: Sequence[ArmResult]) -> tuple[tuple[float | None, ...], ...]:
    """Return each head's share of held-out targets among its 1, 2, .., 10 best tokens.

    All seeds count together.
    """
    texts = [text for result in results for text in result.heads]
    targets = np.sum([text.num_targets for text in texts], axis=0)
    hits = np.cumsum(np.sum([text.rank_hits for text in texts], axis=0), axis=1)
    return tuple(
        tuple(int(count) / int(total) if total else None for count in row)
        for row, total in zip(hits, targets, strict=True)
    )


def _categories(texts: Sequence[TextChange]) -> tuple[CategoryChange, ...]:
    names = sorted({text.category for text in texts if text.category is not None})
    rows = []
    for name in names:
        own = [text for text in texts if text.category == name]
        before, after = perplexities(own)
        rows.append(CategoryChange(name, len({text.key for text in own}), before, after))
    return tuple(rows)


def _results(record: AblationRecord, arm: str) -> tuple[ArmResult, ...]:
    found = record.of(arm)
    if not found:
        raise NotTestable(f"the record has no arm {arm}")
    return found


def _counts(trace: Trace, tree: DraftTree) -> dict[str, tuple[float, float]]:
    """Return decoded tokens and steps by prompt, by replay."""
    (replayed,) = replays(trace, [tree])
    tokens, steps = replay_counts(replayed)
    columns = zip(trace.prompts, tokens.tolist(), steps.tolist(), strict=True)
    return {prompt.key: (kept, taken) for prompt, kept, taken in columns}


def _trace(record: AblationRecord, result: ArmResult, text: TextKind) -> Trace:
    found = record.trace(result) if text == "own" else record.original_text_trace(result)
    if found is None:
        raise NotTestable(f"arm {result.arm} was recorded before arms were measured on the original's text")
    return found


def _pooled(tables: Iterable[dict[str, tuple[float, float]]]) -> Columns:
    """Return the seeds of an arm added up by text.

    Texts stand in the order of their keys, so that arms pair.
    """
    kept = list(tables)
    keys = sorted(kept[0])
    if any(sorted(table) != keys for table in kept):
        raise NotTestable("the seeds of an arm were measured on different texts")
    grid = np.array([[table[key] for key in keys] for table in kept], dtype=np.float64)
    totals = grid.sum(axis=1)
    pooled = grid.sum(axis=0)
    if not totals[:, 1].all():
        raise NotTestable("an arm has nothing to divide by: no step, or no position")
    return Columns(
        numerator=pooled[:, 0], denominator=pooled[:, 1], seeds=tuple((totals[:, 0] / totals[:, 1]).tolist())
    )
