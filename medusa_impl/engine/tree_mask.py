"""The attention mask of a step: every token sees the kept prefix and its own ancestors in the tree.

Paper: Section 2.1.2, tree attention, and Figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NodeTables:
    """What each node of a tree adds to the score of each kind of key, in layers with full attention.

    `near` is the same for the layers that have a sliding window, None without such layers. The first column
    is that of any kept token, the last that of any unused slot, the others those of the nodes.

    Shapes: `[N, N + 2]`.
    """

    full: Tensor
    near: Tensor | None


class TreeMask:
    """Builds the additive 4-D masks that a model is given.

    `sliding_window` is the window of the layers that have one. `mixed_layers` says that the model has layers
    of both types; it is then given one mask for each type.
    """

    def __init__(self, *, sliding_window: int | None, mixed_layers: bool) -> None:
        self._window, self._mixed_layers = sliding_window, mixed_layers

    def tables(self, depths: Tensor, visible: Tensor, *, dtype: torch.dtype) -> NodeTables:
        """Return the tables of a tree, which all its steps share.

        Shapes: depths `[N]`, visible `[N, N]`.
        """
        if self._window is None:
            return NodeTables(full=_node_table(visible, dtype), near=None)
        is_near = depths[:, None] - depths[None, :] < self._window
        return NodeTables(full=_node_table(visible, dtype), near=_node_table(visible & is_near, dtype))

    def __call__(
        self, lengths: Tensor, depths: Tensor, tables: NodeTables, *, slots: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Return the mask: 0 for keys that a node sees, the dtype's minimum for all others.

        The model adds it to the attention scores, so the minimum hides a key.

        A row with 3 kept tokens k, a root r with the children a and b, and one unused slot:

              k0 k1 k2  r  a  b  -
          r    0  0  0  0  .  .  .
          a    0  0  0  0  0  .  .
          b    0  0  0  0  .  0  .

        A sliding window of W also hides every key that is W or more positions before the node. This applies
        to kept tokens and to nodes, since a long prompt is read as one chain of nodes.

        Shapes: lengths `[B]`, the kept tokens of each row; depths `[N]`, the position of a node after them;
        slots `[S]`, 0 .. S - 1; result `[B, 1, N, S]`, or one such mask a layer type.
        """
        # All kept tokens have one column of the table, all unused slots have another. In between, slot
        # `length + n` holds node n.
        column = (slots - (lengths[:, None] - 1)).clamp_(0, depths.shape[0] + 1)
        mask = tables.full[:, column].transpose(0, 1).unsqueeze(1)
        if self._window is None or tables.near is None:
            return mask
        windowed = tables.near[:, column].transpose(0, 1).unsqueeze(1)
        # Which kept tokens a window hides depends on the kept length, so no table can hold it.
        distance = (lengths[:, None] + depths[None, :])[:, None, :, None] - slots
        kept = (slots[None, :] < lengths[:, None])[:, None, None, :]
        windowed = windowed.masked_fill(kept & (distance >= self._window), torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": windowed} if self._mixed_layers else windowed


def _node_table(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what each node adds to the score of any kept token, of each node and of any unused slot.

    Shapes: visible `[N, N]`, result `[N, N + 2]`.
    """
    hiding = torch.finfo(dtype).min
    nodes = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hiding)
    before, after = nodes.new_zeros(len(nodes), 1), nodes.new_full((len(nodes), 1), hiding)
    return torch.cat([before, nodes, after], dim=1)
