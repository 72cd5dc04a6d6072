"""The cells of a sweep: the lines of its `cells.jsonl`, each computed or run at once and never in part.

A cell is all trees on one curve, one sampled setting, or one decoded tree; a cell that could not be had says
why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from harness.files import Frozen, read_lines
from harness.records.latency import BreakEven, break_even
from harness.records.provenance import DeviceInfo
from harness.specs.latency import DtypeName, ModeName
from harness.specs.sweep import SampledSetting
from harness.stats import FigureKind, Interval

Context = Literal["trace"] | int
Method = Literal["independent", "joint"]


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


def read_cells(path: Path, *, allow_torn_tail: bool = False) -> tuple[AnyCell, ...]:
    """Read a `cells.jsonl` as `files.read_lines` does."""
    return read_lines(path, _CELL.validate_json, holds="one cell", allow_torn_tail=allow_torn_tail)
