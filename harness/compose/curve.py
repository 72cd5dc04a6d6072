"""The latency record, and what follows from it: curve, table of modes, speedup against batch; no torch, no clock, no device.

A record folder holds `spec.toml`, `environment.json`, `model.json`, `device_limits.json`, `points.jsonl` (appended group by group),
`modes.json` and `batches.json` where the spec asks for them, and, last, `manifest.json`, which seals it with the SHA-256 of every other
file. It keeps raw times only: medians, monotone smoothing and interpolation happen in `LatencyCurve`, each time anew.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from scipy.optimize import isotonic_regression

from harness.compose.roofline import ModelShape
from harness.errors import UserError
from harness.files import Frozen, read_lines
from harness.latency_specs import DtypeName, LatencyHeads, LatencySpec, ModeName, PointKey, parse_latency_spec
from harness.records import ArmTree, DeviceLimits, Environment, RecordFolder
from harness.shapes import ShapeSpec

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
STOCK = "hf_generate"
POINTS_FILE, MODEL_FILE, MODES_FILE, BATCHES_FILE = "points.jsonl", "model.json", "modes.json", "batches.json"


class LatencyPoint(PointKey):
    """Raw times of one combination, or why it was skipped.

    `backbone_s` is one forward pass over the nodes of every row; `heads_s` the heads at one state a row; `step_s` a whole step of the
    decoding loop: heads, candidates, backbone, acceptance, compaction (a vanilla step for one node; none for nodes without heads).
    `peak_memory_bytes` is that of the point's group.
    """

    schema_version: Literal[1] = 1
    backbone_s: tuple[float, ...] = ()
    heads_s: tuple[float, ...] = ()
    step_s: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    skipped: str | None = None

    @property
    def key(self) -> PointKey:
        """The combination alone."""
        return PointKey.model_validate({name: getattr(self, name) for name in PointKey.model_fields})


class ModelFacts(Frozen):
    """What the timed model is, as far as arithmetic on its times needs it.

    Units: counts of numbers, whatever their dtype; `step_parameters` are those that one decoding step reads.
    """

    schema_version: Literal[1] = 1
    name: str
    random_weights: bool
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    num_parameters: int
    step_parameters: int
    max_positions: int | None
    num_heads: int
    num_head_layers: int
    head_architecture: Literal["own", "shared"]

    @property
    def roofline_shape(self) -> ModelShape:
        """The sizes that decide what a step costs."""
        return ModelShape(**{name: getattr(self, name) for name in ModelShape.__dataclass_fields__})

    @property
    def head_parameters(self) -> int:
        """Numbers that the heads own."""
        block = self.hidden_size * (self.hidden_size + 1)
        own = self.hidden_size * self.vocab_size if self.head_architecture == "own" else 0
        return self.num_heads * (self.num_head_layers * block + own)

    def step_bytes(self, dtype: str) -> int:
        """Bytes of weights that one decoding step reads."""
        return self.step_parameters * DTYPE_BYTES[dtype]

    def cache_bytes(self, tokens: int, *, dtype: str) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_size * tokens * DTYPE_BYTES[dtype]

    def needed_bytes(self, key: PointKey, *, packs: bool) -> int:
        """Bytes that a point needs: weights, their packed copies where a run `packs` any, cache, and logits once as they are and once as
        float32."""
        weights = self.num_parameters + self.head_parameters
        copies = self.step_parameters + self.head_parameters if packs else 0
        logits = key.batch * (key.num_nodes + key.num_heads) * self.vocab_size
        cache = self.cache_bytes(key.batch * (key.context_tokens + key.num_nodes), dtype=key.dtype)
        return (weights + copies) * DTYPE_BYTES[key.dtype] + cache + logits * (DTYPE_BYTES[key.dtype] + 4)


def facts_of_shape(shape: ShapeSpec, *, heads: LatencyHeads, random_weights: bool) -> ModelFacts:
    """Return the facts of a published shape under heads of a form."""
    sizes = {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
    return ModelFacts(
        name=shape.name,
        random_weights=random_weights,
        **sizes,
        num_parameters=shape.num_parameters,
        step_parameters=shape.step_weight_bytes(1),
        max_positions=shape.max_positions,
        num_heads=heads.num_heads,
        num_head_layers=heads.num_layers,
        head_architecture=heads.architecture,
    )


class ModeTrial(Frozen):
    """One prompt decoded greedily in one mode, or by Hugging Face `generate`; steps leave out the prefill."""

    dtype: DtypeName
    mode: ModeName | Literal["hf_generate"]
    prompt_key: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    step_tokens: tuple[int, ...]
    step_times_s: tuple[float, ...]
    prefill_s: float


class ModeTrials(Frozen):
    """All trials of the table of modes, and the mode that `auto` takes in each dtype."""

    schema_version: Literal[1] = 1
    auto: dict[DtypeName, ModeName]
    trials: tuple[ModeTrial, ...]


class BatchTrial(Frozen):
    """Some prompts decoded together: tokens behind the first of each, and the seconds that they took."""

    method: Literal["vanilla", "medusa"]
    batch: int
    round: int
    prompt_keys: tuple[str, ...]
    num_tokens: int
    num_steps: int
    decode_s: float


class BatchTrials(Frozen):
    """All trials of the batch table, in one dtype and mode."""

    schema_version: Literal[1] = 1
    dtype: DtypeName
    mode: ModeName
    tree: ArmTree
    trials: tuple[BatchTrial, ...]


class LatencyManifest(Frozen):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Literal[1] = 1
    spec: str
    num_planned: int
    num_measured: int
    num_skipped: int
    finished_utc: str
    elapsed_s: float
    peak_memory_bytes: int
    sha256: dict[str, str]


class LatencyRecord(RecordFolder):
    """A latency record's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    kind, again = "a latency record", "measure again"

    @cached_property
    def spec(self) -> LatencySpec:
        return parse_latency_spec(self._text("spec.toml"), where="spec.toml")

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def facts(self) -> ModelFacts:
        return self._read(MODEL_FILE, ModelFacts)

    @cached_property
    def points(self) -> tuple[LatencyPoint, ...]:
        return read_points(self.folder / POINTS_FILE)

    @cached_property
    def modes(self) -> ModeTrials | None:
        return self._optional(MODES_FILE, ModeTrials)

    @cached_property
    def batches(self) -> BatchTrials | None:
        return self._optional(BATCHES_FILE, BatchTrials)

    @cached_property
    def manifest(self) -> LatencyManifest | None:
        return self._optional("manifest.json", LatencyManifest)

    def limits(self, dtype: str) -> DeviceLimits | None:
        """What the device could do in that dtype."""
        return self._optional(limits_file(dtype, first=self.spec.dtypes[0]), DeviceLimits)


class LatencyCurve:
    """Seconds against sizes, from the medians of one dtype and mode: monotone in nodes and in heads, linear between what was measured.

    A whole step is a body, which depends on nodes, context and batch, plus the heads, which read one state a row whatever the tree and
    the context. So heads are timed at a few trees and answered for all.

        seconds(N, K, T, B) = body(N, T, B) + heads(K, B)

    Timing noise may make more nodes look cheaper than fewer; isotonic regression replaces such runs by their mean. Nothing is
    extrapolated.
    Raises: UserError where nothing was measured, or a size lies outside of it.
    """

    def __init__(self, points: Iterable[LatencyPoint]) -> None:
        backbone, body, heads = (defaultdict[tuple[int, ...], list[float]](list) for _ in range(3))
        for point in points:
            place = (point.batch, point.context_tokens, point.num_nodes)
            if point.backbone_s:
                backbone[place].append(median(point.backbone_s))
            if point.heads_s:
                heads[point.batch, point.num_heads].append(median(point.heads_s))
            if point.step_s:
                body[place].append(median(point.step_s) - (median(point.heads_s) if point.heads_s else 0.0))
                heads[point.batch, 0] = [0.0]
        if not backbone:
            raise UserError(found="no measured point", need="at least one of this dtype and mode", where="the latency record")
        raw = {place: fmean(values) for place, values in backbone.items()}
        self._backbone = _monotone(raw)
        self._body = _monotone({place: fmean(values) for place, values in body.items()})
        self._heads = _monotone({place: fmean(values) for place, values in heads.items()})
        self.largest_correction = max(abs(self._backbone[place] / seconds - 1) for place, seconds in raw.items())

    def seconds(self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of a whole step; one node without heads is a vanilla step."""
        body = _answer(self._body, {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes})
        return body + _answer(self._heads, {"batch": batch, "heads": num_heads})

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the time of the backbone's pass alone."""
        return _answer(self._backbone, {"batch": batch, "context tokens": context_tokens, "nodes": num_nodes})

    def heads_seconds(self, *, num_heads: int, batch: int = 1) -> float:
        """Return the time of the heads alone."""
        return _answer(self._heads, {"batch": batch, "heads": num_heads})

    def step_cost(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the backbone's pass over so many nodes against one node."""
        one_s = self.backbone_seconds(num_nodes=1, context_tokens=context_tokens, batch=batch)
        return self.backbone_seconds(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch) / one_s


def curve_of(record: LatencyRecord, *, dtype: str, mode: str) -> LatencyCurve:
    """Return the curve of one dtype and mode of a record.

    Raises: UserError where nothing of them was timed.
    """
    return LatencyCurve([point for point in record.points if (point.dtype, point.mode) == (dtype, mode)])


@dataclass(frozen=True)
class BreakEven:
    """Up to which batch drafting pays: the largest measured batch with a speedup above 1 (None: at none), and the batch at which the
    speedup crosses 1, linear in log2 of the batch between that one and the next (None where it does not)."""

    largest_batch: int | None
    crossing: float | None
    measured: tuple[int, ...]

    @property
    def words(self) -> str:
        """The break-even point as a sentence would put it."""
        if self.largest_batch is None:
            return f"none: no speedup at any measured batch ({', '.join(map(str, self.measured))})"
        if self.crossing is None:
            return f"beyond the largest measured batch, {self.largest_batch}"
        return f"batch {self.largest_batch}, crossing 1 at about {self.crossing:.1f}"


def step_cost_of(points: Iterable[LatencyPoint], *, num_nodes: int, like: PointKey) -> float | None:
    """Return the raw step cost beside a point, medians over medians: its dtype, mode, context and batch; None where either is missing."""
    times: dict[int, list[float]] = {1: [], num_nodes: []}
    for point in points:
        if point.group == like.group and point.num_nodes in times:
            times[point.num_nodes] += point.backbone_s
    return median(times[num_nodes]) / median(times[1]) if times[1] and times[num_nodes] else None


def break_even(speedups: Mapping[int, float]) -> BreakEven:
    """Return up to which batch a speedup above 1 was measured, and where behind it the speedup falls to 1."""
    batches = sorted(speedups)
    paying = [batch for batch in batches if speedups[batch] > 1]
    if not paying or paying[-1] == batches[-1]:
        return BreakEven(largest_batch=paying[-1] if paying else None, crossing=None, measured=tuple(batches))
    last, following = paying[-1], batches[batches.index(paying[-1]) + 1]
    share = (speedups[last] - 1) / (speedups[last] - speedups[following])
    crossing = 2 ** (math.log2(last) + share * (math.log2(following) - math.log2(last)))
    return BreakEven(largest_batch=last, crossing=crossing, measured=tuple(batches))


def read_points(path: Path, *, allow_torn_tail: bool = False) -> tuple[LatencyPoint, ...]:
    """Read a `points.jsonl` as `files.read_lines` does."""
    return read_lines(path, LatencyPoint.model_validate_json, holds="one point", allow_torn_tail=allow_torn_tail)


def limits_file(dtype: str, *, first: str) -> str:
    """Return the file that holds the device's limits in a dtype: the spec's first dtype has the plain name."""
    return "device_limits.json" if dtype == first else f"device_limits_{dtype}.json"


def _monotone(values: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Return the values, made non-decreasing along the last size by isotonic regression wherever the others are equal."""
    lines = defaultdict[tuple[int, ...], list[tuple[int, ...]]](list)
    for place in sorted(values):
        lines[place[:-1]].append(place)
    smooth: dict[tuple[int, ...], float] = {}
    for line in lines.values():
        smooth.update(zip(line, isotonic_regression([values[place] for place in line]).x.tolist(), strict=True))
    return smooth


def _answer(values: Mapping[tuple[int, ...], float], sizes: Mapping[str, int]) -> float:
    found = _interpolate(values, tuple(sizes.values()))
    if found is None:
        ranges = [
            f"{name} {min(place[axis] for place in values)} to {max(place[axis] for place in values)}" for axis, name in enumerate(sizes)
        ]
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            found=asked,
            need=f"sizes between measured ones ({', '.join(ranges) if values else 'none'}): nothing is extrapolated",
            where="the latency record",
            do="measure them too: medusa-repro latency with --nodes, --heads, --contexts, --batches",
        )
    return found


def _interpolate(values: Mapping[tuple[int, ...], float], at: tuple[int, ...]) -> float | None:
    """Return the value at a place, linear along the first size between the nearest on either side that can answer for the others.

    None where there is no such pair: grids need not be complete, but nothing is guessed beyond them.
    """
    if not at:
        return values.get(())
    planes = defaultdict[int, dict[tuple[int, ...], float]](dict)
    for place, value in values.items():
        planes[place[0]][place[1:]] = value
    answers: list[tuple[int, float]] = []
    for side in ([size for size in sorted(planes, reverse=True) if size <= at[0]], [size for size in sorted(planes) if size >= at[0]]):
        candidates = ((size, _interpolate(planes[size], at[1:])) for size in side)
        nearest = next(((size, value) for size, value in candidates if value is not None), None)
        if nearest is None:
            return None
        if nearest[0] == at[0]:
            return nearest[1]
        answers.append(nearest)
    (below, below_s), (above, above_s) = answers
    return below_s + (above_s - below_s) * (at[0] - below) / (above - below)
