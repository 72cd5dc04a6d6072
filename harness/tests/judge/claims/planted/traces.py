"""Changes of a made-up trace whose effect on a claim's figure is known, for the planted records of runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from harness.compose.replay import replay
from harness.records.trace import PromptTrace, Trace
from harness.tests.fake_record import CATEGORIES, FakeParts

OUT_OF_REACH = 999  # a rank that no tree holds


def change_prompts(parts: FakeParts, change: Callable[[PromptTrace, int], Mapping[str, Any]]) -> None:
    """Replace fields of every prompt of the trace by what `change` makes of the prompt and its number."""
    assert parts.trace is not None
    prompts = [
        dataclasses.replace(prompt, **change(prompt, number))
        for number, prompt in enumerate(parts.trace.prompts)
    ]
    parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))


def redraw(
    parts: FakeParts, accuracies: Sequence[float], *, together: float = 0.0, reach: float = 1.0
) -> None:
    """Draw all ranks anew: each head's first token is right with its accuracy.

    A share `together` of the draws is one for all heads of a row, so that they are right together. Where a
    first token is wrong, a share `reach` of the right ones has a low rank, and no tree holds the others.
    """

    def change(prompt: PromptTrace, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        shape = prompt.ranks.shape
        own, common = rng.random(shape), rng.random((shape[0], 1))
        draws = np.where(rng.random((shape[0], 1)) < together, common, own)
        low = np.where(rng.random(shape) < reach, rng.geometric(0.25, size=shape), OUT_OF_REACH)
        return {"ranks": _with_targets(prompt, np.where(draws < np.asarray(accuracies), 0, low))}

    change_prompts(parts, change)


def redraw_head(
    parts: FakeParts, head: int, *, on_top: float, among: float | None = None, first: int = 2
) -> None:
    """Draw one head's ranks anew: right on top, and among its `first` tokens, at those shares.

    Without `among` it is right on top or not within reach.
    """

    def change(prompt: PromptTrace, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        draws, ranks = rng.random(len(prompt.ranks)), prompt.ranks.copy()
        lower = rng.integers(1, first, size=len(draws))
        ranks[:, head - 1] = np.where(
            draws < on_top, 0, np.where(draws < (among or on_top), lower, OUT_OF_REACH)
        )
        return {"ranks": _with_targets(prompt, ranks)}

    change_prompts(parts, change)


def raise_last_loss(parts: FakeParts, rise: float) -> None:
    """Let the last head lose `rise` nats more than the head before it, on average."""

    def change(prompt: PromptTrace, number: int) -> dict[str, Any]:
        assert prompt.nll is not None
        losses = prompt.nll.copy()
        noise = np.random.default_rng(number).normal(0, 0.1, size=len(losses))
        losses[:, -1] = np.where(np.isnan(losses[:, -1]), np.nan, losses[:, -2] + rise + noise)
        return {"nll": losses}

    change_prompts(parts, change)


def order_categories(parts: FakeParts, arm: str, *, figures: Mapping[str, float], correlation: float) -> None:
    """Name the prompts' categories so that tokens/step rank them with that correlation to `figures`."""
    assert parts.trace is not None
    names = list(figures)
    stated = list(figures.values())
    orders = itertools.islice(itertools.permutations(range(len(names))), 0, None, 7)
    order = min(orders, key=lambda ranks: abs(_spearman(ranks, stated) - correlation))
    from_hardest = [names[place] for place in np.argsort(order)]
    # A little chance lets categories overlap, so that the interval of their order has a width.
    chance = np.random.default_rng(0).lognormal(0.0, 0.1, size=len(parts.trace.prompts))
    by_rate = np.argsort(_rates(parts, arm) * chance)
    size = len(by_rate) / len(names)
    _name_categories(parts, {int(prompt): from_hardest[int(at / size)] for at, prompt in enumerate(by_rate)})


def set_category_apart(parts: FakeParts, arm: str, *, category: str, ratio: float) -> None:
    """Give a category those prompts whose tokens/step are `ratio` times those of all others together."""
    assert parts.trace is not None
    replayed = replay(parts.trace, parts.trees[arm].tree())
    tokens, steps = replayed.num_kept_tokens - 1, replayed.num_steps
    by_rate = np.argsort(tokens / steps)
    size = len(by_rate) // len(CATEGORIES)

    def apart(start: int) -> float:
        own, rest = by_rate[start : start + size], np.delete(by_rate, slice(start, start + size))
        rates = [tokens[chosen].sum() / steps[chosen].sum() for chosen in (own, rest)]
        return float(abs(rates[0] / rates[1] - ratio))

    start = min(range(len(by_rate) - size + 1), key=apart)
    own = by_rate[start : start + size]
    others = [name for name in CATEGORIES if name != category]
    rest = np.sort(np.delete(by_rate, slice(start, start + size)))
    named = {int(prompt): others[at % len(others)] for at, prompt in enumerate(rest)}
    _name_categories(parts, {**named, **dict.fromkeys(map(int, own), category)})


def _rates(parts: FakeParts, arm: str) -> NDArray[np.float64]:
    assert parts.trace is not None
    replayed = replay(parts.trace, parts.trees[arm].tree())
    return np.asarray((replayed.num_kept_tokens - 1) / replayed.num_steps)


def _name_categories(parts: FakeParts, names: Mapping[int, str]) -> None:
    change_prompts(parts, lambda prompt, number: {"category": names[number]})


def _spearman(one: Sequence[int], other: Sequence[float]) -> float:
    return float(spearmanr(one, other).statistic)


def _with_targets(prompt: PromptTrace, ranks: NDArray[Any]) -> NDArray[np.int32]:
    """Ranks as drawn, and none where the text ends before the token that a head looks for."""
    return np.where(prompt.ranks < 0, -1, ranks).astype(np.int32)
