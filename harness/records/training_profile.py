"""Which share of the matrix throughput training steps reach, and where the rest of their time goes: records,
headline and table. Pure.

    share = sum over dtypes (counted operations / matrix throughput) / seconds of a step

How a profile is taken stands in `record_training_profile`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from harness.errors import UserError
from harness.files import Frozen
from harness.records.provenance import Environment

HEADS_BOUND = 0.6  # of the matrix throughput: what heads alone on cached states are to reach


class MatrixThroughput(Frozen):
    """Matrix throughput in one dtype, measured in the same run before the steps and after them."""

    dtype: str
    before_flop_per_s: float = Field(gt=0)
    after_flop_per_s: float = Field(gt=0)
    method: str

    @property
    def flop_per_s(self) -> float:
        """The better of both: a limit is the most that the device was seen to do, so a share of it can only
        come out too small.
        """
        return max(self.before_flop_per_s, self.after_flop_per_s)


class PartProfile(Frozen):
    """One part of a stage's steps: its seconds in every marked step, and the operations of its products by
    dtype.
    """

    name: str
    seconds: tuple[float, ...] = Field(min_length=1)
    flops: dict[str, int]


class StageProfile(Frozen):
    """The timed steps of one stage: `step_s` untouched, the parts' from marked steps; `other` is what no part
    covers.

    `step_rate` is the stage's share of the recipe's steps; `num_positions` are the positions that one step
    learns from.
    """

    name: str
    step_rate: float = Field(gt=0, le=1)
    num_positions: int = Field(ge=1)
    step_s: tuple[float, ...] = Field(min_length=1)
    parts: tuple[PartProfile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len({len(part.seconds) for part in self.parts}) != 1:
            raise ValueError("found parts of another number of steps, need as many of each")
        return self

    @property
    def flops(self) -> dict[str, int]:
        """Operations of the whole step by dtype."""
        summed: dict[str, int] = defaultdict(int)
        for part in self.parts:
            for dtype, count in part.flops.items():
                summed[dtype] += count
        return dict(summed)

    @property
    def median_step_s(self) -> float:
        """Median of the steps that nothing touched."""
        return median(self.step_s)


class TrainingProfile(Frozen):
    """A profile of a recipe's training steps.

    Products that checkpointing computes again count as often as they run, and masked attention counts in
    full.
    """

    schema_version: Literal[1] = 1
    recipe: str
    kind: Literal["heads", "joint"]
    environment: Environment
    throughput: tuple[MatrixThroughput, ...] = Field(min_length=1)
    stages: tuple[StageProfile, ...] = Field(min_length=1)

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
        """The share over a whole run of the recipe: stages weighted by their shares of its steps."""
        least_s = sum(stage.step_rate * self.least_s(stage.flops) for stage in self.stages)
        return least_s / sum(stage.step_rate * stage.median_step_s for stage in self.stages)


def read_training_profile(path: Path) -> TrainingProfile:
    """Read a training profile.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    try:
        return TrainingProfile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            found=f"{key}: {first['msg']}", need="a TrainingProfile record", where=path.name
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            found=f"no readable {path.name}", need="a training profile", where="the command line"
        ) from error
