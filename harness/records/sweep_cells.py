"""The cells of a sweep: the lines of its `cells.jsonl`, each computed or run at once and never in part.

A cell is all trees on one curve, one sampled setting, or one decoded tree; a cell that could not be had says
why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from harness.bounds import SHORTEST_S, Amount, Count, Finite, Rate, Seconds, Share, StepSeconds, Whole
from harness.files import Frozen
from harness.records.latency import BreakEven, break_even
from harness.records.machines.comparable import MeasuredMachine
from harness.records.provenance import DeviceInfo
from harness.records.step_model import ErrorBand
from harness.specs.latency import DtypeName, ModeName
from harness.specs.sweep import SampledSetting
from harness.stats import FigureKind, KnownInterval
from harness.versions import VERSION, Versioned, read_versioned_lines

Context = Literal["trace"] | Count
Method = Literal["independent", "joint"]

RAN_ON = Field(description="node of the cluster that ran the cell; null on the record's own machine")


class ChosenTree(Frozen):
    """What one search chose for a cell, and what that tree yields on the trace."""

    method: Method = Field(description="the search: by independent marginals, or by joint hits")
    tree: Count = Field(description="index of the tree in trees.json")
    promised: Amount = Field(description="tokens a step that the search believed in")
    step_cost: Amount | None = Field(
        description="the backbone's seconds over those for one node, at the median context; null where the "
        "curve does not tell them"
    )
    overhead: Amount = Field(description="seconds of a mean step over those of vanilla's mean step")
    tokens_per_s: KnownInterval = Field(description="tokens a second, with its interval")
    speedup: KnownInterval = Field(description="tokens a second over vanilla's, with its interval")
    speedups: dict[Count, Amount] = Field(
        default={}, description="speedup by batch; empty where the cell was not asked for it"
    )
    speedups_low: dict[Count, Amount] = Field(
        default={},
        description="lower bounds of these speedups; empty in older records; a batch that takes all prompts "
        "at once has none",
    )
    speedups_high: dict[Count, Amount] = Field(
        default={}, description="upper bounds of these speedups, of the same batches as the lower ones"
    )

    @property
    def break_even(self) -> BreakEven | None:
        """Return up to which batch the tree pays; None where the cell was not asked for it."""
        return break_even(self.speedups) if self.speedups else None

    @property
    def break_even_range(self) -> tuple[int | None, int | None] | None:
        """Return the largest batches whose bounds lie above 1, the lower bound's first; None without bounds.

        A bound that lies above 1 at no batch gives None in its place.
        """
        if not self.speedups_low:
            return None
        low, high = (break_even(some).largest_batch for some in (self.speedups_low, self.speedups_high))
        return low, high


class CurveLabel(Frozen):
    """Which device, model shape, dtype and mode a curve is of, and where it comes from."""

    device: str = Field(description="key in hardware.toml where there is one, else the device's own name")
    shape: str = Field(description="name of the model or of the published shape")
    dtype: DtypeName = Field(description="dtype of the model")
    mode: ModeName | None = Field(description="mode of the engine; null for a prediction")
    kind: Literal["measured", "predicted"] = Field(description="timed on the device, or computed for it")
    source: str = Field(description="latency record or device figures that the curve is made of")
    fingerprint: str = Field(description="hash that changes with any figure of the curve")
    weights_sha256: str | None = Field(
        default=None,
        description="SHA-256 of the timed model's tensors; null for random weights and predictions",
    )
    timed_on: DeviceInfo | None = Field(
        default=None, description="the machine that was timed; null for a prediction, and in older records"
    )
    read_bandwidth_bytes_per_s: Rate | None = Field(
        default=None,
        description="bytes that the timed machine read a second; null where they were not measured, for a "
        "prediction, and in older records",
    )

    @property
    def machine(self) -> MeasuredMachine | None:
        """Return the machine that was timed; None where the label does not say it."""
        if self.timed_on is None:
            return None
        return MeasuredMachine(self.timed_on, self.read_bandwidth_bytes_per_s)

    @property
    def words(self) -> str:
        """Return the curve in a few words."""
        mode = f", {self.mode}" if self.mode is not None else ""
        return f"{self.device}, {self.shape}, {self.dtype}{mode} ({self.kind})"


class ScheduledTree(Frozen):
    """The tree that a batch is to be decoded with on a device, and what it is worth there."""

    batch: Count = Field(description="rows that decode together")
    tree: Count = Field(description="index of the tree in trees.json; the root alone is plain decoding")
    tokens_per_s: Amount = Field(description="tokens a second of all rows together")
    vanilla_tokens_per_s: Amount = Field(description="tokens a second of plain decoding at this batch")
    speedup: Amount = Field(description="the first over the second")
    speedup_low: Amount | None = Field(
        default=None, description="its lower bound; null where one batch takes all prompts"
    )
    speedup_high: Amount | None = Field(default=None, description="its upper bound, as the lower one")


class ComposedCell(Versioned):
    """All trees on one curve at one batch: columns of figures, one entry a tree that the curve covers."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    cell: Literal["composed"] = Field(default="composed", description="tells the kinds of cells apart")
    curve: CurveLabel = Field(description="the curve that prices the steps")
    context: Context = Field(
        description="tokens before every step; trace where each step is priced at the length its text had"
    )
    batch: Count = Field(description="rows that decode together")
    kind: FigureKind = Field(
        description="kind of figure that speedups and tokens/s are; tokens/step are replayed in any case, "
        "and step times are of the curve's kind"
    )
    beyond_share: Share = Field(
        description="share of vanilla steps at lengths that the curve does not cover, priced at the nearest "
        "one that it does"
    )
    vanilla_step_s: StepSeconds = Field(description="seconds of vanilla's mean step")
    vanilla_tokens_per_s: Rate = Field(description="vanilla's tokens a second")
    trees: tuple[Count, ...] = Field(description="indices in trees.json of the trees that the curve covers")
    step_s: tuple[StepSeconds, ...] = Field(description="seconds of a mean replayed step, one entry a tree")
    tokens_per_s: tuple[Amount, ...] = Field(description="tokens a second, one entry a tree")
    speedup: tuple[Amount, ...] = Field(description="tokens a second over vanilla's, one entry a tree")
    speedup_low: tuple[Amount, ...] = Field(description="lower bounds of the speedups, one entry a tree")
    speedup_high: tuple[Amount, ...] = Field(description="upper bounds of the speedups, one entry a tree")
    num_uncovered: Count = Field(description="trees of the sweep that the curve does not cover")
    chosen: tuple[ChosenTree, ...] = Field(description="what the searches chose for this cell")
    schedule: tuple[ScheduledTree, ...] = Field(
        default=(),
        description="the tree of each batch on this curve, where the cell is of batch 1 and its figures are "
        "composed; empty in other cells and in older records",
    )
    timing_rounds: Count | None = Field(
        default=None,
        description="rounds in which the curve was timed, which intervals draw as they draw prompts; "
        "null where they leave the error of the step times out: for a prediction, which has its bands, for "
        "times of one round, and in older records",
    )
    seconds_band: ErrorBand | None = Field(
        default=None,
        description="bounds of measured / predicted seconds of a step on curves that the step model had not "
        "seen; null for a measured curve, and where that is not known",
    )
    overhead_band: ErrorBand | None = Field(
        default=None,
        description="bounds of measured / predicted overhead on curves that the step model had not seen; "
        "null for a measured curve, and where that is not known",
    )

    @property
    def key(self) -> str:
        """Return what makes the cell this one."""
        return composed_key(self.curve, context=self.context, batch=self.batch)

    @property
    def best(self) -> ChosenTree:
        """Return the tree that the search on joint hits chose."""
        return next(chosen for chosen in self.chosen if chosen.method == "joint")


class RanOn(Frozen):
    """Which node of a cluster ran a cell, and what it is; no host name, no address."""

    node: str = Field(description="start of the random id that Ray gave the node")
    accelerator_type: str | None = Field(description="Ray's name of its GPU; null without one")
    device: DeviceInfo = Field(description="the device that ran the cell")
    python: str = Field(description="version of Python there")
    packages: dict[str, str] = Field(description="versions of the packages there, by name")


class SampledRow(Frozen):
    """One text of a sampled setting: counts, and how likely the original backbone finds it."""

    prompt_key: str = Field(description="which prompt; pairs the settings")
    category: str | None = Field(description="category of the prompt; null where it has none")
    seed: Whole | None = Field(description="seed of the draws; null where nothing is drawn")
    prompt_tokens: Count = Field(description="tokens of the prompt")
    num_tokens: Count = Field(description="kept tokens of the answer, the prefill's included")
    ended_by: Literal["eos", "budget"] = Field(description="end of sequence, or the budget of tokens")
    step_tokens: tuple[Count, ...] = Field(
        description="kept tokens of each decoding step; their sum is num_tokens - 1"
    )
    log_likelihood: Finite = Field(
        description="summed log-likelihood of the tokens under the original backbone at temperature 1, nats"
    )
    text_sha256: str = Field(description="start of the SHA-256 of the token ids")


class SampledCell(Versioned):
    """One setting whose text a replay cannot give, run on every prompt and seed."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    cell: Literal["sampled"] = Field(default="sampled", description="tells the kinds of cells apart")
    setting: SampledSetting = Field(description="rule of acceptance and temperature")
    tree: Count | None = Field(description="index of the tree in trees.json; null for vanilla")
    rows: tuple[SampledRow, ...] = Field(description="one entry a prompt and seed")
    elapsed_s: Seconds = Field(description="seconds that the whole cell took")
    ran_on: Annotated[RanOn | None, RAN_ON] = None

    @property
    def key(self) -> str:
        """Return what makes the cell this one."""
        return sampled_key(self.setting)


class StepDifference(Frozen):
    """The first step at which decoding took another path than the replay."""

    prompt_key: str = Field(description="the prompt whose answer it is")
    position: Count = Field(
        description="index in the answer of the last step start that both share, in tokens"
    )
    decoded_steps: Count = Field(description="decoding steps of the answer")
    replayed_steps: Count = Field(description="steps of its replay")
    kind: Literal["tie", "bug"] = Field(description="tie: within rounding; bug: anything else")


class DecodedRow(Frozen):
    """One prompt decoded by vanilla and with the tree in turn, and what was composed for the same steps."""

    prompt_key: str = Field(description="which prompt")
    num_tokens: Count = Field(description="kept tokens of the answer with the tree, the prefill's included")
    vanilla_s: Seconds = Field(description="seconds of vanilla on the decode clock")
    medusa_s: Seconds = Field(description="seconds with the tree on the decode clock")
    medusa_steps: Count = Field(description="decoding steps with the tree")
    composed_vanilla_s: Seconds = Field(description="seconds that were composed for vanilla")
    composed_medusa_s: Seconds = Field(description="seconds that were composed for the tree")

    @model_validator(mode="after")
    def _steps_take_time(self) -> DecodedRow:
        if self.medusa_steps and min(self.medusa_s, self.composed_medusa_s) < SHORTEST_S:
            raise ValueError(
                f"found {self.medusa_steps} steps with the tree in no time, need the time they took"
            )
        return self


class DecodedCell(Versioned):
    """One greedy point decoded for real: the check of the composition."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    cell: Literal["decoded"] = Field(default="decoded", description="tells the kinds of cells apart")
    curve: CurveLabel = Field(description="the curve that the point was composed with")
    tree: Count = Field(description="index of the tree in trees.json")
    rows: tuple[DecodedRow, ...] = Field(description="one entry a prompt")
    differences: tuple[StepDifference, ...] = Field(description="where decoding left its replay, by prompt")
    gap: KnownInterval | None = Field(
        default=None,
        description="composed speedup over the measured one, less 1; its interval draws the prompts of both "
        "together and the rounds in which the curve was timed; null in older records, and where the curve's "
        "timing does not show its error",
    )
    elapsed_s: Seconds = Field(description="seconds that the whole cell took")
    ran_on: Annotated[RanOn | None, RAN_ON] = None

    @model_validator(mode="after")
    def _something_was_timed(self) -> DecodedCell:
        for name in ("vanilla_s", "medusa_s", "composed_vanilla_s", "composed_medusa_s"):
            if sum(getattr(row, name) for row in self.rows) < SHORTEST_S:
                raise ValueError(f"found {name} of 0 in every row, need an answer of more than one token")
        return self

    @property
    def key(self) -> str:
        """Return what makes the cell this one."""
        return decoded_key(
            self.tree, accelerator_type=self.ran_on.accelerator_type if self.ran_on is not None else None
        )


class FailedCell(Versioned):
    """A cell that could not be had: no figure, only the reason."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    cell: Literal["failed"] = Field(default="failed", description="tells the kinds of cells apart")
    key: str = Field(description="key of the cell that it was to be")
    words: str = Field(description="that cell in one line, for people")
    error_type: str = Field(description="class of the exception")
    message: str = Field(description="what the exception said")
    ran_on: Annotated[RanOn | None, RAN_ON] = None


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
    """Return the key of a decoded cell; on a cluster every accelerator type has its own.

    The tree is `none` where there is no curve to check.
    """
    return f"decoded {tree}" + (f" on {accelerator_type}" if accelerator_type is not None else "")


def read_cells(path: Path, *, allow_torn_tail: bool = False) -> tuple[AnyCell, ...]:
    """Return the cells of a `cells.jsonl`, read as `files.read_lines` does."""
    return read_versioned_lines(path, _CELL.validate_json, holds="one cell", allow_torn_tail=allow_torn_tail)
