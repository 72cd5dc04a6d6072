"""What a latency run times, as data: validated, frozen models of what `suites/latency/*.toml` may say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from harness.bounds import Count
from harness.errors import UserError
from harness.files import DataFile, DataPath, Frozen, first_fault, parse_toml, read_toml
from harness.specs.bounds import (
    BatchSize,
    Distinct,
    HeadCount,
    LayerCount,
    NodeCount,
    PromptCount,
    Repeats,
    Some,
    SomeDistinct,
    Spec,
    TextLength,
    TokenCount,
)
from harness.specs.disturbance import LatencyDisturbance
from harness.specs.suite import FastestTree, IntervalSpec, ModelSpec, SearchedTree, TreeSpec
from medusa_impl.recipes import MAX_HEADS, HeadArchitecture

# the modes of medusa_impl.engine.runner, which needs torch
ModeName = Literal["eager", "packed", "compiled", "cuda_graph", "fused_graph"]
DtypeName = Literal["float32", "bfloat16", "float16"]
MAX_POINTS = 100_000  # of a grid: hours of timing
BatchSizes = SomeDistinct[BatchSize]


class LatencyGrid(Spec):
    """Sizes whose product is timed; `dtypes` and `modes` narrow it to some of the spec's, empty means all."""

    num_nodes: SomeDistinct[NodeCount]
    num_heads: SomeDistinct[Annotated[int, Field(ge=0, le=MAX_HEADS)]] = (0,)
    context_tokens: SomeDistinct[TokenCount]
    batch: BatchSizes = (1,)
    dtypes: Distinct[DtypeName] = ()
    modes: Distinct[ModeName] = ()

    @model_validator(mode="after")
    def _ends(self) -> LatencyGrid:
        sizes = (self.num_nodes, self.num_heads, self.context_tokens, self.batch)
        if (num_points := math.prod(len(entries) for entries in sizes)) > MAX_POINTS:
            raise ValueError(f"{num_points:,} points in a grid, at most {MAX_POINTS:,} can be timed")
        return self


class HeadsForm(Spec):
    """The form of draft heads, whatever their values."""

    num_heads: HeadCount = 5
    num_layers: LayerCount = 1
    architecture: HeadArchitecture = "own"


class LatencyHeads(Spec):
    """The draft heads: a checkpoint, else random ones of a form, which cost the same.

    What is left out is as the checkpoint has it, or as `HeadsForm` has it. `num_heads` takes the first heads
    of a checkpoint; layers and architecture have to be the checkpoint's own.
    """

    path: DataPath | None = None
    num_heads: HeadCount | None = None
    num_layers: LayerCount | None = None
    architecture: HeadArchitecture | None = None

    @property
    def form(self) -> HeadsForm:
        """The form that is said, with defaults for what is left out."""
        return HeadsForm.model_validate(self.model_dump(exclude={"path"}, exclude_none=True))


class LatencyPrompts(Spec):
    """Which texts the tables decode.

    `random` means token ids, `prompt_tokens` of them each; random weights can use no others.
    """

    source: Literal["mt_bench", "human_eval", "random"] = "random"
    prompt_tokens: TokenCount = 128


class ModesTable(Spec):
    """The table of modes: prompts that each mode and Hugging Face `generate` decode in turn.

    Step costs are read at `context_tokens`.
    """

    num_prompts: PromptCount
    max_new_tokens: TextLength
    context_tokens: TokenCount
    sizes: SomeDistinct[NodeCount] = (1, 8, 16, 32, 64)


class BatchTable(Spec):
    """Vanilla and Medusa over the same `num_prompts` texts, B of them decoded together.

    Without `num_prompts` there are as many as the largest batch.
    Speedups have intervals over groups of texts: one group, as the default leaves the largest batch, bounds
    nothing.
    """

    batches: BatchSizes = (1, 2, 4, 8)
    tree: TreeSpec
    max_new_tokens: TextLength
    num_prompts: PromptCount | None = None
    rounds: Repeats = 1

    @property
    def num_texts(self) -> int:
        """How many texts every batch decodes."""
        return self.num_prompts or max(self.batches)

    @model_validator(mode="after")
    def _same_texts(self) -> BatchTable:
        if any(self.num_texts % batch for batch in self.batches):
            raise ValueError(
                "every batch must divide num_prompts (the largest batch, if not given), so that all decode "
                "the same texts"
            )
        return self


class PointKey(Frozen):
    """One combination that is timed."""

    dtype: DtypeName = Field(description="dtype of the model")
    mode: ModeName = Field(description="mode of the engine")
    num_nodes: Count = Field(description="nodes of the tree, root included; 1 is vanilla")
    num_heads: Count = Field(description="draft heads that a step reads; 0 where only the backbone is timed")
    context_tokens: Count = Field(description="tokens of each row in the cache before the step")
    batch: Count = Field(description="rows that are computed together")

    @property
    def group(self) -> tuple[str, str, int, int]:
        """What points share a cache and are timed in turn: dtype, mode, context, batch."""
        return self.dtype, self.mode, self.context_tokens, self.batch


class LatencySpec(DataFile):
    """What a latency run times: which model, in which dtypes, modes and sizes.

    The model has its own weights, or is a published shape with random ones.
    `modes` "auto" takes every mode that the device offers but those that compile. A
    point is skipped where its weights, cache and logits would need more than `memory_share` of what is free.
    """

    kind: Literal["latency"] = "latency"
    description: str
    model: ModelSpec | None = None
    shape: str | None = None
    heads: LatencyHeads = LatencyHeads()
    dtypes: SomeDistinct[DtypeName]
    modes: Literal["auto"] | SomeDistinct[ModeName] = "auto"
    grids: Some[LatencyGrid]
    repeats: Repeats = 5
    memory_share: float = Field(default=0.8, gt=0, le=1)
    calibration_trace: DataPath | None = None
    prompts: LatencyPrompts = LatencyPrompts()
    modes_table: ModesTable | None = None
    batch_table: BatchTable | None = None
    interval: IntervalSpec = IntervalSpec()
    disturbance: LatencyDisturbance | None = None  # runs take the default; records without one are older

    @model_validator(mode="after")
    def _consistent(self) -> LatencySpec:
        if (self.model is None) == (self.shape is None):
            raise ValueError("give exactly one of model, shape")
        if self.shape is not None and (self.heads.path is not None or self.prompts.source != "random"):
            raise ValueError("a shape has random weights: no heads.path, and prompts.source = 'random'")
        if self.batch_table is not None and self.heads.path is None:
            raise ValueError("batch_table compares real acceptance: it needs heads.path")
        if (
            self.batch_table is not None
            and isinstance(self.batch_table.tree, SearchedTree | FastestTree)
            and not self.calibration_trace
        ):
            raise ValueError(
                f"batch_table.tree of kind {self.batch_table.tree.kind!r} needs a calibration_trace"
            )
        asked = max(heads for grid in self.grids for heads in grid.num_heads)
        if self.heads.path is None and asked > self.heads.form.num_heads:
            raise ValueError(
                f"the grids ask for {asked} heads, heads.num_heads is {self.heads.form.num_heads}"
            )
        return self

    def points(self, dtype: DtypeName, modes: Sequence[ModeName]) -> tuple[PointKey, ...]:
        """Return what is timed in one dtype, each combination once, group by group.

        A tree of N nodes has at most N - 1 levels below its root, so that many heads are used at most.
        """
        keys = {
            PointKey(
                dtype=dtype,
                mode=mode,
                num_nodes=nodes,
                num_heads=min(heads, nodes - 1),
                context_tokens=context,
                batch=batch,
            )
            for grid in self.grids
            if dtype in (grid.dtypes or self.dtypes)
            for mode in modes
            if mode in (grid.modes or modes)
            for nodes in grid.num_nodes
            for heads in grid.num_heads
            for context in grid.context_tokens
            for batch in grid.batch
        }
        return tuple(
            sorted(
                keys,
                key=lambda key: (
                    modes.index(key.mode),
                    key.batch,
                    key.context_tokens,
                    key.num_nodes,
                    key.num_heads,
                ),
            )
        )


def load_latency_spec(path: Path) -> LatencySpec:
    """Return the latency spec in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, LatencySpec, noun="a latency spec", kind="latency")


def parse_latency_spec(text: str, *, where: str) -> LatencySpec:
    """Return the latency spec that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, LatencySpec, noun="a latency spec", where=where)


def overridden(
    spec: LatencySpec,
    *,
    shape: str | None = None,
    dtypes: str | None = None,
    modes: str | None = None,
    num_nodes: str | None = None,
    num_heads: str | None = None,
    context_tokens: str | None = None,
    batch: str | None = None,
) -> LatencySpec:
    """Return a spec with the command line's words in it: lists with commas between their entries.

    Sizes replace those of every grid; dtypes and modes apply to every grid. `shape` is a published shape or a
    model's folder and takes the spec's model, heads, calibration trace and batch table away, since they
    belong together.
    Raises: UserError for words that the schema does not know.
    """
    data = spec.model_dump(mode="json", exclude_none=True)
    if shape is not None:
        folder = Path(shape)
        for name in ("model", "shape", "calibration_trace", "batch_table"):
            data.pop(name, None)
        data["heads"].pop("path", None)
        data |= (
            {"model": {"path": str(folder.absolute())}}
            if folder.is_dir()
            else {"shape": shape, "prompts": {**data["prompts"], "source": "random"}}
        )
        data["name"] = f"{spec.name}_{re.sub(r'[^a-z0-9]+', '_', folder.name.lower()).strip('_')}"
    for name, words in (("dtypes", dtypes), ("modes", modes)):
        if words is not None:
            data[name] = words if words == "auto" else _words(words)
            data["grids"] = [{**grid, name: []} for grid in data["grids"]]
    sizes = {"num_nodes": num_nodes, "num_heads": num_heads, "context_tokens": context_tokens, "batch": batch}
    given = {name: _words(words) for name, words in sizes.items() if words is not None}
    data["grids"] = [{**grid, **given} for grid in data["grids"]]
    try:
        return LatencySpec.model_validate(data)
    except ValidationError as error:
        raise UserError(
            found=first_fault(error), need="values that a latency file may have", where="the command line"
        ) from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]
