"""What an arm's counts add up to, prompt by prompt: every ratio is formed once from these totals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.records.run import RunRecord
from harness.records.trials import Generation


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


def prompt_totals(record: RunRecord, arm: str, *, timed: bool) -> dict[str, PromptTotals]:
    """Return the totals of an arm by prompt key.

    With `timed` only generations whose times may be used count.
    """
    grouped: dict[str, list[Generation]] = {}
    for generation in record.generations:
        if generation.trial.arm == arm and (record.is_timed(generation) or not timed):
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
    """Return the totals of two arms on the prompts that both have, in the same order."""
    own, base = (prompt_totals(record, name, timed=timed) for name in (arm, baseline))
    shared = [key for key in own if key in base]
    return [own[key] for key in shared], [base[key] for key in shared]


def timed_generations(record: RunRecord, arm: str) -> list[Generation]:
    """Return an arm's generations whose times may be used; none where the suite reports no speed."""
    if not record.reports_speed:
        return []
    return [
        generation
        for generation in record.generations
        if generation.trial.arm == arm and record.is_timed(generation)
    ]


def ratio_of_sums(numerator: Iterable[float], denominator: Iterable[float]) -> float | None:
    """Return one sum over another; None where the second is not above 0."""
    total = sum(denominator)
    return sum(numerator) / total if total > 0 else None


def has_steps(totals: Sequence[PromptTotals]) -> bool:
    """Return whether a single step was taken."""
    return sum(total.steps for total in totals) > 0


def column(totals: Sequence[PromptTotals], name: str) -> NDArray[np.float64]:
    """Return one of the counts, prompt by prompt, [P]."""
    return np.array([getattr(total, name) for total in totals], dtype=np.float64)
