"""Which tree to verify: grown node by node from what the heads get right, then cut where a device makes it
fastest; torch-free.

Growing the canonical tree from a_1 = (0.6, 0.2) and a_2 = (0.5, 0.1); the number in brackets is the order of
addition:

    root (1)
    |- 0  0.60 (2)
    |  |- 0  0.30 (3)
    |  `- 1  0.06 (6)
    `- 1  0.20 (4)
       `- 0  0.10 (5)

A node is worth at most as much as its parent, so taking the best node whose parent is in gives, at every
size, the best tree of that size.
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

DENSE_SLACK = 0.05  # random_dense may stay below the node count asked for by this share


@dataclass(frozen=True)
class GrownTree:
    """A tree and the order in which it grew, so that every prefix is the best tree of its size.

    `growth` starts at the root; `values[i]` is the chance that the path `growth[i]` is right, 1 for the root.
    """

    growth: tuple[RankPath, ...]
    values: tuple[float, ...]

    @cached_property
    def tree(self) -> DraftTree:
        """The tree with every node that was grown."""
        return self.nested(len(self.growth))

    def nested(self, num_nodes: int) -> DraftTree:
        """The best tree of `num_nodes` nodes, root counted: the first so many that grew."""
        self._check_size(num_nodes)
        return DraftTree.from_paths(self.growth[:num_nodes])

    @cached_property
    def expected_acceptance_lengths(self) -> tuple[float, ...]:
        """The expected acceptance length of `nested(1)`, `nested(2)`, ..: sums of the values.

        Departs: positions count equally here, whereas decoding starts its steps more often after a miss and
        stops at the last token: a replay gives what is realised.
        """
        return tuple(float(total) for total in np.cumsum(self.values))

    def expected_acceptance_length(self, num_nodes: int) -> float:
        """The expected acceptance length of `nested(num_nodes)`."""
        self._check_size(num_nodes)
        return self.expected_acceptance_lengths[num_nodes - 1]

    def _check_size(self, num_nodes: int) -> None:
        if not 1 <= num_nodes <= len(self.growth):
            raise UserError(
                found=f"a tree of {num_nodes} nodes",
                need=f"1 to {len(self.growth)} nodes, as many as were grown",
            )


def marginal_accuracies(ranks: ArrayLike, *, max_rank: int) -> NDArray[np.float64]:
    """How often each rank of each head was the true token, counted over the positions that head could be
    right at.

    Shapes: `ranks` [n, K], -1 beyond the end of the text -> [K, max_rank]; ranks 0 .. max_rank - 1 are
    counted. A head that was never tried gets zeros.
    Paper: a_k^(i) of section 2.3.3.
    Departs: the released script divides by one fixed number of positions for all heads, though later heads
    have fewer.
    """
    table = _as_ranks(ranks)
    _check_max_rank(max_rank)
    tried = np.maximum((table >= 0).sum(axis=0), 1)
    counts = np.stack([_rank_counts(column, max_rank=max_rank) for column in table.T])
    return np.asarray(counts / tried[:, None], dtype=np.float64)


def grow_by_marginals(accuracy: ArrayLike, *, num_nodes: int, max_depth: int | None = None) -> GrownTree:
    """The tree that the paper grows: a node's value is the product of its ranks' accuracies, as if the heads
    erred independently.

    Equal values go to the shallower node, then to the smaller path.
    Shapes: `accuracy` [K, R], row k - 1 the accuracies a_k^(0..R-1).
    Raises: UserError if an accuracy is no probability, or fewer than `num_nodes` nodes exist.
    Paper: section 2.3.3.
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
    """The tree that the trace itself prefers: a node's value is the share of positions whose true tokens
    start with its path.

    Unlike the product of marginals this sees that heads are right and wrong together. Counts fall along a
    path, so best-first growth is optimal on the positions given. Positions with nothing after them (first
    rank -1) start no step and are left out. Equal counts, zero included, go to the shallower node, then to
    the smaller path.
    Shapes: `ranks` [n, K], -1 beyond the end of the text; ranks 0 .. max_rank - 1 may enter the tree.
    Raises: UserError if no position is left, or fewer than `num_nodes` nodes exist.
    Departs: from section 2.3.3, which multiplies marginals.
    """
    table = _as_ranks(ranks)
    _check_max_rank(max_rank)
    table = table[table[:, 0] >= 0, : _depth_limit(max_depth, table.shape[1])]
    if not len(table):
        raise UserError(found="no position with a token after it", need="a trace of at least two tokens")
    reaching: dict[RankPath, NDArray[np.int64]] = {}  # the rows that start with a path of the tree

    def expand(path: RankPath, _value: float) -> Iterator[tuple[float, int]]:
        rows = reaching[path[:-1]][reaching[path[:-1]][:, len(path) - 1] == path[-1]] if path else table
        if len(path) < table.shape[1]:
            reaching[path] = rows
            for rank, count in enumerate(_rank_counts(rows[:, len(path)], max_rank=max_rank).tolist()):
                yield count / len(table), rank

    return _grow(expand, num_nodes=num_nodes)


def _grow(expand: Callable[[RankPath, float], Iterable[tuple[float, int]]], *, num_nodes: int) -> GrownTree:
    """Best-first growth; `expand(path, value)` yields (value, rank) of the children and is called once, when
    the path is taken.
    """
    if num_nodes < 1:
        raise UserError(found=f"a tree of {num_nodes} nodes", need="at least 1: the root")
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
        need = f"at most {len(growth)}: heads and ranks allow no more"
        raise UserError(found=f"a tree of {num_nodes} nodes", need=need, do="raise the number of ranks")
    return GrownTree(growth=tuple(growth), values=tuple(values))


@dataclass(frozen=True)
class SizePoint:
    """One nested tree with what it yields and what it costs, in the unit of the caller's `cost`."""

    tree: DraftTree
    tokens_per_step: float
    cost: float

    @property
    def tokens_per_cost(self) -> float:
        """What the search maximises."""
        return self.tokens_per_step / self.cost


@dataclass(frozen=True)
class SizeChoice:
    """The best point of a search over sizes, and all that were compared, in order of size."""

    best: SizePoint
    points: tuple[SizePoint, ...]


def best_size_for_cost(
    grown: GrownTree,
    tokens_per_step: Callable[[DraftTree], float],
    *,
    cost: Callable[[int], float],
    sizes: Iterable[int],
) -> SizeChoice:
    """The nested tree with the most tokens per unit of cost, where `cost(num_nodes)` is the cost of one step;
    ties go to the smaller.

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
    """A random dense tree of about `num_nodes` nodes, the control of the sparse one.

    Dense means Cartesian, with at least two children at every node above the last level. All width vectors of
    one to `num_heads` levels, in any order of widths, whose tree has at most `num_nodes` nodes and at most 5
    % fewer are equally likely; where there is none, those that come closest from below.
    Raises: UserError if `num_nodes` is below 3, the smallest dense tree, or there is no head.
    Paper: section 3.3.1, Fig. 4.
    Departs: the paper samples dense trees without saying how.
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
    # widths, nodes of the last level, nodes in all
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
            need="whole numbers [positions, heads] from -1 up",
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
