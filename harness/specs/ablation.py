"""Ablations as data: recipes side by side at one token budget, from the same heads, on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import DataFile, DataPath, parse_toml, read_toml
from harness.specs.bounds import (
    MAX_PROMPTS,
    MAX_TREE_NODES,
    Many,
    PromptCount,
    Seed,
    Some,
    SomeDistinct,
    Spec,
    TextLength,
)
from harness.specs.suite import ChainTree, IntervalSpec, ModelSpec, SearchedTree

START_ARM = "start"  # the untouched model with the heads that every arm starts from


class PromptDraw(Spec):
    """The first `num_prompts` held-out prompts that a seed draws from the project's catalogue."""

    num_prompts: PromptCount
    seed: Seed


class HeldOutSpec(Spec):
    """Prompts that no arm trains on; the original model answers them greedily, and so does every tuned one.

    `training` takes held-out prompts of the project's own catalogue, without those of the calibration trace;
    `random` draws token ids, for tiny models. `left_out` names draws whose prompts are not measured on: those
    that rates and weights were chosen on.
    """

    source: Literal["training", "random"] = "training"
    num_prompts: int = Field(ge=2, le=MAX_PROMPTS)
    max_new_tokens: TextLength
    seed: Seed
    left_out: Many[PromptDraw] = ()


class ReferenceSpec(Spec):
    """Texts that neither model wrote, to measure likelihood on: MT-Bench's reference answers, both turns."""

    source: Literal["mt_bench"]
    limit: PromptCount | None = None
    max_length: TextLength = 1024


class AblationArm(Spec):
    """One recipe, of whose file only the [recipe] table is used.

    `fresh_heads` starts it from untrained heads, as a control.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    recipe: DataPath
    fresh_heads: bool = False


class AblationSpec(DataFile):
    """One ablation: arms times seeds.

    Every arm sees the same `answer_tokens` of the packed corpus once; a seed draws which, in what order, and
    all else that is random. `tree` is the one tree that all arms are compared at; `best_tree_nodes` the size
    of each arm's own. `decides_claims` false says that the budget shows signs and orders only.
    `expected_tokens_per_s` serves the estimate where no record is at hand.
    """

    kind: Literal["ablation"] = "ablation"
    description: str
    decides_claims: bool
    answer_tokens: int = Field(ge=1, le=10**12)
    seeds: SomeDistinct[Seed]
    packed_corpus: DataPath
    start_heads: DataPath
    calibration_trace: DataPath | None = None
    expected_tokens_per_s: float = Field(gt=0)
    best_tree_nodes: int = Field(default=64, ge=2, le=MAX_TREE_NODES)
    model: ModelSpec
    tree: Annotated[ChainTree | SearchedTree, Field(discriminator="kind")]
    held_out: HeldOutSpec
    references: ReferenceSpec | None = None
    interval: IntervalSpec = IntervalSpec()
    arms: Some[AblationArm]

    @model_validator(mode="after")
    def _consistent(self) -> AblationSpec:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or START_ARM in names:
            raise ValueError(f"arm names must be distinct, and none {START_ARM!r}")
        if isinstance(self.tree, SearchedTree) and self.calibration_trace is None:
            raise ValueError("a searched tree needs a calibration_trace")
        return self

    def plan(self) -> tuple[tuple[str, int | None], ...]:
        """Return what is run, in order: the start, then every arm of the first seed, then of the second."""
        return ((START_ARM, None), *((arm.name, seed) for seed in self.seeds for arm in self.arms))

    def arm(self, name: str) -> AblationArm:
        """Return the arm of that name.

        Raises: UserError where there is none.
        """
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise UserError(
                found=f"arm {name!r}", need=f"one of {', '.join(found)}", where=f"ablation {self.name!r}"
            )
        return found[name]


def load_ablation(path: Path) -> AblationSpec:
    """Return the ablation in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, AblationSpec, noun="an ablation", kind="ablation")


def parse_ablation(text: str, *, where: str) -> AblationSpec:
    """Return the ablation that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, AblationSpec, noun="an ablation", where=where)
