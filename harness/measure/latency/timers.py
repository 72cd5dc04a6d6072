"""Step times at every combination of nodes, heads, context and batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.measure.latency.faults import PREPARING_MODES, UNPREPARED, noting_fault
from harness.records.latency import LatencyPoint
from harness.specs.latency import PointKey
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import BUCKET_TOKENS, TreeCache
from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

_TIMES_A_VISIT, _CHUNK_TOKENS, _SEED = 3, 512, 0
_ENDLESS_TOKENS = 1 << 30  # a budget that no timed loop uses up
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, less whole numbers, are spread evenly
_BACKBONE_DEPTH = 5  # of trees that are timed without heads


def measure_group(
    engine: Engine, keys: Sequence[PointKey], *, repeats: int, clock: Clock, rounds: range | None = None
) -> tuple[LatencyPoint, ...]:
    """Time the points of one group `repeats` times each, in rounds of a few times at each visit.

    `rounds` asks for some of these rounds; the others belong to other sittings. Each round begins with
    another point, so that what disturbs the machine for a moment meets a size in one round only. Every
    speedup rests on the step of one node: before each visit of another size it is visited too, and so it is
    timed as often as all others together, at the levels that they meet.

    A visit is a stretch of decoding: its steps follow each other over a growing text, and each visit of a
    size starts at another length about the context, as the steps of a decoding do. A mode that prepares its
    steps for each length that attention reads keeps to the context itself.

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
        stretch = stretch_of(keys, backbone=engine.runner.backbone)
        room_tokens, batch = max(key.num_nodes for key in keys) + stretch.grown, keys[0].batch
        cache = filled_cache(
            engine.runner.backbone, context_tokens=stretch.longest, batch=batch, room_tokens=room_tokens
        )
        counts = (0, *visits_of(repeats))  # the first warms kernels and allocator up
        wanted = range(len(counts)) if rounds is None else [number + 1 for number in rounds]
        for number in wanted if wanted[0] != 1 else (0, *wanted):
            for key in visited(keys, number=number, num_rounds=len(counts)):
                if key in skipped:
                    continue
                with noting(key):
                    if key not in timers:
                        begun = number * len(keys)  # so that each sitting starts at other lengths
                        timers[key] = _PointTimer(
                            engine, key, cache, stretch=stretch, begun=begun, clock=clock
                        )
                    timers[key].visit(counts[number], number=number)
    if engine.runner.mode != keys[0].mode:  # the engine fell back by itself: these are times of another mode
        reason = f"{keys[0].mode} {UNPREPARED}: {engine.runner.note or engine.runner.mode}"
        skipped = {key: skipped.get(key, reason) for key in keys}
    peak = peak_memory_bytes(device)
    return tuple(
        LatencyPoint(**dict(key), skipped=skipped[key])
        if key in skipped
        else timers[key].point(peak_memory_bytes=peak)
        for key in keys
    )


def visited(keys: Sequence[PointKey], *, number: int, num_rounds: int) -> list[PointKey]:
    """Return the points in the order in which a round visits them, one node before every other size."""
    first = number * len(keys) // num_rounds
    turned = (*keys[first:], *keys[:first])
    one_node = [key for key in keys if key.num_nodes == 1]
    others = [key for key in turned if key.num_nodes > 1]
    return [key for other in others for key in (*one_node, other)] or list(turned)


@dataclass(frozen=True)
class Stretch:
    """About which context the visits of a group start, and how many tokens a visit may keep.

    Starts lie from `longest` - `span` to `longest`. `grown` is 1 where no text grows.
    """

    longest: int
    span: int
    grown: int

    def start(self, visit: int) -> int:
        """Return after how many tokens a visit starts; visits in a row are spread evenly over the span."""
        return self.longest - round(self.span * (visit * _GOLDEN % 1))


def stretch_of(keys: Sequence[PointKey], *, backbone: Backbone) -> Stretch:
    """Return the stretch of one group's visits: about its context, and within the model's positions."""
    context, limit = keys[0].context_tokens, backbone.max_positions
    if keys[0].mode in PREPARING_MODES:
        return Stretch(longest=context, span=0, grown=1)
    grown = (_TIMES_A_VISIT + 1) * (1 + max((key.num_heads for key in keys), default=0))
    half, most = min(BUCKET_TOKENS // 2, context // 2), max(key.num_nodes for key in keys)
    learned = limit is not None and context + most <= limit  # random weights run beyond any limit
    longest = min(context + half, limit - most - grown if learned and limit is not None else math.inf)
    if longest < context - half or half == 0:  # no room to grow
        return Stretch(longest=context, span=0, grown=1)
    return Stretch(longest=int(longest), span=min(2 * half, int(longest) - 1), grown=grown)


def visits_of(repeats: int) -> list[int]:
    """Return how many times each visit of a size takes, one entry a round."""
    whole, rest = divmod(repeats, _TIMES_A_VISIT)
    return [_TIMES_A_VISIT] * whole + ([rest] if rest else [])


class _PointTimer:
    """Times one size after the shared context.

    It times the backbone's pass, the heads, and a step of the decoding loop itself.
    """

    def __init__(
        self,
        engine: Engine,
        key: PointKey,
        cache: TreeCache,
        *,
        stretch: Stretch,
        begun: int,
        clock: Clock,
    ) -> None:
        backbone = engine.runner.backbone
        self._stretch, self._num_visits = stretch, begun
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
        self.times_a_round: list[int] = []
        self._round = 0

    def point(self, *, peak_memory_bytes: int | None) -> LatencyPoint:
        """Return what was timed so far."""
        return LatencyPoint(
            **dict(self._key),
            backbone_s=tuple(self.backbone_s),
            heads_s=tuple(self.heads_s),
            step_s=tuple(self.step_s),
            timing="decoding" if self._stretch.grown > 1 else "fixed",
            times_a_round=tuple(self.times_a_round),
            peak_memory_bytes=peak_memory_bytes,
        )

    def visit(self, num_times: int, *, number: int) -> None:
        """Run each part once unseen, then time it so many times; `number` is the round's."""
        start = self._stretch.start(self._num_visits)
        self._num_visits += 1
        if num_times and number != self._round:
            self._round = number
            self.times_a_round.append(0)
        parts = [(self.backbone_s, self._backbone_pass)]
        if self._key.num_heads:
            parts.append((self.heads_s, self._heads_pass))
        if self._steps is not None:
            parts.append((self.step_s, self._step))
        for times, part in parts:
            rewind(self._cache, context_tokens=start)
            part()
            for _ in range(num_times):
                if part != self._step or self._stretch.grown == 1:
                    rewind(self._cache, context_tokens=start)
                started = self._clock()
                part()
                times.append(self._clock() - started)
        if num_times:
            self.times_a_round[-1] += num_times

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
