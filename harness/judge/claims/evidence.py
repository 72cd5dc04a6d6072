"""What the transfer forms are judged on: a record with its metrics, and per-prompt counts drawn from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.compose.replay import Replay, ReplayIndex
from harness.compose.trees import grow
from harness.errors import UserError
from harness.judge.claims.findings import NotTestable
from harness.judge.judgement import ArmMetrics, Comparison, ParityReport
from harness.judge.totals import paired_totals
from harness.records.run import RunRecord
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.records.trials import Generation
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio_of_ratios, bootstrap_totals
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import GrownTree

Floats = NDArray[np.float64]
EQUIVALENCE_LEVEL = 0.9  # two one-sided tests at 5 %


@dataclass(frozen=True)
class Evidence:
    """One record and what was derived from it.

    `calibration` is the trace that its trees were grown on, where there is one.
    """

    record: RunRecord
    arms: tuple[ArmMetrics, ...]
    comparisons: tuple[Comparison, ...]
    parity: ParityReport
    calibration: Trace | None = None

    def comparison(self, arm: str) -> Comparison:
        """Return the comparison of an arm with its baseline.

        Raises: NotTestable if the arm was not run or the suite reports no speed.
        """
        self.require_speed()
        self.require_original(arm)
        found = next((comparison for comparison in self.comparisons if comparison.arm == arm), None)
        if found is None:
            raise NotTestable(f"the record compares no arm {arm} with a baseline")
        return found

    def require_speed(self) -> None:
        """Refuse a speed from a suite that reports none."""
        if not self.record.reports_speed:
            raise NotTestable(self.record.why_no_speed)

    def require_original(self, arm: str) -> None:
        """Refuse an arm on the tuned backbone: the claims that a run decides are about a frozen one."""
        if any(spec.name == arm and spec.backbone != "original" for spec in self.record.suite.arms):
            raise NotTestable(f"arm {arm} decodes with the tuned backbone, the claim is about the original")

    def tree(self, arm: str) -> DraftTree:
        """Return the tree that an arm decoded with."""
        self.generations(arm)
        trees = self.record.trees
        if arm not in trees:
            raise NotTestable(f"the record has no tree of arm {arm}")
        return trees[arm].tree()

    def trace(self) -> Trace:
        """Return the trace of the record's greedy vanilla generations."""
        if self.record.trace is None:
            raise NotTestable("the record has no trace")
        return self.record.trace

    def generations(self, arm: str) -> tuple[Generation, ...]:
        """Return an arm's generations."""
        self.require_original(arm)
        found = tuple(generation for generation in self.record.generations if generation.trial.arm == arm)
        if not found:
            raise NotTestable(f"the record has no generation of arm {arm}")
        return found


@dataclass(frozen=True)
class PairedCounts:
    """Two arms' decoded tokens, steps and seconds over the prompts that both have.

    Shapes: [prompts] each, the first arm first.
    """

    tokens: tuple[Floats, Floats]
    steps: tuple[Floats, Floats]
    seconds: tuple[Floats, Floats]


def paired_counts(evidence: Evidence, arm: str, *, over: str, timed: bool) -> PairedCounts:
    """Return two arms' counts by prompt; `timed` leaves out generations whose timing is invalid.

    Raises: NotTestable if they share no prompt on which both took a step.
    """
    for name in (arm, over):
        evidence.require_original(name)
    pairs = list(zip(*paired_totals(evidence.record, arm, baseline=over, timed=timed), strict=True))
    pairs = [pair for pair in pairs if all(side.steps for side in pair)]
    if not pairs:
        raise NotTestable(f"arms {arm} and {over} share no {'timed ' if timed else ''}generation")

    def columns(name: str) -> tuple[Floats, Floats]:
        first, second = (
            np.array([getattr(pair[side], name) for pair in pairs], dtype=np.float64) for side in (0, 1)
        )
        return first, second

    return PairedCounts(tokens=columns("decode_tokens"), steps=columns("steps"), seconds=columns("decode_s"))


@dataclass(frozen=True)
class SearchSplit:
    """Text to grow trees on and other text to judge them on."""

    growth: Trace
    held_out: Trace
    origin: str

    def grow(
        self,
        num_nodes: int,
        *,
        max_rank: int,
        max_depth: int | None = None,
        values: Literal["joint", "marginals"] = "joint",
    ) -> GrownTree:
        """Return the best trees up to `num_nodes` nodes on the text for growth, as `compose` grows them."""
        try:
            return grow(
                self.growth, num_nodes=num_nodes, values=values, max_rank=max_rank, max_depth=max_depth
            )
        except UserError as error:
            raise NotTestable(f"no tree of {num_nodes} nodes can be grown ({error})") from error


def search_split(evidence: Evidence) -> SearchSplit:
    """Return text to grow trees on, and other text to judge them on.

    Trees grow on the calibration trace where there is one, else on every other prompt of the record's own
    trace.
    Raises: NotTestable without a trace, with a calibration of other heads, or with too few prompts to halve.
    """
    trace = evidence.trace()
    if evidence.calibration is not None:
        if evidence.calibration.provenance.heads_hash != trace.provenance.heads_hash:
            raise NotTestable("the calibration trace is of other heads than the record's")
        return SearchSplit(
            growth=evidence.calibration, held_out=trace, origin="trees grown on calibration text"
        )
    growth, held_out = halves(trace.provenance, trace.prompts)
    return SearchSplit(
        growth=growth, held_out=held_out, origin="trees grown on every other prompt, judged on the rest"
    )


def halves(provenance: TraceProvenance, prompts: Sequence[PromptTrace]) -> tuple[Trace, Trace]:
    """Return every other prompt as one trace and the rest as another.

    Raises: NotTestable with fewer than four prompts.
    """
    if len(prompts) < 4:
        raise NotTestable(
            f"{len(prompts)} prompts are too few to grow a tree on one half and judge it on the other"
        )
    first, second = (Trace(provenance=provenance, prompts=tuple(prompts[start::2])) for start in (0, 1))
    return first, second


def replays(trace: Trace, trees: Iterable[DraftTree]) -> list[Replay]:
    """Return the replays of several trees over one trace.

    Raises: NotTestable if a tree is deeper than the traced heads.
    """
    index = ReplayIndex(trace)
    try:
        return [index.replay(tree) for tree in trees]
    except UserError as error:
        raise NotTestable(f"a tree cannot be replayed ({error})") from error


def replay_counts(replay: Replay) -> tuple[Floats, Floats]:
    """Return a replay's decoded tokens and steps by prompt."""
    return (replay.num_kept_tokens - 1).astype(np.float64), replay.num_steps.astype(np.float64)


def ratio_of_rates(
    rate: tuple[Floats, Floats], *, over: tuple[Floats, Floats], spec: IntervalSpec
) -> Interval:
    """Return one rate over another with its interval.

    Each is formed from totals (numerator, denominator) of the same prompts.
    """
    rng = np.random.default_rng(spec.seed)
    return bootstrap_ratio_of_ratios(
        rate[0], rate[1], base_numerator=over[0], base_denominator=over[1], spec=spec, rng=rng
    )


def relative_gain(
    rate: tuple[Floats, Floats], *, over: tuple[Floats, Floats], spec: IntervalSpec, scale: float = 1.0
) -> Interval:
    """Return scale x rate / other rate - 1 with its 90 % interval, as an equivalence test takes it."""
    return bootstrap_totals(
        lambda a, b, c, d: scale * (a / b) / (c / d) - 1,
        *rate,
        *over,
        spec=spec.model_copy(update={"level": EQUIVALENCE_LEVEL}),
        rng=np.random.default_rng(spec.seed),
    )
