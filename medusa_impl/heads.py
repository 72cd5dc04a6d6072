"""Medusa heads: small residual networks on the backbone's last hidden state, one for each future position.

Let h be the state from which the LM head predicts token y_i. Head k = 1..K reads the same h and predicts
y_{i+k}:

    p^(k) = softmax(W2 (h + SiLU(W1 h + b)))

W1 and b start at 0 and W2 as a copy of the LM head, so that every head starts exactly as the LM head.

Paper: Section 2.1.1, which counts from the state's own position t: the LM head predicts y_{t+1} and head k
y_{t+k+1}.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medusa_impl.errors import UserError
from medusa_impl.recipes import MAX_HEADS, MAX_LAYERS, HeadArchitecture
from medusa_impl.waiting import may_look


class ResBlock(nn.Module):
    """x + SiLU(W x + b), with W = 0 and b = 0 at the start, so that a new block is exactly the identity.

    Paper: Section 2.1.1.
    Departs: the released code sets only W to 0 and keeps a random bias, so its heads do not start as the LM
    head.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return states of the same shape, `[.., H]`."""
        return states + nn.functional.silu(self.linear(states))


class MedusaHeads(nn.Module):
    """K draft heads: L residual blocks each, then an unembedding.

    With the `own` architecture each head has its own unembedding, which starts as a copy of the LM head. With
    `shared` all heads use the backbone's LM head. It is an argument of `forward` and no part of this module,
    because it belongs to the backbone and stays frozen under Medusa-1.

    Joint training may change the backbone's LM head while the heads keep reading the original one. Then
    `lm_head` holds the original, and `forward` reads it instead of its argument.

    Paper: Section 2.1.1, the `own` architecture with L = 1.
    Departs: the released code writes `[block] * L`, which repeats one module; here the L blocks are distinct.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        architecture: HeadArchitecture,
        lm_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not (1 <= num_heads <= MAX_HEADS and 1 <= num_layers <= MAX_LAYERS):
            raise UserError(
                found=f"{num_heads} heads of {num_layers} layers",
                need=f"at least one of each, and at most {MAX_HEADS} heads of {MAX_LAYERS} layers",
                where="the heads' configuration",
            )
        self.num_heads, self.num_layers = num_heads, num_layers
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.architecture: HeadArchitecture = architecture
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.unembeddings = nn.ModuleList()
        self.lm_head: nn.Module | None = None
        if architecture == "own":
            self.unembeddings.extend(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(num_heads))
            if lm_head is not None:
                # Copied, not shared: afterwards each unembedding learns on its own.
                with torch.no_grad():
                    for unembedding in self.unembeddings:
                        unembedding.get_parameter("weight").copy_(lm_head.get_parameter("weight"))

    def states(self, hidden: Tensor, *, num_heads: int | None = None) -> Tensor:
        """Return each head's state before its unembedding.

        Shapes: hidden `[.., H]`, result `[.., K', H]` with K' = `num_heads` or all.
        """
        return torch.stack([block(hidden) for block in list(self.blocks)[:num_heads]], dim=-2)

    def forward(self, hidden: Tensor, *, lm_head: nn.Module, num_heads: int | None = None) -> Tensor:
        """Return the logits of the first `num_heads` heads (all by default).

        Shapes: hidden `[.., H]`, result `[.., K', V]` with K' = `num_heads` or all.
        """
        states = self.states(hidden, num_heads=num_heads)
        if self.architecture == "shared":
            # One product for all heads: the LM head's weight, which is large, is read from memory only once.
            logits: Tensor = (lm_head if self.lm_head is None else self.lm_head)(states)
            return logits
        return torch.stack(
            [
                unembedding(states[..., k, :])
                for k, unembedding in enumerate(list(self.unembeddings)[:num_heads])
            ],
            dim=-2,
        )

    def check_backbone(self, *, hidden_size: int, vocab_size: int) -> None:
        """Refuse a backbone of another shape.

        Raises: UserError that names both shapes.
        """
        if (self.hidden_size, self.vocab_size) != (hidden_size, vocab_size):
            raise UserError(
                found=f"heads for hidden size {self.hidden_size} and vocabulary {self.vocab_size}",
                need=f"hidden size {hidden_size} and vocabulary {vocab_size}, as the backbone has",
                where="the heads' checkpoint",
                do="use the heads that were trained on this backbone",
            )


def ordered_topk(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` greatest logits, best first; of equal logits the lower id comes first.

    The ranks in recorded traces follow the same order, so a replay of a trace drafts the same trees.

    Shapes: logits `[.., V]`, result `[.., count]`.
    """
    # `torch.topk` is the fastest, but leaves the order of equal values open.
    if not may_look(logits.device):
        return topk_by_blocks(logits, count)
    # One value more than asked for: a tie across the cut decides which id is in.
    values, ids = logits.topk(min(count + 1, logits.shape[-1]), dim=-1)
    if bool((values[..., 1:] == values[..., :-1]).any()):
        return topk_by_blocks(logits, count)
    return ids[..., :count]


def topk_by_blocks(logits: Tensor, count: int, *, block_tokens: int = 128) -> Tensor:
    """Return what `ordered_topk` returns, with one pass over the vocabulary and without a look at a value.

    The vocabulary is cut into blocks. In the order (greatest value, then lowest id) of their best tokens, the
    first `count` blocks hold the first `count` tokens: each block that comes before a token's own holds at
    least one token that comes before it.

        block            0     1     2     3         count 2
        greatest         7     9     7     4         blocks 1 and 0, of which a stable sort takes the best two

    Shapes: logits `[.., V]`, result `[.., count]`.
    """
    vocab_size = logits.shape[-1]
    filling = -vocab_size % block_tokens
    if filling:
        logits = nn.functional.pad(logits, (0, filling), value=-torch.inf)
    blocks = logits.reshape(*logits.shape[:-1], -1, block_tokens)
    num_blocks = min(count, blocks.shape[-2])
    order = blocks.amax(-1).sort(dim=-1, descending=True, stable=True).indices[..., :num_blocks]
    chosen = order.sort(dim=-1).values  # so that places in the chosen blocks are in the order of the ids
    values = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, block_tokens)).flatten(-2)
    place = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    first_ids: Tensor = chosen.gather(-1, place // block_tokens) * block_tokens
    return first_ids + place % block_tokens
