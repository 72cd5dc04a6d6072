"""Medusa heads: small residual networks on the backbone's last hidden state, one per future position.

Paper: Section 2.1.1. Head k = 1..K reads the state that produced token y_i and proposes y_{i+k}.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medusa_impl.errors import UserError
from medusa_impl.recipes import HeadArchitecture


class ResBlock(nn.Module):
    """x + SiLU(W x + b) with W = 0 and b = 0 at the start, so that a fresh block is exactly the identity.

    Departs: the released code zeroes W only and keeps a random bias, so that its heads do not start as the LM
    head.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Return states of the same shape `[.., H]`."""
        return states + nn.functional.silu(self.linear(states))


class MedusaHeads(nn.Module):
    """K draft heads: L residual blocks each, then an unembedding, the head's `own` or the backbone's LM head
    (`shared`).

    The LM head of a `shared` architecture is passed to `forward`, never owned: it stays the backbone's,
    frozen under Medusa-1. Only where joint training adapted the backbone's LM head but not what the heads
    read, `lm_head` holds the original one, and is read instead. With `own`, each unembedding starts as a copy
    of the LM head, so that at step 0 every head equals the LM head exactly.
    Paper: Section 2.1.1. Departs: the released code builds L blocks as one repeated module; these are
    distinct.
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
        if num_heads < 1 or num_layers < 1:
            raise UserError(
                found=f"{num_heads} heads of {num_layers} layers",
                need="at least one of each",
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

        Shapes: hidden `[.., H]`, result `[.., K', V]`. Shared heads go through the LM head as one product.
        """
        states = self.states(hidden, num_heads=num_heads)
        if self.architecture == "shared":
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
        """Refuse a backbone of another shape."""
        if (self.hidden_size, self.vocab_size) != (hidden_size, vocab_size):
            raise UserError(
                found=f"heads for hidden size {self.hidden_size} and vocabulary {self.vocab_size}",
                need=f"hidden size {hidden_size} and vocabulary {vocab_size}, as the backbone has",
                where="the heads' checkpoint",
                do="use the heads that were trained on this backbone",
            )


def ordered_topk(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` greatest logits, best first, equal logits by lower id: the order that
    traces rank by.

    `torch.topk` leaves the order of ties open. On a CPU a stable sort settles the rare tie; elsewhere, where
    looking for one would make the host wait, value and id are ordered together as one integer.
    Shapes: logits `[.., V]`, result `[.., count]`.
    """
    if logits.device.type != "cpu":
        return topk_of_keys(logits, count)
    vocab_size = logits.shape[-1]
    values, ids = logits.topk(min(count + 1, vocab_size), dim=-1)
    if bool((values[..., 1:] == values[..., :-1]).any()):
        return logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return ids[..., :count]


def topk_of_keys(logits: Tensor, count: int) -> Tensor:
    """Return what `ordered_topk` returns, by the top of 64-bit keys: the logit's rank among floats above, the
    complement of the id below.

    A float's bits read as an integer order like the float where it is positive and in reverse where it is
    negative.
    Shapes: logits `[.., V]`, result `[.., count]`.
    """
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0 makes -0 the 0 that it equals
    order = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((order << 32) - ids).topk(count, dim=-1).indices
