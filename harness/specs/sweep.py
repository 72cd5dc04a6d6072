"""What a sweep looks at, as data: validated, frozen models of what `suites/sweeps/*.toml` may say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.files import DataFile, DataPath, Frozen, parse_toml, read_toml
from harness.specs.latency import Counts, LatencyHeads
from harness.specs.suite import IntervalSpec

MAX_NODES = 256  # the widest tree of Fig. 4
Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_NODES)], ...], Field(min_length=1)]
Widths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Temperature = Annotated[float, Field(gt=0)]
SampledRule = Literal["greedy", "vanilla", "typical", "rejection"]
PredictedDtype = Literal["float16", "bfloat16"]


class ChainTrees(Frozen):
    """Chains: the best token of each of the first heads and no branches."""

    kind: Literal["chain"]
    depths: Counts


class CartesianTrees(Frozen):
    """Cartesian trees of these s-vectors, and the best one for each of `max_nodes`.

    Best is the one with the most tokens/step on the calibration trace.
    """

    kind: Literal["cartesian"]
    widths: tuple[Widths, ...] = ()
    max_nodes: tuple[Annotated[int, Field(ge=2, le=MAX_NODES)], ...] = ()

    @model_validator(mode="after")
    def _says_something(self) -> CartesianTrees:
        if not self.widths and not self.max_nodes:
            raise ValueError("give widths, max_nodes or both")
        return self


class RandomDenseTrees(Frozen):
    """Dense trees drawn at random, the control of Fig. 4: `draws` of each size and each number of heads."""

    kind: Literal["random_dense"]
    num_nodes: Annotated[tuple[Annotated[int, Field(ge=3, le=MAX_NODES)], ...], Field(min_length=1)]
    draws: int = Field(default=1, ge=1)
    seed: int


class GrownTrees(Frozen):
    """Trees grown on the calibration trace.

    By head accuracies (`marginals`, the paper's way), by hits of whole paths (`joint`), or both.
    """

    kind: Literal["grown"]
    num_nodes: Sizes
    values: Annotated[tuple[Literal["marginals", "joint"], ...], Field(min_length=1)] = ("marginals", "joint")


TreeFamily = Annotated[
    ChainTrees | CartesianTrees | RandomDenseTrees | GrownTrees, Field(discriminator="kind")
]


class CostAwareSearch(Frozen):
    """The search for each device's own tree, of at most `max_nodes` nodes, on the calibration trace."""

    max_nodes: int = Field(default=MAX_NODES, ge=1, le=MAX_NODES)


class MeasuredDevices(Frozen):
    """Which latency records supply measured curves, and in which dtypes.

    All sealed records, or those of the named specs.
    """

    records: Literal["all"] | tuple[str, ...] = "all"
    dtypes: tuple[str, ...] = ()


class PredictedDevices(Frozen):
    """Which devices of `hardware.toml` carry which published shapes, as the roofline predicts.

    `heads` is the form of the draft heads.
    """

    devices: Literal["all"] | tuple[str, ...] = "all"
    shapes: Annotated[tuple[str, ...], Field(min_length=1)]
    dtypes: Annotated[tuple[PredictedDtype, ...], Field(min_length=1)] = ("float16",)
    heads: LatencyHeads = LatencyHeads()


class SampledSetting(Frozen):
    """One way to decode whose text a replay cannot give: a rule at a temperature."""

    rule: SampledRule = Field(
        description="rule of acceptance; for comparison greedy, at temperature 0, and vanilla, without a tree"
    )
    temperature: float = Field(default=0.0, ge=0, description="what logits are divided by; 0 is greedy")
    epsilon: float | None = Field(
        default=None, gt=0, lt=1, description="hard threshold of typical acceptance, a probability"
    )
    delta: float | None = Field(
        default=None, gt=0, description="factor of typical acceptance's threshold delta * exp(-entropy)"
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


class TypicalGrid(Frozen):
    """Thresholds of typical acceptance, of which every combination is run.

    With `deltas` "sqrt" delta is the square root of epsilon, as in Fig. 5.
    """

    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)]
    epsilons: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
    deltas: (
        Literal["sqrt"] | Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
    ) = "sqrt"

    @property
    def settings(self) -> tuple[SampledSetting, ...]:
        """The product, temperatures outermost."""
        return tuple(
            SampledSetting(rule="typical", temperature=temperature, epsilon=epsilon, delta=delta)
            for temperature in self.temperatures
            for epsilon in self.epsilons
            for delta in ((math.sqrt(epsilon),) if self.deltas == "sqrt" else self.deltas)
        )


class SampledPoints(Frozen):
    """Points that change the text and so are run: which tree, which prompts of the suite, which settings.

    `vanilla` and `rejection` are temperatures. Of the suite's prompts those of `categories` (empty means all)
    are taken, at most `num_prompts`. Texts are cut at `max_new_tokens`; each is drawn once a seed.
    """

    tree_nodes: int = Field(ge=2, le=MAX_NODES)
    categories: tuple[str, ...] = ()
    num_prompts: int = Field(ge=1)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    max_new_tokens: int = Field(ge=2)
    greedy: bool = True
    vanilla: tuple[Temperature, ...] = ()
    rejection: tuple[Temperature, ...] = ()
    typical: tuple[TypicalGrid, ...] = ()

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


class DecodedChecks(Frozen):
    """Greedy points, drawn by seed, that are decoded for real.

    Steps are compared with the replay, speedup with the composition.
    """

    num_points: int = Field(default=12, ge=1)
    seed: int
    num_prompts: int = Field(ge=2)


class ClusterSpec(Frozen):
    """What every run cell asks of a Ray cluster; another executor reads none of it.

    `accelerator_types` are names as Ray spells them, such as "A100"; empty means any node, and a cluster
    whose nodes are alike. Sampled settings run on some of the types, decoded points on each. `num_gpus` and
    `num_cpus` are those of one cell, 0 GPUs for CPU nodes. A cell whose worker or node is lost is run again
    at most `max_retries` times. `latency` names a latency spec: a type whose device has no sealed record of
    it is measured first, so that the sweep composes with it.
    """

    accelerator_types: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    num_gpus: float = Field(default=1, ge=0)
    num_cpus: int = Field(default=1, ge=1)
    max_retries: int = Field(default=3, ge=0)
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
    num_heads: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    trees: Annotated[tuple[TreeFamily, ...], Field(min_length=1)]
    search: CostAwareSearch = CostAwareSearch()
    contexts: Annotated[tuple[Literal["trace"] | Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        "trace",
    )
    batches: Counts = (1,)
    break_even_batches: Counts = (1, 2, 4, 8, 16, 32, 64)
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
