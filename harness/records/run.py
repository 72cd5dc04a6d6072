"""What a run leaves on disk: versioned, validated records; everything after them is a function of them.

A record folder holds `suite.toml`, `environment.json`, `trees.json`, `generations.jsonl` (appended line by
line), what is measured apart from the trials (`step_costs.json`, `profile.json`, `device_limits.json`,
`heads_control.json`, in half precision `rounding.json`), `trace.npz`, and, last, `manifest.json`, which seals
it with the SHA-256 of every other file. What a suite's tuned backbone has of its own has `-tuned` in its name
(`file_of`). No clock, device or torch is needed to read one.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from harness.files import Frozen
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder, file_of
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.store import LineFile, StoreKind
from harness.records.trace import Trace
from harness.specs.suite import BackboneName, SuiteSpec, parse_suite
from harness.versions import VERSION, Versioned, read_versioned_lines
from medusa_impl.tree import DraftTree

CALIBRATION_FILE, TRACE_FILE = "calibration.npz", "trace.npz"
HEADS_CONTROL_FILE, ROUNDING_FILE = "heads_control.json", "rounding.json"

TIE_MARGIN_FLOAT32 = 5e-4  # rounding moved top-two gaps by at most 8e-5 in trials
# Both runs may shift, each by up to the largest, from the pass whose gap classes them; and a few hundred
# positions miss the rarest shift.
TIE_SHIFTS = 2.0


class TrialKey(Frozen):
    """One arm on one prompt in one round with one seed: the unit that is run once."""

    arm: str = Field(description="name that the suite gives the arm")
    prompt_key: str = Field(description="prompt, such as mt_bench-81; pairs the arms")
    round: int = Field(description="which pass over all arms and prompts, from 0")
    seed: int | None = Field(default=None, description="seed of the draws; null where nothing is drawn")


class Generation(Versioned):
    """One finished trial: raw token ids, raw counts and times of its steps."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["generation"] = Field(default="generation", description="tells it from a failure")
    trial: TrialKey = Field(description="what was run")
    order: int = Field(description="index in the order in which the run takes its trials, from 0")
    attempt: int = Field(default=0, description="0 for the first try, one more for each repeat")
    category: str | None = Field(description="category of the prompt; null where it has none")
    prompt_tokens: int = Field(description="number of tokens of the prompt")
    token_ids: tuple[int, ...] = Field(
        description="ids of the kept tokens y_1..y_n, cut after the end of sequence or at the budget"
    )
    ended_by: Literal["eos", "budget"] = Field(description="end of sequence, or the budget of tokens")
    step_tokens: tuple[int, ...] = Field(
        description="kept tokens of each decoding step; their sum is n - 1, since the prefill yields y_1"
    )
    step_times_s: tuple[float, ...] = Field(description="seconds of each decoding step, as in step_tokens")
    prefill_s: float = Field(description="seconds until y_1 is on the host; then the decode clock starts")
    timing_valid: bool = Field(default=True, description="false where a kill cut its block of trials")
    peak_memory_bytes: int | None = Field(
        default=None, description="most bytes allocated during the trial (on a CPU: resident in memory)"
    )
    cache_bytes: int | None = Field(default=None, description="bytes of the key-value cache")
    load_average: float | None = Field(default=None, description="one-minute load average at its end")

    @property
    def num_tokens(self) -> int:
        """Return the number of kept tokens, y_1 included."""
        return len(self.token_ids)

    @property
    def num_steps(self) -> int:
        """Return the number of decoding steps after the prefill."""
        return len(self.step_tokens)

    @property
    def decode_s(self) -> float:
        """Return the seconds on the decode clock."""
        return sum(self.step_times_s)

    @property
    def wall_s(self) -> float:
        """Return the seconds with the prefill."""
        return self.prefill_s + self.decode_s


class Failure(Versioned):
    """A trial that raised: no metric, never a data point."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["failure"] = Field(default="failure", description="tells it from a generation")
    trial: TrialKey = Field(description="what was run")
    order: int = Field(description="index in the order in which the run takes its trials, from 0")
    attempt: int = Field(default=0, description="0 for the first try, one more for each repeat")
    error_type: str = Field(description="class of the exception")
    message: str = Field(description="what the exception said, without paths, at most 500 characters")


TrialOutcome = Annotated[Generation | Failure, Field(discriminator="kind")]
_OUTCOME: TypeAdapter[Generation | Failure] = TypeAdapter(TrialOutcome)


class StepCost(Versioned):
    """Separately timed steps of one shape."""

    arm: str | None = Field(default=None, description="arm whose steps they are; null for a shape alone")
    prompt_key: str | None = Field(
        default=None,
        description="prompt whose block the steps follow; null for a shape alone, and in older records",
    )
    num_nodes: int = Field(description="nodes of the tree, root included; 1 is vanilla")
    num_heads: int = Field(description="draft heads that the tree reads")
    context_tokens: int = Field(description="tokens in the cache before the steps")
    backbone_s: tuple[float, ...] = Field(description="seconds of the backbone in each step")
    step_s: tuple[float, ...] = Field(
        default=(),
        description="seconds of each whole step, with heads, candidates, acceptance and compaction; empty "
        "where only the backbone was timed",
    )


class StepCosts(Versioned):
    """All separately timed steps of a run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    costs: tuple[StepCost, ...] = Field(description="one entry a shape; shapes were timed in turn")


class ProfileRow(Frozen):
    """Where one arm's step time goes, in a profiling run apart from the timed ones."""

    arm: str = Field(description="name that the suite gives the arm")
    num_steps: int = Field(description="decoding steps that were timed")
    step_s: float = Field(description="seconds of all steps together")
    backbone_s: float = Field(description="seconds in calls of the backbone, over all steps")
    heads_s: float = Field(description="seconds in calls of the draft heads, over all steps")
    candidates_s: float = Field(description="seconds for candidates, positions and mask, over all steps")
    acceptance_s: float = Field(description="seconds for acceptance, over all steps")
    cache_s: float = Field(description="seconds for compaction of the cache, over all steps")

    @property
    def own_code_share(self) -> float:
        """Return 1 - (backbone + heads) / step: what our own code costs."""
        return 1 - (self.backbone_s + self.heads_s) / self.step_s


class Profile(Versioned):
    """The profiling run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    rows: tuple[ProfileRow, ...] = Field(description="one entry an arm")


class DeviceLimits(Versioned):
    """What this device can do, measured in the same run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    read_bandwidth_bytes_per_s: float = Field(description="bytes read a second, the best of several repeats")
    matmul_flop_per_s: float = Field(
        description="floating-point operations of a matrix product a second, the best of several repeats"
    )
    method: str = Field(description="sizes and repeats of the two measurements, in words")


class HeadsControl(Versioned):
    """Trained heads against useless ones on held-out text, before any timing is kept."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    num_positions: int = Field(description="positions at which the first head was read")
    trained_top1: tuple[float, ...] = Field(
        description="share of positions, one entry a head, at which the trained head's best token is right"
    )
    random_top1: tuple[float, ...] = Field(description="the same share, of heads with random weights")
    identity_top1: tuple[float, ...] = Field(description="the same share, of heads before any training")


class ShapeShift(Frozen):
    """How far steps of one shape move a figure from what the trace's pass gives at the same positions.

    A position's value is the largest of the nodes that hold it, or of the heads read there.
    """

    arms: tuple[str, ...] = Field(description="arms that decode in steps of this shape")
    num_nodes: int = Field(description="tokens of a step: nodes of the tree, root included")
    num_positions: int = Field(description="positions that were compared")
    p50: float = Field(description="median of the absolute differences of logits")
    p90: float = Field(description="90th percentile of the absolute differences of logits")
    p99: float = Field(description="99th percentile of the absolute differences of logits")
    largest: float = Field(description="largest of the absolute differences of logits")


class Rounding(Versioned):
    """How far this dtype's rounding moves logits between the shapes in which a run computes one position."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    dtype: str = Field(description="dtype of the steps, such as bfloat16")
    num_texts: int = Field(description="texts that were compared, of no benchmark prompt")
    num_candidates: int = Field(description="ranks of a head that were compared: those a tree may name")
    gaps: tuple[ShapeShift, ...] = Field(
        min_length=1,
        description="shifts of the difference of the two tokens that the trace's pass finds best; also with "
        "generate of transformers, where an arm uses it",
    )
    heads: tuple[ShapeShift, ...] = Field(
        description="shifts of the difference of any two of a draft head's best candidates"
    )

    @property
    def largest_gap_shift(self) -> float:
        """Return the largest shift of a gap in any shape."""
        return max(shape.largest for shape in self.gaps)

    @property
    def largest_head_shift(self) -> float:
        """Return the largest shift of a head in any shape; 0 where no arm reads a head."""
        return max((shape.largest for shape in self.heads), default=0.0)


class ArmTree(Versioned):
    """The tree an arm decoded with, and where it came from."""

    paths: tuple[tuple[int, ...], ...] = Field(
        description="each node's ranks from the root on, counted from 0; the root is the empty path"
    )
    origin: str = Field(description="how the tree was chosen, in words")
    predicted_tokens_per_step: float | None = Field(
        default=None, description="tokens a step in a replay of the calibration trace; null without one"
    )

    def tree(self) -> DraftTree:
        """Return the validated tree."""
        return DraftTree.from_paths(self.paths)


class ArmTrees(Versioned):
    """The resolved trees of a run's Medusa arms."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    trees: dict[str, ArmTree] = Field(description="each arm's tree, by the arm's name")


class Likelihood(Frozen):
    """How likely the original backbone finds one sampled generation, at temperature 1."""

    trial: TrialKey = Field(description="the trial that was scored")
    mean_log_likelihood: float = Field(description="mean log-likelihood, nats a token")


class Likelihoods(Versioned):
    """Likelihoods of all sampled generations, scored after the timed part."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    rows: tuple[Likelihood, ...] = Field(description="one entry a sampled generation")


class Manifest(Versioned):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["suite"] | None, KIND] = None
    suite: str = Field(description="name of the suite")
    num_planned: int = Field(description="trials that were to be run")
    num_generations: int = Field(description="trials that finished")
    num_failures: int = Field(description="trials that failed and were not repeated with success")
    finished_utc: Annotated[str, FINISHED_UTC]
    elapsed_s: Annotated[float, ELAPSED_S]
    peak_memory_bytes: int = Field(
        description="most bytes allocated in that session (on a CPU: resident in memory)"
    )
    sha256: Annotated[dict[str, str], FILE_HASHES]

    @property
    def complete(self) -> bool:
        """Return whether every planned trial has an outcome."""
        return self.num_generations + self.num_failures >= self.num_planned


class RunRecord(RecordFolder):
    """A run's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    @cached_property
    def suite(self) -> SuiteSpec:
        return self._spec("suite.toml", SuiteSpec, parse_suite)

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def manifest(self) -> Manifest | None:
        return self._optional("manifest.json", Manifest)

    @cached_property
    def outcomes(self) -> tuple[Generation | Failure, ...]:
        return read_outcomes(self.folder / "generations.jsonl")

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Return the trials that failed and were not repeated with success."""
        done = {outcome.trial for outcome in self.outcomes if isinstance(outcome, Generation)}
        return tuple(
            outcome for outcome in self.outcomes if isinstance(outcome, Failure) and outcome.trial not in done
        )

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """Return one generation a trial: the last whose timing is valid, else the last."""
        chosen: dict[TrialKey, Generation] = {}
        for outcome in self.outcomes:
            if isinstance(outcome, Generation):
                before = chosen.get(outcome.trial)
                if before is None or outcome.timing_valid or not before.timing_valid:
                    chosen[outcome.trial] = outcome
        return tuple(sorted(chosen.values(), key=lambda generation: generation.order))

    @cached_property
    def trees(self) -> dict[str, ArmTree]:
        return dict(self._read("trees.json", ArmTrees).trees)

    @cached_property
    def step_costs(self) -> StepCosts | None:
        return self._optional("step_costs.json", StepCosts)

    @cached_property
    def profile(self) -> Profile | None:
        return self._optional("profile.json", Profile)

    @cached_property
    def device_limits(self) -> DeviceLimits | None:
        return self._optional("device_limits.json", DeviceLimits)

    @cached_property
    def heads_control(self) -> HeadsControl | None:
        return self.heads_control_of("original")

    def heads_control_of(self, backbone: BackboneName) -> HeadsControl | None:
        """Return the control of one backbone's heads."""
        return self._optional(file_of(HEADS_CONTROL_FILE, backbone), HeadsControl)

    @cached_property
    def rounding(self) -> Rounding | None:
        """Return the original backbone's rounding; None in float32, and in records older than the measure."""
        return self.rounding_of("original")

    def rounding_of(self, backbone: BackboneName) -> Rounding | None:
        """Return what this precision's rounding does to one backbone."""
        return self._optional(file_of(ROUNDING_FILE, backbone), Rounding)

    @cached_property
    def likelihoods(self) -> Likelihoods | None:
        return self._optional("likelihoods.json", Likelihoods)

    @cached_property
    def trace(self) -> Trace | None:
        """Return the trace of the original backbone's greedy vanilla generations."""
        return self.trace_of("original")

    def trace_of(self, backbone: BackboneName) -> Trace | None:
        """Return the trace of one backbone's greedy vanilla generations; it is read once."""
        if backbone not in self._traces:
            path = self.folder / file_of(TRACE_FILE, backbone)
            self._traces[backbone] = Trace.load(path) if path.exists() else None
        return self._traces[backbone]

    @cached_property
    def _traces(self) -> dict[BackboneName, Trace | None]:
        return {}


def read_outcomes(path: Path, *, allow_torn_tail: bool = False) -> tuple[Generation | Failure, ...]:
    """Return the trial outcomes of a `generations.jsonl`, read as `read_lines` does."""
    return read_versioned_lines(
        path, _OUTCOME.validate_json, holds="one trial outcome", allow_torn_tail=allow_torn_tail
    )


def read_arm_steps(path: Path, *, allow_torn_tail: bool = False) -> tuple[StepCost, ...]:
    """Return the separately timed steps of an `arm_steps.jsonl`, read as `read_lines` does."""
    return read_versioned_lines(
        path, StepCost.model_validate_json, holds="one arm's separate steps", allow_torn_tail=allow_torn_tail
    )


RUN = StoreKind(
    record_kind="suite",
    noun="run",
    spec_noun="suite",
    spec_file="suite.toml",
    provenance_file="environment.json",
    lines=LineFile[Generation | Failure]("generations.jsonl", read_outcomes),
    begun=lambda folder: (RunRecord(folder).suite, RunRecord(folder).environment),
    identity=ENGINE_IDENTITY,
)
ARM_STEPS = LineFile[StepCost]("arm_steps.jsonl", read_arm_steps)
