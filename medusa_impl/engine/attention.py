"""Attention for models whose query heads share key-value heads, without copies of the keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

GROUPED_ATTENTION = "medusa_grouped_sdpa"


def grouped_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return masked attention in which each key-value head is read only once.

    With a mask and more than one token, transformers copies the keys and values for every query head of a
    group. Here the query heads of a group become further query rows of one product:

        Hq = 4 heads of N rows, Hkv = 2        2 heads of 2 N rows
        q0 q1 | q2 q3                    ->    (q0; q1)  (q2; q3)
        k0      k1                              k0        k1

    The mask's rows are repeated for each query head of a group, here or once for all layers before.

    Shapes: query `[B, Hq, N, d]`; key and value `[B, Hkv, T, d]`; mask `[B, 1, N, T]`, or with its rows
    repeated `[B, 1, Hq / Hkv * N, T]`; result `[B, N, Hq, d]`.
    """
    batch, num_heads, num_new, _ = query.shape
    groups = num_heads // key.shape[1]
    # Query heads of one group are neighbours in `query`, so a reshape stacks them.
    rows = query.reshape(batch, key.shape[1], groups * num_new, query.shape[-1])
    mask = attention_mask
    if mask is not None and mask.shape[-2] != groups * num_new:
        mask = mask[:, :, :num_new].repeat(1, 1, groups, 1)
    mixed = scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return mixed.reshape(batch, num_heads, num_new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_sdpa_attention)
