"""Where decoding left its replay, and whether rounding explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Literal

from harness.records.run import TIE_MARGIN_FLOAT32
from harness.records.trace import HEAD_TIES_KEY, TEXT_TIES_KEY, PromptTrace, Trace
from medusa_impl.tree import DraftTree

Kind = Literal["tie", "bug"]
# From prompt key and position i to the tokens that rounding may put first.
NearTokens = dict[tuple[str, int], list[int]]


def decoded_difference(
    trace: Trace,
    prompt: PromptTrace,
    tree: DraftTree,
    *,
    token_ids: Sequence[int],
    step_tokens: Sequence[int],
    replayed: Sequence[int],
) -> tuple[int, Kind] | None:
    """Return where a greedily decoded text took another path than its replay, and why.

    The text may come from anywhere; the difference is classed as `replay_differences` does. `replayed` are
    the positions at which the replay's steps start. None where tokens and steps agree. Ties of the text are
    float32's.
    """
    near = near_tokens(trace)
    expected: list[int] = prompt.tokens.tolist()
    parted = parting(
        token_ids, expected, key=prompt.key, prompt=prompt, near=near, tie_margin=TIE_MARGIN_FLOAT32
    )
    decoded = step_starts(step_tokens)
    if parted is None and decoded == list(replayed):
        return None
    position, ranges = last_common(decoded, list(replayed)), rank_ranges(trace)[prompt.key]
    return position, difference_kind(
        step_tokens,
        tree,
        num_heads=None,
        ranges=ranges,
        since=position,
        parted=None if parted is None else (parted.position, parted.kind),
    )


@dataclass(frozen=True)
class Parting:
    """Where two texts part, the reference's top-two gap there, and what that makes of it."""

    position: int
    gap: float | None
    kind: Kind


def parting(
    ids: Sequence[int],
    expected: Sequence[int],
    *,
    key: str,
    prompt: PromptTrace | None,
    near: NearTokens | None,
    tie_margin: float,
) -> Parting | None:
    """Return where two texts part and whether rounding explains it; None where they are equal.

    `expected` is the reference's text and `prompt` its trace.
    """
    if tuple(ids) == tuple(expected):
        return None
    shorter = min(len(ids), len(expected))
    position = next((index for index in range(shorter) if ids[index] != expected[index]), shorter)
    gap = _gap(prompt, tuple(expected), position=position) if position < shorter else None
    is_tie = gap is not None and (gap == 0 or gap < tie_margin)
    # Positions of a trace count from 1, those of a text from 0.
    is_tie &= near is None or (position < shorter and ids[position] in near.get((key, position + 1), ()))
    return Parting(position=position, gap=gap, kind="tie" if is_tie else "bug")


def _gap(prompt: PromptTrace | None, expected: tuple[int, ...], *, position: int) -> float | None:
    """Return the reference's top-two gap at a position; None unless the trace is of this text up to there."""
    if (
        prompt is None
        or prompt.gaps is None
        or tuple(prompt.tokens[: position + 1].tolist()) != expected[: position + 1]
    ):
        return None
    return float(prompt.gaps[position])


@dataclass(frozen=True)
class RankRanges:
    """The lowest and highest rank that rounding allows, of one traced prompt in row i and head k.

    Positions in `unknown` have no ranks.
    """

    lowest: list[list[int]]
    highest: list[list[int]]
    unknown: set[int]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the prompt's trace has."""
        return len(self.lowest)

    def kept_tokens(self, tree: DraftTree, position: int, *, num_heads: int | None) -> set[int]:
        """Return the numbers of tokens that a step at `position` may keep.

        A path goes on to each child whose rank is possible, and may end wherever some possible rank has no
        child.
        """
        lowest, highest = self.lowest[position - 1][:num_heads], self.highest[position - 1][:num_heads]
        lengths, nodes = list[int](), [0]
        for depth, (low, high) in enumerate(zip(lowest, highest, strict=True)):
            children = [
                [child for child in tree.children[node] if low <= tree.ranks[child] <= high] for node in nodes
            ]
            if any(len(some) <= high - low for some in children):
                lengths.append(depth + 1)
            nodes = [child for some in children for child in some]
        if nodes:
            lengths.append(len(lowest) + 1)
        return {min(length, self.num_tokens - position) for length in lengths}


def near_tokens(trace: Trace | None) -> NearTokens | None:
    """Return the tokens that rounding may put first, by prompt and position.

    None for a trace that does not list them.
    """
    listed = trace.provenance.extra.get(TEXT_TIES_KEY) if trace is not None else None
    if not isinstance(listed, list):
        return None
    return {
        (str(row[0]), int(str(row[1]))): [int(str(cell)) for cell in row[2:]]
        for row in listed
        if isinstance(row, list)
    }


def rank_ranges(trace: Trace) -> dict[str, RankRanges]:
    """Return the ranges of every prompt: its ranks themselves but where the provenance lists a head tie."""
    ranges = {
        prompt.key: RankRanges(prompt.ranks.tolist(), prompt.ranks.tolist(), set())
        for prompt in trace.prompts
    }
    listed = trace.provenance.extra.get(HEAD_TIES_KEY, [])
    for row in listed if isinstance(listed, list) else []:
        if not isinstance(row, list) or str(row[0]) not in ranges:
            continue
        one, (position, head, *bounds) = ranges[str(row[0])], (int(str(cell)) for cell in row[1:])
        if bounds:
            one.lowest[position - 1][head - 1], one.highest[position - 1][head - 1] = bounds
        else:
            one.unknown.add(position)
    return ranges


def difference_kind(
    step_tokens: Sequence[int],
    tree: DraftTree,
    *,
    num_heads: int | None,
    ranges: RankRanges,
    since: int,
    parted: tuple[int, Kind] | None,
) -> Kind:
    """Class the difference between decoded and replayed steps that begins with the step at `since`.

    `parted` is where the texts themselves part, and what that parting is; None where they agree.
    """
    for start, kept in zip(step_starts(step_tokens), step_tokens, strict=True):
        if start < since:
            continue
        if parted is not None and start + kept > parted[0]:
            return parted[1]
        if start in ranges.unknown:
            return "tie"
        if start >= ranges.num_tokens or kept not in ranges.kept_tokens(tree, start, num_heads=num_heads):
            return "bug"
    return "tie" if 1 + sum(step_tokens) == ranges.num_tokens else "bug"


def step_starts(step_tokens: Sequence[int]) -> list[int]:
    """Return the positions at which the steps of a generation started."""
    return list(accumulate(step_tokens, initial=1))[:-1]


def last_common(decoded: list[int], expected: list[int]) -> int:
    """Return the position of the last step that both started; what it accepted differs."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(decoded, expected, strict=False))
    return max((first for first, _ in same), default=1)
