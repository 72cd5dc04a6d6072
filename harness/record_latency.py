"""Record a latency run: time backbone, heads and whole steps of every size on the device, then the tables of modes and of batches.

All sizes behind one context share a cache and are timed in turn. Its keys and values come from a real prefill of random tokens, in
chunks, once a group; a timed step is dropped by forgetting it, so that every repeat sees the same context.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from harness.compose.curve import BATCHES_FILE, MODEL_FILE, MODES_FILE, LatencyPoint, LatencyRecord, ModelFacts, ModeTrials, limits_file
from harness.device.clock import Clock, device_clock
from harness.device.doctor import foreign_gpu_processes
from harness.device.engine import Engine, best_device
from harness.device.limits import measure_device_limits
from harness.device.locks import device_held, folder_held
from harness.errors import UserError
from harness.files import write_json
from harness.latency_engine import (
    chosen_modes,
    describe_latency,
    facts_of_engine,
    free_memory_bytes,
    load_latency_engine,
    model_words,
    packs_weights,
    planned_facts,
)
from harness.latency_specs import DtypeName, LatencySpec, ModeName, PointKey
from harness.latency_store import LatencyStore
from harness.measure_modes import LatencyPrompt, measure_batches, measure_modes, table_prompts
from harness.paths import without_paths
from medusa_impl.acceptance import GreedyRule
from medusa_impl.backbone import Backbone
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.kv_cache import TreeCache
from medusa_impl.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

_TIMES_A_VISIT, _CHUNK_TOKENS, _SEED = 3, 512, 0
_ENDLESS_TOKENS = 1 << 30  # a budget that no timed loop uses up
_BACKBONE_DEPTH = 5  # of trees that are timed without heads

Held = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class LatencyOptions:
    """What the command line may say about a latency run, besides the spec."""

    results: Path
    resume: Path | None = None
    allow_hub: bool = False
    command: str = ""


def run_latency(spec: LatencySpec, *, spec_file: Path | None, options: LatencyOptions, console: Console) -> Path:
    """Run a latency spec, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that cannot be run, or a resume of another run.
    """
    started = time.monotonic()
    device, beside = best_device(), spec_file.parent if spec_file is not None else None
    if options.resume is not None:
        LatencyRecord(options.resume)  # must be there before minutes go into loading
    if foreign := foreign_gpu_processes():
        raise UserError(found=f"{foreign} other processes on the GPU", need="a GPU of our own", where="this machine", do="stop them")
    clock = device_clock(device)

    def held() -> contextlib.AbstractContextManager[None]:
        return device_held(device, on_wait=lambda: console.print("another run holds the device: waiting for its turn"))

    first = spec.dtypes[0]
    console.print(f"[bold]{spec.name}[/bold]: loading {model_words(spec)} in {first}")
    free_bytes = free_memory_bytes(device)
    if spec.shape is not None:
        check_fits(spec, dtype=first, free_bytes=free_bytes)
    engine = load_latency_engine(spec, dtype=first, device=device, beside=beside, allow_hub=options.allow_hub)
    prompts = table_prompts(spec, engine, allow_hub=options.allow_hub)
    environment = describe_latency(engine, spec=spec, prompts=prompts, command=options.command)
    store = LatencyStore.open(options.results, spec=spec, environment=environment, resume=options.resume)
    with folder_held(store.folder):
        write_json(store.folder / MODEL_FILE, facts_of_engine(engine))
        done, num_planned, peak = store.prepare(), 0, 0
        for dtype in spec.dtypes:
            if dtype != first:
                _release(device)
                free_bytes = free_memory_bytes(device)
                console.print(f"loading {model_words(spec)} in {dtype}")
                engine = load_latency_engine(spec, dtype=dtype, device=device, beside=beside, allow_hub=options.allow_hub)
            session = _Session(spec, engine, dtype, store, clock, held, console, free_bytes)
            num_planned += len(session.plan)
            peak = max(peak, session.measure(prompts, done=done, beside=beside))
            del engine, session  # two copies of the weights may not fit
        store.seal(num_planned=num_planned, elapsed_s=time.monotonic() - started, peak_memory_bytes=peak)
    return store.folder


def print_latency_plan(spec: LatencySpec, *, console: Console) -> dict[str, int]:
    """Print every point with the memory that it needs and why it would be skipped; return how many there are and how many are skipped.

    Nothing is loaded. Whether a mode is on offer shows only when the model is; `auto` is shown as `eager`.
    """
    device, facts = best_device(), planned_facts(spec)
    free_bytes = free_memory_bytes(device)
    table = Table("dtype", "mode", "batch", "context", "nodes", "heads", "GB", "skipped")
    counts = {"points": 0, "skipped": 0}
    for dtype in spec.dtypes:
        packs = packs_weights(spec, dtype=dtype, device=device)
        for key in spec.points(dtype, chosen_modes(spec, ("eager",))):
            reason = skip_reason(key, facts, packs=packs, free_bytes=free_bytes, memory_share=spec.memory_share)
            sizes = (key.batch, key.context_tokens, key.num_nodes, key.num_heads)
            table.add_row(dtype, key.mode, *map(str, sizes), f"{facts.needed_bytes(key, packs=packs) / 1e9:.2f}", reason or "")
            counts = {"points": counts["points"] + 1, "skipped": counts["skipped"] + (reason is not None)}
    console.print(table)
    console.print(f"{facts.name}: {counts['points']} points, {counts['skipped']} skipped; {free_bytes / 1e9:.2f} GB free", highlight=False)
    return counts


def check_fits(spec: LatencySpec, *, dtype: DtypeName, free_bytes: int) -> None:
    """Refuse, before random weights are made, a shape of which no point fits into memory."""
    facts = planned_facts(spec)
    needed = min(facts.needed_bytes(key, packs=False) for key in spec.points(dtype, chosen_modes(spec, ("eager",))))
    if needed > spec.memory_share * free_bytes:
        raise UserError(
            found=f"{facts.name} in {dtype}, which needs {needed / 1e9:.1f} GB at its smallest size",
            need=f"at most {spec.memory_share:g} of the free {free_bytes / 1e9:.1f} GB",
            where="this machine",
            do="choose a smaller shape or dtype",
        )


class _Session:
    """One dtype's share of a run."""

    def __init__(
        self,
        spec: LatencySpec,
        engine: Engine,
        dtype: DtypeName,
        store: LatencyStore,
        clock: Clock,
        held: Held,
        console: Console,
        free_bytes: int,
    ) -> None:
        self.spec, self.engine, self.dtype, self.store = spec, engine, dtype, store
        self.clock, self.held, self.console, self.free_bytes = clock, held, console, free_bytes
        self.available = engine.runner.available_modes()
        self.modes = chosen_modes(spec, self.available)
        self.plan = spec.points(dtype, self.modes)

    def measure(self, prompts: Sequence[LatencyPrompt], *, done: set[PointKey], beside: Path | None) -> int:
        """Measure all of this dtype that is not on disk; return the peak memory seen."""
        auto: ModeName = self.available[0]
        self._measure_limits()
        peak = self._measure_points(done)
        self._measure_modes(prompts, auto=auto)
        if self.dtype == self.spec.dtypes[0]:
            self._measure_batches(prompts, auto=auto, beside=beside)
        return max(peak, peak_memory_bytes(self.engine.runner.backbone.device))

    def _measure_limits(self) -> None:
        path = self.store.folder / limits_file(self.dtype, first=self.spec.dtypes[0])
        if not path.exists():
            with self.held():
                backbone = self.engine.runner.backbone
                write_json(path, measure_device_limits(backbone.device, backbone.dtype, clock=self.clock))

    def _measure_points(self, done: set[PointKey]) -> int:
        """Time every group that is not on disk; return the peak memory seen."""
        facts, peak = facts_of_engine(self.engine), 0
        packs = packs_weights(self.spec, dtype=self.dtype, device=self.engine.runner.backbone.device)
        for (dtype, mode, context_tokens, batch), members in groupby(self.plan, key=lambda key: key.group):
            todo = [key for key in members if key not in done]
            reasons = {key: self._reason(key, facts, packs=packs) for key in todo}
            self.store.append(LatencyPoint(**dict(key), skipped=reason) for key, reason in reasons.items() if reason is not None)
            if runnable := [key for key in todo if reasons[key] is None]:
                self.console.print(f"{dtype} {mode}: context {context_tokens}, batch {batch}, {len(runnable)} sizes", highlight=False)
                with self.held():
                    points = measure_group(self.engine, runnable, repeats=self.spec.repeats, clock=self.clock)
                self.store.append(points)
                peak = max(peak, *(point.peak_memory_bytes or 0 for point in points))
        return peak

    def _measure_modes(self, prompts: Sequence[LatencyPrompt], *, auto: ModeName) -> None:
        table = self.spec.modes_table
        record = LatencyRecord(self.store.folder)
        before = record.modes or ModeTrials(auto={}, trials=())
        if table is None or self.dtype in before.auto:
            return
        self.console.print(f"{self.dtype}: the table of modes, {table.num_prompts} prompts", highlight=False)
        timed = {key.mode for key in self.plan}  # a grid may leave a mode to some dtypes
        modes = [mode for mode in self.modes if mode in self.available and mode in timed]
        trials = measure_modes(
            self.engine,
            self.dtype,
            modes,
            prompts[: table.num_prompts],
            max_new_tokens=table.max_new_tokens,
            clock=self.clock,
            held=self.held,
        )
        after = ModeTrials(auto={**before.auto, self.dtype: auto}, trials=(*before.trials, *trials))
        write_json(self.store.folder / MODES_FILE, after)

    def _measure_batches(self, prompts: Sequence[LatencyPrompt], *, auto: ModeName, beside: Path | None) -> None:
        path = self.store.folder / BATCHES_FILE
        if self.spec.batch_table is None or path.exists():
            return
        self.console.print(f"{self.dtype}: speed against batch {list(self.spec.batch_table.batches)}", highlight=False)
        self.engine.runner.use(auto if auto in self.modes else self.modes[0])
        points = LatencyRecord(self.store.folder).points
        write_json(
            path,
            measure_batches(self.engine, self.spec, points, prompts, dtype=self.dtype, clock=self.clock, held=self.held, beside=beside),
        )

    def _reason(self, key: PointKey, facts: ModelFacts, *, packs: bool) -> str | None:
        if key.mode not in self.available:
            return f"mode {key.mode} is not available on this device in {key.dtype}"
        return skip_reason(key, facts, packs=packs, free_bytes=self.free_bytes, memory_share=self.spec.memory_share)


def measure_group(engine: Engine, keys: Sequence[PointKey], *, repeats: int, clock: Clock) -> tuple[LatencyPoint, ...]:
    """Time the points of one group `repeats` times each, a few times at each visit, each round of visits beginning somewhere else.

    So what disturbs the machine for a moment meets a size in one round only, and with three rounds or more its median stands.

    Each visit's first pass is dropped: it meets what a pass of another size left in caches and allocator, which no step of a decoding
    does (on a CPU in eager mode it takes half as long again).
    A point that runs out of memory is recorded as skipped, and the others go on.
    """
    device = engine.runner.backbone.device
    engine.runner.use(keys[0].mode)
    reset_peak_memory(device)
    skipped: dict[PointKey, str] = {}
    timers: dict[PointKey, _PointTimer] = {}
    with _noting_out_of_memory(skipped, keys, device):  # of the context; points note their own
        room_tokens = max(key.num_nodes for key in keys) + 1
        cache = filled_cache(engine.runner.backbone, context_tokens=keys[0].context_tokens, batch=keys[0].batch, room_tokens=room_tokens)
        rounds = (0, *_visits(repeats))  # the first warms kernels and allocator up
        for number, num_times in enumerate(rounds):
            first = number * len(keys) // len(rounds)
            for key in (*keys[first:], *keys[:first]):
                if key in skipped:
                    continue
                with _noting_out_of_memory(skipped, [key], device):
                    if key not in timers:
                        timers[key] = _PointTimer(engine, key, cache, clock=clock)
                    timers[key].visit(num_times)
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
    """Times one size behind the shared context: the backbone's pass, the heads, and a step of the decoding loop itself."""

    def __init__(self, engine: Engine, key: PointKey, cache: TreeCache, *, clock: Clock) -> None:
        backbone = engine.runner.backbone
        self._engine, self._key, self._cache, self._clock = engine, key, cache, clock
        self._tree = comb_tree(key.num_nodes, depth=key.num_heads or _BACKBONE_DEPTH)
        self._buffers = tree_buffers(self._tree, device=backbone.device)
        self._tokens = torch.arange(key.num_nodes, device=backbone.device).remainder(backbone.vocab_size).repeat(key.batch, 1)
        self._states = torch.ones(key.batch, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
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
        self._engine.runner.backbone.forward(self._tokens, depths=self._buffers.depths, visible=self._buffers.visible, cache=self._cache)

    @torch.inference_mode()
    def _heads_pass(self) -> None:
        self._engine.heads(self._states, lm_head=self._engine.runner.backbone.lm_head, num_heads=self._key.num_heads)

    def _step(self) -> None:
        assert self._steps is not None
        next(self._steps)

    def _decoding(self) -> Iterator[DecodingStep]:
        """Return an endless decoding behind the context, its prefill of one token a row done."""
        prompts = [[row % self._engine.runner.backbone.vocab_size] for row in range(self._key.batch)]
        rewind(self._cache, context_tokens=self._key.context_tokens)
        backbone, cache, no_end = self._engine.runner.backbone, self._cache, frozenset[int]()
        if self._key.num_nodes == 1:
            steps = decode_vanilla(backbone, prompts, rule=GreedyRule(), max_new_tokens=_ENDLESS_TOKENS, eos_ids=no_end, cache=cache)
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
    """Return a cache whose rows hold `context_tokens` random tokens each, read in chunks, with room for some more."""
    cache = backbone.new_cache(batch_size=batch, max_length=context_tokens + room_tokens)
    texts = torch.randint(backbone.vocab_size, (batch, context_tokens), generator=torch.Generator().manual_seed(_SEED))
    for row in range(batch):
        for start in range(0, context_tokens, _CHUNK_TOKENS):
            backbone.prefill(texts[row, start : start + _CHUNK_TOKENS], cache=cache, row=row)
    return cache


def rewind(cache: TreeCache, *, context_tokens: int) -> None:
    """Forget all that was kept behind the first `context_tokens` of every row; their keys and values stay."""
    cache.clear_rows()
    for row in range(cache.num_rows):
        cache.keep_all(row=row, count=context_tokens)


def comb_tree(num_nodes: int, *, depth: int) -> DraftTree:
    """Return a tree of that many nodes: the best path of `depth` levels, then the next best tokens of each level beside it in turn.

    A step's cost depends on its number of nodes and on how many of a head's tokens it sorts, not on where the nodes hang.
    """
    depth = min(depth, num_nodes - 1)
    teeth = ((0,) * level + (rank,) for rank in range(num_nodes) for level in range(depth))
    return DraftTree.from_paths([(), *(tooth for tooth, _ in zip(teeth, range(num_nodes - 1), strict=False))])


def skip_reason(key: PointKey, facts: ModelFacts, *, packs: bool, free_bytes: int, memory_share: float) -> str | None:
    """Return why a point must not be tried, or None: too many positions for real weights, or too much memory.

    Random weights have learned no positions, so that they are timed at any length.
    """
    last = key.context_tokens + key.num_nodes
    if facts.max_positions is not None and not facts.random_weights and last > facts.max_positions:
        return f"needs {last} positions, the model has {facts.max_positions}"
    needed = facts.needed_bytes(key, packs=packs)
    if needed > memory_share * free_bytes:
        return f"needs {needed / 1e9:.2f} GB, {memory_share:g} of the free {free_bytes / 1e9:.2f} GB is less"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def _noting_out_of_memory(skipped: dict[PointKey, str], keys: Sequence[PointKey], device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        words = " ".join(without_paths(str(error)).split())[:200]
        skipped.update(dict.fromkeys(keys, f"ran out of memory: {words}"))
    else:
        return
    _release(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
