"""What a sweep leaves on disk: versioned, validated records, without torch or a device.

A record folder holds `sweep.toml`, `origin.json`, `trees.json`, `cells.jsonl` (one line a finished cell,
appended as it ends) and, last, `manifest.json`, which seals it with the SHA-256 of every other file. Tables,
figures and verdicts are functions of them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Amount, Count, FileName, Rate, Seconds, Sha256, Utc
from harness.files import Frozen
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder
from harness.records.provenance import Provenance
from harness.records.step_model import StepModel
from harness.records.store import LineFile, StoreKind
from harness.records.sweep_cells import (
    AnyCell,
    ComposedCell,
    DecodedCell,
    FailedCell,
    SampledCell,
    read_cells,
)
from harness.specs.sweep import SweepSpec, parse_sweep
from harness.stats import Interval, KnownInterval
from harness.versions import VERSION, Versioned
from medusa_impl.tree import DraftTree

SPEC_FILE, ORIGIN_FILE, TREES_FILE, CELLS_FILE = "sweep.toml", "origin.json", "trees.json", "cells.jsonl"

CHAIN, CARTESIAN, DENSE, MARGINALS, JOINT, CHOSEN = (
    "chain",
    "Cartesian",
    "random dense",
    "marginals",
    "joint",
    "cost-aware",
)


class TraceFacts(Frozen):
    """What a trace is of: one of the two texts that every composed figure rests on."""

    model_sha256: str = Field(description="SHA-256 of the backbone's tensors")
    heads_sha256: str = Field(description="SHA-256 of the heads' tensors")
    dtype: str = Field(description="dtype of the pass that ranked the text")
    max_new_tokens: Count = Field(description="most tokens that an answer may have")
    num_prompts: Count = Field(description="prompts whose answers it holds")
    num_positions: Count = Field(description="tokens of all answers together")
    num_heads: Count = Field(description="draft heads that were ranked")


class PredictionError(Frozen):
    """How far predictions are off."""

    num_points: Count = Field(ge=1, description="predictions that were compared with a measurement")
    median_error: Amount = Field(
        description="median of |predicted - measured| / measured, a share of the measured time"
    )
    worst_error: Amount = Field(description="largest |predicted - measured| / measured")
    median_ratio: Rate = Field(
        description="median of measured / predicted: times this, half of the predictions are too short"
    )


class RooflineError(Frozen):
    """How far the roofline was off on measured devices."""

    devices: tuple[str, ...] = Field(description="devices that were measured")
    limits: tuple[Literal["measured", "data sheet"], ...] = Field(
        description="whose limits the roofline was given, one entry a device"
    )
    seconds: PredictionError = Field(description="error of the backbone's seconds")
    step_cost: PredictionError | None = Field(
        description="error of its step cost, in which a constant factor cancels; null without points"
    )


class SweepOrigin(Provenance):
    """Where a sweep comes from; `device` is the machine that composed."""

    executor: Literal["local", "ray"] = Field(
        default="local",
        description="local: the composing machine ran the run cells; ray: each run cell says where it ran",
    )
    inputs: dict[str, str] = Field(description="SHA-256 of every file that the sweep read, by name")
    trace: TraceFacts = Field(description="the text that all trees are replayed on")
    calibration: TraceFacts = Field(description="the text that trees were grown and searched on")
    roofline_error: RooflineError | None = Field(
        description="how far the roofline was off; null where no latency record tells"
    )
    step_model: StepModel | None = Field(
        default=None,
        description="the fitted model that predictions were made with; null where they are the roofline's",
    )


class TreeRate(Frozen):
    """Replayed tokens/step of one tree."""

    batch: Count = Field(
        description="rows that decode together, where a batch takes as many steps as its slowest row"
    )
    tree: Count = Field(description="index of the tree in the file's trees")
    tokens_per_step: KnownInterval = Field(description="kept tokens a step and row, with its interval")


class SweepTree(Frozen):
    """One tree of a sweep."""

    paths: tuple[tuple[Count, ...], ...] = Field(
        description="each node's ranks from the root on, counted from 0; the root is the empty path"
    )
    num_heads: Count = Field(description="draft heads that it was allowed")
    families: tuple[str, ...] = Field(description="every family that came up with it, the first one first")

    @property
    def family(self) -> str:
        """Return the first family that came up with it."""
        return self.families[0]

    def tree(self) -> DraftTree:
        """Return the validated tree."""
        return DraftTree.from_paths(self.paths)


class SweepTrees(Versioned):
    """The trees of a sweep and what they yield on its trace; cells name trees by their index here."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    trees: tuple[SweepTree, ...] = Field(description="each tree once")
    calibrated: tuple[Amount, ...] = Field(
        description="replayed tokens a step on the calibration trace, one entry a tree"
    )
    rates: tuple[TreeRate, ...] = Field(description="tokens a step on the sweep's trace, by tree and batch")

    def rate(self, tree: int, *, batch: int = 1) -> Interval:
        """Return a tree's tokens/step at a batch."""
        return next(rate.tokens_per_step for rate in self.rates if (rate.batch, rate.tree) == (batch, tree))


class SweepManifest(Versioned):
    """Written last: a folder without it is an unfinished sweep."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["sweep"] | None, KIND] = None
    sweep: str = Field(description="name of the sweep")
    num_planned: Count = Field(description="cells that were asked for, run cells included")
    num_done: Count = Field(description="cells that hold figures")
    num_failed: Count = Field(description="cells that hold a reason instead")
    num_points: Count = Field(description="figures of a tree on a curve at a context and a batch")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]


class SweepRecord(RecordFolder):
    """A sweep's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun, finished, again = "a sweep's record", "a finished sweep", "sweep again"
    core = (SPEC_FILE, ORIGIN_FILE, TREES_FILE, CELLS_FILE)
    origin_file = ORIGIN_FILE

    @cached_property
    def spec(self) -> SweepSpec:
        return self._spec(SPEC_FILE, SweepSpec, parse_sweep)

    @cached_property
    def origin(self) -> SweepOrigin:
        return self._read(ORIGIN_FILE, SweepOrigin)

    @cached_property
    def trees(self) -> SweepTrees:
        return self._read(TREES_FILE, SweepTrees)

    @cached_property
    def cells(self) -> tuple[AnyCell, ...]:
        return read_cells(self.file(CELLS_FILE), allow_torn_tail=self.unsealed is not None)

    @cached_property
    def manifest(self) -> SweepManifest | None:
        return self._optional("manifest.json", SweepManifest)

    @property
    def composed(self) -> tuple[ComposedCell, ...]:
        """Return the composed cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, ComposedCell))

    @property
    def sampled(self) -> tuple[SampledCell, ...]:
        """Return the sampled cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, SampledCell))

    @property
    def decoded(self) -> tuple[DecodedCell, ...]:
        """Return the decoded cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, DecodedCell))

    @property
    def failed(self) -> tuple[FailedCell, ...]:
        """Return the cells that could not be had."""
        return tuple(cell for cell in self.cells if isinstance(cell, FailedCell))

    @property
    def run_devices(self) -> tuple[str, ...]:
        """Return the devices that ran the run cells, each once, such as `NVIDIA A100-SXM4-80GB (cuda)`."""
        ran_on = [cell.ran_on for cell in self.sampled] + [cell.ran_on for cell in self.decoded]
        devices = [one.device if one is not None else self.origin.device for one in ran_on]
        return tuple(dict.fromkeys(f"{device.name} ({device.kind})" for device in devices))

    @property
    def num_points(self) -> int:
        """Return how many figures of a tree on a curve at a context and a batch there are."""
        return sum(len(cell.trees) for cell in self.composed)


SWEEP = StoreKind(
    record_kind="sweep",
    noun="sweep",
    spec_noun="spec",
    spec_file=SPEC_FILE,
    provenance_file=ORIGIN_FILE,
    lines=LineFile[AnyCell](CELLS_FILE, read_cells),
    begun=lambda folder: (SweepRecord(folder).spec, SweepRecord(folder).origin),
    identity=("commit", "dirty", "packages", "device", "executor", "inputs", "trace", "calibration"),
    home=("sweep",),
)
