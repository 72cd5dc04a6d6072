"""A draft tree as the tensors that a step needs: attention mask, depths, paths, and where each node's token
comes from.

Paper: Section 2.1.2 and Figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.tree import DraftTree


@dataclass(frozen=True)
class TreeBuffers:
    """The tensors of one tree of N nodes (root included), P candidates and depth D - 1.

    Shapes: depths `[N]`; visible `[N, N]` boolean, node n sees node m (its ancestors and itself); parents
    `[N]`, the root's own parent being the root; paths `[P, D]` root-to-leaf node indices, padded with the
    root, which stands in no path twice; children `[N, C]` padded with N; head_index and rank_index `[N - 1]`,
    the draft head and the rank that give each node but the root its token, and draft_index `[N - 1]`, the
    place of the two in a flat table of each head's `num_ranks` best tokens; inner `[I]` nodes with children
    and inner_position `[N]` its inverse (0 for leaves).

    For the tree {(), (0), (1), (0, 0)} the mask is

              ()  0  1  00
         ()    x  .  .  .
         0     x  x  .  .
         1     x  .  x  .
         00    x  x  .  x
    """

    tree: DraftTree
    depths: Tensor
    visible: Tensor
    parents: Tensor
    paths: Tensor
    children: Tensor
    head_index: Tensor
    rank_index: Tensor
    draft_index: Tensor
    inner: Tensor
    inner_position: Tensor

    @property
    def num_nodes(self) -> int:
        """Nodes, root included."""
        return self.tree.num_nodes

    @property
    def num_ranks(self) -> int:
        """How many of a head's best tokens the tree needs at most; 0 for the root alone."""
        return max(self.tree.num_ranks, default=0)


def tree_buffers(tree: DraftTree, *, device: torch.device) -> TreeBuffers:
    """Return the buffers of a tree on a device."""
    num_nodes, num_ranks = tree.num_nodes, max(tree.num_ranks, default=0)
    visible = torch.eye(num_nodes, dtype=torch.bool)
    for node in range(1, num_nodes):
        visible[node] |= visible[tree.parents[node]]
    widest = max((len(children) for children in tree.children), default=0)
    inner = [node for node in range(num_nodes) if tree.children[node]] or [0]
    inner_position = torch.zeros(num_nodes, dtype=torch.long)
    inner_position[inner] = torch.arange(len(inner))

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
        children=padded([list(children) for children in tree.children], max(widest, 1), filler=num_nodes),
        head_index=torch.tensor([depth - 1 for depth in tree.depths[1:]], dtype=torch.long, device=device),
        rank_index=torch.tensor(tree.ranks[1:], dtype=torch.long, device=device),
        draft_index=torch.tensor(
            [
                (depth - 1) * num_ranks + rank
                for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
            ],
            dtype=torch.long,
            device=device,
        ),
        inner=torch.tensor(inner, device=device),
        inner_position=inner_position.to(device),
    )
