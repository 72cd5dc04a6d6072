"""What a sweep looks at, as data: validated, frozen models of what `suites/sweeps/*.toml` may say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.files import DataFile, DataPath, parse_toml, read_toml
from harness.specs.bounds import (
    MAX_PROMPTS,
    Distinct,
    HeadCount,
    Many,
    PromptCount,
    Seed,
    Some,
    SomeDistinct,
    Spec,
    Temperature,
    TextLength,
    TokenCount,
)
from harness.specs.latency import BatchSizes, HeadsForm
from harness.specs.suite import IntervalSpec

MAX_NODES = 256  # the widest tree of Fig. 4
MAX_SAMPLED = 100_000  # settings times seeds: days of decoding
Sizes = SomeDistinct[Annotated[int, Field(ge=1, le=MAX_NODES)]]
Widths = Some[Annotated[int, Field(ge=1, le=MAX_NODES)]]
Thresholds = SomeDistinct[Annotated[float, Field(gt=0, lt=1)]]
SampledRule = Literal["greedy", "vanilla", "typical", "rejection"]
PredictedDtype = Literal["float16", "bfloat16"]


class ChainTrees(Spec):
    """Chains: the best token of each of the first heads and no branches."""

    kind: Literal["chain"]
    depths: SomeDistinct[HeadCount]


class CartesianTrees(Spec):
    """Cartesian trees of these s-vectors, and the best one for each of `max_nodes`.

    Best is the one with the most tokens/step on the calibration trace.
    """

    kind: Literal["cartesian"]
    widths: Many[Widths] = ()
    max_nodes: Distinct[Annotated[int, Field(ge=2, le=MAX_NODES)]] = ()

    @model_validator(mode="after")
    def _says_something(self) -> CartesianTrees:
        if not self.widths and not self.max_nodes:
            raise ValueError("give widths, max_nodes or both")
        return self


class RandomDenseTrees(Spec):
    """Dense trees drawn at random, the control of Fig. 4: `draws` of each size and each number of heads."""

    kind: Literal["random_dense"]
    num_nodes: SomeDistinct[Annotated[int, Field(ge=3, le=MAX_NODES)]]
    draws: int = Field(default=1, ge=1, le=1000)
    seed: Seed


class GrownTrees(Spec):
    """Trees grown on the calibration trace.

    By head accuracies (`marginals`, the paper's way), by hits of whole paths (`joint`), or both.
    """

    kind: Literal["grown"]
    num_nodes: Sizes
    values: SomeDistinct[Literal["marginals", "joint"]] = ("marginals", "joint")


TreeFamily = Annotated[
    ChainTrees | CartesianTrees | RandomDenseTrees | GrownTrees, Field(discriminator="kind")
]


class CostAwareSearch(Spec):
    """The search for each device's own tree, of at most `max_nodes` nodes, on the calibration trace."""

    max_nodes: int = Field(default=MAX_NODES, ge=1, le=MAX_NODES)


class MeasuredDevices(Spec):
    """Which latency records supply measured curves, and in which dtypes.

    All sealed records, or those of the named specs.
    """

    records: Literal["all"] | Some[str] = "all"
    dtypes: Distinct[str] = ()


class PredictedDevices(Spec):
    """Which devices of `hardware.toml` carry which published shapes, as the roofline predicts.

    `heads` is the form of the draft heads.
    """

    devices: Literal["all"] | Some[str] = "all"
    shapes: SomeDistinct[str]
    dtypes: SomeDistinct[PredictedDtype] = ("float16",)
    heads: HeadsForm = HeadsForm()


class SampledSetting(Spec):
    """One way to decode whose text a replay cannot give: a rule at a temperature."""

    rule: SampledRule = Field(
        description="rule of acceptance; for comparison greedy, at temperature 0, and vanilla, without a tree"
    )
    temperature: float = Field(
        default=0.0, ge=0, le=1000, description="what logits are divided by; 0 is greedy"
    )
    epsilon: float | None = Field(
        default=None, gt=0, lt=1, description="hard threshold of typical acceptance, a probability"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="factor of typical acceptance's threshold delta * exp(-entropy)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SampledSetting:
        if (self.rule == "typical") != (self.epsilon is not None and self.delta is not None):
            raise ValueError("typical acceptance, and no other rule, has epsilon and delta")
        if (self.rule == "greedy") == (self.temperature > 0):
            raise ValueError("greedy is at temperature 0, every other setting above it")
        return self

    @property
    def words(self) -> str:
        """The setting in one line, such as `typical, T 0.7, epsilon 0.09, delta 0.3`."""
        thresholds = (
            f", epsilon {self.epsilon:g}, delta {self.delta:.3g}"
            if self.epsilon is not None and self.delta is not None
            else ""
        )
        return f"{self.rule}, T {self.temperature:g}{thresholds}"


class TypicalGrid(Spec):
    """Thresholds of typical acceptance, of which every combination is run.

    With `deltas` "sqrt" delta is the square root of epsilon, as in Fig. 5.
    """

    temperatures: SomeDistinct[Temperature]
    epsilons: Thresholds
    deltas: Literal["sqrt"] | Thresholds = "sqrt"

    @property
    def settings(self) -> tuple[SampledSetting, ...]:
        """The product, temperatures outermost."""
        return tuple(
            SampledSetting(rule="typical", temperature=temperature, epsilon=epsilon, delta=delta)
            for temperature in self.temperatures
            for epsilon in self.epsilons
            for delta in ((math.sqrt(epsilon),) if self.deltas == "sqrt" else self.deltas)
        )


class SampledPoints(Spec):
    """Points that change the text and so are run: which tree, which prompts of the suite, which settings.

    `vanilla` and `rejection` are temperatures. Of the suite's prompts those of `categories` (empty means all)
    are taken, at most `num_prompts`. Texts are cut at `max_new_tokens`; each is drawn once a seed.
    """

    tree_nodes: int = Field(ge=2, le=MAX_NODES)
    categories: Distinct[str] = ()
    num_prompts: PromptCount
    seeds: SomeDistinct[Seed]
    max_new_tokens: TextLength
    greedy: bool = True
    vanilla: Distinct[Temperature] = ()
    rejection: Distinct[Temperature] = ()
    typical: Annotated[tuple[TypicalGrid, ...], Field(max_length=100)] = ()

    @model_validator(mode="after")
    def _ends(self) -> SampledPoints:
        grids = (
            len(grid.temperatures) * len(grid.epsilons) * (1 if grid.deltas == "sqrt" else len(grid.deltas))
            for grid in self.typical
        )
        num_settings = len(self.vanilla) + len(self.rejection) + sum(grids)
        if num_settings * len(self.seeds) > MAX_SAMPLED:
            raise ValueError(
                f"{num_settings:,} settings with {len(self.seeds):,} seeds, need at most {MAX_SAMPLED:,} runs"
            )
        return self

    @property
    def settings(self) -> tuple[SampledSetting, ...]:
        """Every setting once, in the order in which they run."""
        wanted = [SampledSetting(rule="greedy")] if self.greedy else []
        wanted += [SampledSetting(rule="vanilla", temperature=temperature) for temperature in self.vanilla]
        wanted += [
            SampledSetting(rule="rejection", temperature=temperature) for temperature in self.rejection
        ]
        wanted += [setting for grid in self.typical for setting in grid.settings]
        return tuple(dict.fromkeys(wanted))


class DecodedChecks(Spec):
    """Greedy points, drawn by seed, that are decoded for real.

    Steps are compared with the replay, speedup with the composition.
    """

    num_points: int = Field(default=12, ge=1, le=10_000)
    seed: Seed
    num_prompts: int = Field(ge=2, le=MAX_PROMPTS)


class ClusterSpec(Spec):
    """What every run cell asks of a Ray cluster; another executor reads none of it.

    `accelerator_types` are names as Ray spells them, such as "A100"; empty means any node, and a cluster
    whose nodes are alike. Sampled settings run on some of the types, decoded points on each. `num_gpus` and
    `num_cpus` are those of one cell, 0 GPUs for CPU nodes. A cell whose worker or node is lost is run again
    at most `max_retries` times. `latency` names a latency spec: a type whose device has no sealed record of
    it is measured first, so that the sweep composes with it.
    """

    accelerator_types: Many[Annotated[str, Field(min_length=1)]] = ()
    num_gpus: float = Field(default=1, ge=0, le=1024)
    num_cpus: int = Field(default=1, ge=1, le=65_536)
    max_retries: int = Field(default=3, ge=0, le=1000)
    latency: DataPath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ClusterSpec:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError("num_gpus is a share of one GPU or a whole number of them")
        if len(set(self.accelerator_types)) < len(self.accelerator_types):
            raise ValueError("accelerator_types must be distinct")
        return self


class SweepSpec(DataFile):
    """A sweep: one trace, trees grown on another, curves of devices, and points that are run.

    `trace` is replayed; `calibration_trace` is what trees are grown and chosen on. `shape` is the published
    shape of the trace's model. `suite` names the suite file whose model, heads and prompts the run points
    take. `contexts` gives "trace" (each step at the length that its text had) or lengths at which every step
    is priced instead. `break_even_batches` are tried with each device's own tree. `cluster` is for the
    executor `ray`.
    """

    kind: Literal["sweep"] = "sweep"
    description: str
    suite: DataPath
    shape: str
    trace: DataPath
    calibration_trace: DataPath
    num_heads: SomeDistinct[HeadCount]
    trees: Some[TreeFamily]
    search: CostAwareSearch = CostAwareSearch()
    contexts: SomeDistinct[Literal["trace"] | TokenCount] = ("trace",)
    batches: BatchSizes = (1,)
    break_even_batches: BatchSizes = (1, 2, 4, 8, 16, 32, 64)
    measured: MeasuredDevices | None = None
    predicted: PredictedDevices | None = None
    sampled: SampledPoints | None = None
    decoded: DecodedChecks | None = None
    cluster: ClusterSpec | None = None
    interval: IntervalSpec = IntervalSpec(num_resamples=1000)

    @model_validator(mode="after")
    def _has_devices(self) -> SweepSpec:
        if self.measured is None and self.predicted is None:
            raise ValueError(
                "give measured, predicted or both: a sweep composes with some device's step times"
            )
        if self.break_even_batches[0] != 1 or list(self.break_even_batches) != sorted(
            set(self.break_even_batches)
        ):
            raise ValueError("break_even_batches must rise from 1")
        if self.cluster is not None and self.cluster.latency is not None and self.measured is None:
            raise ValueError(
                "cluster.latency measures step times: give measured, so that the sweep composes with them"
            )
        return self


def load_sweep(path: Path) -> SweepSpec:
    """Return the sweep in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, SweepSpec, noun="a sweep", kind="sweep")


def parse_sweep(text: str, *, where: str) -> SweepSpec:
    """Return the sweep that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, SweepSpec, noun="a sweep", where=where)
