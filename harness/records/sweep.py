"""What a sweep leaves on disk: versioned, validated records; tables, figures and verdicts are functions of
them. No torch, no device.

A record folder holds `sweep.toml`, `origin.json`, `trees.json`, `cells.jsonl` (one line a finished cell,
appended as it ends) and, last, `manifest.json`, which seals it with the SHA-256 of every other file. A cell
is what is computed or run at once and never in part: all trees on one curve, one sampled setting, or one
decoded tree; a cell that could not be had says why.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from harness.files import Frozen, read_lines
from harness.records.folder import RecordFolder
from harness.records.latency import BreakEven, break_even
from harness.records.provenance import DeviceInfo, Provenance
from harness.records.store import LineFile, StoreKind
from harness.specs.latency import DtypeName, ModeName
from harness.specs.sweep import SampledSetting, SweepSpec, parse_sweep
from harness.stats import FigureKind, Interval
from medusa_impl.tree import DraftTree, RankPath

SPEC_FILE, ORIGIN_FILE, TREES_FILE, CELLS_FILE = "sweep.toml", "origin.json", "trees.json", "cells.jsonl"
Context = Literal["trace"] | int

CHAIN, CARTESIAN, DENSE, MARGINALS, JOINT, CHOSEN = (
    "chain",
    "Cartesian",
    "random dense",
    "marginals",
    "joint",
    "cost-aware",
)

Method = Literal["independent", "joint"]


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


class ChosenTree(Frozen):
    """What one search chose for a cell, and what that tree yields on the trace.

    `promised` is the tokens/step that the search believed in. `step_cost` is the backbone alone against one
    node at the median context; `overhead` the mean step against vanilla's; `speedups` the speedup by batch,
    where the cell was asked for it.
    """

    method: Method
    tree: int
    promised: float
    step_cost: float | None
    overhead: float
    tokens_per_s: Interval
    speedup: Interval
    speedups: dict[int, float] = {}

    @property
    def break_even(self) -> BreakEven | None:
        """Up to which batch the tree pays."""
        return break_even(self.speedups) if self.speedups else None


class CurveLabel(Frozen):
    """Which device, model shape, dtype and mode a curve is of, where it comes from, and what it is worth.

    `device` is the key in `hardware.toml` where there is one, else the device's own name. `fingerprint`
    changes with any figure behind the curve. `weights_sha256` is that of the model that was timed, None for
    random weights and predictions.
    """

    device: str
    shape: str
    dtype: DtypeName
    mode: ModeName | None
    kind: Literal["measured", "predicted"]
    source: str
    fingerprint: str
    weights_sha256: str | None = None

    @property
    def words(self) -> str:
        """The curve in a few words."""
        mode = f", {self.mode}" if self.mode is not None else ""
        return f"{self.device}, {self.shape}, {self.dtype}{mode} ({self.kind})"


class ComposedCell(Frozen):
    """All trees on one curve at one batch: columns of figures, one entry a tree that the curve covers.

    `context` is "trace" where each step is priced at the length that its text had. `kind` is that of speedups
    and tokens/s; tokens/step are replayed whatever it says, step times are `curve.kind`. `beyond_share` is
    the share of vanilla steps at lengths that the curve does not cover, priced at the nearest one that it
    does. Units: `step_s` seconds, the mean over the replayed steps.
    """

    schema_version: Literal[1] = 1
    cell: Literal["composed"] = "composed"
    curve: CurveLabel
    context: Context
    batch: int
    kind: FigureKind
    beyond_share: float
    vanilla_step_s: float
    vanilla_tokens_per_s: float
    trees: tuple[int, ...]
    step_s: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    speedup: tuple[float, ...]
    speedup_low: tuple[float, ...]
    speedup_high: tuple[float, ...]
    num_uncovered: int
    chosen: tuple[ChosenTree, ...]

    @property
    def key(self) -> str:
        """What makes the cell this one."""
        return composed_key(self.curve, context=self.context, batch=self.batch)

    @property
    def best(self) -> ChosenTree:
        """The tree that the search on joint hits chose."""
        return next(chosen for chosen in self.chosen if chosen.method == "joint")


class RanOn(Frozen):
    """Which node of a cluster ran a cell: the start of the random id that Ray gave it (no host name, no
    address), and what it is.
    """

    node: str
    accelerator_type: str | None
    device: DeviceInfo
    python: str
    packages: dict[str, str]


class SampledRow(Frozen):
    """One text: counts and, in nats, the summed log-likelihood of its tokens under the original backbone at
    temperature 1.

    `step_tokens` sums to `num_tokens` - 1, since the prefill yields the first token.
    """

    prompt_key: str
    category: str | None
    seed: int | None
    prompt_tokens: int
    num_tokens: int
    ended_by: Literal["eos", "budget"]
    step_tokens: tuple[int, ...]
    log_likelihood: float
    text_sha256: str


class SampledCell(Frozen):
    """One setting whose text a replay cannot give, run on every prompt and seed; vanilla has no tree.

    `ran_on`, here as in other cells, is None on the record's own machine.
    """

    schema_version: Literal[1] = 1
    cell: Literal["sampled"] = "sampled"
    setting: SampledSetting
    tree: int | None
    rows: tuple[SampledRow, ...]
    elapsed_s: float
    ran_on: RanOn | None = None

    @property
    def key(self) -> str:
        """What makes the cell this one."""
        return sampled_key(self.setting)


class StepDifference(Frozen):
    """The first step at which decoding took another path than the replay; a `tie` lies within rounding,
    anything else is a `bug`.
    """

    prompt_key: str
    position: int
    decoded_steps: int
    replayed_steps: int
    kind: Literal["tie", "bug"]


class DecodedRow(Frozen):
    """One prompt decoded for real, by vanilla and with the tree in turn, on the decode clock; composed times
    are of the same steps.
    """

    prompt_key: str
    num_tokens: int
    vanilla_s: float
    medusa_s: float
    medusa_steps: int
    composed_vanilla_s: float
    composed_medusa_s: float


class DecodedCell(Frozen):
    """One greedy point decoded for real: the check of the composition."""

    schema_version: Literal[1] = 1
    cell: Literal["decoded"] = "decoded"
    curve: CurveLabel
    tree: int
    rows: tuple[DecodedRow, ...]
    differences: tuple[StepDifference, ...]
    elapsed_s: float
    ran_on: RanOn | None = None

    @property
    def key(self) -> str:
        """What makes the cell this one."""
        return decoded_key(
            self.tree, accelerator_type=self.ran_on.accelerator_type if self.ran_on is not None else None
        )


class FailedCell(Frozen):
    """A cell that could not be had: no figure, only the reason."""

    schema_version: Literal[1] = 1
    cell: Literal["failed"] = "failed"
    key: str
    words: str
    error_type: str
    message: str
    ran_on: RanOn | None = None


SweepCell = Annotated[ComposedCell | SampledCell | DecodedCell | FailedCell, Field(discriminator="cell")]
_CELL: TypeAdapter[ComposedCell | SampledCell | DecodedCell | FailedCell] = TypeAdapter(SweepCell)
AnyCell = ComposedCell | SampledCell | DecodedCell | FailedCell


def composed_key(curve: CurveLabel, *, context: Context, batch: int) -> str:
    """Return the key of a composed cell."""
    return f"composed {curve.fingerprint} {context} {batch}"


def sampled_key(setting: SampledSetting) -> str:
    """Return the key of a sampled cell."""
    return f"sampled {setting.words}"


def decoded_key(tree: int | Literal["none"], *, accelerator_type: str | None = None) -> str:
    """Return the key of a decoded cell; on a cluster every accelerator type has its own. `none` is where
    there is no curve to check.
    """
    return f"decoded {tree}" + (f" on {accelerator_type}" if accelerator_type is not None else "")


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


def read_cells(path: Path, *, allow_torn_tail: bool = False) -> tuple[AnyCell, ...]:
    """Read a `cells.jsonl` as `files.read_lines` does."""
    return read_lines(path, _CELL.validate_json, holds="one cell", allow_torn_tail=allow_torn_tail)


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
