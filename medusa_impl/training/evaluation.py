"""How well heads predict text that they were not trained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from medusa_impl.heads import MedusaHeads
from medusa_impl.training.features import FeatureSet
from medusa_impl.training_log import HeadEvaluation

NUM_TOP_RANKS = 10


@torch.no_grad()
def evaluate_heads(
    features: FeatureSet,
    rows: Tensor,
    *,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    max_logits_bytes: int = 64 * 2**20,
) -> HeadEvaluation:
    """Return losses and rank counts of the heads over the given rows, full vocabulary, float32.

    Shapes: rows `[R]`, row numbers of the features; lm_head_weight `[V, H]`, not used by `own` unembeddings.
    """
    loss_sums = [0.0] * heads.num_heads
    num_targets = [0] * heads.num_heads
    rank_hits = torch.zeros(heads.num_heads, NUM_TOP_RANKS, dtype=torch.long)
    chunk_rows = max(1, max_logits_bytes // (4 * heads.vocab_size))  # logits of 4 bytes, one head at a time
    token_ids = torch.arange(heads.vocab_size)
    for part in torch.split(rows, chunk_rows):
        head_states = heads.states(features.states[part].float())
        for head in range(heads.num_heads):
            targets = features.targets[part, head].long()
            kept = targets >= 0
            weight = lm_head_weight if heads.architecture == "shared" else heads.unembeddings[head].weight
            logits = linear(head_states[kept, head], weight.float())  # type: ignore[arg-type]
            chosen = targets[kept, None]
            target_logits = logits.gather(1, chosen)
            loss_sums[head] += float(
                (torch.logsumexp(logits, 1, keepdim=True) - target_logits).double().sum()
            )
            # Ties as decoding breaks them: of equal logits the lower id comes first.
            ranks = ((logits > target_logits) | ((logits == target_logits) & (token_ids < chosen))).sum(1)
            # All ranks from NUM_TOP_RANKS on fall into one last bin, which is cut off.
            rank_hits[head] += torch.bincount(ranks.clamp_max(NUM_TOP_RANKS), minlength=NUM_TOP_RANKS + 1)[
                :NUM_TOP_RANKS
            ]
            num_targets[head] += int(kept.sum())
    return HeadEvaluation(
        loss_sums=tuple(loss_sums),
        num_targets=tuple(num_targets),
        rank_hits=tuple(tuple(row) for row in rank_hits.tolist()),
    )
