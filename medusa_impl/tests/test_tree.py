"""DraftTree: canonical order, derived views, refusals that name the path, JSON, Cartesian trees."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_impl import tree as tree_module
from medusa_impl.errors import UserError
from medusa_impl.tree import DraftTree, RankPath, cartesian_num_nodes, largest_cartesian

EXAMPLE: list[RankPath] = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]


@st.composite
def path_sets(draw: st.DrawFn) -> list[RankPath]:
    """Non-root paths of a random tree, in the order they were attached."""
    paths: list[RankPath] = [()]
    for parent, rank in draw(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 25)), min_size=1, max_size=25)
    ):
        path = (*paths[parent % len(paths)], rank)
        if path not in paths:
            paths.append(path)
    return paths[1:]


@given(paths=path_sets(), seed=st.integers(0, 2**32), with_root=st.booleans())
def test_any_order_gives_one_canonical_tree(paths: list[RankPath], seed: int, with_root: bool) -> None:
    shuffled = [*paths, ()] if with_root else list(paths)
    random.Random(seed).shuffle(shuffled)
    tree = DraftTree.from_paths([list(path) for path in shuffled])
    assert tree.paths == tuple(sorted([(), *paths], key=lambda path: (len(path), path)))
    assert tree == DraftTree.from_paths(paths)
    assert tree.fingerprint == DraftTree.from_paths(paths).fingerprint


@given(paths=path_sets())
def test_views_agree_with_the_paths(paths: list[RankPath]) -> None:
    tree = DraftTree.from_paths(paths)
    assert tree.num_nodes == len(paths) + 1
    assert tree.depth == max(map(len, paths))
    assert (tree.parents[0], tree.depths[0], tree.ranks[0]) == (-1, 0, 0)
    for node in range(1, tree.num_nodes):
        parent = tree.parents[node]
        assert parent < node
        assert tree.paths[node] == (*tree.paths[parent], tree.ranks[node])
        assert tree.depths[node] == tree.depths[parent] + 1
        assert node in tree.children[parent]
    for below in tree.children:
        assert list(below) == list(range(below[0], below[0] + len(below))) if below else True
        assert [tree.ranks[node] for node in below] == sorted({tree.ranks[node] for node in below})
    assert sum(map(len, tree.children)) == tree.num_nodes - 1
    assert tree.num_ranks == tuple(
        1 + max(path[-1] for path in paths if len(path) == depth) for depth in range(1, tree.depth + 1)
    )


@given(paths=path_sets())
def test_candidates_run_from_the_root_to_every_leaf(paths: list[RankPath]) -> None:
    tree = DraftTree.from_paths(paths)
    leaves = {path for path in paths if not any(other[:-1] == path for other in paths)}
    assert {tree.paths[leaf] for leaf in tree.leaves} == leaves
    for leaf, candidate in zip(tree.leaves, tree.candidates, strict=True):
        assert [tree.paths[node] for node in candidate] == [
            tree.paths[leaf][:depth] for depth in range(tree.depths[leaf] + 1)
        ]


def test_the_root_alone() -> None:
    tree = DraftTree.root_only()
    assert (tree.num_nodes, tree.depth, tree.parents, tree.num_ranks) == (1, 0, (-1,), ())
    assert (tree.leaves, tree.candidates, tree.children) == ((0,), ((0,),), ((),))
    assert DraftTree.from_json(tree.to_json()) == DraftTree.chain(0) == DraftTree.from_paths([()]) == tree
    tree.check_fits(num_heads=0, vocab_size=1)


def test_rank_ten_does_not_alias_into_the_next_head() -> None:
    """Rank 10 of head 1 is a node of its own.

    The flat index of the released code, with ten ranks a head, takes it for the best token of head 2.
    """
    tree = DraftTree.from_paths([(0,), (10,), (0, 0), (10, 11)])
    assert tree.num_nodes == 5
    assert tree.num_ranks == (11, 12)
    assert [tree.paths[node] for node in tree.children[0]] == [(0,), (10,)]
    with pytest.raises(UserError, match=r"\(10, 11\) without its parent \(10,\)"):
        DraftTree.from_paths([(0,), (0, 0), (10, 11)])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1,), (0,)], r"node \(0,\) twice"),
        ([(), (0,), ()], r"node \(\) twice"),
        ([(0,), (1, 0)], r"\(1, 0\) without its parent \(1,\)"),
        ([(0, 0)], r"\(0, 0\) without its parent \(0,\)"),
        ([(0,), (0, -1)], r"\(0, -1\)"),
        ([(0,), (1.0,)], r"\(1\.0,\)"),
        ([(0,), (True,)], r"\(True,\)"),
        ([(0,), ("1",)], r"\('1',\)"),
        ([(0,), "0"], "'0' in the list"),
        ([0, 1], "0 in the list"),
        ([], "no path"),
    ],
)
def test_bad_paths_are_refused_by_name(paths: list[RankPath], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DraftTree.from_paths(paths)


@pytest.mark.parametrize(
    "paths",
    [
        (),
        ((0,),),
        ((), (1,), (0,)),
        ((), (0,), (0,)),
        ((), (0, 0)),
        ((), (-1,)),
        ((), (True,)),
        ((), (0, 0), (0,)),
    ],
)
def test_the_constructor_takes_canonical_paths_only(paths: tuple[RankPath, ...]) -> None:
    with pytest.raises(UserError):
        DraftTree(paths=paths)


def test_numpy_ranks_become_plain_integers() -> None:
    tree = DraftTree.from_paths(np.array([[3]], dtype=np.int32))
    assert tree.paths == ((), (3,))
    assert type(tree.paths[1][0]) is int


@given(paths=path_sets())
def test_json_round_trip(paths: list[RankPath]) -> None:
    tree = DraftTree.from_paths(paths)
    assert DraftTree.from_json(tree.to_json()) == tree
    assert DraftTree.from_json(tree.to_json(provenance={"trace": "abc"})) == tree
    assert DraftTree.from_json(json.dumps(paths)) == tree
    assert DraftTree.from_json(repr(paths)) == tree


def test_json_from_a_file(tmp_path: Path) -> None:
    tree = DraftTree.from_paths(EXAMPLE)
    file = tmp_path / "tree.json"
    file.write_text(tree.to_json())
    assert DraftTree.from_json(file) == DraftTree.from_json(str(file)) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version":1,"paths":[[0]],"widths":[1]}', "unknown key 'widths'"),
        ('{"schema_version":2,"paths":[[0]]}', "schema_version 2"),
        ('{"schema_version":true,"paths":[[0]]}', "schema_version True"),
        ('{"paths":[[0]]}', "schema_version None"),
        ('{"schema_version":1}', "no paths"),
        ('{"schema_version":1,"paths":7}', "paths = 7"),
        ('{"schema_version":1,"paths":[]}', "no path"),
        ("[[0], [0, 0", "cannot be read"),
        ("[__import__('os').getpid()]", "cannot be read"),
        ("[[0], [0, 0], [0, 0]]", r"\(0, 0\) twice"),
        ("[" * 100_000, "cannot be read"),
        ("no/such/tree.json", "no readable tree"),
        ("", "no readable tree"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DraftTree.from_json(text)


def test_fingerprint_is_the_hash_of_the_canonical_json() -> None:
    tree = DraftTree.from_paths([(1,), (0,)])
    assert tree.to_json() == '{"paths":[[0],[1]],"schema_version":1}'
    assert tree.fingerprint == hashlib.sha256(b'{"paths":[[0],[1]],"schema_version":1}').hexdigest()[:12]
    assert tree.fingerprint != DraftTree.from_paths([(0,), (2,)]).fingerprint


def test_draw_shows_what_the_module_docstring_shows() -> None:
    drawing = DraftTree.from_paths(EXAMPLE).draw()
    indented = "\n".join("    " + line for line in drawing.splitlines())
    assert tree_module.__doc__ is not None
    assert indented in tree_module.__doc__


@given(widths=st.lists(st.integers(1, 4), max_size=4))
def test_cartesian_has_every_combination(widths: list[int]) -> None:
    tree = DraftTree.cartesian(widths)
    expected = {
        path
        for depth in range(len(widths) + 1)
        for path in product(*(range(width) for width in widths[:depth]))
    }
    assert set(tree.paths) == expected
    assert tree.num_nodes == cartesian_num_nodes(widths) == len(expected)
    assert tree == DraftTree.from_paths(expected)


@pytest.mark.parametrize("widths", [(0,), (2, -1), (1.5,), (300, 300)])
def test_bad_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(UserError):
        DraftTree.cartesian(widths)


def test_chain_is_one_line() -> None:
    tree = DraftTree.chain(4)
    assert tree.paths == ((), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))
    assert tree.candidates == ((0, 1, 2, 3, 4),)
    with pytest.raises(UserError, match="depth -1"):
        DraftTree.chain(-1)


def _all_widths(num_heads: int, max_nodes: int) -> list[tuple[int, ...]]:
    vectors = (v for length in range(num_heads + 1) for v in product(range(1, max_nodes), repeat=length))
    return [v for v in vectors if list(v) == sorted(v, reverse=True) and cartesian_num_nodes(v) <= max_nodes]


@pytest.mark.parametrize("num_heads", [0, 1, 2, 3])
@pytest.mark.parametrize("max_nodes", [1, 2, 5, 8, 15, 24])
def test_largest_cartesian_against_every_vector(num_heads: int, max_nodes: int) -> None:
    everything = _all_widths(num_heads, max_nodes)
    widths = largest_cartesian(num_heads, max_nodes)
    most = max(map(cartesian_num_nodes, everything))
    deepest = max(len(v) for v in everything if cartesian_num_nodes(v) == most)
    assert widths == min(v for v in everything if cartesian_num_nodes(v) == most and len(v) == deepest)


def test_largest_cartesian_by_value() -> None:
    def value(widths: tuple[int, ...]) -> float:
        return -abs(sum(widths) - 7) - 0.1 * len(widths)

    assert largest_cartesian(3, 30, value=value) == max(
        _all_widths(3, 30), key=lambda v: (value(v), cartesian_num_nodes(v))
    )
    # 1 + 7 + 14 + 14 + 14 + 14 = 64: all nodes are used, on five levels.
    assert largest_cartesian(5, 64) == (7, 2, 1, 1, 1)
    # (9, 2, 2), (9, 3, 1) and (21, 1, 1) also have 64 nodes on three levels.
    assert largest_cartesian(3, 64) == (7, 4, 1)
    with pytest.raises(UserError):
        largest_cartesian(5, 0)


def test_a_tree_that_does_not_fit_is_refused_by_name() -> None:
    tree = DraftTree.from_paths([(0,), (12,), (0, 3)])
    tree.check_fits(num_heads=2, vocab_size=13)
    with pytest.raises(UserError, match=r"node \(0, 3\) at depth 2.*depth 1 or less"):
        tree.check_fits(num_heads=1, vocab_size=100)
    with pytest.raises(UserError, match=r"rank 12 in node \(12,\)"):
        tree.check_fits(num_heads=5, vocab_size=12)


@given(paths=path_sets(), max_depth=st.integers(0, 6))
def test_pruning_keeps_the_nodes_above(paths: list[RankPath], max_depth: int) -> None:
    pruned = DraftTree.from_paths(paths).pruned(max_depth)
    assert set(pruned.paths) == {(), *(path for path in paths if len(path) <= max_depth)}


def test_the_pure_half_does_not_load_torch() -> None:
    code = (
        "import sys, harness.compose.replay, medusa_impl.tree, medusa_impl.tree_search; "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(tree_module.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "mc_small = [(0,), (1,), (0, 0)]\n",
        "# as it is published\nmc_small: list = [(0,), (0, 0), (1,)]",
        "mc_small=[[0],[1],[0,0]] # lists do too",
        "[(0,), (1,), (0, 0)]",
    ],
)
def test_published_trees_are_read_as_they_are_published(tmp_path: Path, text: str) -> None:
    (tmp_path / "choices.py").write_text(text)
    assert DraftTree.from_json(tmp_path / "choices.py").paths == ((), (0,), (1,), (0, 0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = [(0,)]\nb = [(1,)]", r"2 statements \(a, b\); need one tree a file"),
        ("import os", "no list of tuples"),
        ("a = list(range(3))", "cannot be read"),
        ("a: list", "no list of tuples"),
        ("", "no list of tuples"),
        ("[" * 100_000, "cannot be read"),
        ("a = " + "[" * 3000, "cannot be read"),
        ("[" * 900 + "]" * 900, "ranks that are whole numbers"),
        ("[[" + "9" * 5000 + "]]", "cannot be read"),
        ("[[" + "0," * 300 + "0]]", "a path of 301 ranks; need at most 256"),
    ],
)
def test_text_that_is_no_tree_is_refused_in_one_line(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "choices.py").write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        DraftTree.from_json(tmp_path / "choices.py")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_huge_trees_are_refused_before_they_are_built() -> None:
    """A chain of depth 10^9 once took all memory."""
    with pytest.raises(UserError, match="a chain of depth 1000000000; need 0 to 256"):
        DraftTree.chain(10**9)
    with pytest.raises(UserError, match="1000 widths; need at most 256"):
        DraftTree.cartesian((1,) * 1000)
    with pytest.raises(UserError, match="need at most 65536"):
        DraftTree.cartesian((10**18, 10**18))
    assert DraftTree.chain(256).depth == 256
