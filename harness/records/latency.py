"""Timed points, modes and batches of one latency run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harness.bounds import Count, FileName, Seconds, Sha256, StepSeconds, Utc
from harness.files import Frozen
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder
from harness.records.probes import DeviceLimits
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.run import ArmTree
from harness.records.store import LineFile, StoreKind
from harness.records.trials import (
    GpuObservation,
    MachineObservation,
    ProcessorObservation,
    disturbed_by_others,
)
from harness.specs.disturbance import OthersRule
from harness.specs.latency import DtypeName, HeadsForm, LatencySpec, ModeName, PointKey, parse_latency_spec
from harness.specs.shapes import ModelShape, ShapeSpec
from harness.versions import VERSION, Versioned, read_versioned_lines

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
STOCK = "hf_generate"
OUT_OF_TIME = "the time budget was used up"  # why a point was skipped
POINTS_FILE, MODEL_FILE, MODES_FILE, BATCHES_FILE = "points.jsonl", "model.json", "modes.json", "batches.json"


Timing = Literal["fixed", "decoding"]
_OLDER_TIMES_A_ROUND = 3  # of records that do not say


class DisturbedTimes(Frozen):
    """Times of a point that were taken again, since others used the machine meanwhile: kept, never used."""

    backbone_s: tuple[StepSeconds, ...] = Field(description="seconds of each forward pass")
    heads_s: tuple[Seconds, ...] = Field(description="seconds of each call of the heads")
    step_s: tuple[StepSeconds, ...] = Field(description="seconds of each whole step")
    machine: MachineObservation = Field(description="what was seen of the machine meanwhile")


class LatencyPoint(Versioned, PointKey):
    """Raw times of one combination, or why it was skipped."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    backbone_s: tuple[StepSeconds, ...] = Field(
        default=(), description="seconds of each forward pass over the nodes of every row"
    )
    heads_s: tuple[Seconds, ...] = Field(
        default=(), description="seconds of each call of the heads at one state a row; empty without heads"
    )
    step_s: tuple[StepSeconds, ...] = Field(
        default=(),
        description="seconds of each whole step of the decoding loop: heads, candidates, backbone, "
        "acceptance, compaction; a vanilla step for one node; empty for more nodes without heads",
    )
    peak_memory_bytes: Count | None = Field(
        default=None,
        description="most bytes allocated while the points of the same dtype, mode, context and batch were "
        "timed (on a CPU: resident in memory)",
    )
    gpu: GpuObservation | None = Field(
        default=None,
        description="the GPU after the points of the same dtype, mode, context and batch, and who else used "
        "it; of several rounds the first that it was shared or held back in, else the last; null on a CPU, "
        "without its driver's package, and in older records",
    )
    timing: Timing = Field(
        default="fixed",
        description="how a visit's steps follow each other. fixed: each after the same context, which it is "
        "made to forget. decoding: over a growing text, as the decoding loop takes them, each visit from "
        "another length about the context",
    )
    times_a_round: tuple[Count, ...] = Field(
        default=(),
        description="how many of the times of each part every round over the sizes took, in order; a step of "
        "one node is timed before each other size, so that its rounds are longer; empty in older records, "
        "whose rounds took three of every size, and the last one what was left",
    )
    processor: tuple[ProcessorObservation, ...] = Field(
        default=(),
        description="what the host's cores did in each sitting that the times are of, over all sizes of the "
        "same dtype, mode, context and batch; empty in older records, and where compilers run meanwhile",
    )
    disturbed: tuple[DisturbedTimes, ...] = Field(
        default=(), description="times that were disturbed and taken again, by the rule of spec.toml"
    )
    skipped: str | None = Field(default=None, description="why nothing was timed; null where it was")

    @model_validator(mode="after")
    def _rounds_hold_all_times(self) -> LatencyPoint:
        held = sum(self.times_a_round)
        if self.times_a_round and any(
            len(times) not in (0, held) for times in (self.backbone_s, self.heads_s, self.step_s)
        ):
            raise ValueError(f"found times_a_round of {held} in all, need as many as each part has times")
        return self

    @property
    def key(self) -> PointKey:
        """Return the combination alone."""
        return PointKey.model_validate({name: getattr(self, name) for name in PointKey.model_fields})

    def with_rounds_of(self, later: LatencyPoint) -> LatencyPoint:
        """Return the point with the rounds of a later sitting added; as it is where that one was skipped."""
        if later.skipped is not None:
            return self
        parts = ("backbone_s", "heads_s", "step_s", "times_a_round", "processor", "disturbed")
        peaks = [one.peak_memory_bytes for one in (self, later) if one.peak_memory_bytes is not None]
        added: dict[str, Any] = {name: getattr(self, name) + getattr(later, name) for name in parts}
        was_free = self.gpu is None or not (self.gpu.is_shared or self.gpu.is_held_back)
        last = {"gpu": later.gpu if was_free else self.gpu, "peak_memory_bytes": max(peaks, default=None)}
        return LatencyPoint.model_validate({**dict(self), **added, **last})

    def disturbances(self, rule: OthersRule | None) -> tuple[str, ...]:
        """Return in words what disturbed the times in use by a rule; nothing without one."""
        if rule is None:
            return ()
        seen = self.processor or (None,)
        found = (words for one in seen for words in disturbed_by_others(one, self.gpu, rule=rule))
        return tuple(dict.fromkeys(found))

    def by_round(self, part: Literal["backbone_s", "heads_s", "step_s"]) -> tuple[tuple[float, ...], ...]:
        """Return the times of a part round by round; times within a round are moments apart."""
        times: tuple[float, ...] = getattr(self, part)
        counts = self.times_a_round or (_OLDER_TIMES_A_ROUND,) * -(-len(times) // _OLDER_TIMES_A_ROUND)
        starts = [0, *accumulate(counts)]
        rounds = (times[start:end] for start, end in pairwise(starts))
        return tuple(one for one in rounds if one)


class ModelFacts(Versioned):
    """What the timed model is, as far as arithmetic on its times needs it; sizes count numbers, not bytes."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    name: str = Field(description="name of the model or of the published shape")
    random_weights: bool = Field(description="whether the weights were drawn instead of loaded")
    num_layers: Count = Field(description="decoder layers of the backbone")
    hidden_size: Count = Field(description="numbers of one hidden state")
    num_attention_heads: Count = Field(description="heads of attention that queries have")
    num_key_value_heads: Count = Field(description="heads of attention that keys and values have")
    head_size: Count = Field(description="numbers of one key of one head")
    intermediate_size: Count = Field(description="numbers between the two layers of a feed-forward block")
    vocab_size: Count = Field(description="tokens of the vocabulary")
    num_parameters: Count = Field(description="numbers that the backbone owns")
    step_parameters: Count = Field(description="numbers of the backbone that one decoding step reads")
    max_positions: Count | None = Field(description="most tokens that a text may have; null where unbounded")
    num_heads: Count = Field(description="draft heads")
    num_head_layers: Count = Field(description="residual blocks of a draft head")
    head_architecture: Literal["own", "shared"] = Field(
        description="own: each draft head has its unembedding; shared: all use the backbone's LM head"
    )

    @property
    def roofline_shape(self) -> ModelShape:
        """Return the sizes that decide what a step costs."""
        return ModelShape(**{name: getattr(self, name) for name in ModelShape.__dataclass_fields__})

    @property
    def head_parameters(self) -> int:
        """Return how many numbers the draft heads own."""
        block = self.hidden_size * (self.hidden_size + 1)
        own = self.hidden_size * self.vocab_size if self.head_architecture == "own" else 0
        return self.num_heads * (self.num_head_layers * block + own)

    def step_bytes(self, dtype: str) -> int:
        """Return the bytes of weights that one decoding step reads."""
        return self.step_parameters * DTYPE_BYTES[dtype]

    def cache_bytes(self, tokens: int, *, dtype: str) -> int:
        """Return the bytes of keys and values of so many tokens."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_size * tokens * DTYPE_BYTES[dtype]

    def needed_bytes(self, key: PointKey, *, packs: bool) -> int:
        """Return the bytes that a point needs.

        They are weights, their packed copies where a run `packs` any, cache, and logits once as they are and
        once as float32.
        """
        weights = self.num_parameters + self.head_parameters
        copies = self.step_parameters + self.head_parameters if packs else 0
        logits = key.batch * (key.num_nodes + key.num_heads) * self.vocab_size
        cache = self.cache_bytes(key.batch * (key.context_tokens + key.num_nodes), dtype=key.dtype)
        return (weights + copies) * DTYPE_BYTES[key.dtype] + cache + logits * (DTYPE_BYTES[key.dtype] + 4)


def facts_of_shape(shape: ShapeSpec, *, heads: HeadsForm, random_weights: bool) -> ModelFacts:
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
    """One prompt decoded greedily in one mode of the engine, or by Hugging Face `generate`."""

    dtype: DtypeName = Field(description="dtype of the model")
    mode: ModeName | Literal["hf_generate"] = Field(description="mode of the engine, or hf_generate")
    prompt_key: str = Field(description="which prompt; pairs the modes")
    prompt_tokens: Count = Field(description="tokens of the prompt")
    token_ids: tuple[Count, ...] = Field(description="ids of the kept tokens, the prefill's first")
    step_tokens: tuple[Count, ...] = Field(description="kept tokens of each decoding step after the prefill")
    step_times_s: tuple[StepSeconds, ...] = Field(description="seconds of each of these steps")
    prefill_s: StepSeconds = Field(description="seconds until the first token is on the host")
    machine: MachineObservation = Field(
        default=MachineObservation(),
        description="what was seen of the machine over all modes on the prompt; empty in older records",
    )


class ModeTrials(Versioned):
    """All trials of the table of modes, and the mode that `auto` takes in each dtype."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    auto: dict[DtypeName, ModeName] = Field(description="mode that `auto` takes, by dtype")
    trials: tuple[ModeTrial, ...] = Field(description="one entry a dtype, mode and prompt")
    disturbed: tuple[ModeTrial, ...] = Field(
        default=(), description="trials that were disturbed and run again, by the rule of spec.toml"
    )


class BatchTrial(Frozen):
    """Some prompts decoded together."""

    method: Literal["vanilla", "medusa"] = Field(description="plain decoding, or with the record's tree")
    batch: Count = Field(description="prompts that were decoded together")
    round: Count = Field(description="which pass over all batches, from 0")
    prompt_keys: tuple[str, ...] = Field(description="the prompts of the batch")
    num_tokens: Count = Field(description="tokens after the first of each prompt, of all prompts together")
    num_steps: Count = Field(description="decoding steps, the prefill left out")
    decode_s: StepSeconds = Field(description="seconds that these steps took together")
    machine: MachineObservation = Field(
        default=MachineObservation(),
        description="what was seen of the machine over both methods on these prompts; empty in older records",
    )


class BatchTrials(Versioned):
    """All trials of the batch table, in one dtype and mode."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    dtype: DtypeName = Field(description="dtype of the model")
    mode: ModeName = Field(description="mode of the engine")
    tree: ArmTree = Field(description="the tree that Medusa decodes with")
    trials: tuple[BatchTrial, ...] = Field(description="one entry a method, group of prompts and round")
    disturbed: tuple[BatchTrial, ...] = Field(
        default=(), description="trials that were disturbed and run again, by the rule of spec.toml"
    )


class LatencyManifest(Versioned):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["latency"] | None, KIND] = None
    spec: str = Field(description="name of the latency spec")
    num_planned: Count = Field(description="points that were to be timed, those to be skipped among them")
    num_measured: Count = Field(description="points that were timed")
    num_skipped: Count = Field(description="points that were skipped, with a reason")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    peak_memory_bytes: Count = Field(description="most bytes allocated in that session (on a CPU: resident)")
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]


class LatencyRecord(RecordFolder):
    """A latency record's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun, again = "a latency record", "measure again"
    core = ("spec.toml", "environment.json", MODEL_FILE, POINTS_FILE)

    @cached_property
    def spec(self) -> LatencySpec:
        return self._spec("spec.toml", LatencySpec, parse_latency_spec)

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def facts(self) -> ModelFacts:
        return self._read(MODEL_FILE, ModelFacts)

    @cached_property
    def points(self) -> tuple[LatencyPoint, ...]:
        return read_points(self.file(POINTS_FILE), allow_torn_tail=self.unsealed is not None)

    @cached_property
    def modes(self) -> ModeTrials | None:
        return self._optional(MODES_FILE, ModeTrials)

    @cached_property
    def batches(self) -> BatchTrials | None:
        return self._optional(BATCHES_FILE, BatchTrials)

    @cached_property
    def manifest(self) -> LatencyManifest | None:
        return self._optional("manifest.json", LatencyManifest)

    @cached_property
    def quiet_share(self) -> float | None:
        """Return the share of timed sizes and trials that nothing disturbed; None where there are none."""
        timed = [point for point in self.points if point.backbone_s]
        disturbed = [bool(point.disturbances(self.spec.disturbance)) for point in timed]
        for trials in (self.modes.trials if self.modes else (), self.batches.trials if self.batches else ()):
            disturbed += [bool(one.machine.disturbances(self.spec.disturbance)) for one in trials]
        return 1 - sum(disturbed) / len(disturbed) if disturbed else None

    @property
    def is_quiet(self) -> bool:
        """Return whether its times may be used by the rule of its spec; older records have none."""
        rule, share = self.spec.disturbance, self.quiet_share
        return rule is None or share is None or share >= rule.min_quiet_share

    def limits(self, dtype: str) -> DeviceLimits | None:
        """Return what the device could do in that dtype."""
        return self._optional(limits_file(dtype, first=self.spec.dtypes[0]), DeviceLimits)


@dataclass(frozen=True)
class BreakEven:
    """Up to which batch drafting pays.

    `largest_batch` is the largest measured batch with a speedup above 1, None where none has one. `crossing`
    is the batch at which the speedup falls to 1, linear in log2 of the batch between that one and the next,
    None where it does not.
    """

    largest_batch: int | None
    crossing: float | None
    measured: tuple[int, ...]

    @property
    def words(self) -> str:
        """Return the break-even point as a sentence would put it."""
        if self.largest_batch is None:
            return f"none: no speedup at any measured batch ({', '.join(map(str, self.measured))})"
        if self.crossing is None:
            return f"beyond the largest measured batch, {self.largest_batch}"
        return f"batch {self.largest_batch}, crossing 1 at about {self.crossing:.1f}"


def break_even(speedups: Mapping[int, float]) -> BreakEven:
    """Return up to which batch a speedup above 1 was measured, and where after it the speedup falls to 1."""
    batches = sorted(speedups)
    paying = [batch for batch in batches if speedups[batch] > 1]
    if not paying or paying[-1] == batches[-1]:
        return BreakEven(largest_batch=paying[-1] if paying else None, crossing=None, measured=tuple(batches))
    last, following = paying[-1], batches[batches.index(paying[-1]) + 1]
    share = (speedups[last] - 1) / (speedups[last] - speedups[following])
    crossing = 2 ** (math.log2(last) + share * (math.log2(following) - math.log2(last)))
    return BreakEven(largest_batch=last, crossing=crossing, measured=tuple(batches))


def read_points(path: Path, *, allow_torn_tail: bool = False) -> tuple[LatencyPoint, ...]:
    """Return the points of a `points.jsonl`, read as `files.read_lines` does."""
    return read_versioned_lines(
        path, LatencyPoint.model_validate_json, holds="one point", allow_torn_tail=allow_torn_tail
    )


def limits_file(dtype: str, *, first: str) -> str:
    """Return the file of the device's limits in a dtype; the spec's first dtype has the plain name."""
    return "device_limits.json" if dtype == first else f"device_limits_{dtype}.json"


LATENCY = StoreKind(
    record_kind="latency",
    noun="run",
    spec_noun="spec",
    spec_file="spec.toml",
    provenance_file="environment.json",
    lines=LineFile[LatencyPoint](POINTS_FILE, read_points, leaves_out_absent=True),
    begun=lambda folder: (LatencyRecord(folder).spec, LatencyRecord(folder).environment),
    identity=ENGINE_IDENTITY,
    home=("latency",),
)
