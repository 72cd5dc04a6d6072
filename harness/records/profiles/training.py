"""Which share of the matrix throughput training steps reach, and where the rest of their time goes.

    share = sum over dtypes (counted operations / matrix throughput) / seconds of a step

How a profile is taken stands in `measure/profiles/training.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from harness.bounds import Count, Rate, Seconds, Share, StepSeconds
from harness.files import Frozen
from harness.records.provenance import Environment
from harness.versions import VERSION, Versioned, read_versioned_file

HEADS_BOUND = 0.6  # of the matrix throughput: what heads alone on cached states are to reach


class MatrixThroughput(Frozen):
    """Matrix throughput in one dtype, measured in the same run before the steps and after them."""

    dtype: str = Field(description="dtype of the factors")
    before_flop_per_s: Rate = Field(description="floating-point operations a second, before the steps")
    after_flop_per_s: Rate = Field(description="floating-point operations a second, after the steps")
    method: str = Field(description="sizes and repeats of the measurement, in words")

    @property
    def flop_per_s(self) -> float:
        """Return the better of both, in operations a second.

        A limit is the most that the device was seen to do, so a share of it can only come out too small.
        """
        return max(self.before_flop_per_s, self.after_flop_per_s)


class PartProfile(Frozen):
    """One part of a stage's steps."""

    name: str = Field(description="the part, such as backward; other is what no part covers")
    seconds: tuple[Seconds, ...] = Field(min_length=1, description="seconds of the part in every marked step")
    flops: dict[str, Count] = Field(
        description="floating-point operations of its matrix products in one step, by dtype of the factors"
    )


class StageProfile(Frozen):
    """The timed steps of one stage."""

    name: str = Field(description="the stage of the training")
    step_rate: Share = Field(gt=0, description="share of the recipe's steps that are of this stage")
    num_positions: Count = Field(ge=1, description="positions that one step learns from")
    step_s: tuple[StepSeconds, ...] = Field(
        min_length=1, description="seconds of every step that nothing touched"
    )
    parts: tuple[PartProfile, ...] = Field(
        min_length=1, description="the parts of marked steps, which took turns with the untouched ones"
    )

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len({len(part.seconds) for part in self.parts}) != 1:
            raise ValueError("found parts of another number of steps, need as many of each")
        return self

    @property
    def flops(self) -> dict[str, int]:
        """Return the operations of the whole step by dtype."""
        summed: dict[str, int] = defaultdict(int)
        for part in self.parts:
            for dtype, count in part.flops.items():
                summed[dtype] += count
        return dict(summed)

    @property
    def median_step_s(self) -> float:
        """Return the median seconds of the steps that nothing touched."""
        return median(self.step_s)


class TrainingProfile(Versioned):
    """A profile of a recipe's training steps."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    recipe: str = Field(description="name of the recipe")
    kind: Literal["heads", "joint"] = Field(description="heads alone, or heads and backbone")
    environment: Environment = Field(description="where the profile comes from")
    throughput: tuple[MatrixThroughput, ...] = Field(
        min_length=1, description="one entry a dtype that products were counted in"
    )
    stages: tuple[StageProfile, ...] = Field(
        min_length=1,
        description="one entry a stage; products that checkpointing computes again count as often as they "
        "run, and masked attention counts in full",
    )

    @model_validator(mode="after")
    def _throughput_of_every_dtype(self) -> Self:
        counted = {dtype for stage in self.stages for dtype in stage.flops}
        if missing := sorted(counted - {limit.dtype for limit in self.throughput}):
            raise ValueError(f"found products in {missing}, need the matrix throughput there")
        return self

    def least_s(self, flops: Mapping[str, int]) -> float:
        """Return the seconds that these operations take at full matrix throughput."""
        limits = {limit.dtype: limit.flop_per_s for limit in self.throughput}
        return sum(count / limits[dtype] for dtype, count in flops.items())

    def stage_share(self, stage: StageProfile) -> float:
        """Return the share of the matrix throughput that a stage's steps reach."""
        return self.least_s(stage.flops) / stage.median_step_s

    def part_share(self, part: PartProfile) -> float | None:
        """Return the share that one part reaches while it runs; None for one that does not run."""
        return self.least_s(part.flops) / median(part.seconds) if median(part.seconds) > 0 else None

    @property
    def share(self) -> float:
        """Return the share over a whole run of the recipe: stages weighted by their shares of its steps."""
        least_s = sum(stage.step_rate * self.least_s(stage.flops) for stage in self.stages)
        return least_s / sum(stage.step_rate * stage.median_step_s for stage in self.stages)


def read_training_profile(path: Path) -> TrainingProfile:
    """Return a training profile.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    return read_versioned_file(path, TrainingProfile, noun="a training profile")
