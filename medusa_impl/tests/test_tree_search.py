"""Tree search: growth against every possible tree, acceptance lengths, choice of size, dense trees."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medusa_impl.errors import UserError
from medusa_impl.tree import DraftTree, RankPath, cartesian_num_nodes
from medusa_impl.tree_search import (
    GrownTree,
    best_size_for_cost,
    grow_by_joint_hits,
    grow_by_marginals,
    marginal_accuracies,
    random_dense,
)

Table = NDArray[np.int64]
NUM_HEADS, NUM_RANKS = 2, 3  # twelve non-root nodes: every tree can be listed


@cache
def _every_tree(num_nodes: int) -> list[tuple[RankPath, ...]]:
    nodes = [path for depth in (1, 2) for path in product(range(NUM_RANKS), repeat=depth)]
    subsets = (set(subset) | {()} for subset in combinations(nodes, num_nodes - 1))
    return [tuple(subset) for subset in subsets if all(path[:-1] in subset for path in subset if path)]


def _best(values: dict[RankPath, float], num_nodes: int) -> float:
    return max(sum(values[path] for path in paths) for paths in _every_tree(num_nodes))


def _longest_prefix(row: list[int], tree: DraftTree) -> int:
    return max(len(path) for path in tree.paths if tuple(row[: len(path)]) == path)


@st.composite
def rank_tables(draw: st.DrawFn) -> Table:
    """Random ranks of one text, with -1 after its end, so the last row is -1 throughout."""
    n, num_heads = draw(st.integers(2, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ranks = rng.geometric(draw(st.floats(0.2, 0.9)), (n, num_heads)).astype(np.int64) - 1
    ranks[np.arange(1, n + 1)[:, None] + np.arange(1, num_heads + 1) > n] = -1
    return ranks


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.integers(0, 4), min_size=NUM_RANKS, max_size=NUM_RANKS),
        min_size=NUM_HEADS,
        max_size=NUM_HEADS,
    )
)
def test_growth_by_marginals_is_best_at_every_size(weights: list[list[int]]) -> None:
    accuracy = np.array(weights) / 16
    grown = grow_by_marginals(accuracy, num_nodes=8)
    values = {
        path: float(accuracy[0, path[0]] * accuracy[1, path[1]])
        for path in product(range(NUM_RANKS), repeat=2)
    }
    values |= {(rank,): float(accuracy[0, rank]) for rank in range(NUM_RANKS)} | {(): 1.0}
    for size in range(1, 9):
        assert grown.expected_acceptance_length(size) == pytest.approx(_best(values, size))
        assert sum(values[path] for path in grown.nested(size).paths) == pytest.approx(
            grown.expected_acceptance_length(size)
        )


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_growth_by_joint_hits_is_best_at_every_size(seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, NUM_RANKS + 1, (20, NUM_HEADS))
    grown = grow_by_joint_hits(rows, num_nodes=8, max_rank=NUM_RANKS)
    prefixes = [path for depth in (0, 1, 2) for path in product(range(NUM_RANKS), repeat=depth)]
    values = {
        path: float(np.mean([tuple(row[: len(path)]) == path for row in rows.tolist()])) for path in prefixes
    }
    for size in range(1, 9):
        assert grown.expected_acceptance_length(size) == pytest.approx(_best(values, size))


@given(ranks=rank_tables(), num_nodes=st.integers(1, 5))
def test_joint_expectation_is_the_mean_over_positions(ranks: Table, num_nodes: int) -> None:
    """The expectation is exactly what the grown tree yields on the positions that it was grown on.

    Positions that no token follows are left out.
    """
    grown = grow_by_joint_hits(ranks, num_nodes=num_nodes, max_rank=6)
    rows = [row for row in ranks.tolist() if row[0] >= 0]
    for size in range(1, num_nodes + 1):
        mean = sum(1 + _longest_prefix(row, grown.nested(size)) for row in rows) / len(rows)
        assert grown.expected_acceptance_length(size) == pytest.approx(mean)


def test_both_growths_agree_where_heads_are_independent() -> None:
    """The two growths agree if the rows make the joint law the product of the heads' shares.

    Such rows hold every combination as often as the product says.
    """
    shares = [(5, 3, 2), (7, 2, 1)]
    rows = [
        pair for pair in product(range(3), repeat=2) for _ in range(shares[0][pair[0]] * shares[1][pair[1]])
    ]
    by_joint = grow_by_joint_hits(np.array(rows), num_nodes=12, max_rank=3)
    by_marginals = grow_by_marginals(marginal_accuracies(np.array(rows), max_rank=3), num_nodes=12)
    assert by_joint.growth == by_marginals.growth
    assert by_joint.values == pytest.approx(by_marginals.values)


def test_joint_growth_sees_what_marginals_cannot() -> None:
    """Head 2 is right exactly when head 1 is, which only the joint growth sees.

    The product undervalues (0, 0) and prefers (1,), which is worth less.
    """
    rows = np.array([[0, 0]] * 4 + [[1, 3]] * 3 + [[2, 3]] * 3)
    by_marginals = grow_by_marginals(marginal_accuracies(rows, max_rank=3), num_nodes=3)
    by_joint = grow_by_joint_hits(rows, num_nodes=3, max_rank=3)
    assert by_marginals.growth == ((), (0,), (1,))
    assert by_joint.growth == ((), (0,), (0, 0))
    assert by_joint.expected_acceptance_length(3) == pytest.approx(1.8)


def test_the_example_of_the_docstring() -> None:
    grown = grow_by_marginals([[0.6, 0.2], [0.5, 0.1]], num_nodes=6)
    assert grown.growth == ((), (0,), (0, 0), (1,), (1, 0), (0, 1))
    assert grown.expected_acceptance_length(6) == pytest.approx(1 + 0.6 + 0.3 + 0.2 + 0.1 + 0.06)


@given(ranks=rank_tables())
def test_growth_is_nested_and_its_values_never_rise(ranks: Table) -> None:
    for grown in (
        grow_by_joint_hits(ranks, num_nodes=6, max_rank=5),
        grow_by_marginals(marginal_accuracies(ranks, max_rank=5), num_nodes=6),
    ):
        assert list(grown.values) == sorted(grown.values, reverse=True)
        assert grown.tree == grown.nested(6)
        for size in range(2, 7):
            assert set(grown.nested(size).paths) - set(grown.nested(size - 1).paths) == {
                grown.growth[size - 1]
            }


def test_a_smaller_search_is_a_prefix_of_a_larger_one() -> None:
    ranks = np.random.default_rng(3).geometric(0.5, (200, 4)) - 1
    large = grow_by_joint_hits(ranks, num_nodes=40, max_rank=8)
    for size in (1, 2, 17, 39):
        assert grow_by_joint_hits(ranks, num_nodes=size, max_rank=8).growth == large.growth[:size]


def test_ties_go_to_the_shallower_node_then_the_smaller_path() -> None:
    assert grow_by_marginals([[1.0, 1.0], [1.0, 1.0]], num_nodes=5).growth == ((), (0,), (1,), (0, 0), (0, 1))
    assert grow_by_joint_hits([[5, 5]], num_nodes=4, max_rank=2).growth == ((), (0,), (1,), (0, 0))


def test_ranks_of_an_unordered_head_may_leave_gaps() -> None:
    """Measured accuracies need not fall with the rank: a node may come before its sibling of better rank."""
    grown = grow_by_marginals([[0.1, 0.0, 0.7]], num_nodes=3)
    assert grown.growth == ((), (2,), (0,))


def test_max_rank_and_max_depth_bound_the_tree() -> None:
    ranks = np.array([[12, 0], [12, 0], [1, 0]])
    assert (12,) not in grow_by_joint_hits(ranks, num_nodes=4, max_rank=12).growth
    assert grow_by_joint_hits(ranks, num_nodes=3, max_rank=13).growth == ((), (12,), (12, 0))
    assert grow_by_joint_hits(ranks, num_nodes=3, max_rank=13, max_depth=1).growth == ((), (12,), (1,))
    assert grow_by_marginals([[0.9], [0.9]], num_nodes=2, max_depth=1).tree.depth == 1


@given(ranks=rank_tables())
def test_marginals_count_only_where_a_head_could_be_right(ranks: Table) -> None:
    accuracy = marginal_accuracies(ranks, max_rank=4)
    for k, column in enumerate(ranks.T.tolist()):
        tried = [rank for rank in column if rank >= 0]
        for rank in range(4):
            assert accuracy[k, rank] == pytest.approx(tried.count(rank) / len(tried) if tried else 0.0)


@pytest.mark.parametrize(
    ("accuracy", "num_nodes"),
    [([[0.5]], 3), ([[0.5]], 0), ([[1.5]], 2), ([[float("nan")]], 2), ([[-0.1]], 2), ([0.5], 2)],
)
def test_bad_marginals_are_refused(accuracy: list[list[float]], num_nodes: int) -> None:
    with pytest.raises(UserError):
        grow_by_marginals(accuracy, num_nodes=num_nodes)


@pytest.mark.parametrize("ranks", [[[-1, -1]], [[-2, 0]], [[0.0, 1.0]], [0, 1], np.zeros((3, 0), dtype=int)])
def test_bad_rank_tables_are_refused(ranks: list[list[int]]) -> None:
    with pytest.raises(UserError):
        grow_by_joint_hits(ranks, num_nodes=2, max_rank=2)


def test_bad_bounds_are_refused() -> None:
    for bounds in ({"max_rank": 0}, {"max_rank": 2, "max_depth": 0}):
        with pytest.raises(UserError):
            grow_by_joint_hits([[0, 0]], num_nodes=2, **bounds)


def _grown() -> GrownTree:
    return GrownTree(growth=((), (0,), (1,), (2,)), values=(1.0, 0.5, 0.3, 0.1))


def test_the_size_with_most_tokens_per_cost_wins() -> None:
    grown = _grown()

    def tokens(tree: DraftTree) -> float:
        return grown.expected_acceptance_length(tree.num_nodes)

    choice = best_size_for_cost(grown, tokens, cost=lambda num_nodes: 1 + num_nodes / 8, sizes=(4, 1, 2))
    assert [point.tree.num_nodes for point in choice.points] == [1, 2, 4]
    assert [point.tokens_per_cost for point in choice.points] == pytest.approx(
        [1 / 1.125, 1.5 / 1.25, 1.9 / 1.5]
    )
    assert choice.best is choice.points[2]
    dear = best_size_for_cost(grown, tokens, cost=float, sizes=range(1, 5))
    assert dear.best.tree == DraftTree.root_only()


def test_equal_worth_goes_to_the_smaller_tree() -> None:
    assert (
        best_size_for_cost(
            _grown(), lambda tree: float(tree.num_nodes), cost=float, sizes=(4, 2)
        ).best.tree.num_nodes
        == 2
    )


def test_bad_sizes_and_costs_are_refused() -> None:
    grown = _grown()
    for sizes, price in (((), 1.0), ((5,), 1.0), ((0,), 1.0), ((2,), 0.0), ((2,), float("nan"))):
        with pytest.raises(UserError):
            best_size_for_cost(grown, lambda _tree: 1.0, cost=lambda _n, price=price: price, sizes=sizes)  # type: ignore[misc]


@pytest.mark.parametrize("num_nodes", [3, 4, 8, 64, 256])
@pytest.mark.parametrize("num_heads", [1, 3, 5])
def test_random_dense_trees_are_cartesian_and_close_from_below(num_nodes: int, num_heads: int) -> None:
    for seed in range(5):
        tree = random_dense(num_nodes, num_heads=num_heads, rng=np.random.default_rng(seed))
        assert tree == DraftTree.cartesian(tree.num_ranks)
        assert min(tree.num_ranks) >= 2
        assert tree.depth <= num_heads
        # the single level of num_nodes - 1 always comes this close
        assert 0.95 * num_nodes <= tree.num_nodes <= num_nodes
        assert tree.num_nodes == cartesian_num_nodes(tree.num_ranks)


def test_random_dense_follows_its_seed_and_reaches_several_shapes() -> None:
    shapes = [random_dense(256, num_heads=5, rng=np.random.default_rng(seed)).num_ranks for seed in range(20)]
    assert shapes == [
        random_dense(256, num_heads=5, rng=np.random.default_rng(seed)).num_ranks for seed in range(20)
    ]
    assert len(set(shapes)) > 5
    with pytest.raises(UserError):
        random_dense(2, num_heads=5, rng=np.random.default_rng(0))
