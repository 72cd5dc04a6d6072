"""The attention mask of a step: every token sees the kept prefix and its own ancestors in the tree.

Paper: Section 2.1.2, tree attention, and Figure 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TreeMask:
    """Builds the additive 4-D masks that a model is given.

    `sliding_window` is the window of the layers that have one. `mixed_layers` says that the model has layers
    of both types; it is then given one mask for each type.
    """

    def __init__(self, *, sliding_window: int | None, mixed_layers: bool) -> None:
        self._window, self._mixed_layers = sliding_window, mixed_layers
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, lengths: Tensor, depths: Tensor, visible: Tensor, *, slots: Tensor, dtype: torch.dtype
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
        visible `[N, N]`; slots `[S]`, 0 .. S - 1; result `[B, 1, N, S]`, or one such mask a layer type.
        """
        # All kept tokens have one column of the table, all unused slots have another. In between, slot
        # `length + n` holds node n.
        column = (slots - (lengths[:, None] - 1)).clamp_(0, visible.shape[0] + 1)
        mask = self._node_table("full", visible, visible, dtype)[:, column].transpose(0, 1).unsqueeze(1)
        if self._window is None:
            return mask
        near = depths[:, None] - depths[None, :] < self._window
        table = self._node_table("sliding", visible, visible & near, dtype)
        windowed = table[:, column].transpose(0, 1).unsqueeze(1)
        # Which kept tokens a window hides depends on the kept length, so no table can hold it.
        distance = (lengths[:, None] + depths[None, :])[:, None, :, None] - slots
        kept = (slots[None, :] < lengths[:, None])[:, None, None, :]
        windowed = windowed.masked_fill(kept & (distance >= self._window), torch.finfo(dtype).min)
        return {"full_attention": mask, "sliding_attention": windowed} if self._mixed_layers else windowed

    def _node_table(self, name: str, tree: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what each node adds to the score of each kind of key.

        The first column is that of any kept token, the last that of any unused slot, the others those of the
        nodes. All steps of a generation have the same tree, so the table of the last tree is kept.

        Shapes: visible `[N, N]`, result `[N, N + 2]`.
        """
        if name not in self._tables or self._tables[name][0] is not tree:
            hiding = torch.finfo(dtype).min
            nodes = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            nodes.masked_fill_(~visible, hiding)
            before, after = nodes.new_zeros(len(nodes), 1), nodes.new_full((len(nodes), 1), hiding)
            self._tables[name] = (tree, torch.cat([before, nodes, after], dim=1))
        return self._tables[name][1]
