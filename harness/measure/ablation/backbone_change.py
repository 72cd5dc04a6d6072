"""What training did to a backbone, measured against the model that it was.

It is told by divergence, likelihood, first choices, greedy text and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from harness.device.trace import rank_rows
from harness.records.ablation import GreedyText, HeadText, TextChange
from medusa_impl.engine.backbone import Backbone
from medusa_impl.heads import MedusaHeads
from medusa_impl.training.losses import NUM_RANKS
from medusa_impl.training.sequences import TrainingSequence

_CHUNK_POSITIONS = 64  # bounds the logits in flight to 4 x 64 x V values


@dataclass(frozen=True)
class MeasuredText:
    """A text to measure on; only the tokens of its answers count."""

    key: str
    category: str | None
    sequence: TrainingSequence

    def targets(self) -> tuple[int, ...]:
        """Return the answers' tokens."""
        return tuple(
            token for start, end in self.sequence.answers for token in self.sequence.token_ids[start:end]
        )


@dataclass(frozen=True)
class Reading:
    """A text under one model: the states at its answers' tokens, and the LM head that reads them.

    Shapes: states `[n, H]`, one row an answer token, in order.
    """

    states: Tensor
    lm_head: nn.Module


@torch.inference_mode()
def read_text(backbone: Backbone, text: MeasuredText) -> Reading:
    """Return a text's states from one pass."""
    tokens = torch.tensor(text.sequence.token_ids)
    cache = backbone.new_cache(batch_size=1, max_length=len(tokens))
    hidden = backbone.read(tokens, cache=cache).hidden[0]
    rows = torch.cat([hidden[start - 1 : end - 1] for start, end in text.sequence.answers])
    return Reading(states=rows, lm_head=backbone.lm_head)


@torch.inference_mode()
def text_change(text: MeasuredText, *, original: Reading, tuned: Reading) -> TextChange:
    """Return KL(original || tuned), likelihoods and agreement over a text's answers.

    Where both are one reading there is exactly no change. Logits are those of the LM head on the last hidden
    states, float32.
    """
    wanted = torch.tensor(text.targets())
    kl_sum = original_nll_sum = tuned_nll_sum = 0.0
    num_agreements = 0
    parts = (torch.split(rows, _CHUNK_POSITIONS) for rows in (original.states, tuned.states, wanted))
    for ours, theirs, tokens in zip(*parts, strict=True):
        before = log_softmax(original.lm_head(ours).float(), -1)
        after = before if tuned is original else log_softmax(tuned.lm_head(theirs).float(), -1)
        chosen = tokens[:, None].to(before.device)
        kl_sum += float((before.exp() * (before - after)).sum(-1).double().sum())
        original_nll_sum -= float(before.gather(1, chosen).double().sum())
        tuned_nll_sum -= float(after.gather(1, chosen).double().sum())
        num_agreements += int((before.argmax(-1) == after.argmax(-1)).sum())
    return TextChange(
        key=text.key,
        category=text.category,
        num_positions=len(wanted),
        kl_sum=kl_sum,
        original_nll_sum=original_nll_sum,
        tuned_nll_sum=tuned_nll_sum,
        num_agreements=num_agreements,
    )


@torch.inference_mode()
def head_text(text: MeasuredText, heads: MedusaHeads, reading: Reading) -> HeadText:
    """Return how the heads rank a text's answers on a backbone's states, and their losses.

    Both are over the whole vocabulary.
    """
    num_heads = heads.num_heads
    losses, targets = torch.zeros(num_heads, dtype=torch.float64), torch.zeros(num_heads, dtype=torch.long)
    hits = torch.zeros(num_heads, NUM_RANKS, dtype=torch.long)
    lengths = [end - start for start, end in text.sequence.answers]
    answers = torch.split(torch.tensor(text.targets()), lengths)
    for states, answer in zip(torch.split(reading.states, lengths), answers, strict=True):
        ranks, nll, _ = rank_rows(heads, reading.lm_head, states, answer.tolist())
        losses += torch.nan_to_num(nll.double(), nan=0.0).sum(0)
        targets += (ranks >= 0).sum(0)
        for rank in range(NUM_RANKS):
            hits[:, rank] += (ranks == rank).sum(0)
    return HeadText(
        key=text.key,
        loss_sums=tuple(losses.tolist()),
        num_targets=tuple(targets.tolist()),
        rank_hits=tuple(tuple(row) for row in hits.tolist()),
    )


def greedy_text(key: str, tokens: Sequence[int], *, original: Sequence[int]) -> GreedyText:
    """Return how long two greedy answers to one prompt are the same."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, original, strict=False)))
    return GreedyText(key=key, num_tokens=len(tokens), num_original_tokens=len(original), num_shared=shared)
