"""Suites as data: validated, frozen models of what `suites/*.toml` may say."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.files import DataFile, DataPath, Frozen, ModelFolder, parse_toml, read_toml

BackboneName = Literal["original", "tuned"]


class TinyModelSpec(Frozen):
    """A random Llama-shaped model made on the spot, for suites that test the machinery and time nothing."""

    vocab_size: int = Field(ge=8)
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_positions: int
    seed: int


class ModelSpec(Frozen):
    """The backbone: an asset of `assets.toml`, a local folder, or a tiny random model; exactly one of them.

    `adapter` names the folder of a LoRA adapter that is merged into it: the backbone of Medusa-2.
    `chat_template` names a Jinja file for a model whose tokenizer brings no template of its own. `chat_date`
    is the day that a template which asks for the date writes; without it, that on which the work began.
    """

    asset: str | None = None
    path: ModelFolder | None = None
    tiny: TinyModelSpec | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False
    adapter: DataPath | None = None
    chat_template: DataPath | None = None
    chat_date: date | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if sum(source is not None for source in (self.asset, self.path, self.tiny)) != 1:
            raise ValueError("give exactly one of asset, path, tiny")
        return self


class HeadsSpec(Frozen):
    """The draft heads: a checkpoint, or a short training on the suite's own model (tiny models only).

    A suite none of whose arms drafts needs neither.
    """

    path: DataPath | None = None
    train_steps: int | None = None
    num_heads: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> HeadsSpec:
        if self.path is not None and self.train_steps is not None:
            raise ValueError("give exactly one of path, train_steps")
        return self

    @property
    def absent(self) -> bool:
        """Whether there are none."""
        return self.path is None and self.train_steps is None


class TunedSpec(Frozen):
    """Medusa-2 next to Medusa-1: the suite's model with an adapter, and the heads trained with it.

    The adapter is merged into the model.
    """

    adapter: DataPath
    heads_path: DataPath
    calibration_trace: DataPath | None = None


class PromptSpec(Frozen):
    """Which prompts are decoded; `path` names a file of the user's own, `source` a known set."""

    source: Literal["mt_bench", "human_eval", "random", "file"]
    path: DataPath | None = None
    per_category: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)


class ChainTree(Frozen):
    """A chain of the first `depth` heads: the best token of each and no branches."""

    kind: Literal["chain"]
    depth: int = Field(ge=1)


class CartesianTree(Frozen):
    """All combinations of the top `widths[k]` tokens of head k + 1.

    With `max_nodes` it is the best such tree of at most that many nodes on the calibration trace, or the
    largest where there is no trace.
    """

    kind: Literal["cartesian"]
    widths: tuple[int, ...] | None = None
    max_nodes: int | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CartesianTree:
        if (self.widths is None) == (self.max_nodes is None):
            raise ValueError("give exactly one of widths, max_nodes")
        return self


class FileTree(Frozen):
    """A tree from a JSON file."""

    kind: Literal["file"]
    path: DataPath


class SearchedTree(Frozen):
    """The tree grown on the calibration trace to `num_nodes` nodes, root included (paper, Section 2.3.3)."""

    kind: Literal["searched"]
    num_nodes: int = Field(ge=2)
    values: Literal["marginals", "joint"] = "joint"


class FastestTree(Frozen):
    """The tree with the most calibrated tokens a step over this machine's own step time.

    Step times are measured before the arms run.
    """

    kind: Literal["fastest"]
    max_nodes: int = Field(ge=2)


TreeSpec = Annotated[
    ChainTree | CartesianTree | FileTree | SearchedTree | FastestTree, Field(discriminator="kind")
]


class GreedyAcceptance(Frozen):
    """Accept a draft token where it is the backbone's argmax; lossless."""

    rule: Literal["greedy"] = "greedy"


class TypicalAcceptance(Frozen):
    """Accept x where p(x) > min(epsilon, delta * exp(-H)); lossy (paper, Section 2.3.1)."""

    rule: Literal["typical"]
    temperature: float = Field(gt=0)
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0)
    root: Literal["sampled", "greedy"] = "sampled"


class RejectionAcceptance(Frozen):
    """Rejection sampling with point-mass proposals; lossless in distribution."""

    rule: Literal["rejection"]
    temperature: float = Field(gt=0)


AcceptanceSpec = Annotated[
    GreedyAcceptance | TypicalAcceptance | RejectionAcceptance, Field(discriminator="rule")
]


class ArmSpec(Frozen):
    """One configuration that decodes every prompt.

    `baseline` names the vanilla arm that it is compared with, on the same `backbone`; `temperature` is that
    of a sampled vanilla arm (a Medusa arm's stands in its acceptance); `seeds` are refused where no random
    number is drawn, since they could not matter.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    method: Literal["vanilla", "medusa", "hf_greedy", "hf_prompt_lookup"]
    backbone: BackboneName = "original"
    baseline: str | None = None
    tree: TreeSpec | None = None
    num_heads: int | None = Field(default=None, ge=1)
    acceptance: AcceptanceSpec | None = None
    temperature: float = Field(default=0.0, ge=0)
    seeds: tuple[int, ...] = ()

    @property
    def stochastic(self) -> bool:
        """Return whether the arm draws random numbers."""
        if self.acceptance is None or self.acceptance.rule == "greedy":
            return self.temperature > 0
        return self.acceptance.rule == "rejection" or self.acceptance.root == "sampled"

    @property
    def sampling_temperature(self) -> float:
        """The temperature of the law that the arm follows; 0 is greedy."""
        if self.acceptance is None or self.acceptance.rule == "greedy":
            return self.temperature
        return self.acceptance.temperature

    @model_validator(mode="after")
    def _consistent(self) -> ArmSpec:
        if (self.method == "medusa") != (self.tree is not None) or (self.method == "medusa") != (
            self.acceptance is not None
        ):
            raise ValueError(
                f"arm {self.name!r}: a medusa arm, and no other, has a tree and an acceptance rule"
            )
        if self.method == "medusa" and self.temperature:
            raise ValueError(f"arm {self.name!r}: a medusa arm's temperature stands in its acceptance")
        if self.stochastic != bool(self.seeds):
            raise ValueError(
                f"arm {self.name!r}: found seeds {list(self.seeds)}, need seeds exactly where random "
                "numbers are drawn"
            )
        if (self.method == "vanilla") != (self.baseline is None):
            raise ValueError(f"arm {self.name!r}: every arm but vanilla names its baseline")
        return self


class IntervalSpec(Frozen):
    """How intervals are formed: bootstrap over prompts, both arms of a prompt drawn together."""

    level: float = Field(default=0.95, gt=0.5, lt=1)
    num_resamples: int = Field(default=4000, ge=100)
    seed: int = 20240119


class ProbeSpec(Frozen):
    """What is measured apart from the timed generations."""

    step_nodes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    step_context_tokens: int = 192
    step_repeats: int = 12
    profile_prompts: int = 2


class SuiteSpec(DataFile):
    """One suite: model, heads, prompts, arms, and how they are measured."""

    kind: Literal["suite"] = "suite"
    description: str
    reports_speed: bool = True
    max_new_tokens: int = Field(ge=2)
    rounds: int = Field(default=1, ge=1)
    warmup_prompts: int = Field(default=1, ge=0)
    plan_seed: int = 1
    engine: Literal["auto", "eager", "packed"] = "auto"
    calibration_trace: DataPath | None = None
    model: ModelSpec
    heads: HeadsSpec = HeadsSpec()
    tuned: TunedSpec | None = None
    prompts: PromptSpec
    interval: IntervalSpec = IntervalSpec()
    probes: ProbeSpec = ProbeSpec()
    arms: tuple[ArmSpec, ...]

    @model_validator(mode="after")
    def _arms_consistent(self) -> SuiteSpec:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError("arm names must be distinct")
        vanilla = {arm.name: arm for arm in self.arms if arm.method == "vanilla"}
        for arm in self.arms:
            if arm.baseline is None:
                continue
            if arm.baseline not in vanilla:
                raise ValueError(
                    f"arm {arm.name!r}: baseline {arm.baseline!r} is no vanilla arm of this suite"
                )
            if arm.sampling_temperature != vanilla[arm.baseline].temperature:
                raise ValueError(
                    f"arm {arm.name!r}: its baseline {arm.baseline!r} samples at another temperature"
                )
            if arm.backbone != vanilla[arm.baseline].backbone:
                raise ValueError(
                    f"arm {arm.name!r}: its baseline {arm.baseline!r} decodes with another backbone"
                )
        return self

    @model_validator(mode="after")
    def _has_heads(self) -> SuiteSpec:
        if self.heads.absent and self.drafts:
            raise ValueError("a medusa arm needs [heads]: give exactly one of path, train_steps")
        return self

    @property
    def drafts(self) -> bool:
        """Whether an arm has draft heads."""
        return any(arm.method == "medusa" for arm in self.arms)

    @model_validator(mode="after")
    def _tuned_consistent(self) -> SuiteSpec:
        has_arms = any(arm.backbone == "tuned" for arm in self.arms)
        if has_arms != (self.tuned is not None):
            raise ValueError("arms on the tuned backbone and a [tuned] table need each other")
        if self.tuned is not None and self.model.adapter is not None:
            raise ValueError(
                "a [tuned] table together with model.adapter: the original is the model without an adapter"
            )
        return self

    @property
    def backbones(self) -> tuple[BackboneName, ...]:
        """The backbones that its arms decode with, the original first."""
        return ("original",) if self.tuned is None else ("original", "tuned")

    def calibration_of(self, backbone: BackboneName) -> str | None:
        """Return the path of the calibration trace of a backbone's heads."""
        if backbone == "original":
            return self.calibration_trace
        return self.tuned.calibration_trace if self.tuned is not None else None

    def arm(self, name: str) -> ArmSpec:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def load_suite(path: Path) -> SuiteSpec:
    """Return the suite in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, SuiteSpec, noun="a suite", kind="suite")


def parse_suite(text: str, *, where: str) -> SuiteSpec:
    """Return the suite that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, SuiteSpec, noun="a suite", where=where)


def is_deterministic(arm: ArmSpec) -> bool:
    """Return whether the arm decodes greedily, so that its text must be its baseline's."""
    return not arm.stochastic and arm.sampling_temperature == 0
