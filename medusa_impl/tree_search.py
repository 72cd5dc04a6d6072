"""The search for a good tree: grow it node by node from the heads' accuracies, then choose its size.

Example: head 1 is right with its best token in 60 % of all positions and with its second-best in 20 %, so
a_1 = (0.6, 0.2); likewise a_2 = (0.5, 0.1). Each node shows its rank, its value, which is the product of the
accuracies along its path, and in brackets the order in which it is added:

    root (1)
    |- 0  0.60 (2)
    |  |- 0  0.30 (3)
    |  `- 1  0.06 (6)
    `- 1  0.20 (4)
       `- 0  0.10 (5)

A node is never worth more than its parent. So adding, again and again, the best node whose parent is in the
tree gives the best tree of every size.

This module needs no torch.

Paper: Section 2.3.3.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medusa_impl.errors import UserError
from medusa_impl.tree import DraftTree, RankPath, cartesian_num_nodes

DENSE_SLACK = 0.05  # `random_dense` may have fewer nodes than asked for, by up to this share


@dataclass(frozen=True)
class GrownTree:
    """A tree together with the order in which it grew: every prefix is the best tree of its size.

    `growth` starts with the root. `values[i]` is the probability that all tokens of the path `growth[i]` are
    right, which is 1 for the root.
    """

    growth: tuple[RankPath, ...]
    values: tuple[float, ...]

    @cached_property
    def tree(self) -> DraftTree:
        """Return the tree with every node that was grown."""
        return self.nested(len(self.growth))

    def nested(self, num_nodes: int) -> DraftTree:
        """Return the best tree of `num_nodes` nodes, root included: the first ones that grew."""
        self._check_size(num_nodes)
        return DraftTree.from_paths(self.growth[:num_nodes])

    @cached_property
    def expected_acceptance_lengths(self) -> tuple[float, ...]:
        """Return the expected acceptance length of `nested(1)`, `nested(2)`, ..

        The acceptance length counts every accepted node once, so its expectation is the sum of the values.

        Units: tokens per step, the root included.
        Departs: every position of the text counts equally here. Decoding starts its steps more often after a
        wrong token, and stops at the last token; only a replay gives the length that decoding reaches.
        """
        return tuple(float(total) for total in np.cumsum(self.values))

    def expected_acceptance_length(self, num_nodes: int) -> float:
        """Return the expected acceptance length of `nested(num_nodes)`."""
        self._check_size(num_nodes)
        return self.expected_acceptance_lengths[num_nodes - 1]

    def _check_size(self, num_nodes: int) -> None:
        if not 1 <= num_nodes <= len(self.growth):
            raise UserError(
                found=f"a tree of {num_nodes} nodes",
                need=f"1 to {len(self.growth)} nodes, the number that was grown",
            )


def marginal_accuracies(ranks: ArrayLike, *, max_rank: int) -> NDArray[np.float64]:
    """Return a_k^(i): how often the token of rank i of head k was the true token.

    The share is taken over the positions at which head k has a true token. A head without such a position
    gets zeros.

    Shapes: ranks `[n, K]`, the rank of the true token in each head, -1 after the end of the text; result
    `[K, max_rank]`, for ranks 0 .. max_rank - 1.
    Paper: Section 2.3.3.
    Departs: the released script divides by one number of positions for all heads, though later heads have
    fewer.
    """
    table = _as_ranks(ranks)
    _check_max_rank(max_rank)
    tried = np.maximum((table >= 0).sum(axis=0), 1)
    counts = np.stack([_rank_counts(column, max_rank=max_rank) for column in table.T])
    return np.asarray(counts / tried[:, None], dtype=np.float64)


def grow_by_marginals(accuracy: ArrayLike, *, num_nodes: int, max_depth: int | None = None) -> GrownTree:
    """Return the paper's tree: a node's value is the product of the accuracies along its path.

    This treats the errors of different heads as independent. Of equal values the shallower node is added
    first, then the smaller path.

    Shapes: accuracy `[K, R]`, row k - 1 the accuracies a_k^(0 .. R - 1).
    Raises: UserError if an accuracy is not between 0 and 1, or fewer than `num_nodes` nodes exist.
    Paper: Section 2.3.3.
    """
    table = np.asarray(accuracy, dtype=np.float64)
    if table.ndim != 2 or not ((table >= 0) & (table <= 1)).all():
        raise UserError(
            found=f"accuracies of shape {table.shape}", need="a table [heads, ranks] of numbers from 0 to 1"
        )
    rows = table[: _depth_limit(max_depth, len(table))].tolist()

    def expand(path: RankPath, value: float) -> Iterator[tuple[float, int]]:
        if len(path) < len(rows):
            for rank, share in enumerate(rows[len(path)]):
                yield value * share, rank

    return _grow(expand, num_nodes=num_nodes)


def grow_by_joint_hits(
    ranks: ArrayLike, *, num_nodes: int, max_rank: int, max_depth: int | None = None
) -> GrownTree:
    """Return the tree in which a node's value is the share of positions at which its whole path is right.

    Unlike a product of accuracies, this share sees that heads tend to be right together and wrong together.
    It never rises along a path, so best-first growth gives the best tree for the positions given. A position
    at the end of the text (first rank -1) starts no step, and is left out. Of equal shares, also of 0, the
    shallower node is added first, then the smaller path.

    Shapes: ranks `[n, K]`, -1 after the end of the text; ranks 0 .. max_rank - 1 may enter the tree.
    Raises: UserError if no position is left, or fewer than `num_nodes` nodes exist.
    Departs: Section 2.3.3 multiplies the accuracies of single heads.
    """
    table = _as_ranks(ranks)
    _check_max_rank(max_rank)
    table = table[table[:, 0] >= 0, : _depth_limit(max_depth, table.shape[1])]
    if not len(table):
        raise UserError(found="no position that a token follows", need="a trace of at least two tokens")
    # For each path of the tree, the rows whose ranks start with it. A node's rows are found among its
    # parent's, so that the whole table is searched only once, for the root.
    reaching: dict[RankPath, NDArray[np.int64]] = {}

    def expand(path: RankPath, _value: float) -> Iterator[tuple[float, int]]:
        rows = reaching[path[:-1]][reaching[path[:-1]][:, len(path) - 1] == path[-1]] if path else table
        if len(path) < table.shape[1]:
            reaching[path] = rows
            for rank, count in enumerate(_rank_counts(rows[:, len(path)], max_rank=max_rank).tolist()):
                yield count / len(table), rank

    return _grow(expand, num_nodes=num_nodes)


def _grow(expand: Callable[[RankPath, float], Iterable[tuple[float, int]]], *, num_nodes: int) -> GrownTree:
    """Return the tree that best-first growth gives.

    `expand(path, value)` yields (value, rank) of each child. It is called once, when the path is added.
    """
    if num_nodes < 1:
        raise UserError(found=f"a tree of {num_nodes} nodes", need="at least 1: the root")
    # `heapq` pops the smallest entry: so values are negative, and ties go by depth, then by path.
    heap: list[tuple[float, int, RankPath]] = [(-1.0, 0, ())]
    growth: list[RankPath] = []
    values: list[float] = []
    while heap and len(growth) < num_nodes:
        negative, depth, path = heapq.heappop(heap)
        growth.append(path)
        values.append(-negative)
        for value, rank in expand(path, -negative):
            heapq.heappush(heap, (-value, depth + 1, (*path, rank)))
    if len(growth) < num_nodes:
        need = f"at most {len(growth)} nodes, which is all that these heads and ranks allow"
        raise UserError(found=f"a tree of {num_nodes} nodes", need=need, do="raise the number of ranks")
    return GrownTree(growth=tuple(growth), values=tuple(values))


@dataclass(frozen=True)
class SizePoint:
    """One nested tree, its tokens per step, and the cost of a step in the unit of the caller's `cost`."""

    tree: DraftTree
    tokens_per_step: float
    cost: float

    @property
    def tokens_per_cost(self) -> float:
        """Return tokens per unit of cost, which the search maximises."""
        return self.tokens_per_step / self.cost


@dataclass(frozen=True)
class SizeChoice:
    """The best point of a search over sizes, and all points that were compared, in order of size."""

    best: SizePoint
    points: tuple[SizePoint, ...]


def best_size_for_cost(
    grown: GrownTree,
    tokens_per_step: Callable[[DraftTree], float],
    *,
    cost: Callable[[int], float],
    sizes: Iterable[int],
) -> SizeChoice:
    """Return the nested tree with the most tokens per unit of cost.

    `cost(num_nodes)` is the cost of one step. Ties go to the smaller tree.

    Raises: UserError if there is no size, a size was not grown, or a cost is not positive.
    """
    points = []
    for size in sorted(set(sizes)):
        tree = grown.nested(size)
        if not (price := cost(size)) > 0:
            raise UserError(found=f"cost {price} for {size} nodes", need="a cost above 0")
        points.append(SizePoint(tree=tree, tokens_per_step=tokens_per_step(tree), cost=price))
    if not points:
        raise UserError(found="no size to compare", need="at least one number of nodes")
    return SizeChoice(best=max(points, key=lambda point: point.tokens_per_cost), points=tuple(points))


def random_dense(num_nodes: int, *, num_heads: int, rng: np.random.Generator) -> DraftTree:
    """Return a random dense tree of about `num_nodes` nodes, with which sparse trees are compared.

    Dense means Cartesian, with at least two children at every node above the last level. The widths may have
    any order and one to `num_heads` levels. All trees with at most `num_nodes` nodes and at most 5 % fewer
    are equally likely. Where there is no such tree, the largest ones below `num_nodes` are.

    Raises: UserError if `num_nodes` is below 3, the smallest dense tree, or there is no head.
    Paper: Section 3.3.1, Figure 4.
    Departs: the paper does not say how it samples dense trees.
    """
    if num_nodes < 3 or num_heads < 1:
        raise UserError(
            found=f"a dense tree of {num_nodes} nodes for {num_heads} heads",
            need="at least 3 nodes and one head",
        )
    vectors = _dense_widths(num_nodes, num_heads=num_heads)
    sizes = [cartesian_num_nodes(widths) for widths in vectors]
    floor = min(max(sizes), (1 - DENSE_SLACK) * num_nodes)
    close = [widths for widths, size in zip(vectors, sizes, strict=True) if size >= floor]
    return DraftTree.cartesian(close[int(rng.integers(len(close)))])


def _dense_widths(max_nodes: int, *, num_heads: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    # Each entry: widths, number of nodes of the last level, number of nodes in all.
    stack: list[tuple[tuple[int, ...], int, int]] = [((), 1, 1)]
    while stack:
        widths, level, total = stack.pop()
        for width in range(2, (max_nodes - total) // level + 1):
            longer = (*widths, width)
            found.append(longer)
            if len(longer) < num_heads:
                stack.append((longer, level * width, total + level * width))
    return found


def _as_ranks(ranks: ArrayLike) -> NDArray[np.int64]:
    table = np.asarray(ranks)
    if (
        table.ndim != 2
        or not table.shape[1]
        or not np.issubdtype(table.dtype, np.integer)
        or (table < -1).any()
    ):
        raise UserError(
            found=f"ranks of shape {table.shape} and type {table.dtype}",
            need="whole numbers from -1 up, of shape [positions, heads]",
        )
    return table.astype(np.int64, copy=False)


def _rank_counts(column: NDArray[np.int64], *, max_rank: int) -> NDArray[np.int64]:
    return np.bincount(column[(column >= 0) & (column < max_rank)], minlength=max_rank)


def _check_max_rank(max_rank: int) -> None:
    if max_rank < 1:
        raise UserError(found=f"max_rank {max_rank}", need="at least 1")


def _depth_limit(max_depth: int | None, num_heads: int) -> int:
    if max_depth is not None and max_depth < 1:
        raise UserError(found=f"max_depth {max_depth}", need="at least 1")
    return num_heads if max_depth is None else min(max_depth, num_heads)
