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
    # `torch.topk` leaves the order of equal values open. A sort would settle it, but costs far more, and ties
    # are rare. Checking for a tie makes the host wait for a GPU, so there value and id form one sort key.
    if logits.device.type != "cpu":
        return topk_of_keys(logits, count)
    vocab_size = logits.shape[-1]
    # One value more than asked for: a tie across the cut decides which id is in.
    values, ids = logits.topk(min(count + 1, vocab_size), dim=-1)
    if bool((values[..., 1:] == values[..., :-1]).any()):
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return ids[..., :count]


def topk_of_keys(logits: Tensor, count: int) -> Tensor:
    """Return what `ordered_topk` returns, without a check for ties.

    Each logit becomes one 64-bit integer: its order among all floats, times 2^32, minus its id.

    Shapes: logits `[.., V]`, result `[.., count]`.
    """
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0 turns -0 into 0, which it equals
    # Read as integers, the bits of positive floats are in the floats' order, those of negative floats in
    # reverse order.
    order = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((order << 32) - ids).topk(count, dim=-1).indices
