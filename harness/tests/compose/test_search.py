"""The search for a device's fastest tree: the programme against brute force and greedy growth, choices
against enumeration.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compose.replay import ReplayIndex
from harness.compose.search import (
    METHODS,
    CostChoice,
    IndependentProgramme,
    SearchSpace,
    cached_choices,
    search_sizes,
)
from harness.errors import UserError
from harness.records.sweep_cells import Method
from harness.tests.fake_sweep import made_up_trace
from medusa_impl.tree import DraftTree, RankPath
from medusa_impl.tree_search import grow_by_marginals

ROWS = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.05]]
accuracies = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=3)


def all_trees(num_nodes: int, *, depth: int, ranks: int) -> Iterator[DraftTree]:
    """Every tree of a size, by adding every set of paths and keeping the trees among them."""
    paths = [path for level in range(1, depth + 1) for path in _paths(level, ranks)]
    for chosen in combinations(paths, num_nodes - 1):
        if all(path[:-1] in ((), *chosen) for path in chosen):
            yield DraftTree.from_paths([(), *chosen])


@cache
def _paths(level: int, ranks: int) -> tuple[RankPath, ...]:
    if level == 0:
        return ((),)
    return tuple((*path, rank) for path in _paths(level - 1, ranks) for rank in range(ranks))


def value_of(tree: DraftTree, rows: list[list[float]]) -> float:
    return sum(float(np.prod([rows[level][rank] for level, rank in enumerate(path)])) for path in tree.paths)


@pytest.mark.parametrize("rows", [ROWS, [[0.1, 0.6, 0.0], [0.9, 0.9, 0.9]]], ids=["falling", "in any order"])
def test_the_programme_finds_the_best_of_all_trees(rows: list[list[float]]) -> None:
    programme = IndependentProgramme(rows, max_nodes=6)
    for size in range(1, 6):
        best = max(value_of(tree, rows) for tree in all_trees(size, depth=2, ranks=3))
        assert programme.value(size) == pytest.approx(best)
        tree = programme.tree(size)
        assert tree.num_nodes == size and value_of(tree, rows) == pytest.approx(best)


@given(rows=accuracies, size=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_programme_finds_what_greedy_growth_finds(rows: list[list[float]], size: int) -> None:
    """The paper's greedy growth is optimal under independence, for accuracies in any order: shown, not
    assumed.
    """
    size = min(size, sum(3**level for level in range(len(rows) + 1)))
    programme, grown = IndependentProgramme(rows, max_nodes=12), grow_by_marginals(rows, num_nodes=size)
    assert programme.value(size) == pytest.approx(grown.expected_acceptance_length(size))
    assert value_of(programme.tree(size), rows) == pytest.approx(programme.value(size))


def test_sizes_that_heads_and_ranks_do_not_allow() -> None:
    programme = IndependentProgramme([[0.5, 0.2]], max_nodes=5)
    assert programme.tree(3) == DraftTree.cartesian((2,))
    for size in (0, 4, 9):
        with pytest.raises(UserError, match=f"found a tree of {size} nodes"):
            programme.value(size)
    with pytest.raises(UserError, match="numbers from 0 to 1"):
        IndependentProgramme([[1.5]], max_nodes=3)


@pytest.fixture(scope="module")
def index() -> ReplayIndex:
    return ReplayIndex(made_up_trace(2, num_prompts=12))


@pytest.fixture(scope="module")
def space(index: ReplayIndex) -> SearchSpace:
    return SearchSpace(index, max_nodes=24)


def price(num_nodes: int, num_heads: int) -> float:
    return 1 + num_nodes / 40 + num_heads / 20


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_is_the_best_candidate(space: SearchSpace, method: Method) -> None:
    choice = space.choose(method, price)
    merits = [
        candidate.rate / price(candidate.num_nodes, candidate.max_depth)
        for candidate in space.candidates(method)
    ]
    assert choice.promised / choice.step_s == pytest.approx(max(merits))
    assert choice.num_candidates == len(merits) and choice.num_unpriced == 0
    tree = choice.tree()
    assert choice.step_s == pytest.approx(price(tree.num_nodes, tree.depth))


def test_joint_promises_are_replays(index: ReplayIndex, space: SearchSpace) -> None:
    for candidate in space.candidates("joint")[1::7]:
        tree = candidate.build()
        assert (tree.num_nodes, tree.depth) == (candidate.num_nodes, candidate.max_depth)
        assert candidate.rate == pytest.approx(index.replay(tree).tokens_per_step)


def test_dear_nodes_make_small_trees_and_dear_heads_shallow_ones(space: SearchSpace) -> None:
    cheap = space.choose("joint", lambda nodes, heads: 1 + nodes / 1000)
    dear = space.choose("joint", lambda nodes, heads: 1 + nodes / 5)
    assert dear.tree().num_nodes < cheap.tree().num_nodes
    shallow = space.choose("joint", lambda nodes, heads: 1 + nodes / 1000 + (heads > 1) * 10)
    assert shallow.tree().depth == 1 < cheap.tree().depth
    none = space.choose("joint", lambda nodes, heads: 1.0 if nodes == 1 else 50.0)
    assert none.tree() == DraftTree.root_only() and none.promised == 1.0


def test_sizes_without_a_price_are_left_out(space: SearchSpace) -> None:
    choice = space.choose("joint", lambda nodes, heads: price(nodes, heads) if nodes <= 6 else None)
    assert choice.tree().num_nodes <= 6
    assert choice.num_unpriced == sum(candidate.num_nodes > 6 for candidate in space.candidates("joint")) > 0
    with pytest.raises(UserError, match="no size with a price"):
        space.choose("joint", lambda nodes, heads: None)
    with pytest.raises(UserError, match="need a price above 0"):
        space.choose("joint", lambda nodes, heads: 0.0)


def test_more_heads_than_were_traced(index: ReplayIndex) -> None:
    with pytest.raises(UserError, match="need 1 node or more, and 0 to 4 heads"):
        SearchSpace(index, max_nodes=8, num_heads=5)


def test_sizes() -> None:
    assert search_sizes(1) == ()
    assert search_sizes(5) == (2, 3, 4, 5)
    assert search_sizes(70) == (*range(2, 65), 68, 70)


def test_choices_are_kept_by_curve_and_trace(space: SearchSpace, tmp_path: Path) -> None:
    searched: list[int] = []

    def search() -> list[CostChoice]:
        searched.append(1)
        return [space.choose(method, price) for method in METHODS]

    found = cached_choices(space.key, curve_fingerprint="one", folder=tmp_path / "trees", search=search)
    assert (
        cached_choices(space.key, curve_fingerprint="one", folder=tmp_path / "trees", search=search) == found
    )
    assert len(searched) == 1
    cached_choices(space.key, curve_fingerprint="two", folder=tmp_path / "trees", search=search)
    cached_choices("another space", curve_fingerprint="one", folder=tmp_path / "trees", search=search)
    assert len(searched) == 3
    for path in (tmp_path / "trees").iterdir():
        path.write_text(path.read_text()[:50])  # a kill, or another version
    assert (
        cached_choices(space.key, curve_fingerprint="one", folder=tmp_path / "trees", search=search) == found
    )
    assert len(searched) == 4
    assert cached_choices(space.key, curve_fingerprint="one", folder=None, search=search) == found
    assert len(searched) == 5


def test_the_key_of_a_space_follows_the_text() -> None:
    keys = {SearchSpace(ReplayIndex(made_up_trace(seed)), max_nodes=4).key for seed in (1, 1, 2)}
    assert len(keys) == 2
