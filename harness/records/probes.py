"""What a run measures apart from its trials: the device, the heads, step costs, a profile, rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.bounds import Amount, Count, Rate, Seconds, Share, StepSeconds
from harness.files import Frozen
from harness.records.trials import ProcessorObservation
from harness.specs.disturbance import DisturbanceRule
from harness.versions import VERSION, Data, Versioned


class StepCost(Versioned):
    """Separately timed steps of one shape."""

    arm: str | None = Field(default=None, description="arm whose steps they are; null for a shape alone")
    prompt_key: str | None = Field(
        default=None,
        description="prompt whose block the steps follow; null for a shape alone, and in older records",
    )
    num_nodes: Count = Field(description="nodes of the tree, root included; 1 is vanilla")
    num_heads: Count = Field(description="draft heads that the tree reads")
    context_tokens: Count = Field(description="tokens in the cache before the steps")
    backbone_s: tuple[StepSeconds, ...] = Field(
        min_length=1, description="seconds of the backbone in each step"
    )
    step_s: tuple[StepSeconds, ...] = Field(
        default=(),
        description="seconds of each whole step, with heads, candidates, acceptance and compaction; empty "
        "where only the backbone was timed",
    )
    processor: ProcessorObservation | None = Field(
        default=None,
        description="what the host's cores did while an arm's steps were timed, in turns with those of the "
        "block's other arms; null for a shape alone, and in older records",
    )

    def is_quiet(self, rule: DisturbanceRule | None) -> bool:
        """Return whether no other work took more of the cores than a rule allows; true without a rule."""
        if rule is None or self.processor is None:
            return True
        return self.processor.others_share <= rule.max_others_share


class StepCosts(Versioned):
    """All separately timed steps of a run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    costs: tuple[StepCost, ...] = Field(description="one entry a shape; shapes were timed in turn")


class ProfileRow(Frozen):
    """Where one arm's step time goes, in a profiling run apart from the timed ones."""

    arm: str = Field(description="name that the suite gives the arm")
    num_steps: Count = Field(description="decoding steps that were timed")
    step_s: Seconds = Field(description="seconds of all steps together; 0 where no step was taken")
    backbone_s: Seconds = Field(description="seconds in calls of the backbone, over all steps")
    heads_s: Seconds = Field(description="seconds in calls of the draft heads, over all steps")
    candidates_s: Seconds = Field(description="seconds for candidates, positions and mask, over all steps")
    acceptance_s: Seconds = Field(description="seconds for acceptance, over all steps")
    cache_s: Seconds = Field(description="seconds for compaction of the cache, over all steps")

    @property
    def own_code_share(self) -> float:
        """Return 1 - (backbone + heads) / step: what our own code costs; 0 where no step was taken."""
        return 0.0 if self.step_s == 0 else 1 - (self.backbone_s + self.heads_s) / self.step_s


class Profile(Versioned):
    """The profiling run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    rows: tuple[ProfileRow, ...] = Field(description="one entry an arm")


def _of_fixed_sizes(data: Data) -> Data:
    """Return limits of version 1 as those of version 2: the probe of that time had no one-row product."""
    return {**data, "row_product_bytes_per_s": None}


class DeviceLimits(Versioned):
    """What this device can do, measured in the same run.

    The probe of version 1 used small or fixed sizes, so that steps could be faster than its figures.
    """

    upgrades: ClassVar[Mapping[int, Callable[[Data], Data]]] = {1: _of_fixed_sizes}

    schema_version: Annotated[Literal[2], VERSION] = 2
    read_bandwidth_bytes_per_s: Rate = Field(
        description="bytes read a second, the best of several repeats and growing sizes"
    )
    matmul_flop_per_s: Rate = Field(
        description="floating-point operations of a matrix product a second in the dtype of the run, the "
        "best of several repeats and growing sizes"
    )
    row_product_bytes_per_s: Rate | None = Field(
        default=None,
        description="bytes of weights a second that products of one row read in the dtype of the run, as "
        "those of a vanilla step do; null in records of version 1",
    )
    method: str = Field(description="sizes and repeats of the measurements, in words")

    @property
    def are_under_measured(self) -> bool:
        """Return whether an older probe measured them, which the device itself may exceed."""
        return self.row_product_bytes_per_s is None

    def best_with(self, other: DeviceLimits) -> DeviceLimits:
        """Return the higher figure of each of two measurements of one device and dtype."""
        rows = [rate for one in (self, other) if (rate := one.row_product_bytes_per_s) is not None]
        return DeviceLimits(
            read_bandwidth_bytes_per_s=max(self.read_bandwidth_bytes_per_s, other.read_bandwidth_bytes_per_s),
            matmul_flop_per_s=max(self.matmul_flop_per_s, other.matmul_flop_per_s),
            row_product_bytes_per_s=max(rows, default=None),
            method=f"the better of twice: {self.method}; then {other.method}",
        )


class HeadsControl(Versioned):
    """Trained heads against useless ones on held-out text, before any timing is kept."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    num_positions: Count = Field(description="positions at which the first head was read")
    trained_top1: tuple[Share, ...] = Field(
        description="share of positions, one entry a head, at which the trained head's best token is right"
    )
    random_top1: tuple[Share, ...] = Field(description="the same share, of heads with random weights")
    identity_top1: tuple[Share, ...] = Field(description="the same share, of heads before any training")


class ShapeShift(Frozen):
    """How far steps of one shape move a figure from what the trace's pass gives at the same positions.

    A position's value is the largest of the nodes that hold it, or of the heads read there.
    """

    arms: tuple[str, ...] = Field(description="arms that decode in steps of this shape")
    num_nodes: Count = Field(description="tokens of a step: nodes of the tree, root included")
    num_positions: Count = Field(description="positions that were compared")
    p50: Amount = Field(description="median of the absolute differences of logits")
    p90: Amount = Field(description="90th percentile of the absolute differences of logits")
    p99: Amount = Field(description="99th percentile of the absolute differences of logits")
    largest: Amount = Field(description="largest of the absolute differences of logits")


class Rounding(Versioned):
    """How far this dtype's rounding moves logits between the shapes in which a run computes one position."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    dtype: str = Field(description="dtype of the steps, such as bfloat16")
    num_texts: Count = Field(description="texts that were compared, of no benchmark prompt")
    num_candidates: Count = Field(description="ranks of a head that were compared: those a tree may name")
    gaps: tuple[ShapeShift, ...] = Field(
        min_length=1,
        description="shifts of the difference of the two tokens that the trace's pass finds best; also with "
        "generate of transformers, where an arm uses it",
    )
    heads: tuple[ShapeShift, ...] = Field(
        description="shifts of the difference of any two of a draft head's best candidates"
    )

    @property
    def largest_gap_shift(self) -> float:
        """Return the largest shift of a gap in any shape."""
        return max(shape.largest for shape in self.gaps)

    @property
    def largest_head_shift(self) -> float:
        """Return the largest shift of a head in any shape; 0 where no arm reads a head."""
        return max((shape.largest for shape in self.heads), default=0.0)
