"""What a run leaves on disk: versioned, validated records; everything after them is a function of them.

A record folder holds `suite.toml`, `environment.json`, `trees.json`, `generations.jsonl` (appended line by
line), the probes (`step_costs.json`, `profile.json`, `device_limits.json`, `heads_control.json`, in half
precision `rounding.json`), `trace.npz`, and, last, `manifest.json`, which seals it with the SHA-256 of every
other file. What a suite's tuned backbone has of its own has `-tuned` in its name (`file_of`). No clock,
device or torch is needed to read one.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from harness.files import Frozen, read_lines
from harness.records.folder import RecordFolder, file_of
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.store import LineFile, StoreKind
from harness.records.trace import Trace
from harness.specs.suite import BackboneName, SuiteSpec, parse_suite
from medusa_impl.tree import DraftTree

RECORD_SCHEMA_VERSION = 1
CALIBRATION_FILE, TRACE_FILE = "calibration.npz", "trace.npz"
HEADS_CONTROL_FILE, ROUNDING_FILE = "heads_control.json", "rounding.json"

TIE_MARGIN_FLOAT32 = 5e-4  # design.md, section 7: rounding moved top-two gaps by at most 8e-5 in trials
# Both runs may shift, each by up to the largest, from the pass whose gap classes them; and a few hundred
# positions miss the rarest shift.
TIE_SHIFTS = 2.0


class TrialKey(Frozen):
    """One arm on one prompt in one round with one seed: the unit that is run once."""

    arm: str
    prompt_key: str
    round: int
    seed: int | None = None


class Generation(Frozen):
    """One finished trial: raw token ids, raw per-step counts and times.

    `token_ids` are y_1..y_n after the shared cut (end-of-sequence or budget). `step_tokens[s]` counts the
    kept tokens of decoding step s and sums to n - 1, since the prefill yields y_1; `step_times_s` are aligned
    with it. The decode clock starts when y_1 is on the host.
    """

    schema_version: Literal[1] = 1
    kind: Literal["generation"] = "generation"
    trial: TrialKey
    order: int
    attempt: int = 0
    category: str | None
    prompt_tokens: int
    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "budget"]
    step_tokens: tuple[int, ...]
    step_times_s: tuple[float, ...]
    prefill_s: float
    timing_valid: bool = True
    peak_memory_bytes: int | None = None
    cache_bytes: int | None = None
    load_average: float | None = None

    @property
    def num_tokens(self) -> int:
        """Kept tokens, y_1 included."""
        return len(self.token_ids)

    @property
    def num_steps(self) -> int:
        """Decoding steps after the prefill."""
        return len(self.step_tokens)

    @property
    def decode_s(self) -> float:
        """Seconds on the decode clock."""
        return sum(self.step_times_s)

    @property
    def wall_s(self) -> float:
        """Seconds with the prefill."""
        return self.prefill_s + self.decode_s


class Failure(Frozen):
    """A trial that raised: no metric, never a data point."""

    schema_version: Literal[1] = 1
    kind: Literal["failure"] = "failure"
    trial: TrialKey
    order: int
    attempt: int = 0
    error_type: str
    message: str


TrialOutcome = Annotated[Generation | Failure, Field(discriminator="kind")]
_OUTCOME: TypeAdapter[Generation | Failure] = TypeAdapter(TrialOutcome)


class StepCost(Frozen):
    """Separately timed steps of one shape: backbone alone, and the whole step with heads, candidates,
    acceptance and compaction.
    """

    arm: str | None = None
    num_nodes: int
    num_heads: int
    context_tokens: int
    backbone_s: tuple[float, ...]
    step_s: tuple[float, ...] = ()


class StepCosts(Frozen):
    """All separately timed steps of a run; shapes are interleaved within it."""

    schema_version: Literal[1] = 1
    costs: tuple[StepCost, ...]


class ProfileRow(Frozen):
    """Where one arm's step time goes, from a profiling run apart from the timed ones (seconds summed over its
    steps).

    `backbone_s` and `heads_s` are the calls of the modules themselves; `candidates_s` includes positions and
    mask."""

    arm: str
    num_steps: int
    step_s: float
    backbone_s: float
    heads_s: float
    candidates_s: float
    acceptance_s: float
    cache_s: float

    @property
    def own_code_share(self) -> float:
        """1 - (backbone + heads) / step: what our own code costs."""
        return 1 - (self.backbone_s + self.heads_s) / self.step_s


class Profile(Frozen):
    """The profiling run."""

    schema_version: Literal[1] = 1
    rows: tuple[ProfileRow, ...]


class DeviceLimits(Frozen):
    """What this device can do, measured in the same run: best of several repeats of a read-only and a matrix
    product benchmark.
    """

    schema_version: Literal[1] = 1
    read_bandwidth_bytes_per_s: float
    matmul_flop_per_s: float
    method: str


class HeadsControl(Frozen):
    """Trained heads against freshly initialised and randomly weighted ones, before any timing is kept
    (held-out top-1 share per head).
    """

    schema_version: Literal[1] = 1
    num_positions: int
    trained_top1: tuple[float, ...]
    random_top1: tuple[float, ...]
    identity_top1: tuple[float, ...]


class ShapeShift(Frozen):
    """How far the steps of some arms, all of `num_nodes` tokens, move a figure away from what the trace's
    pass gives at the same positions.

    One value a position, the largest of it: the nodes that hold the position, or the heads read there.
    Units: `p50`, `p90`, `p99` and `largest` are absolute differences of logits.
    """

    arms: tuple[str, ...]
    num_nodes: int
    num_positions: int
    p50: float
    p90: float
    p99: float
    largest: float


class Rounding(Frozen):
    """How far this dtype's rounding moves logits between the shapes in which a run computes one position, on
    text of no benchmark prompt.

    `gaps`: the difference of the two tokens that the trace's pass finds best; with `generate` of
    transformers, where an arm uses it.
    `heads`: the difference of any two of a draft head's best candidates, of those ranks that a tree may name.
    """

    schema_version: Literal[1] = 1
    dtype: str
    num_texts: int
    num_candidates: int
    gaps: tuple[ShapeShift, ...] = Field(min_length=1)
    heads: tuple[ShapeShift, ...]

    @property
    def largest_gap_shift(self) -> float:
        """The largest of all shapes."""
        return max(shape.largest for shape in self.gaps)

    @property
    def largest_head_shift(self) -> float:
        """The largest of all shapes; 0 where no arm reads a head."""
        return max((shape.largest for shape in self.heads), default=0.0)


class ArmTree(Frozen):
    """The tree an arm decoded with, and where it came from."""

    paths: tuple[tuple[int, ...], ...]
    origin: str
    predicted_tokens_per_step: float | None = None

    def tree(self) -> DraftTree:
        """Return the validated tree."""
        return DraftTree.from_paths(self.paths)


class ArmTrees(Frozen):
    """The resolved trees by arm."""

    schema_version: Literal[1] = 1
    trees: dict[str, ArmTree]


class Likelihood(Frozen):
    """Mean log-likelihood of one sampled generation under the original backbone at temperature 1 (nats a
    token).
    """

    trial: TrialKey
    mean_log_likelihood: float


class Likelihoods(Frozen):
    """Likelihoods of all sampled generations, scored after the timed part."""

    schema_version: Literal[1] = 1
    rows: tuple[Likelihood, ...]


class Manifest(Frozen):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Literal[1] = 1
    suite: str
    num_planned: int
    num_generations: int
    num_failures: int
    finished_utc: str
    elapsed_s: float
    peak_memory_bytes: int
    sha256: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether every planned trial has an outcome."""
        return self.num_generations + self.num_failures >= self.num_planned


class RunRecord(RecordFolder):
    """A run's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    @cached_property
    def suite(self) -> SuiteSpec:
        return parse_suite(self._text("suite.toml"), where="suite.toml")

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def manifest(self) -> Manifest | None:
        return self._read("manifest.json", Manifest) if (self.folder / "manifest.json").exists() else None

    @cached_property
    def outcomes(self) -> tuple[Generation | Failure, ...]:
        return read_outcomes(self.folder / "generations.jsonl")

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Trials that failed and were not repeated with success."""
        done = {outcome.trial for outcome in self.outcomes if isinstance(outcome, Generation)}
        return tuple(
            outcome for outcome in self.outcomes if isinstance(outcome, Failure) and outcome.trial not in done
        )

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """One generation a trial: the last whose timing is valid, else the last."""
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
        """The control of one backbone's heads."""
        return self._optional(file_of(HEADS_CONTROL_FILE, backbone), HeadsControl)

    @cached_property
    def rounding(self) -> Rounding | None:
        """None in float32, and in records from before it was measured."""
        return self.rounding_of("original")

    def rounding_of(self, backbone: BackboneName) -> Rounding | None:
        """What this precision's rounding does to one backbone."""
        return self._optional(file_of(ROUNDING_FILE, backbone), Rounding)

    @cached_property
    def likelihoods(self) -> Likelihoods | None:
        return self._optional("likelihoods.json", Likelihoods)

    @cached_property
    def trace(self) -> Trace | None:
        """The trace of the original backbone's greedy vanilla generations, with the backbone's top-two gaps
        and the heads' losses.
        """
        return self.trace_of("original")

    def trace_of(self, backbone: BackboneName) -> Trace | None:
        """The trace of one backbone's greedy vanilla generations; read once."""
        if backbone not in self._traces:
            path = self.folder / file_of(TRACE_FILE, backbone)
            self._traces[backbone] = Trace.load(path) if path.exists() else None
        return self._traces[backbone]

    @cached_property
    def _traces(self) -> dict[BackboneName, Trace | None]:
        return {}


def read_outcomes(path: Path, *, allow_torn_tail: bool = False) -> tuple[Generation | Failure, ...]:
    """Read a `generations.jsonl` as `read_lines` does."""
    return read_lines(
        path, _OUTCOME.validate_json, holds="one trial outcome", allow_torn_tail=allow_torn_tail
    )


def read_arm_steps(path: Path, *, allow_torn_tail: bool = False) -> tuple[StepCost, ...]:
    """Read an `arm_steps.jsonl` as `read_lines` does."""
    return read_lines(
        path, StepCost.model_validate_json, holds="one arm's separate steps", allow_torn_tail=allow_torn_tail
    )


RUN = StoreKind(
    noun="run",
    spec_noun="suite",
    spec_file="suite.toml",
    provenance_file="environment.json",
    lines=LineFile[Generation | Failure]("generations.jsonl", read_outcomes),
    begun=lambda folder: (RunRecord(folder).suite, RunRecord(folder).environment),
    identity=ENGINE_IDENTITY,
)
ARM_STEPS = LineFile[StepCost]("arm_steps.jsonl", read_arm_steps)
