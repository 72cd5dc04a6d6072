"""Timed points, modes and batches of one latency run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from harness.files import Frozen, read_lines
from harness.records.folder import RecordFolder
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.run import ArmTree, DeviceLimits
from harness.records.store import LineFile, StoreKind
from harness.specs.latency import DtypeName, LatencyHeads, LatencySpec, ModeName, PointKey, parse_latency_spec
from harness.specs.shapes import ModelShape, ShapeSpec

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
STOCK = "hf_generate"
POINTS_FILE, MODEL_FILE, MODES_FILE, BATCHES_FILE = "points.jsonl", "model.json", "modes.json", "batches.json"


class LatencyPoint(PointKey):
    """Raw times of one combination, or why it was skipped.

    `backbone_s` is one forward pass over the nodes of every row; `heads_s` the heads at one state a row;
    `step_s` a whole step of the decoding loop: heads, candidates, backbone, acceptance, compaction (a vanilla
    step for one node; none for nodes without heads). `peak_memory_bytes` is that of the point's group.
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
        """Bytes that a point needs: weights, their packed copies where a run `packs` any, cache, and logits
        once as they are and once as float32.
        """
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


@dataclass(frozen=True)
class BreakEven:
    """Up to which batch drafting pays: the largest measured batch with a speedup above 1 (None: at none), and
    the batch at which the speedup crosses 1, linear in log2 of the batch between that one and the next (None
    where it does not).
    """

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
    return read_lines(
        path, LatencyPoint.model_validate_json, holds="one point", allow_torn_tail=allow_torn_tail
    )


def limits_file(dtype: str, *, first: str) -> str:
    """Return the file that holds the device's limits in a dtype: the spec's first dtype has the plain
    name.
    """
    return "device_limits.json" if dtype == first else f"device_limits_{dtype}.json"


LATENCY = StoreKind(
    noun="run",
    spec_noun="spec",
    spec_file="spec.toml",
    provenance_file="environment.json",
    lines=LineFile[LatencyPoint](POINTS_FILE, read_points, leaves_out_absent=True),
    begun=lambda folder: (LatencyRecord(folder).spec, LatencyRecord(folder).environment),
    identity=ENGINE_IDENTITY,
    home=("latency",),
)
