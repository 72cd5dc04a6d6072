"""What a sweep leaves on disk: versioned, validated records; tables, figures and verdicts are functions of
them. No torch, no device.

A record folder holds `sweep.toml`, `origin.json`, `trees.json`, `cells.jsonl` (one line a finished cell,
appended as it ends) and, last, `manifest.json`, which seals it with the SHA-256 of every other file. A cell
is what is computed or run at once and never in part: all trees on one curve, one sampled setting, or one
decoded tree; a cell that could not be had says why.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field

from harness.files import Frozen
from harness.records.folder import RecordFolder
from harness.records.provenance import Provenance
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
from harness.stats import Interval
from medusa_impl.tree import DraftTree, RankPath

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
    """What a trace is of: one of the two texts behind every composed figure."""

    model_sha256: str
    heads_sha256: str
    dtype: str
    max_new_tokens: int
    num_prompts: int
    num_positions: int
    num_heads: int


class PredictionError(Frozen):
    """How far predictions are off: absolute relative errors, as shares of the measured time.

    `median_ratio` is measured over predicted: what a prediction has to be multiplied by to be right half of
    the time.
    """

    num_points: int = Field(ge=1)
    median_error: float = Field(ge=0)
    worst_error: float = Field(ge=0)
    median_ratio: float = Field(gt=0)


class RooflineError(Frozen):
    """How far the roofline was off on measured devices: for the backbone's seconds, and for its step cost, in
    which a constant factor cancels; `limits` says whose limits it was given there.
    """

    devices: tuple[str, ...]
    limits: tuple[Literal["measured", "data sheet"], ...]
    seconds: PredictionError
    step_cost: PredictionError | None


class SweepOrigin(Provenance):
    """Where a sweep comes from. `inputs` gives every file behind it by name and SHA-256; `device` is the
    machine that composed.

    The executor `local` ran the run cells there too; with `ray` each run cell says where it ran. `commit` is
    None outside a git checkout, and the report says so.
    """

    executor: Literal["local", "ray"] = "local"
    inputs: dict[str, str]
    trace: TraceFacts
    calibration: TraceFacts
    roofline_error: RooflineError | None


class TreeRate(Frozen):
    """Replayed tokens/step of one tree: rows decoded alone, or in batches where a batch takes as many steps
    as its slowest row.
    """

    batch: int
    tree: int
    tokens_per_step: Interval


class SweepTree(Frozen):
    """One tree of a sweep: how many heads it was allowed, and every family that came up with it, the first
    one first.
    """

    paths: tuple[RankPath, ...]
    num_heads: int
    families: tuple[str, ...]

    @property
    def family(self) -> str:
        """The first family that came up with it."""
        return self.families[0]

    def tree(self) -> DraftTree:
        """Return the validated tree."""
        return DraftTree.from_paths(self.paths)


class SweepTrees(Frozen):
    """The trees of a sweep and what they yield on its trace; cells name trees by their place here."""

    schema_version: Literal[1] = 1
    trees: tuple[SweepTree, ...]
    calibrated: tuple[float, ...]
    rates: tuple[TreeRate, ...]

    def rate(self, tree: int, *, batch: int = 1) -> Interval:
        """Return a tree's tokens/step at a batch."""
        return next(rate.tokens_per_step for rate in self.rates if (rate.batch, rate.tree) == (batch, tree))


class SweepManifest(Frozen):
    """Written last: a folder without it is an unfinished sweep. `num_planned` counts what was asked for, run
    cells included.
    """

    schema_version: Literal[1] = 1
    sweep: str
    num_planned: int
    num_done: int
    num_failed: int
    num_points: int
    finished_utc: str
    elapsed_s: float
    sha256: dict[str, str]


class SweepRecord(RecordFolder):
    """A sweep's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    kind, finished, again = "a sweep's record", "a finished sweep", "sweep again"

    @cached_property
    def spec(self) -> SweepSpec:
        return parse_sweep(self._text(SPEC_FILE), where=SPEC_FILE)

    @cached_property
    def origin(self) -> SweepOrigin:
        return self._read(ORIGIN_FILE, SweepOrigin)

    @cached_property
    def trees(self) -> SweepTrees:
        return self._read(TREES_FILE, SweepTrees)

    @cached_property
    def cells(self) -> tuple[AnyCell, ...]:
        return read_cells(self.folder / CELLS_FILE)

    @cached_property
    def manifest(self) -> SweepManifest | None:
        return (
            self._read("manifest.json", SweepManifest) if (self.folder / "manifest.json").exists() else None
        )

    @property
    def composed(self) -> tuple[ComposedCell, ...]:
        """The composed cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, ComposedCell))

    @property
    def sampled(self) -> tuple[SampledCell, ...]:
        """The sampled cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, SampledCell))

    @property
    def decoded(self) -> tuple[DecodedCell, ...]:
        """The decoded cells."""
        return tuple(cell for cell in self.cells if isinstance(cell, DecodedCell))

    @property
    def failed(self) -> tuple[FailedCell, ...]:
        """The cells that could not be had."""
        return tuple(cell for cell in self.cells if isinstance(cell, FailedCell))

    @property
    def run_devices(self) -> tuple[str, ...]:
        """The devices that ran the run cells, each once, such as `NVIDIA A100-SXM4-80GB (cuda)`."""
        ran_on = [cell.ran_on for cell in self.sampled] + [cell.ran_on for cell in self.decoded]
        devices = [one.device if one is not None else self.origin.device for one in ran_on]
        return tuple(dict.fromkeys(f"{device.name} ({device.kind})" for device in devices))

    @property
    def num_points(self) -> int:
        """Figures of a tree on a curve at a context and a batch."""
        return sum(len(cell.trees) for cell in self.composed)


SWEEP = StoreKind(
    noun="sweep",
    spec_noun="spec",
    spec_file=SPEC_FILE,
    provenance_file=ORIGIN_FILE,
    lines=LineFile[AnyCell](CELLS_FILE, read_cells),
    begun=lambda folder: (SweepRecord(folder).spec, SweepRecord(folder).origin),
    identity=("commit", "dirty", "packages", "device", "executor", "inputs", "trace", "calibration"),
    home=("sweep",),
)
