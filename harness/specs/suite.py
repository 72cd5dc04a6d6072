"""Suites as data: validated, frozen models of what `suites/*.toml` may say."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import DataFile, DataPath, ModelFolder, parse_toml, read_toml
from harness.specs.bounds import (
    MAX_PROMPTS,
    MAX_RESAMPLES,
    MAX_TREE_NODES,
    Distinct,
    HeadCount,
    NodeCount,
    PromptCount,
    Repeats,
    Seed,
    Some,
    SomeDistinct,
    Spec,
    Temperature,
    TextLength,
    TokenCount,
    Width,
)
from harness.specs.disturbance import DisturbanceRule

BackboneName = Literal["original", "tuned"]
MAX_TINY_SIZE, MAX_TINY_PARAMETERS = 2**17, 10**8
DEFAULT_HEADS = 5  # that are trained where a suite does not say how many


class TinyModelSpec(Spec):
    """A random Llama-shaped model made on the spot, for suites that test the machinery and time nothing."""

    vocab_size: int = Field(ge=8, le=MAX_TINY_SIZE)
    hidden_size: int = Field(ge=1, le=MAX_TINY_SIZE)
    num_layers: int = Field(ge=1, le=64)
    num_attention_heads: int = Field(ge=1, le=1024)
    num_key_value_heads: int = Field(ge=1, le=1024)
    intermediate_size: int = Field(ge=1, le=MAX_TINY_SIZE)
    max_positions: TokenCount
    seed: Seed

    @model_validator(mode="after")
    def _can_be_built(self) -> TinyModelSpec:
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads) or heads % self.num_key_value_heads:
            raise ValueError(
                "hidden_size must be an even multiple of num_attention_heads, and that a multiple of "
                "num_key_value_heads"
            )
        block = 4 * self.hidden_size + 3 * self.intermediate_size
        numbers = self.hidden_size * (2 * self.vocab_size + self.num_layers * block)
        if numbers > MAX_TINY_PARAMETERS:
            raise ValueError(f"about {numbers:,} parameters, at most {MAX_TINY_PARAMETERS:,} are tiny")
        return self


class ModelSpec(Spec):
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


class HeadsSpec(Spec):
    """The draft heads: an asset, a checkpoint, or a short training on the suite's model (tiny models only).

    A checkpoint is a file that this project wrote, or a file or folder as others publish it. `num_heads` is
    how many to train, or the first heads of a checkpoint; left out, all of them. A suite none of whose arms
    drafts needs none of the three.
    """

    asset: str | None = None
    path: DataPath | None = None
    train_steps: int | None = Field(default=None, ge=1, le=100_000)
    num_heads: HeadCount | None = None

    @property
    def num_trained(self) -> int:
        """How many heads a short training makes."""
        return self.num_heads or DEFAULT_HEADS

    @model_validator(mode="after")
    def _one_source(self) -> HeadsSpec:
        if sum(source is not None for source in (self.asset, self.path, self.train_steps)) > 1:
            raise ValueError("give exactly one of asset, path, train_steps")
        return self

    @property
    def absent(self) -> bool:
        """Whether there are none."""
        return self.asset is None and self.path is None and self.train_steps is None


class TunedSpec(Spec):
    """Medusa-2 next to Medusa-1: the suite's model with an adapter, and the heads trained with it.

    The adapter is merged into the model.
    """

    adapter: DataPath
    heads_path: DataPath
    calibration_trace: DataPath | None = None


class PromptSpec(Spec):
    """Which prompts are decoded; `path` names a file of the user's own, `source` a known set."""

    source: Literal["mt_bench", "human_eval", "random", "file"]
    path: DataPath | None = None
    per_category: PromptCount | None = None
    limit: PromptCount | None = None


class ChainTree(Spec):
    """A chain of the first `depth` heads: the best token of each and no branches."""

    kind: Literal["chain"]
    depth: HeadCount


class CartesianTree(Spec):
    """All combinations of the top `widths[k]` tokens of head k + 1.

    With `max_nodes` it is the best such tree of at most that many nodes on the calibration trace, or the
    largest where there is no trace.
    """

    kind: Literal["cartesian"]
    widths: Some[Width] | None = None
    max_nodes: NodeCount | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CartesianTree:
        if (self.widths is None) == (self.max_nodes is None):
            raise ValueError("give exactly one of widths, max_nodes")
        return self


class FileTree(Spec):
    """A tree from a JSON file."""

    kind: Literal["file"]
    path: DataPath


class SearchedTree(Spec):
    """The tree grown on the calibration trace to `num_nodes` nodes, root included (paper, Section 2.3.3)."""

    kind: Literal["searched"]
    num_nodes: int = Field(ge=2, le=MAX_TREE_NODES)
    values: Literal["marginals", "joint"] = "joint"


class FastestTree(Spec):
    """The tree with the most calibrated tokens a step over this machine's own step time.

    Step times are measured before the arms run.
    """

    kind: Literal["fastest"]
    max_nodes: int = Field(ge=2, le=MAX_TREE_NODES)


TreeSpec = Annotated[
    ChainTree | CartesianTree | FileTree | SearchedTree | FastestTree, Field(discriminator="kind")
]


class GreedyAcceptance(Spec):
    """Accept a draft token where it is the backbone's argmax; lossless."""

    rule: Literal["greedy"] = "greedy"


class TypicalAcceptance(Spec):
    """Accept x where p(x) > min(epsilon, delta * exp(-H)); lossy (paper, Section 2.3.1)."""

    rule: Literal["typical"]
    temperature: Temperature
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, le=1000)
    root: Literal["sampled", "greedy"] = "sampled"


class RejectionAcceptance(Spec):
    """Rejection sampling with point-mass proposals; lossless in distribution."""

    rule: Literal["rejection"]
    temperature: Temperature


AcceptanceSpec = Annotated[
    GreedyAcceptance | TypicalAcceptance | RejectionAcceptance, Field(discriminator="rule")
]


class ArmSpec(Spec):
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
    num_heads: HeadCount | None = None
    acceptance: AcceptanceSpec | None = None
    temperature: float = Field(default=0.0, ge=0, le=1000)
    seeds: Distinct[Seed] = ()

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


class IntervalSpec(Spec):
    """How intervals are formed: bootstrap over prompts, both arms of a prompt drawn together."""

    level: float = Field(default=0.95, gt=0.5, lt=1)
    num_resamples: int = Field(default=4000, ge=100, le=MAX_RESAMPLES)
    seed: Seed = 20240119


class ProbeSpec(Spec):
    """What is measured apart from the timed generations."""

    step_nodes: SomeDistinct[NodeCount] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    step_context_tokens: TokenCount = 192
    step_repeats: Repeats = 12
    profile_prompts: int = Field(default=2, ge=0, le=MAX_PROMPTS)


class SuiteSpec(DataFile):
    """One suite: model, heads, prompts, arms, and how they are measured."""

    kind: Literal["suite"] = "suite"
    description: str
    reports_speed: bool = True
    max_new_tokens: TextLength
    rounds: Repeats = 1
    warmup_prompts: int = Field(default=1, ge=0, le=MAX_PROMPTS)
    plan_seed: Seed = 1
    engine: Literal["auto", "eager", "packed"] = "auto"
    calibration_trace: DataPath | None = None
    model: ModelSpec
    heads: HeadsSpec = HeadsSpec()
    tuned: TunedSpec | None = None
    prompts: PromptSpec
    interval: IntervalSpec = IntervalSpec()
    disturbance: DisturbanceRule | None = None  # runs take the default; records without one are older
    probes: ProbeSpec = ProbeSpec()
    arms: Some[ArmSpec]
    headline_arm: str | None = None  # the greedy Medusa arm on the original backbone that a run is told by

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
        if self.headline_arm is not None and self.headline_arm not in self.greedy_arms:
            raise ValueError(f"headline_arm must be one of {', '.join(self.greedy_arms) or 'no arm here'}")
        return self

    @model_validator(mode="after")
    def _has_heads(self) -> SuiteSpec:
        if self.heads.absent and self.drafts:
            raise ValueError("a medusa arm needs [heads]: give exactly one of asset, path, train_steps")
        return self

    @property
    def greedy_arms(self) -> tuple[str, ...]:
        """The arms that draft, keep the backbone's own choice and decode with the original backbone."""
        drafting = [arm for arm in self.arms if arm.method == "medusa" and arm.backbone == "original"]
        return tuple(arm.name for arm in drafting if is_deterministic(arm))

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
        """Return the arm of that name.

        Raises: UserError where there is none.
        """
        if (found := next((arm for arm in self.arms if arm.name == name), None)) is not None:
            return found
        need = f"one of {', '.join(arm.name for arm in self.arms)}"
        raise UserError(found=f"arm {name!r}", need=need, where=f"suite {self.name!r}")


def load_suite(path: Path) -> SuiteSpec:
    """Return the suite in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, SuiteSpec, noun="a suite", kind="suite")


def parse_suite(text: str, *, where: str) -> SuiteSpec:
    """Return the suite that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, SuiteSpec, noun="a suite", where=where)


def is_deterministic(arm: ArmSpec) -> bool:
    """Return whether the arm decodes greedily, so that its text must be its baseline's."""
    return not arm.stochastic and arm.sampling_temperature == 0
