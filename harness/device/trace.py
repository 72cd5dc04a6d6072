"""Record traces: run kept tokens once through backbone and heads, and keep how each head ranked what came.

What a trace is stands in `harness/records/trace.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from harness.assets.chat import taken_date
from harness.device.engine import Engine
from harness.device.machine import package_versions
from harness.device.prompts import Prompt
from harness.records.opened import open_trace
from harness.records.trace import HEAD_TIES_KEY, TEXT_TIES_KEY, PromptTrace, Trace, TraceProvenance
from medusa_impl.engine.backbone import Backbone
from medusa_impl.heads import MedusaHeads

CHAT_DATE_KEY = "chat_date"  # of a trace's extra provenance: the day that the chat template wrote
HEAD_TIE_MARGIN = 1e-4  # rounding moves a float32 logit by about 1e-5 between shapes
MAX_TREE_RANK = 32
CHUNK_POSITIONS = 32  # bounds the logits in flight to 32 * K * V values


@dataclass(frozen=True)
class Text:
    """A prompt and the tokens y_1..y_n that greedy decoding kept."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "budget"]


def calibration_of(engine: Engine, path: Path, *, where: str | None = None, do: str | None = None) -> Trace:
    """Return the calibration trace in a file; an error says with `where` and `do` what to mend.

    Raises: UserError where it is of another model or other heads than the engine's.
    """
    trace = open_trace(path)
    trace.require_same(
        backbone_sha256=engine.loaded.sha256,
        heads_sha256=engine.heads_sha256,
        where=where or path.name,
        do=do or "record it again with medusa-repro trace",
    )
    return trace


@torch.inference_mode()
def kept_states(backbone: Backbone, text: Text) -> tuple[Tensor, Tensor]:
    """Return the states that produced y_1..y_n and the backbone's logits there, from one teacher-forced pass.

    Shapes: states `[n, H]`, logits `[n, V]`.
    """
    sequence = torch.tensor([*text.prompt.prompt_ids, *text.token_ids[:-1]])
    cache = backbone.new_cache(batch_size=1, max_length=len(sequence))
    output = backbone.read(sequence, cache=cache, num_logits=len(text.token_ids))
    return output.hidden[0, len(text.prompt.prompt_ids) - 1 :], output.logits[0]


@torch.inference_mode()
def rank_rows(
    heads: MedusaHeads,
    lm_head: torch.nn.Module,
    states: Tensor,
    token_ids: Sequence[int],
    *,
    tie_margin: float = HEAD_TIE_MARGIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ranks and losses of the true tokens under every head, and the range of each rank.

    The range is what rounding could make of it. The rank of a token is the number of tokens with a greater
    logit, or an equal logit and a lower id; tokens within `tie_margin` of it may stand on either side.
    Shapes: states `[n, H]`; ranks `[n, K]` int32 with -1 beyond the end, losses `[n, K]` float32 in nats with
    nan there, ranges `[n, K, 2]` int32, lowest and highest rank, with -1 there.
    """
    num_tokens, num_heads = len(token_ids), heads.num_heads
    ranks = torch.full((num_tokens, num_heads), -1, dtype=torch.int32)
    losses = torch.full((num_tokens, num_heads), torch.nan, dtype=torch.float32)
    ranges = torch.full((num_tokens, num_heads, 2), -1, dtype=torch.int32)
    padded = torch.tensor([*token_ids, *[0] * num_heads], device=states.device)
    ids = torch.arange(heads.vocab_size, device=states.device)
    for start in range(0, num_tokens - 1, CHUNK_POSITIONS):
        rows = torch.arange(start, min(start + CHUNK_POSITIONS, num_tokens - 1), device=states.device)
        logits = heads(states[rows], lm_head=lm_head).float()
        targets = padded[rows[:, None] + 1 + torch.arange(num_heads, device=states.device)]
        truth = logits.gather(-1, targets[..., None])
        rank = (logits > truth).sum(-1) + ((logits == truth) & (ids < targets[..., None])).sum(-1)
        loss = logits.logsumexp(-1) - truth.squeeze(-1)
        inside = rows[:, None] + 1 + torch.arange(num_heads, device=states.device) < num_tokens
        ranks[rows.cpu()] = torch.where(inside, rank.int(), -1).cpu()
        losses[rows.cpu()] = torch.where(inside, loss, torch.nan).cpu()
        around = torch.stack(
            [(logits > truth + tie_margin).sum(-1), (logits >= truth - tie_margin).sum(-1) - 1], dim=-1
        )
        ranges[rows.cpu()] = torch.where(inside[..., None], around.int(), -1).cpu()
    return ranks, losses, ranges


def record_trace(
    engine: Engine,
    texts: Sequence[Text],
    *,
    max_new_tokens: int,
    extra: dict[str, str],
    on_text: Callable[[], None] | None = None,
    head_tie_margin: float = HEAD_TIE_MARGIN,
    text_tie_margin: float | None = None,
) -> Trace:
    """Return the trace of greedy texts under the engine's heads.

    It holds the backbone's top-two gaps and the heads' losses too. Its provenance lists the head ties: where
    a rank that a tree may name has another token within `head_tie_margin`, prompt key, position i, head k,
    and the lowest and highest rank that rounding allows. With a `text_tie_margin` it also lists the text
    ties: where several tokens lie within that of the backbone's best one, prompt key, position i, and their
    ids.
    """
    backbone, heads = engine.runner.backbone, engine.heads
    prompts, head_ties, text_ties = [], list[JsonValue](), list[JsonValue]()
    for text in texts:
        states, logits = kept_states(backbone, text)
        best = logits.float().topk(2, dim=-1).values
        ranks, losses, ranges = rank_rows(
            heads, backbone.lm_head, states, text.token_ids, tie_margin=head_tie_margin
        )
        if text_tie_margin is not None:
            text_ties += _text_ties(text.prompt.key, logits, best[:, :1] - text_tie_margin)
        head_ties += _head_ties(text.prompt.key, ranges)
        prompts.append(
            PromptTrace(
                key=text.prompt.key,
                category=text.prompt.category,
                prompt_tokens=len(text.prompt.prompt_ids),
                tokens=np.array(text.token_ids),
                ended_by=text.ended_by,
                ranks=ranks.numpy(),
                gaps=(best[:, 0] - best[:, 1]).cpu().numpy(),
                nll=losses.numpy(),
            )
        )
        if on_text is not None:
            on_text()
    extra_ties: dict[str, JsonValue] = {HEAD_TIES_KEY: head_ties, "head_tie_margin": head_tie_margin}
    if text_tie_margin is not None:
        extra_ties |= {TEXT_TIES_KEY: text_ties, "text_tie_margin": text_tie_margin}
    provenance = TraceProvenance(
        model_hash=engine.loaded.sha256,
        heads_hash=engine.heads_sha256 or "",
        dtype=str(backbone.dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        versions=package_versions(),
        extra={**extra, **extra_ties, **_dated(engine.loaded.tokenizer)},
    )
    return Trace(provenance=provenance, prompts=tuple(prompts))


def _dated(tokenizer: Any) -> dict[str, JsonValue]:
    """Return the day that the chat template wrote into the prompts, where it asks for one."""
    day = taken_date(tokenizer, begun=None)
    return {} if day is None else {CHAT_DATE_KEY: day.isoformat()}


def _text_ties(key: str, logits: Tensor, lowest: Tensor) -> list[JsonValue]:
    """Return the positions at which several tokens reach the lowest logit of a tie, with their ids.

    Shapes: logits `[n, V]`, lowest `[n, 1]`.
    """
    near = (logits.float() >= lowest).cpu()
    several = (near.sum(-1) > 1).nonzero().flatten().tolist()
    return [[key, row + 1, *near[row].nonzero().flatten().tolist()] for row in several]


def _head_ties(key: str, ranges: Tensor) -> list[JsonValue]:
    """Return the ranks that rounding leaves open and a tree may name, by position and head.

    Shapes: ranges `[n, K, 2]`, lowest and highest rank.
    """
    is_open = (ranges[..., 0] < ranges[..., 1]) & (ranges[..., 0] <= MAX_TREE_RANK)
    return [[key, row + 1, head + 1, *ranges[row, head].tolist()] for row, head in is_open.nonzero().tolist()]
