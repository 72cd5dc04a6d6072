"""Record traces: run kept tokens once through backbone and heads, and keep how each head ranked what came.

The definition of a trace stands in `harness/trace.py`; this module is its device half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from harness.engine import Engine
from harness.environment import package_versions
from harness.trace import PromptTrace, Trace, TraceProvenance
from medusa_impl.backbone import Backbone
from medusa_impl.heads import MedusaHeads

HEAD_TIE_MARGIN = 1e-4  # rounding moves a float32 logit by about 1e-5 between shapes
MAX_TREE_RANK = 32
_CHUNK_POSITIONS = 32  # bounds the logits in flight to 32 * K * V values


@dataclass(frozen=True)
class KeptText:
    """One prompt and the tokens y_1..y_n that greedy decoding kept."""

    key: str
    category: str | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "budget"]


@torch.inference_mode()
def kept_states(backbone: Backbone, text: KeptText) -> tuple[Tensor, Tensor]:
    """Return the states that produced y_1..y_n and the backbone's logits there, from one teacher-forced pass.

    Shapes: states `[n, H]`, logits `[n, V]`.
    """
    sequence = torch.tensor([*text.prompt_ids, *text.token_ids[:-1]])
    cache = backbone.new_cache(batch_size=1, max_length=len(sequence))
    output = backbone.read(sequence, cache=cache, num_logits=len(text.token_ids))
    return output.hidden[0, len(text.prompt_ids) - 1 :], output.logits[0]


@torch.inference_mode()
def rank_rows(heads: MedusaHeads, lm_head: torch.nn.Module, states: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ranks and losses of the true tokens under every head, and where rounding could move a rank that a tree may name.

    The rank of a token is the number of tokens with a greater logit, or an equal logit and a lower id.
    Shapes: states `[n, H]`; ranks `[n, K]` int32 with -1 beyond the end, losses `[n, K]` float32 in nats with nan
    there, ties `[n, K]` boolean.
    """
    num_tokens, num_heads = len(token_ids), heads.num_heads
    ranks = torch.full((num_tokens, num_heads), -1, dtype=torch.int32)
    losses = torch.full((num_tokens, num_heads), torch.nan, dtype=torch.float32)
    ties = torch.zeros(num_tokens, num_heads, dtype=torch.bool)
    padded = torch.tensor([*token_ids, *[0] * num_heads], device=states.device)
    ids = torch.arange(heads.vocab_size, device=states.device)
    for start in range(0, num_tokens - 1, _CHUNK_POSITIONS):
        rows = torch.arange(start, min(start + _CHUNK_POSITIONS, num_tokens - 1), device=states.device)
        logits = heads(states[rows], lm_head=lm_head).float()
        targets = padded[rows[:, None] + 1 + torch.arange(num_heads, device=states.device)]
        truth = logits.gather(-1, targets[..., None])
        rank = (logits > truth).sum(-1) + ((logits == truth) & (ids < targets[..., None])).sum(-1)
        loss = logits.logsumexp(-1) - truth.squeeze(-1)
        inside = rows[:, None] + 1 + torch.arange(num_heads, device=states.device) < num_tokens
        ranks[rows.cpu()] = torch.where(inside, rank.int(), -1).cpu()
        losses[rows.cpu()] = torch.where(inside, loss, torch.nan).cpu()
        near = ((logits - truth).abs() <= HEAD_TIE_MARGIN).sum(-1) > 1
        ties[rows.cpu()] = (near & inside & (rank <= MAX_TREE_RANK)).cpu()
    return ranks, losses, ties


def record_trace(
    engine: Engine, texts: Sequence[KeptText], *, max_new_tokens: int, extra: dict[str, str], on_text: Callable[[], None] | None = None
) -> Trace:
    """Return the trace of greedy texts under the engine's heads, with the backbone's top-two gaps and the heads' losses."""
    backbone, heads = engine.runner.backbone, engine.heads
    prompts, head_ties = [], list[list[str | int]]()
    for text in texts:
        states, logits = kept_states(backbone, text)
        best = logits.float().topk(2, dim=-1).values
        ranks, losses, ties = rank_rows(heads, backbone.lm_head, states, text.token_ids)
        head_ties += [[text.key, row + 1, head + 1] for row, head in ties.nonzero().tolist()]
        prompts.append(
            PromptTrace(
                key=text.key,
                category=text.category,
                prompt_tokens=len(text.prompt_ids),
                tokens=np.array(text.token_ids),
                ended_by=text.ended_by,
                ranks=ranks.numpy(),
                gaps=(best[:, 0] - best[:, 1]).cpu().numpy(),
                nll=losses.numpy(),
            )
        )
        if on_text is not None:
            on_text()
    provenance = TraceProvenance(
        model_hash=engine.loaded.sha256,
        heads_hash=engine.heads_sha256 or "",
        dtype=str(backbone.dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        versions=package_versions(),
        extra={**extra, "head_ties": head_ties},  # type: ignore[dict-item]
    )
    return Trace(provenance=provenance, prompts=tuple(prompts))
