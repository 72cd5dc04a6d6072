"""What judging a record yields: metrics, comparisons, check outcomes, verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

from harness.files import Frozen
from harness.stats import FigureKind, Interval

# Steps grow with the text, and prompt lookup's are of many widths: so much the two estimates of a speedup lie
# apart in committed records without disturbance (0.96 to 1.02 for trees on CPUs).
MAX_MEDIANS_APART = 0.1


class CategoryMetrics(Frozen):
    """One arm on one prompt category."""

    category: str
    num_prompts: int
    acceleration_rate: float
    speedup: float | None


class ArmMetrics(Frozen):
    """One arm over all its generations: counts first, ratios formed once from totals.

    Units: `_s` seconds, `_per_s` a second, `_bytes` bytes. Speed figures are None where the suite reports no
    speed. `step_cost` is the backbone step at this arm's nodes over one node, from separately timed steps.
    `bandwidth_share` is bytes of weights (plus heads) read a step over the measured read bandwidth, as a
    share of step time.
    """

    arm: str
    method: str
    num_generations: int
    num_failures: int
    num_prompts: int
    num_nodes: int
    tokens: int
    steps: int
    acceleration_rate: Interval
    tokens_per_s: Interval | None
    wall_tokens_per_s: float | None
    first_token_s: float | None
    step_p50_s: float | None
    step_p95_s: float | None
    step_cost: float | None
    bandwidth_share: float | None
    peak_memory_bytes: int | None
    cache_bytes: int | None
    replayed_tokens_per_step: float | None
    calibrated_tokens_per_step: float | None
    categories: tuple[CategoryMetrics, ...]
    diagnosis: str


class Comparison(Frozen):
    """An arm against its baseline, paired by prompt.

    `speedup` is tokens/s over tokens/s from totals on the decode clock, `wall_speedup` the same with the
    prefill, as the authors' script times it. `overhead` is mean step latency over mean step latency, and
    `separate_overhead` the same from separately timed steps. `speedup_by_medians` takes each arm's median
    step in place of its mean, so that a few long steps do not move it. `identity_gap` is how far the speedup
    lies from acceleration rate over overhead, which it equals by definition.
    """

    arm: str
    baseline: str
    speedup: Interval
    wall_speedup: Interval
    overhead: Interval
    separate_overhead: float | None
    identity_gap: float
    speedup_by_medians: float

    @property
    def estimates_agree(self) -> bool:
        """Return whether the speedup by medians lies as near to the speedup as on a quiet machine."""
        return abs(self.speedup_by_medians / self.speedup.estimate - 1) <= MAX_MEDIANS_APART


class CheckStatus(StrEnum):
    """How a validity check came out."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class CheckOutcome(Frozen):
    """One named validity check on one record: found X, need Y.

    One `of_times` looks at times alone, and where it fails so do speeds alone. The others guard texts, which
    carry tokens/step, replays, parity and likelihoods, and speeds as well.
    """

    name: str
    status: CheckStatus
    found: str
    need: str
    of_times: bool = False


class Divergence(Frozen):
    """The first position where a greedy arm's tokens differ from its reference's, and its class."""

    arm: str
    reference: str
    prompt_key: str
    position: int
    gap: float | None
    kind: Literal["tie", "bug"]


class ParityRounding(Frozen):
    """What parity in half precision was judged by: the run's own measured rounding.

    `tie_margin` is a multiple of `largest_shift`, the most that the top-two gap moved between shapes.
    `share_below` is the share of the traced positions whose gap lies below the margin, so that some other
    token is a tie there; `num_equal_tokens` are those before texts differ. With two backbones the larger
    shift and margin are shown, and each position counts under its own.
    """

    dtype: str
    largest_shift: float
    tie_margin: float
    share_below: float
    num_equal_tokens: int


class ParityReport(Frozen):
    """Greedy parity of all deterministic arms with their references, by prompt key and lengths included.

    `rounding` is None in float32, whose margin is fixed, and where half precision's was not measured: then no
    divergence is judged.
    """

    num_compared: int
    num_tokens: int
    num_identical: int
    divergences: tuple[Divergence, ...]
    rounding: ParityRounding | None = None


FormName = Literal["literal", "transfer", "paper-only", "none"]


class VerdictKind(StrEnum):
    """How a claim's test came out."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_DECIDABLE = "not decidable here"  # the device or the law fixes the outcome before the run
    NOT_TESTED = "not tested"


class ClaimVerdict(Frozen):
    """One claim's verdict with its evidence: our figure, its kind, and the reason.

    Where `decides` is false, it is the verdict of a further form, which is shown and does not count.
    `turns` says with which other values of this project's settings the verdict is another one. `power` says
    what a sample of this size and spread can tell; it is empty where the test is exact. `prompts_needed` says
    how many prompts would decide an inconclusive one, None where that is not known. `is_ours` marks a
    statement of this project about the paper's figures, which does not count either; `is_claim` is false of
    what no result claims: definitions, settings, facts about code, figures of others.
    """

    claim_id: str
    stated: str
    place: str
    paper_figure: str
    form: FormName
    kind: VerdictKind
    ours: str
    figure_kind: FigureKind | None
    reason: str
    turns: tuple[str, ...] = ()
    power: str = ""
    prompts_needed: int | None = None
    decides: bool = True
    is_ours: bool = False
    is_claim: bool = True

    @property
    def counts(self) -> bool:
        """Return whether it is one of the verdicts on the paper's claims, one a claim."""
        return self.decides and not self.is_ours


def by_test(verdicts: Iterable[ClaimVerdict]) -> list[tuple[ClaimVerdict, ...]]:
    """Return verdicts in groups: claims that one test decides together are one, at the place of the first.

    A claim that is not tested stands alone.
    """
    groups: dict[object, list[ClaimVerdict]] = {}
    for one in verdicts:
        test = (one.form, one.kind, one.ours, one.reason, one.decides)
        groups.setdefault(one.claim_id if one.kind is VerdictKind.NOT_TESTED else test, []).append(one)
    return [tuple(group) for group in groups.values()]


class Judgement(Frozen):
    """Everything derived from one record: a pure function of its files."""

    suite: str
    arms: tuple[ArmMetrics, ...]
    comparisons: tuple[Comparison, ...]
    parity: ParityReport
    checks: tuple[CheckOutcome, ...]
    verdicts: tuple[ClaimVerdict, ...]
    reports_speed: bool

    @property
    def failed(self) -> tuple[CheckOutcome, ...]:
        """Return the checks that failed."""
        return tuple(check for check in self.checks if check.status is CheckStatus.FAILED)

    @property
    def valid_texts(self) -> bool:
        """Return whether texts, and what follows from them without a clock, are valid."""
        return all(check.of_times for check in self.failed)

    @property
    def valid_speeds(self) -> bool | None:
        """Return whether times are valid; None where the suite reports no speed."""
        return not self.failed if self.reports_speed else None

    @property
    def valid(self) -> bool:
        """Return whether every figure that the suite asks for is valid."""
        return self.valid_texts and self.valid_speeds is not False

    @property
    def withheld(self) -> str | None:
        """Return why speeds are not shown although the suite asks for them; None where they are."""
        return withheld_by(self.checks)


def withheld_by(checks: Iterable[CheckOutcome]) -> str | None:
    """Return in words which checks of times failed; None where none did."""
    failed = [
        f"{one.name} found {one.found}, and needs {one.need}"
        for one in checks
        if one.status is CheckStatus.FAILED and one.of_times
    ]
    return "; ".join(failed) or None
