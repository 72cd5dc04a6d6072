"""The heads' loss, computed a few positions at a time so that logits never fill the memory.

    L1 = sum over k of lambda_k CE(head k, y_{i+k}),  lambda_k = 0.8^k

The state from which the LM head predicts y_i is the one that head k reads to predict y_{i+k}. A batch of T
positions has T x K x V logits, far more than anything else in training. So the positions are split into
chunks, and of each chunk only the loss and the gradient of the states are kept.

Paper: Section 2.2.1, Eq. 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads

NO_TARGET = -1  # of a head that would look past the end of the answer
OUTSIDE_SUBSET = -2  # of a target that the restricted vocabulary does not have
NUM_RANKS = 10  # accuracies are counted among a head's 1, 2, .., 10 best tokens
DEFAULT_LOGITS_BYTES = 32 * 2**20  # one float32 slice; two or three of this size are alive at once
GPU_LOGITS_BYTES = 512 * 2**20  # the same on a GPU, whose products need more rows to be busy
_CACHE_BYTES = 2 * 2**20  # float32 logits worked on at once on a CPU: what its cache holds


@dataclass(frozen=True)
class Medusa1Loss:
    """Eq. 1 of one batch, and the sums that a log needs.

    loss: Eq. 1, differentiable.
    loss_sums: each head's cross-entropy, without its weight, summed over its targets.
    rank_hits: entry [k, r] counts the targets of head k + 1 with exactly r greater logits; logits equal to
    the target's do not count against it.
    num_outside: the targets that were left out because they are not in the token subset.

    Shapes: loss scalar; loss_sums and num_targets `[K]`; rank_hits `[K, NUM_RANKS]`.
    Units: losses in nats.
    """

    loss: Tensor
    loss_sums: Tensor
    num_targets: Tensor
    rank_hits: Tensor
    num_positions: int
    num_outside: int

    @property
    def num_hits(self) -> Tensor:
        """Return how many targets of each head have no logit above theirs.

        Shapes: `[K]`.
        """
        return self.rank_hits[:, 0]


@dataclass(frozen=True)
class TokenSubset:
    """A restricted vocabulary: the tokens that it keeps, and where each is among them.

    Shapes: token_ids `[V']` ascending; local_ids `[V]`, a token's index in the subset or `OUTSIDE_SUBSET`.
    """

    token_ids: Tensor
    local_ids: Tensor

    @staticmethod
    def most_frequent(counts: Tensor, *, size: int) -> TokenSubset:
        """Return the `size` most frequent tokens; of equally frequent ones, those with the lower ids.

        Shapes: counts `[V]`, how often each token occurs.
        """
        token_ids = counts.argsort(descending=True, stable=True)[:size].sort().values
        local_ids = torch.full(counts.shape, OUTSIDE_SUBSET, dtype=torch.int32)
        local_ids[token_ids] = torch.arange(len(token_ids), dtype=torch.int32)
        return TokenSubset(token_ids=token_ids, local_ids=local_ids)

    def localise(self, targets: Tensor) -> Tensor:
        """Return targets as indices of the subset.

        A token that the subset does not have becomes `OUTSIDE_SUBSET`. `NO_TARGET` stays as it is.
        """
        return torch.where(targets >= 0, self.local_ids[targets.clamp_min(0).long()], targets)

    def to(self, device: torch.device) -> TokenSubset:
        """Return the same subset on a device."""
        return TokenSubset(token_ids=self.token_ids.to(device), local_ids=self.local_ids.to(device))


def head_weights(*, num_heads: int, lambda_base: float) -> tuple[float, ...]:
    """Return lambda_k = `lambda_base` ** k for k = 1 .. K: later heads are less certain and weigh less.

    Paper: Section 2.2.1, with the base 0.8.
    Departs: some released recipes count k from 0, which makes every weight 1 / 0.8 times as large.
    """
    return tuple(lambda_base**k for k in range(1, num_heads + 1))


def logits_bytes(device: torch.device) -> int:
    """Return how large one slice of float32 logits is on a device."""
    return DEFAULT_LOGITS_BYTES if device.type == "cpu" else GPU_LOGITS_BYTES


def medusa1_loss(
    states: Tensor,
    targets: Tensor,
    *,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    lambdas: Sequence[float],
    subset: TokenSubset | None = None,
    num_positions: int | None = None,
    max_logits_bytes: int = DEFAULT_LOGITS_BYTES,
    own_dtype: torch.dtype = torch.float32,
) -> Medusa1Loss:
    """Return Eq. 1 of a batch: the weighted sum over all targets, divided by the number of positions.

    All heads are divided by the same number: that of the positions with a target for head 1, in the subset or
    not. For one part of a batch it is given as `num_positions`. Rows without any target change nothing, so a
    batch may be padded. The products with a shared unembedding run in the dtype of `lm_head_weight`, the
    softmax in float32; those with own unembeddings run in `own_dtype`. All tensors are on one device, also
    those of the subset.

    Shapes: states `[T, H]`; targets `[T, K]` token ids, or indices of the subset if there is one, and
    `NO_TARGET` where there is none; lm_head_weight `[V', H]`, already restricted to the subset, and not used
    by `own` unembeddings.
    Raises: UserError if shapes do not fit, or a shared unembedding asks for gradients.
    Paper: Section 2.2.1, Eq. 1.
    """
    if targets.shape != (states.shape[0], heads.num_heads) or len(lambdas) != heads.num_heads:
        raise UserError(
            found=f"targets of shape {tuple(targets.shape)} and {len(lambdas)} weights for "
            f"{states.shape[0]} states",
            need=f"one row for each state, one column and one weight for each of {heads.num_heads} heads",
            where="the heads' loss",
        )
    if num_positions is None:
        num_positions = int((targets[:, 0] != NO_TARGET).sum())
    head_states = heads.states(states)
    scales = torch.tensor(lambdas, dtype=torch.float32, device=states.device) / max(num_positions, 1)
    if heads.architecture == "shared":
        loss, row_losses, row_ranks, row_heads = _shared_loss(
            head_states, targets, lm_head_weight, scales, max_logits_bytes
        )
    else:
        loss, row_losses, row_ranks, row_heads = _own_loss(
            head_states, targets, heads, scales, subset, max_logits_bytes, own_dtype
        )
    num_heads = heads.num_heads
    return Medusa1Loss(
        loss=loss,
        loss_sums=torch.zeros(num_heads, dtype=torch.float64, device=states.device).index_add_(
            0, row_heads, row_losses.double()
        ),
        num_targets=torch.bincount(row_heads, minlength=num_heads),
        rank_hits=rank_counts(row_ranks, row_heads, num_heads=num_heads),
        num_positions=num_positions,
        num_outside=int((targets == OUTSIDE_SUBSET).sum()),
    )


def rank_counts(ranks: Tensor, groups: Tensor, *, num_heads: int) -> Tensor:
    """Return how many targets of each head have rank 0 .. NUM_RANKS - 1.

    Shapes: ranks and groups `[R]`, the rank of each target and its head, counted from 0; result
    `[K, NUM_RANKS]`.
    """
    near = ranks < NUM_RANKS
    return torch.bincount(groups[near] * NUM_RANKS + ranks[near], minlength=num_heads * NUM_RANKS).reshape(
        num_heads, NUM_RANKS
    )


def _shared_loss(
    head_states: Tensor, targets: Tensor, weight: Tensor, scales: Tensor, max_logits_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight.requires_grad:
        raise UserError(
            found="an unembedding that asks for gradients",
            need="a frozen one",
            where="the heads' loss",
            do="detach the LM head's weight",
        )
    num_heads = head_states.shape[1]
    # All heads share one product: row t * K + k of the flat states belongs to position t and head k + 1.
    flat_targets = targets.reshape(-1)
    rows = (flat_targets >= 0).nonzero().squeeze(1)
    row_heads = rows % num_heads
    chunk_rows = max(1, max_logits_bytes // (4 * weight.shape[0]))
    loss, row_losses, row_ranks = _FrozenUnembeddingLoss.apply(  # type: ignore[no-untyped-call]
        head_states.reshape(-1, head_states.shape[-1]),
        weight,
        rows,
        flat_targets[rows].long(),
        scales[row_heads],
        chunk_rows,
    )
    return loss, row_losses, row_ranks, row_heads


class _FrozenUnembeddingLoss(torch.autograd.Function):
    """Weighted cross-entropy after a frozen unembedding, with its gradient computed in the forward pass.

    For one row x with the target y

        loss = -log softmax(x W^T)[y],     d loss / d x = (softmax(x W^T) - onehot(y)) W

    W is frozen, so this is the only gradient that is needed, and it is known as soon as the logits are. The
    forward pass computes both, chunk by chunk. So no more than one chunk of logits is ever in memory, and no
    logit is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        scales: Tensor,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        row_losses = states.new_empty(len(rows), dtype=torch.float32)
        row_ranks = torch.empty(len(rows), dtype=torch.long, device=states.device)
        # On a CPU the work between the two products goes through smaller blocks, which stay in the cache:
        # on whole chunks it would take more time than the products.
        block_rows = (
            max(1, _CACHE_BYTES // (4 * weight.shape[0])) if states.device.type == "cpu" else chunk_rows
        )
        for start in range(0, len(rows), chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = linear(states[rows[part]].to(weight.dtype), weight)
            rowwise = (logits, targets[part], row_losses[part], row_ranks[part])
            blocks = zip(*(torch.split(kept, block_rows) for kept in rowwise), strict=True)
            for block, wanted, block_losses, block_ranks in blocks:
                wide, chosen = block.float(), wanted[:, None]
                probabilities, target_logits = torch.softmax(wide, dim=-1), wide.gather(1, chosen)
                # The log of the softmax's denominator, from the largest logit, whose probability is never 0.
                # So one exponential a logit serves loss and gradient.
                normaliser = wide.amax(1) - probabilities.amax(1).log()
                block_losses.copy_(normaliser - target_logits.squeeze(1))
                block_ranks.copy_((wide > target_logits).sum(1))
                if gradient is not None:
                    # softmax - onehot, written over the logits, which are no longer needed.
                    probabilities.scatter_add_(
                        1, chosen, probabilities.new_full((1, 1), -1.0).expand_as(chosen)
                    )
                    block.copy_(probabilities)
            if gradient is not None:
                gradient[rows[part]] = (logits @ weight).to(gradient.dtype) * scales[part, None]
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(row_losses, row_ranks)
        return (row_losses * scales).sum(), row_losses, row_ranks

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None


def _own_loss(
    head_states: Tensor,
    targets: Tensor,
    heads: MedusaHeads,
    scales: Tensor,
    subset: TokenSubset | None,
    max_logits_bytes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Zero, but connected to the blocks: a batch without any target can still call backward.
    loss = head_states.sum() * 0.0
    losses, ranks, row_heads = [], [], []
    for head, unembedding in enumerate(heads.unembeddings):
        rows = (targets[:, head] >= 0).nonzero().squeeze(1)
        weight: Tensor = unembedding.weight  # type: ignore[assignment]
        weight = weight if subset is None else weight.index_select(0, subset.token_ids)
        chunk_rows = max(1, max_logits_bytes // (4 * weight.shape[0]))
        for part in torch.split(rows, chunk_rows):
            # These unembeddings learn, so autograd is needed. The checkpoint drops the logits after the
            # forward pass and computes them again in the backward pass.
            row_loss, row_rank = checkpoint(
                _chunk_loss,
                head_states[part, head],
                weight,
                targets[part, head].long(),
                dtype,
                use_reentrant=False,
            )
            loss = loss + scales[head] * row_loss.sum()
            losses.append(row_loss.detach())
            ranks.append(row_rank)
            row_heads.append(torch.full_like(part, head))
    if not losses:
        nothing = torch.empty(0, dtype=torch.long, device=head_states.device)
        return loss, nothing.float(), nothing, nothing
    return loss, torch.cat(losses), torch.cat(ranks), torch.cat(row_heads)


def _chunk_loss(states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Cast here, so that the gradients of all chunks are summed in the weight's own float32.
    logits = linear(states.to(dtype), weight.to(dtype)).float()
    ranks = (logits.detach() > logits.detach().gather(1, targets[:, None])).sum(1)
    return cross_entropy(logits, targets, reduction="none"), ranks
