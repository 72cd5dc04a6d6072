"""Which share of the matrix throughput training steps reach, and where the rest of their time goes: records, headline and table. Pure.

    share = sum over dtypes (counted operations / matrix throughput) / seconds of a step

How a profile is taken stands in `record_training_profile`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Column, Table

from harness.errors import UserError
from harness.files import Frozen
from harness.records.provenance import Environment
from harness.report.formatting import ABSENT, milliseconds, percent, significant

HEADS_BOUND = 0.6  # of the matrix throughput: what heads alone on cached states are to reach


class MatrixThroughput(Frozen):
    """Matrix throughput in one dtype, measured in the same run before the steps and after them."""

    dtype: str
    before_flop_per_s: float = Field(gt=0)
    after_flop_per_s: float = Field(gt=0)
    method: str

    @property
    def flop_per_s(self) -> float:
        """The better of both: a limit is the most that the device was seen to do, so a share of it can only come out too small."""
        return max(self.before_flop_per_s, self.after_flop_per_s)


class PartProfile(Frozen):
    """One part of a stage's steps: its seconds in every marked step, and the operations of its products by dtype."""

    name: str
    seconds: tuple[float, ...] = Field(min_length=1)
    flops: dict[str, int]


class StageProfile(Frozen):
    """The timed steps of one stage: `step_s` untouched, the parts' from marked steps; `other` is what no part covers.

    `step_rate` is the stage's share of the recipe's steps; `num_positions` are the positions that one step learns from.
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

    Products that checkpointing computes again count as often as they run, and masked attention counts in full.
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
        raise UserError(found=f"{key}: {first['msg']}", need="a TrainingProfile record", where=path.name) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(found=f"no readable {path.name}", need="a training profile", where="the command line") from error


def training_headline(profile: TrainingProfile) -> dict[str, Any]:
    """Return the one JSON object that ends the command's output.

    Units: milliseconds (medians), GFLOP a step and GFLOP/s; shares of the matrix throughput.
    """
    return {
        "recipe": profile.recipe,
        "kind": profile.kind,
        "device": profile.environment.device.name,
        "share": profile.share,
        "bound": HEADS_BOUND if profile.kind == "heads" else None,
        "gflop_per_s": {limit.dtype: limit.flop_per_s / 1e9 for limit in profile.throughput},
        "stages": [
            {
                "name": stage.name,
                "share": profile.stage_share(stage),
                "num_steps": len(stage.step_s),
                "step_ms": 1e3 * stage.median_step_s,
                "positions_per_s": stage.num_positions / stage.median_step_s,
                "gflop": {dtype: count / 1e9 for dtype, count in sorted(stage.flops.items())},
                "parts": {
                    part.name: {"ms": 1e3 * median(part.seconds), "share": profile.part_share(part)}
                    for part in stage.parts
                    if any(part.seconds)
                },
            }
            for stage in profile.stages
        ],
    }


def print_training_profile(console: Console, profile: TrainingProfile) -> None:
    """Print one table a stage: where the time goes, what is counted in it, and how much of the step each part loses."""
    for stage in profile.stages:
        rate = significant(stage.num_positions / stage.median_step_s)
        title = f"{stage.name}: {milliseconds(stage.median_step_s)} ms a step, {rate} positions/s, {percent(stage.step_rate)} of the steps"
        shown = Table(Column("part", no_wrap=True), "ms", "of the step", "GFLOP", "of matrix throughput", "lost of the step", title=title)
        for part in (part for part in stage.parts if any(part.seconds)):
            lost_s = median(part.seconds) - profile.least_s(part.flops)
            shown.add_row(
                part.name,
                milliseconds(median(part.seconds)),
                percent(median(part.seconds) / stage.median_step_s),
                _gflop(part.flops),
                percent(profile.part_share(part)) if part.flops else ABSENT,
                percent(lost_s / stage.median_step_s),
            )
        share = profile.stage_share(stage)
        shown.add_section()
        shown.add_row("step", milliseconds(stage.median_step_s), percent(1), _gflop(stage.flops), percent(share), percent(1 - share))
        console.print(shown)
    for limit in profile.throughput:
        found = f"{limit.before_flop_per_s / 1e9:,.0f} before the steps, {limit.after_flop_per_s / 1e9:,.0f} after"
        console.print(f"matrix throughput, {limit.dtype}: {found}, GFLOP/s; the better counts", highlight=False, soft_wrap=True)
    bound = f"; at least {percent(HEADS_BOUND)} are wanted" if profile.kind == "heads" else ""
    console.print(f"over the recipe: {percent(profile.share)} of the matrix throughput{bound}", highlight=False, soft_wrap=True)


def _gflop(flops: Mapping[str, int]) -> str:
    return ", ".join(f"{significant(count / 1e9)} {dtype}" for dtype, count in sorted(flops.items())) or ABSENT
