"""Any tree decoded from a trace of greedy decoding: arithmetic on a file, no model, no device.

A prompt's trace is the kept tokens y_1 .. y_n and, in row i and column k, the rank of y_{i+k} in draft head k
read at the state that produced y_i; -1 where i + k > n. Rank = number of tokens with a greater logit, or an
equal logit and a lower id.

Replay of the tree {(), (0), (1), (0,0)} on n = 6 tokens, two heads:

    i   row i     longest path in the tree   hop
    1   ( 0, 0)   (0,0)                      3    y_2 y_3 y_4
    4   ( 5, 0)   ()                         1    y_5
    5   ( 1,-1)   (1)                        1    y_6: two would pass the end, y_6 is the last
    6   (-1,-1)                                   no step: y_6 is known

3 steps for n - 1 = 5 tokens. Exact in float32 but for rounding ties; half precision makes it an
approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError
from harness.records.trace import Ints, Trace
from medusa_impl.tree import DraftTree, RankPath


@dataclass(frozen=True, eq=False)
class Replay:
    """The decoding of one tree over a trace: raw counts by step and by prompt.

    Ratios are formed from the counts once. A step at position i starts when y_i is the last known token; its
    acceptance length is cut at the prompt's last token.
    Shapes: P prompts, S steps of all prompts in order. `num_kept_tokens`, `num_steps` [P]; `positions`,
    `acceptance_lengths` [S].
    """

    trace: Trace
    tree: DraftTree
    batch: int
    num_kept_tokens: Ints
    num_steps: Ints
    positions: Ints
    acceptance_lengths: Ints

    @property
    def total_steps(self) -> int:
        """Return the verification passes of all prompts, each decoded alone."""
        return int(self.num_steps.sum())

    @property
    def tokens_per_step(self) -> float:
        """Return the acceleration rate: sum of n - 1 over sum of steps; 1 exactly for vanilla.

        Raises: UserError if no prompt took a step, which happens only where all end at their first token.
        """
        if not self.total_steps:
            raise UserError(
                found="no decoding step: every prompt ends at its first token",
                need="a prompt of at least two kept tokens",
            )
        return int((self.num_kept_tokens - 1).sum()) / self.total_steps

    @cached_property
    def batch_steps(self) -> Ints:
        """Return the steps of each batch of `batch` prompts in order: those of its slowest row."""
        return np.maximum.reduceat(self.num_steps, np.arange(0, len(self.num_steps), self.batch))

    @cached_property
    def offsets(self) -> Ints:
        """Return where each prompt's steps begin in the step arrays, [P + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_steps)])

    def hops(self, prompt: int) -> Ints:
        """Return the positions i at which the steps of one prompt, given by its index, started."""
        return self.positions[self.offsets[prompt] : self.offsets[prompt + 1]]

    @cached_property
    def context_tokens(self) -> Ints:
        """Return for every step the tokens known when it started, root included: prompt_tokens + i, [S]."""
        prompt_tokens = np.array([prompt.prompt_tokens for prompt in self.trace.prompts])
        return np.repeat(prompt_tokens, self.num_steps) + self.positions

    @cached_property
    def batch_context_tokens(self) -> Ints:
        """Return for every step of every batch the longest context among its rows.

        A row that has finished stays with all its tokens.
        """
        longest: list[Ints] = []
        for first, steps in zip(
            range(0, len(self.num_steps), self.batch), self.batch_steps.tolist(), strict=True
        ):
            context = np.zeros(steps, dtype=np.int64)
            for row in range(first, min(first + self.batch, len(self.num_steps))):
                own = self.context_tokens[self.offsets[row] : self.offsets[row + 1]]
                final = self.trace.prompts[row].prompt_tokens + int(self.num_kept_tokens[row])
                context = np.maximum(context, np.pad(own, (0, steps - len(own)), constant_values=final))
            longest.append(context)
        return np.concatenate(longest)


class ReplayIndex:
    """A trace prepared once, so that thousands of trees replay at the cost of a few passes each.

    Positions are sorted by their rank rows, so the positions whose row starts with a path are one range. A
    tree's nodes are looked up among these ranges; the number of ranges over a position is the depth it
    reaches, whatever the size of the tree.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        ranks = trace.ranks
        self._order = np.lexsort(ranks.T[::-1])  # reversed: numpy takes the last key as the first to sort by
        self._ranges = _prefix_ranges(ranks[self._order])
        self._kept = np.array([prompt.num_kept_tokens for prompt in trace.prompts], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._kept)[:-1]])
        self._reach_of_root = np.arange(1, len(ranks) + 1)  # where a hop of one token lands
        self._prompt_of_row = np.repeat(np.arange(len(self._kept)), self._kept)

    def replay(
        self,
        tree: DraftTree,
        *,
        num_heads: int | None = None,
        budget: int | None = None,
        batch: int | None = None,
    ) -> Replay:
        """Return the decoding of a tree.

        At most `num_heads` heads, `budget` tokens a prompt and batches of `batch` prompts are used. With
        fewer heads than the tree is deep, the tree is pruned to their number. A smaller budget cuts every
        prompt there.
        Raises: UserError if the tree is deeper than the traced heads, or the budget, heads or batch lie
        outside what was traced.
        """
        tree = self._usable(tree, num_heads=num_heads)
        limit = self.trace.provenance.max_new_tokens
        if budget is not None and not 1 <= budget <= limit:
            raise UserError(
                found=f"a budget of {budget} tokens",
                need=f"1 to {limit}, the budget of the trace",
                do="record a longer one",
            )
        if batch is not None and batch < 1:
            raise UserError(found=f"a batch of {batch} prompts", need="at least 1")
        kept = self._kept if budget is None else np.minimum(self._kept, budget)
        last = self._first + kept - 1  # the row of y_n, where no step starts
        landing = np.minimum(self._reach_of_root + self._depths(tree), last[self._prompt_of_row])
        rows = _visited(landing, first=self._first, last=last)
        num_steps = np.diff(np.searchsorted(rows, np.append(self._first, len(landing))))
        return Replay(
            trace=self.trace,
            tree=tree,
            batch=batch or 1,
            num_kept_tokens=kept,
            num_steps=num_steps,
            positions=rows - np.repeat(self._first, num_steps) + 1,
            acceptance_lengths=landing[rows] - rows,
        )

    def _usable(self, tree: DraftTree, *, num_heads: int | None) -> DraftTree:
        traced = self.trace.num_heads
        if num_heads is not None and not 0 <= num_heads <= traced:
            raise UserError(
                found=f"{num_heads} heads asked for", need=f"0 to {traced}, the heads of the trace"
            )
        tree = tree if num_heads is None else tree.pruned(num_heads)
        if tree.depth > traced:
            raise UserError(
                found=f"a tree of depth {tree.depth}",
                need=f"depth {traced} or less, the heads of the trace",
                where=f"tree {tree.fingerprint}",
                do="prune it with num_heads",
            )
        return tree

    def _depths(self, tree: DraftTree) -> Ints:
        """Return for every row the length of the longest prefix that is a node of the tree."""
        found = filter(None, map(self._ranges.get, tree.paths))  # the root has no range: it holds everywhere
        spans = np.fromiter(chain.from_iterable(found), dtype=np.int64).reshape(-1, 2)
        size = len(self._order) + 1
        # The ranges over a row are those of its prefixes in the tree: their number is the depth reached.
        opened, closed = (np.bincount(spans[:, side], minlength=size) for side in (0, 1))
        depths = np.empty(size - 1, dtype=np.int64)
        depths[self._order] = np.cumsum(opened - closed)[:-1]
        return depths


def replay(
    trace: Trace,
    tree: DraftTree,
    *,
    num_heads: int | None = None,
    budget: int | None = None,
    batch: int | None = None,
) -> Replay:
    """Return the decoding of one tree over a trace.

    For many trees prepare a `ReplayIndex` once and ask that.
    """
    return ReplayIndex(trace).replay(tree, num_heads=num_heads, budget=budget, batch=batch)


def _prefix_ranges(rows: NDArray[np.int32]) -> dict[RankPath, tuple[int, int]]:
    """Return the range of rows that begin with a path, for every path that begins a row.

    The rows are those of a lexicographically sorted table.
    """
    ranges: dict[RankPath, tuple[int, int]] = {}
    is_new = np.zeros(len(rows), dtype=bool)
    is_new[0] = True
    for depth in range(1, rows.shape[1] + 1):
        column = rows[:, depth - 1]
        is_new[1:] |= column[1:] != column[:-1]
        starts = np.flatnonzero(is_new)
        stops = np.append(starts[1:], len(rows))
        paths = map(tuple, rows[starts, :depth].tolist())
        ranges.update(zip(paths, zip(starts.tolist(), stops.tolist(), strict=True), strict=True))
    return ranges


def _visited(landing: Ints, *, first: Ints, last: Ints) -> Ints:
    """Return the rows at which steps start, in order.

    They lead from every `first` along `landing` to `last`, which is not one of them. Doubling: with the rows
    of the first 2^r hops and the landing of 2^r hops known, one gather gives twice as many of both. The last
    row of a prompt lands on itself.
    """
    rows, jump = first, landing
    while (jump[first] != last).any():
        rows = np.concatenate([rows, jump[rows]])
        jump = jump[jump]
    is_visited = np.zeros(len(landing), dtype=bool)
    is_visited[rows] = True
    is_visited[last] = False
    return np.flatnonzero(is_visited)
