"""A gate as data: what two versions decode, how much worse does not count and why, and its looks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from harness.files import DataFile, DataPath, parse_toml, read_toml, with_paths
from harness.specs.bounds import Repeats, Some, SomeDistinct, Spec, TextLength
from harness.specs.suite import ArmSpec, HeadsSpec, ModelSpec, PromptSpec, SuiteSpec

Quantity = Literal[
    "tokens_per_step",
    "acceptance",
    "step_s",
    "step_cost",
    "overhead",
    "speedup",
    "tokens_per_s",
    "parity",
    "quality",
    "peak_memory",
]
TimedQuantity = Literal["step_s", "step_cost", "overhead", "speedup", "tokens_per_s"]
_Share = Annotated[float, Field(gt=0, lt=1)]


class MarginSpec(Spec):
    """How much worse a quantity may become before that counts, and why so much.

    It is a share of the base's value; of `parity` the share of texts that may differ, of `acceptance` and
    `quality` a plain difference, in shares and in nats a token.
    """

    quantity: Quantity
    margin: float = Field(ge=0, lt=1)
    reason: str = Field(min_length=1)


class DisturbanceSpec(Spec):
    """When a block counts as disturbed: others used more than a share of all cores, or the GPU at all."""

    others_share: _Share
    reason: str = Field(min_length=1)


class GateSpec(DataFile):
    """One gate: model, heads, prompts and arms; looks, error and margins, all fixed before anything is timed.

    `looks` are numbers of blocks, one prompt each, after which the figures are judged. `alpha` is the chance
    of a wrong alarm over all timed quantities and all looks together. `must_see` is the slowdown that the
    gate has to find with a chance of `power`; where a runner is too noisy for that, the gate says so. Every
    `mark_every`-th step is cut into its parts, and tells the step cost instead of a step's time.
    """

    kind: Literal["gate"] = "gate"
    description: str
    minutes: float = Field(gt=0, le=24 * 60)
    max_new_tokens: TextLength
    looks: SomeDistinct[Repeats]
    alpha: _Share
    must_see: _Share
    power: _Share
    mark_every: int = Field(default=5, ge=3, le=63)
    quality_prompts: int = Field(default=0, ge=0, le=1000)
    engine: Literal["auto", "eager", "packed"] = "auto"
    calibration_trace: DataPath | None = None
    disturbance: DisturbanceSpec
    model: ModelSpec
    heads: HeadsSpec = HeadsSpec()
    prompts: PromptSpec
    arms: Some[ArmSpec]
    margins: Some[MarginSpec]

    @model_validator(mode="after")
    def _looks_grow(self) -> GateSpec:
        if list(self.looks) != sorted(self.looks) or self.looks[0] < 3:
            raise ValueError(
                f"looks {list(self.looks)}, need growing numbers of blocks, the first at least 3"
            )
        return self

    @model_validator(mode="after")
    def _marks_keep_turns(self) -> GateSpec:
        if self.mark_every % 2 == 0:
            raise ValueError(
                f"mark_every {self.mark_every}, need an odd number: the versions begin the pairs of steps in "
                "turn, and of an even one the unmarked pairs begin with one of them more often"
            )
        return self

    @model_validator(mode="after")
    def _each_margin_once(self) -> GateSpec:
        named = [one.quantity for one in self.margins]
        if len(set(named)) != len(named):
            raise ValueError("margins name a quantity twice")
        if any(one.margin >= self.must_see for one in self.margins if one.quantity in TIMED):
            raise ValueError(f"margins of timed quantities have to be below must_see, {self.must_see:g}")
        return self

    @model_validator(mode="after")
    def _arms_fit(self) -> GateSpec:
        self.suite()  # which refuses arms that do not fit together
        for arm in self.arms:
            if arm.method not in ("vanilla", "medusa") or arm.backbone != "original":
                raise ValueError(f"arm {arm.name!r}: a gate decodes vanilla and medusa arms of one backbone")
            if arm.tree is not None and arm.tree.kind == "fastest":
                raise ValueError(
                    f"arm {arm.name!r}: a tree chosen by step times differs from run to run, need a fixed one"
                )
        if not any(arm.method == "vanilla" for arm in self.timed_arms):
            raise ValueError("no greedy vanilla arm: overhead and speedup are taken against it")
        return self

    @property
    def timed_arms(self) -> tuple[ArmSpec, ...]:
        """The greedy arms, whose steps are timed; the others are decoded for their texts alone."""
        return tuple(arm for arm in self.arms if not arm.stochastic)

    @property
    def sampled_arms(self) -> tuple[ArmSpec, ...]:
        """The arms that draw, whose texts are scored."""
        return tuple(arm for arm in self.arms if arm.stochastic)

    @property
    def vanilla(self) -> str:
        """The name of the greedy vanilla arm."""
        return next(arm.name for arm in self.timed_arms if arm.method == "vanilla")

    def margin(self, quantity: Quantity) -> float | None:
        """Return the margin of a quantity; None where the gate does not judge it."""
        return next((one.margin for one in self.margins if one.quantity == quantity), None)

    def suite(self) -> SuiteSpec:
        """Return what is decoded, as a suite, which every version of this project can read."""
        return SuiteSpec.model_validate(self.suite_data())

    def suite_data(self) -> dict[str, Any]:
        """Return the suite as data, without absent values, for a version whose suites may know fewer keys."""
        prompts = self.prompts.model_copy(update={"limit": self.looks[-1]})
        data = {
            "schema_version": 1,
            "kind": "suite",
            "name": self.name,
            "description": self.description,
            "max_new_tokens": self.max_new_tokens,
            "engine": self.engine,
        }
        if self.calibration_trace is not None:
            data["calibration_trace"] = str(self.calibration_trace)
        tables = {"model": self.model, "heads": self.heads, "prompts": prompts}
        data |= {name: with_paths(table, str) for name, table in tables.items()}
        return {**data, "arms": [with_paths(arm, str) for arm in self.arms]}


TIMED: tuple[Quantity, ...] = ("step_s", "step_cost", "overhead", "speedup", "tokens_per_s")


def load_gate_spec(path: Path) -> GateSpec:
    """Return the gate in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, GateSpec, noun="a gate", kind="gate")


def parse_gate_spec(text: str, *, where: str) -> GateSpec:
    """Return the gate that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, GateSpec, noun="a gate", where=where)
