"""Step times at every combination of nodes, heads, context and batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.measure.latency.faults import UNPREPARED, noting_fault
from harness.records.latency import LatencyPoint
from harness.specs.latency import PointKey
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

_TIMES_A_VISIT, _CHUNK_TOKENS, _SEED = 3, 512, 0
_ENDLESS_TOKENS = 1 << 30  # a budget that no timed loop uses up
_BACKBONE_DEPTH = 5  # of trees that are timed without heads


def measure_group(
    engine: Engine, keys: Sequence[PointKey], *, repeats: int, clock: Clock
) -> tuple[LatencyPoint, ...]:
    """Time the points of one group `repeats` times each, in rounds of a few times at each visit.

    Each round begins with another point. So what disturbs the machine for a moment meets a size in one round
    only, and with three rounds or more its median stands.

    Each visit's first pass is dropped: it meets what a pass of another size left in caches and allocator,
    which no step of a decoding does (on a CPU in eager mode it takes half as long again). A point that runs
    out of memory, or that a preparing mode cannot run, is recorded as skipped, and the others go on.
    """
    device = engine.runner.backbone.device
    engine.runner.use(keys[0].mode)
    reset_peak_memory(device)
    skipped: dict[PointKey, str] = {}
    timers: dict[PointKey, _PointTimer] = {}

    def noting(*faulty: PointKey) -> contextlib.AbstractContextManager[None]:
        return noting_fault(
            keys[0].mode,
            device=device,
            note=lambda reason: skipped.update(dict.fromkeys(faulty, reason)),
        )

    with noting(*keys):  # of the context; points note their own
        room_tokens = max(key.num_nodes for key in keys) + 1
        cache = filled_cache(
            engine.runner.backbone,
            context_tokens=keys[0].context_tokens,
            batch=keys[0].batch,
            room_tokens=room_tokens,
        )
        rounds = (0, *_visits(repeats))  # the first warms kernels and allocator up
        for number, num_times in enumerate(rounds):
            first = number * len(keys) // len(rounds)
            for key in (*keys[first:], *keys[:first]):
                if key in skipped:
                    continue
                with noting(key):
                    if key not in timers:
                        timers[key] = _PointTimer(engine, key, cache, clock=clock)
                    timers[key].visit(num_times)
    if engine.runner.mode != keys[0].mode:  # the engine fell back by itself: these are times of another mode
        reason = f"{keys[0].mode} {UNPREPARED}: {engine.runner.note or engine.runner.mode}"
        skipped = {key: skipped.get(key, reason) for key in keys}
    peak = peak_memory_bytes(device)
    return tuple(
        LatencyPoint(**dict(key), skipped=skipped[key])
        if key in skipped
        else LatencyPoint(
            **dict(key),
            backbone_s=tuple(timers[key].backbone_s),
            heads_s=tuple(timers[key].heads_s),
            step_s=tuple(timers[key].step_s),
            peak_memory_bytes=peak,
        )
        for key in keys
    )


def _visits(repeats: int) -> list[int]:
    """Return how many times each visit takes."""
    whole, rest = divmod(repeats, _TIMES_A_VISIT)
    return [_TIMES_A_VISIT] * whole + ([rest] if rest else [])


class _PointTimer:
    """Times one size after the shared context.

    It times the backbone's pass, the heads, and a step of the decoding loop itself.
    """

    def __init__(self, engine: Engine, key: PointKey, cache: TreeCache, *, clock: Clock) -> None:
        backbone = engine.runner.backbone
        self._engine, self._key, self._cache, self._clock = engine, key, cache, clock
        self._tree = comb_tree(key.num_nodes, depth=key.num_heads or _BACKBONE_DEPTH)
        self._buffers = tree_buffers(self._tree, device=backbone.device)
        self._tokens = (
            torch.arange(key.num_nodes, device=backbone.device)
            .remainder(backbone.vocab_size)
            .repeat(key.batch, 1)
        )
        self._states = torch.ones(
            key.batch, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device
        )
        self._steps = self._decoding() if key.num_heads or key.num_nodes == 1 else None
        self.backbone_s: list[float] = []
        self.heads_s: list[float] = []
        self.step_s: list[float] = []

    def visit(self, num_times: int) -> None:
        """Run each part once unseen, then time it so many times."""
        parts = [(self.backbone_s, self._backbone_pass)]
        if self._key.num_heads:
            parts.append((self.heads_s, self._heads_pass))
        if self._steps is not None:
            parts.append((self.step_s, self._step))
        for times, part in parts:
            rewind(self._cache, context_tokens=self._key.context_tokens)
            part()
            for _ in range(num_times):
                rewind(self._cache, context_tokens=self._key.context_tokens)
                started = self._clock()
                part()
                times.append(self._clock() - started)

    @torch.inference_mode()
    def _backbone_pass(self) -> None:
        self._engine.runner.backbone.forward(
            self._tokens, depths=self._buffers.depths, visible=self._buffers.visible, cache=self._cache
        )

    @torch.inference_mode()
    def _heads_pass(self) -> None:
        self._engine.heads(
            self._states, lm_head=self._engine.runner.backbone.lm_head, num_heads=self._key.num_heads
        )

    def _step(self) -> None:
        assert self._steps is not None
        next(self._steps)

    def _decoding(self) -> Iterator[DecodingStep]:
        """Return an endless decoding after the context, its prefill of one token a row done."""
        prompts = [[row % self._engine.runner.backbone.vocab_size] for row in range(self._key.batch)]
        rewind(self._cache, context_tokens=self._key.context_tokens)
        backbone, cache, no_end = self._engine.runner.backbone, self._cache, frozenset[int]()
        if self._key.num_nodes == 1:
            steps = decode_vanilla(
                backbone,
                prompts,
                rule=GreedyRule(),
                max_new_tokens=_ENDLESS_TOKENS,
                eos_ids=no_end,
                cache=cache,
            )
        else:
            steps = decode_medusa(
                backbone,
                self._engine.heads,
                self._tree,
                prompts,
                rule=GreedyRule(),
                max_new_tokens=_ENDLESS_TOKENS,
                eos_ids=no_end,
                cache=cache,
            )
        next(steps)
        return steps


def filled_cache(backbone: Backbone, *, context_tokens: int, batch: int, room_tokens: int) -> TreeCache:
    """Return a cache whose rows hold `context_tokens` random tokens each, with room for more.

    The tokens are read in chunks.
    """
    cache = backbone.new_cache(batch_size=batch, max_length=context_tokens + room_tokens)
    texts = torch.randint(
        backbone.vocab_size, (batch, context_tokens), generator=torch.Generator().manual_seed(_SEED)
    )
    for row in range(batch):
        for start in range(0, context_tokens, _CHUNK_TOKENS):
            backbone.prefill(texts[row, start : start + _CHUNK_TOKENS], cache=cache, row=row)
    return cache


def rewind(cache: TreeCache, *, context_tokens: int) -> None:
    """Forget all that was kept after the first `context_tokens` of every row; their keys and values stay."""
    cache.clear_rows()
    for row in range(cache.num_rows):
        cache.keep_all(row=row, count=context_tokens)


def comb_tree(num_nodes: int, *, depth: int) -> DraftTree:
    """Return a tree of that many nodes.

    It has the best path of `depth` levels, then the next best tokens of each level in turn. A step's cost
    depends on its number of nodes and on how many of a head's tokens it sorts, not on where the nodes hang.
    """
    depth = min(depth, num_nodes - 1)
    teeth = ((0,) * level + (rank,) for rank in range(num_nodes) for level in range(depth))
    return DraftTree.from_paths([(), *(tooth for tooth, _ in zip(teeth, range(num_nodes - 1), strict=False))])
