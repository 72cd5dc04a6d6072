"""Vanilla decoding of many prompts, a fixed number at a time, to generate training corpora.

`decode_vanilla` decodes one batch and ends with its longest row. Here a row that has ended takes the next
prompt at once, so that the device stays busy. Nothing here is for measuring speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.rows import EndedBy

# A new cache gets room for somewhat longer prompts than the one that asks for it, rounded up, so that it is
# not replaced for every prompt that is a little longer.
_SPARE_TOKENS, _ROUNDING_TOKENS = 128, 64


@dataclass(frozen=True)
class StreamRequest:
    """One prompt for `decode_stream`.

    Temperature 0 means greedy decoding; otherwise `seed` starts the random numbers of this prompt alone.
    """

    key: str
    prompt_ids: Sequence[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class StreamCompletion:
    """One answer of `decode_stream`.

    It holds the tokens, end-of-sequence included, and the states that predicted them.

    Shapes: states `[n, H]` float16, or None if they were not asked for.
    """

    key: str
    token_ids: list[int]
    ended_by: EndedBy
    states: Tensor | None


def decode_stream(
    backbone: Backbone,
    requests: Iterable[StreamRequest],
    *,
    num_rows: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    keep_states: bool = False,
) -> Iterator[StreamCompletion]:
    """Yield the answers to many prompts, in the order in which they end.

    `num_rows` prompts decode together, one token a step. The text of an answer depends on its own seed and on
    no other prompt. One exception: where two logits differ only by rounding, the batch can decide which is
    greater.
    """
    stream = _Stream(
        backbone,
        iter(requests),
        num_rows=num_rows,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        keep_states=keep_states,
    )
    while True:
        yield from stream.fill_rows()
        if stream.num_active:
            yield from stream.take_step()
        elif not stream.is_waiting:
            return


class _StreamRow:
    """One answer while it grows."""

    def __init__(self, request: StreamRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.states: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(request.seed)

    def pick_token(self, logits: Tensor) -> int:
        """Return the next token, greedy or sampled.

        Shapes: logits `[V]`.
        """
        if self.request.temperature == 0:
            return int(logits.argmax())
        # Sampling by inverting the cumulative law takes one uniform number a token, drawn on the host: so the
        # text does not depend on the device's generator.
        uniform = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        law = torch.softmax(logits.float() / self.request.temperature, dim=-1)
        cumulative = law.cumsum(-1, dtype=torch.float64)
        return int(torch.searchsorted(cumulative, uniform * cumulative[-1]).clamp_max(logits.shape[-1] - 1))


class _Stream:
    """The rows that decode together, and the requests that wait for a row."""

    def __init__(
        self,
        backbone: Backbone,
        requests: Iterator[StreamRequest],
        *,
        num_rows: int,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        keep_states: bool,
    ) -> None:
        self._backbone, self._requests = backbone, requests
        self._max_new_tokens, self._eos_ids, self._keep_states = max_new_tokens, eos_ids, keep_states
        self._rows: list[_StreamRow | None] = [None] * num_rows
        self._next_ids = torch.zeros(num_rows, 1, dtype=torch.long)
        # Every step decodes the root-only tree: one token, which sees itself.
        self._depths = torch.zeros(1, dtype=torch.long, device=backbone.device)
        self._visible = torch.ones(1, 1, dtype=torch.bool, device=backbone.device)
        self._cache: TreeCache | None = None
        self._waiting: StreamRequest | None = None  # a request that needs a longer cache

    @property
    def num_active(self) -> int:
        """Return how many rows decode an answer now."""
        return sum(row is not None for row in self._rows)

    @property
    def is_waiting(self) -> bool:
        """Return whether a request waits for a longer cache."""
        return self._waiting is not None

    def fill_rows(self) -> Iterator[StreamCompletion]:
        """Give every free row a prompt; yield the answers that end with their first token."""
        for index in range(len(self._rows)):
            while self._rows[index] is None:
                request = self._waiting or next(self._requests, None)
                self._waiting = None
                if request is None:
                    return
                needed = len(request.prompt_ids) + self._max_new_tokens
                if self._cache is None or needed > self._cache.max_length:
                    if self.num_active:
                        # The rows in flight hold the present cache. They end first, then a longer one
                        # replaces it.
                        self._waiting = request
                        return
                    length = needed + _SPARE_TOKENS
                    self._cache = self._backbone.new_cache(
                        batch_size=len(self._rows),
                        max_length=-(-length // _ROUNDING_TOKENS) * _ROUNDING_TOKENS,
                    )
                self._rows[index] = _StreamRow(request)
                self._cache.clear_rows(slice(index, index + 1))
                output = self._backbone.prefill(
                    torch.tensor(request.prompt_ids), cache=self._cache, row=index
                )
                yield from self._add_token(index, output.logits[0, -1], output.hidden[0, -1])

    def take_step(self) -> Iterator[StreamCompletion]:
        """Decode one token in every active row; yield the answers that end with it."""
        assert self._cache is not None
        active = [index for index, row in enumerate(self._rows) if row is not None]
        # Idle rows run along in the batch. Cleared, they do not make attention read further than it must.
        for index in set(range(len(self._rows))) - set(active):
            self._cache.clear_rows(slice(index, index + 1))
        step = self._backbone.forward(
            self._next_ids.to(self._backbone.device),
            depths=self._depths,
            visible=self._visible,
            cache=self._cache,
        )
        counts = [int(row is not None) for row in self._rows]
        self._cache.keep(
            torch.zeros_like(self._next_ids, device=self._backbone.device),
            torch.tensor(counts, device=self._backbone.device),
            counts=counts,
        )
        for index in active:
            yield from self._add_token(index, step.logits[index, -1], step.hidden[index, -1])

    def _add_token(self, index: int, logits: Tensor, hidden: Tensor) -> Iterator[StreamCompletion]:
        """Add one token to a row; yield its answer if it ends here, and free the row."""
        row = self._rows[index]
        assert row is not None
        token = row.pick_token(logits)
        row.token_ids.append(token)
        if self._keep_states:
            # A copy, since the next step may overwrite the model's output.
            row.states.append(hidden.to("cpu", torch.float16, copy=True))
        self._next_ids[index, 0] = token
        if token not in self._eos_ids and len(row.token_ids) < self._max_new_tokens:
            return
        self._rows[index] = None
        yield StreamCompletion(
            key=row.request.key,
            token_ids=row.token_ids,
            ended_by="eos" if token in self._eos_ids else "budget",
            states=torch.stack(row.states) if self._keep_states else None,
        )
