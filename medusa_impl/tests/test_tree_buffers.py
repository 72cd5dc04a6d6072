"""The tensors of a tree against definitions on its rank paths."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

CPU = torch.device("cpu")


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(0, 25))):
        parents = [(), *sorted(paths)]
        paths.add((*parents[draw(st.integers(0, len(parents) - 1))], draw(st.integers(0, 14))))
    return DraftTree.from_paths([(), *paths])


@settings(max_examples=60, deadline=None)
@given(tree=trees())
def test_buffers_say_what_the_rank_paths_say(tree: DraftTree) -> None:
    buffers, paths, n = tree_buffers(tree, device=CPU), tree.paths, tree.num_nodes
    assert buffers.num_nodes == n == len(buffers.depths) == len(buffers.parents)
    assert buffers.visible.dtype == torch.bool
    assert buffers.visible.tolist() == [
        [paths[a][: len(paths[b])] == paths[b] for b in range(n)] for a in range(n)
    ]
    assert buffers.depths.tolist() == [len(path) for path in paths]
    assert [paths[parent] for parent in buffers.parents.tolist()] == [path[:-1] for path in paths]
    assert buffers.draft_index.tolist() == [
        (len(path) - 1) * buffers.num_ranks + path[-1] for path in paths[1:]
    ]
    assert buffers.num_ranks == max((path[-1] + 1 for path in paths[1:]), default=0)


@settings(max_examples=60, deadline=None)
@given(tree=trees())
def test_paths_are_padded_with_the_root_and_children_with_no_node(tree: DraftTree) -> None:
    """Regression: padding that is the index of a node may be accepted like that node.

    The root is safe, because it is never counted along a path (see the acceptance tests).
    """
    buffers, paths, n = tree_buffers(tree, device=CPU), tree.paths, tree.num_nodes
    leaves = [
        path for path in paths if not any(other[: len(path)] == path and other != path for other in paths)
    ]
    assert buffers.paths.shape == (len(leaves), tree.depth + 1)
    for leaf, row in zip(leaves, buffers.paths.tolist(), strict=True):
        assert [paths[node] for node in row[: len(leaf) + 1]] == [
            leaf[:depth] for depth in range(len(leaf) + 1)
        ]
        assert row[len(leaf) + 1 :] == [0] * (tree.depth - len(leaf))
    for node, row in enumerate(buffers.children.tolist()):
        children = [child for child in row if child != n]
        assert row == children + [n] * (len(row) - len(children))
        assert [paths[child] for child in children] == [
            path for path in paths if path and path[:-1] == paths[node]
        ]
    inner = [node for node in range(n) if paths[node] not in leaves] or [0]
    assert buffers.inner.tolist() == inner
    assert [buffers.inner_position[node].item() for node in inner] == list(range(len(inner)))


def test_the_drawn_tree() -> None:
    """The mask of {(), (0), (1), (0, 0)} as the docstring draws it, and the rest of its buffers."""
    buffers = tree_buffers(DraftTree.from_paths([(0,), (1,), (0, 0)]), device=CPU)
    assert ["".join("x" if seen else "." for seen in row) for row in buffers.visible.tolist()] == [
        "x...",
        "xx..",
        "x.x.",
        "xx.x",
    ]
    assert buffers.paths.tolist() == [[0, 2, 0], [0, 1, 3]]
    assert buffers.children.tolist() == [[1, 2], [3, 4], [4, 4], [4, 4]]
    assert buffers.parents.tolist() == [0, 0, 0, 1]
    assert buffers.num_ranks == 2 and buffers.draft_index.tolist() == [0, 1, 2]
    assert buffers.depths.tolist() == [0, 1, 1, 2]
    assert buffers.inner.tolist() == [0, 1] and buffers.inner_position.tolist() == [0, 1, 0, 0]


def test_the_root_alone() -> None:
    buffers = tree_buffers(DraftTree.root_only(), device=CPU)
    assert (
        buffers.visible.tolist() == [[True]]
        and buffers.paths.tolist() == [[0]]
        and buffers.children.tolist() == [[1]]
    )
    assert buffers.num_ranks == 0 and len(buffers.draft_index) == 0
