"""Many vanilla rows in flight at once, for corpora."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.decode import EndedBy
from medusa_impl.engine.backbone import Backbone


@dataclass(frozen=True)
class StreamRequest:
    """One prompt for `decode_stream`; temperature 0 is greedy, otherwise `seed` starts the row's own random
    numbers.
    """

    key: str
    prompt_ids: Sequence[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class StreamCompletion:
    """One finished row of `decode_stream`: kept tokens (end-of-sequence included) and the states that
    produced them.

    Shapes: states `[n, H]` float16, or None where they were not asked for.
    """

    key: str
    token_ids: list[int]
    ended_by: EndedBy
    states: Tensor | None


class _StreamRow:
    def __init__(self, request: StreamRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.states: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(request.seed)

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def decode_stream(
    backbone: Backbone,
    requests: Iterable[StreamRequest],
    *,
    num_rows: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    keep_states: bool = False,
) -> Iterator[StreamCompletion]:
    """Decode many prompts one token a step, `num_rows` at a time; a finished row takes the next prompt at
    once.

    For making corpora, not for measuring: completions come in order of finishing. A row's text depends on its
    own seed only (and, where two logits lie within rounding, on the batch it ran in).
    """
    pending = iter(requests)
    first = next(pending, None)
    if first is None:
        return
    cache = None
    rows: list[_StreamRow | None] = [None] * num_rows
    next_ids = torch.zeros(num_rows, 1, dtype=torch.long)
    depth, visible = (
        torch.zeros(1, dtype=torch.long, device=backbone.device),
        torch.ones(1, 1, dtype=torch.bool, device=backbone.device),
    )
    queue: list[StreamRequest] = [first]

    def take(row_index: int, logits: Tensor, hidden: Tensor) -> StreamCompletion | None:
        row = rows[row_index]
        assert row is not None
        token = _pick_token(logits, row)
        row.token_ids.append(token)
        if keep_states:
            row.states.append(hidden.to("cpu", torch.float16, copy=True))
        next_ids[row_index, 0] = token
        if token not in eos_ids and len(row.token_ids) < max_new_tokens:
            return None
        rows[row_index] = None
        return StreamCompletion(
            key=row.request.key,
            token_ids=row.token_ids,
            ended_by="eos" if token in eos_ids else "budget",
            states=torch.stack(row.states) if keep_states else None,
        )

    while True:
        for row_index in range(num_rows):
            while rows[row_index] is None:
                request = queue.pop() if queue else next(pending, None)
                if request is None:
                    break
                needed = len(request.prompt_ids) + max_new_tokens
                if cache is None or needed > cache.max_length:
                    if any(row is not None for row in rows):
                        # waits until the rows in flight are done and a longer cache can replace this one
                        queue.append(request)
                        break
                    cache = backbone.new_cache(batch_size=num_rows, max_length=-(-(needed + 128) // 64) * 64)
                rows[row_index] = _StreamRow(request)
                cache.clear_rows(slice(row_index, row_index + 1))
                output = backbone.prefill(torch.tensor(request.prompt_ids), cache=cache, row=row_index)
                completion = take(row_index, output.logits[0, -1], output.hidden[0, -1])
                if completion is not None:
                    yield completion
            if queue:
                break
        active = [index for index in range(num_rows) if rows[index] is not None]
        if not active:
            if queue:
                continue
            return
        assert cache is not None
        for index in set(range(num_rows)) - set(active):
            cache.clear_rows(slice(index, index + 1))
        step = backbone.forward(next_ids.to(backbone.device), depths=depth, visible=visible, cache=cache)
        counts = [int(row is not None) for row in rows]
        cache.keep(
            torch.zeros_like(next_ids, device=backbone.device),
            torch.tensor(counts, device=backbone.device),
            counts=counts,
        )
        for index in active:
            completion = take(index, step.logits[index, -1], step.hidden[index, -1])
            if completion is not None:
                yield completion


def _pick_token(logits: Tensor, row: _StreamRow) -> int:
    if row.request.temperature == 0:
        return int(logits.argmax())
    cumulative = torch.softmax(logits.float() / row.request.temperature, dim=-1).cumsum(
        -1, dtype=torch.float64
    )
    return int(torch.searchsorted(cumulative, row.uniform() * cumulative[-1]).clamp_max(logits.shape[-1] - 1))
