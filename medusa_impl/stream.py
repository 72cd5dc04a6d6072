"""Vanilla decoding of many prompts, a fixed number at a time, to generate training corpora.

`decode_vanilla` decodes one batch and ends with its longest row. Here a row that has ended takes the next
prompt at once, so that the device stays busy. Nothing here is for measuring speed.

The device chooses tokens and ends rows by itself. The host sees how a step ended one step later, while the
device computes the next one:

    device    step 1 | step 2 | step 3 | ..
    host      launches 2, reads 1 | launches 3, reads 2 | ..

So on a GPU the host never waits for the step that runs; a row that has ended idles for one step. On a CPU
there is nothing to overlap, and the host reads each step at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.rows import EndedBy
from medusa_impl.stream_rows import DeviceRows, StreamRequest

# A new cache gets room for somewhat longer prompts than the one that asks for it, rounded up, so that it is
# not replaced for every prompt that is a little longer.
_SPARE_TOKENS, _ROUNDING_TOKENS = 128, 64
CACHE_SPARE_TOKENS = _SPARE_TOKENS + _ROUNDING_TOKENS  # at most
_PREFILL_TOKENS = 8192  # of one pass over several prompts, padding included
GPU_PREFILL_ROWS = 16  # prompts that a GPU reads in one pass; a CPU reads each alone, without any padding


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
    prefill_rows: int | None = None,
    delay_steps: int | None = None,
) -> Iterator[StreamCompletion]:
    """Yield the answers to many prompts, in the order in which they end.

    `num_rows` prompts decode together, one token a step. The text of an answer depends on its own seed and on
    no other prompt. One exception: where two logits differ only by rounding, the batch can decide which is
    greater. `prefill_rows` prompts are read in one pass, and the host looks at a step `delay_steps` later; by
    default as the device likes it.
    """
    on_cpu = backbone.device.type == "cpu"
    stream = _Stream(
        backbone,
        iter(requests),
        rows=DeviceRows(
            num_rows,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            hidden_size=backbone.hidden_size if keep_states else None,
            device=backbone.device,
        ),
        eos_ids=eos_ids,
        prefill_rows=prefill_rows or (1 if on_cpu else GPU_PREFILL_ROWS),
        delay_steps=delay_steps if delay_steps is not None else (0 if on_cpu else 1),
    )
    stream.fill_rows()
    while stream.num_active:
        yield from stream.take_step()
        stream.fill_rows()


@dataclass(frozen=True, eq=False)
class _Owner:
    """The answer that a row makes at present; the same request may come twice, an owner does not."""

    request: StreamRequest


@dataclass(frozen=True)
class _Outcome:
    """Which rows go on after a step, on its way to the host, and whose the rows were in that step."""

    going_on: Tensor
    owners: tuple[_Owner | None, ...]
    ready: torch.cuda.Event | None

    @staticmethod
    def of(going_on: Tensor, owners: Sequence[_Owner | None]) -> _Outcome:
        """Send the flags to the host, without waiting for them."""
        if going_on.device.type != "cuda":
            return _Outcome(going_on, tuple(owners), None)
        there = torch.empty(going_on.shape, dtype=going_on.dtype, pin_memory=True)
        there.copy_(going_on, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return _Outcome(there, tuple(owners), ready)

    def ended_rows(self) -> list[tuple[int, _Owner]]:
        """Return the rows that have ended, and whose they were, as soon as that step has been computed."""
        if self.ready is not None:
            self.ready.synchronize()
        flags = enumerate(self.going_on.tolist())
        rows = [(row, self.owners[row]) for row, goes_on in flags if not goes_on]
        return [(row, owner) for row, owner in rows if owner is not None]


class _Prompts:
    """Reads prompts, all but their last token, and hands their keys and values to rows of another cache.

    On a GPU several are read in one pass, padded on the right: no token sees those after it, so the padding
    is seen by none, and it is not kept. The last token is left to the row's first step.
    """

    def __init__(self, backbone: Backbone, requests: Iterator[StreamRequest], *, num_rows: int) -> None:
        # Prompts have many lengths: none is worth preparing a step for. This backbone calls the model as it
        # is.
        self._reader, self._requests = Backbone(backbone.model), requests
        self._num_rows = num_rows
        self._pulled: StreamRequest | None = None
        self._waiting: deque[StreamRequest] = deque()
        self._row = 0  # of the cache, that of the first request that waits
        self._cache: TreeCache | None = None

    def first(self) -> StreamRequest | None:
        """Return the request that is next, or None if there is no more."""
        if not self._waiting:
            self._pull()
            if self._num_rows > 1:
                self._read_together()
        return self._waiting[0] if self._waiting else None

    @torch.inference_mode()
    def place(self, cache: TreeCache, *, row: int) -> StreamRequest:
        """Return the next request, whose prompt is now kept in a row of `cache`."""
        request = self._waiting.popleft()
        cache.clear_rows(slice(row, row + 1))
        count = len(request.prompt_ids) - 1
        if count and self._num_rows == 1:
            self._reader.prefill(torch.tensor(request.prompt_ids[:-1]), cache=cache, row=row)
        elif count:
            assert self._cache is not None
            keys = self._cache.layer_storage(0)[0].transpose(1, 2)
            cache.allocate(keys, keys)
            layers = range(len(cache.layers))
            torch._foreach_copy_(  # of all layers in a few launches
                [ours[row, :count] for layer in layers for ours in cache.layer_storage(layer)],
                [kept[self._row, :count] for layer in layers for kept in self._cache.layer_storage(layer)],
            )
            cache.keep_all(row=row, count=count)
        self._row += 1
        return request

    def _pull(self) -> None:
        """Take as many requests as are read together."""
        longest = 0
        while len(self._waiting) < self._num_rows:
            request = self._pulled or next(self._requests, None)
            self._pulled = None
            if request is None:
                return
            longest = max(longest, len(request.prompt_ids))
            if self._waiting and longest * (len(self._waiting) + 1) > _PREFILL_TOKENS:
                self._pulled = request
                return
            self._waiting.append(request)

    def _read_together(self) -> None:
        lengths = [len(request.prompt_ids) - 1 for request in self._waiting]
        self._row, width = 0, max(lengths, default=0)
        if not width:
            return
        if self._cache is None or self._cache.max_length < width:
            self._cache = self._reader.new_cache(
                batch_size=self._num_rows, max_length=-(-width // _ROUNDING_TOKENS) * _ROUNDING_TOKENS
            )
        self._cache.clear_rows()
        tokens = torch.zeros(self._num_rows, width, dtype=torch.long)
        for row, request in enumerate(self._waiting):
            tokens[row, : lengths[row]] = torch.tensor(request.prompt_ids[:-1])
        positions = torch.arange(width, device=self._reader.device)
        self._reader.forward(
            tokens.to(self._reader.device),
            depths=positions,
            visible=positions[:, None] >= positions[None, :],
            cache=self._cache,
            num_logits=1,
        )


class _Stream:
    """The rows that decode together, and the requests that wait for a row."""

    def __init__(
        self,
        backbone: Backbone,
        requests: Iterator[StreamRequest],
        *,
        rows: DeviceRows,
        eos_ids: frozenset[int],
        prefill_rows: int,
        delay_steps: int,
    ) -> None:
        self._backbone, self._rows, self._eos_ids = backbone, rows, eos_ids
        self._prompts = _Prompts(backbone, requests, num_rows=prefill_rows)
        self._delay_steps = delay_steps
        self._owners: list[_Owner | None] = [None] * rows.num_rows
        self._outcomes: deque[_Outcome] = deque()
        # Every step decodes the root-only tree: one token, which sees itself.
        self._depths = torch.zeros(1, dtype=torch.long, device=backbone.device)
        self._visible = torch.ones(1, 1, dtype=torch.bool, device=backbone.device)
        self._roots = torch.zeros(rows.num_rows, 1, dtype=torch.long, device=backbone.device)
        self._cache: TreeCache | None = None

    @property
    def num_active(self) -> int:
        """Return how many rows decode an answer, as far as the host knows."""
        return sum(owner is not None for owner in self._owners)

    def fill_rows(self) -> None:
        """Give every free row a prompt, as long as there are prompts that fit into the cache."""
        for row, owner in enumerate(self._owners):
            if owner is not None:
                continue
            request = self._prompts.first()
            if request is None or not self._has_room(request):
                return
            assert self._cache is not None
            self._owners[row] = _Owner(self._prompts.place(self._cache, row=row))
            self._rows.start(row, request)

    def take_step(self) -> Iterator[StreamCompletion]:
        """Decode one token in every active row; yield the answers that are known to have ended."""
        assert self._cache is not None
        step = self._backbone.forward(
            self._rows.next_ids, depths=self._depths, visible=self._visible, cache=self._cache
        )
        # What ran in this step is kept. The device knows better than the host which rows that were: a length
        # on the host may be a little too long, which costs a few masked slots.
        self._cache.keep(
            self._roots,
            self._rows.active.long(),
            counts=[int(owner is not None) for owner in self._owners],
        )
        going_on = self._rows.take(step.logits[:, -1], step.hidden[:, -1])
        self._outcomes.append(_Outcome.of(going_on, self._owners))
        if len(self._outcomes) > self._delay_steps:
            yield from self._settle(self._outcomes.popleft())

    def _settle(self, outcome: _Outcome) -> Iterator[StreamCompletion]:
        """Free the rows that ended in a step, and yield their answers."""
        assert self._cache is not None
        # Others had ended in an earlier step, which was looked at since.
        ended = [(row, owner) for row, owner in outcome.ended_rows() if self._owners[row] is owner]
        if not ended:
            return
        for row, _ in ended:
            self._owners[row] = None
            # Idle rows run along in the batch. Cleared, they do not make attention read further than it must.
            self._cache.clear_rows(slice(row, row + 1))
        answers = self._rows.answers([row for row, _ in ended], ready=outcome.ready)
        for (_, owner), (token_ids, states) in zip(ended, answers, strict=True):
            yield StreamCompletion(
                key=owner.request.key,
                token_ids=token_ids,
                ended_by="eos" if token_ids[-1] in self._eos_ids else "budget",
                states=states,
            )

    def _has_room(self, request: StreamRequest) -> bool:
        """Return whether the cache is long enough; replace one that is not as soon as no row uses it."""
        # The host may count `delay_steps` tokens more than there are.
        needed = len(request.prompt_ids) + self._rows.max_new_tokens + self._delay_steps
        if self._cache is not None and needed <= self._cache.max_length:
            return True
        if self.num_active:
            return False
        length = needed + _SPARE_TOKENS
        self._cache = self._backbone.new_cache(
            batch_size=self._rows.num_rows,
            max_length=-(-length // _ROUNDING_TOKENS) * _ROUNDING_TOKENS,
        )
        return True
