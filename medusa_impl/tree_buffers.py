"""A draft tree as the tensors that a decoding step reads: mask, depths, paths, and each node's source.

Paper: Section 2.1.2 and Figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.tree import DraftTree


@dataclass(frozen=True)
class TreeBuffers:
    """The tensors of one tree with N nodes (root included), P candidates and depth D - 1.

    The tree {(), (0), (1), (0, 0)} has the nodes #0 .. #3, and its tensors are

        #0 ()            visible  #0 #1 #2 #3      depths         0 1 1 2
        |- #1 (0)             #0   x  .  .  .      parents        0 0 0 1
        |  `- #3 (0, 0)       #1   x  x  .  .      paths          0 2 0
        `- #2 (1)             #2   x  .  x  .                     0 1 3
                              #3   x  x  .  x      children       1 2 / 3 4 / 4 4 / 4 4

    visible: node n (row) sees node m (column), that is, itself and its ancestors.
    parents: the parent of every node; the root is its own parent.
    paths: the nodes of every candidate from root to leaf. Short paths are padded with the root, which no path
    holds twice, so that padding can be told from nodes.
    children: the children of every node, padded with N, which is no node.
    draft_index: for every node but the root, where its token is in a flat table of the `num_ranks` best
    tokens of head 1, head 2, ..
    inner: the nodes that have children. Only their distributions decide about tokens of the tree.
    inner_position: the position of every node in `inner`; 0 for leaves, which have none.

    Shapes: depths, parents and inner_position `[N]`; visible `[N, N]` boolean; paths `[P, D]`; children
    `[N, C]` with C the most children of a node; draft_index `[N - 1]`; inner `[I]`.
    """

    tree: DraftTree
    depths: Tensor
    visible: Tensor
    parents: Tensor
    paths: Tensor
    children: Tensor
    draft_index: Tensor
    inner: Tensor
    inner_position: Tensor

    @property
    def num_nodes(self) -> int:
        """Return the number of nodes, the root included."""
        return self.tree.num_nodes

    @property
    def num_ranks(self) -> int:
        """Return how many of a head's best tokens the tree needs at most; 0 for the root alone."""
        return max(self.tree.num_ranks, default=0)


def tree_buffers(tree: DraftTree, *, device: torch.device) -> TreeBuffers:
    """Return the buffers of a tree on a device."""
    num_nodes, num_ranks = tree.num_nodes, max(tree.num_ranks, default=0)
    visible = torch.eye(num_nodes, dtype=torch.bool)
    for node in range(1, num_nodes):
        # A parent has a smaller index, so its row is complete by now: it holds all of its ancestors.
        visible[node] |= visible[tree.parents[node]]
    most_children = max(len(children) for children in tree.children)
    # The root counts as inner even when it is the only node, so that there is always a distribution to read.
    inner = [node for node in range(num_nodes) if tree.children[node]] or [0]
    inner_position = torch.zeros(num_nodes, dtype=torch.long)
    inner_position[inner] = torch.arange(len(inner))
    draft_index = [
        (depth - 1) * num_ranks + rank for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
    ]

    def padded(rows: list[list[int]], width: int, *, filler: int) -> Tensor:
        return torch.tensor(
            [row + [filler] * (width - len(row)) for row in rows], dtype=torch.long, device=device
        ).reshape(len(rows), width)

    return TreeBuffers(
        tree=tree,
        depths=torch.tensor(tree.depths, device=device),
        visible=visible.to(device),
        parents=torch.tensor([0, *tree.parents[1:]], device=device),
        paths=padded([list(path) for path in tree.candidates], tree.depth + 1, filler=0),
        # At least one column, because a gather from none would fail.
        children=padded([list(row) for row in tree.children], max(most_children, 1), filler=num_nodes),
        draft_index=torch.tensor(draft_index, dtype=torch.long, device=device),
        inner=torch.tensor(inner, device=device),
        inner_position=inner_position.to(device),
    )
