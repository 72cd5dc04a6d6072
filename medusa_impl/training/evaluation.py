"""How well heads predict text that they were not trained on."""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import linear

from medusa_impl.heads import MedusaHeads
from medusa_impl.training.features import AnswerTable, FeatureSet
from medusa_impl.training.states import DeviceStates, StateSource
from medusa_impl.training_log import HeadEvaluation

NUM_TOP_RANKS = 10


@torch.no_grad()
def evaluate_heads(
    features: AnswerTable,
    rows: Tensor,
    *,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    max_logits_bytes: int = 64 * 2**20,
    source: StateSource | None = None,
) -> HeadEvaluation:
    """Return losses and rank counts of the heads over the given rows, full vocabulary, float32.

    It runs where the LM head's weight is. `source` has the states; without one `features` are a `FeatureSet`,
    which is copied there.

    Shapes: rows `[R]`, row numbers of the features; lm_head_weight `[V, H]`, not used by `own` unembeddings.
    """
    device = lm_head_weight.device
    if source is None:
        assert isinstance(features, FeatureSet)
        source = DeviceStates(features, device=device)
    num_heads = heads.num_heads
    loss_sums, num_targets = [0.0] * num_heads, [0] * num_heads
    rank_hits = torch.zeros(num_heads, NUM_TOP_RANKS, dtype=torch.long)
    chunk_rows = max(1, max_logits_bytes // (4 * heads.vocab_size))  # logits of 4 bytes, one head at a time
    token_ids = torch.arange(heads.vocab_size, device=device)
    for part in source.split(rows, chunk_rows):
        states, all_targets = source.read(send_to_device(source.item(part), device))
        for some_states, some_targets in zip(
            torch.split(states, chunk_rows), torch.split(all_targets, chunk_rows), strict=True
        ):
            head_states = heads.states(some_states)
            for head in range(num_heads):
                targets = some_targets[:, head].long()
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
                bins = torch.bincount(ranks.clamp_max(NUM_TOP_RANKS), minlength=NUM_TOP_RANKS + 1)
                rank_hits[head] += bins[:NUM_TOP_RANKS].cpu()
                num_targets[head] += int(kept.sum())
    return HeadEvaluation(
        loss_sums=tuple(loss_sums),
        num_targets=tuple(num_targets),
        rank_hits=tuple(tuple(row) for row in rank_hits.tolist()),
    )
