"""What a run leaves on disk: versioned, validated records; everything after them is a function of them.

A record folder holds `suite.toml`, `environment.json`, `trees.json`, `generations.jsonl` (appended line by
line), what is measured apart from the trials (`step_costs.json`, `profile.json`, `device_limits.json`,
`heads_control.json`, in half precision `rounding.json`), `trace.npz`, `tokens.json`, and, last,
`manifest.json`, which seals it with the SHA-256 of every other file. What a suite's tuned backbone has of its
own has `-tuned` in its name (`file_of`). Where a time budget was used up, `suite.toml` is what was run and
`asked.toml` what was asked. No clock, device or torch is needed to read one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Amount, Count, FileName, Finite, Seconds, Sha256, Utc
from harness.errors import UserError
from harness.files import Frozen
from harness.records.folder import (
    ASKED_FILE,
    ELAPSED_S,
    FILE_HASHES,
    FINISHED_UTC,
    KIND,
    RecordFolder,
    file_of,
)
from harness.records.probes import DeviceLimits, HeadsControl, Profile, Rounding, StepCost, StepCosts
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.store import LineFile, StoreKind
from harness.records.trace import Trace
from harness.records.trials import BlockTry, Failure, Generation, TrialKey, block_tries, read_outcomes
from harness.specs.suite import BackboneName, SuiteSpec, parse_suite
from harness.versions import VERSION, Versioned, read_versioned_lines
from medusa_impl.tree import DraftTree

CALIBRATION_FILE, TRACE_FILE = "calibration.npz", "trace.npz"
GENERATIONS_FILE, ARM_STEPS_FILE = "generations.jsonl", "arm_steps.jsonl"
HEADS_CONTROL_FILE, ROUNDING_FILE = "heads_control.json", "rounding.json"
TOKENS_FILE = "tokens.json"

TIE_MARGIN_FLOAT32 = 5e-4  # rounding moved top-two gaps by at most 8e-5 in trials
# Both runs may shift, each by up to the largest, from the pass whose gap classes them; and a few hundred
# positions miss the rarest shift.
TIE_SHIFTS = 2.0


class TokenTexts(Versioned):
    """What the kept tokens of a record read as, for pages that show its texts."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    texts: dict[Count, str] = Field(
        description="text of each token id that a generation kept, as it reads after another token; a part "
        "of a character reads as a replacement mark"
    )


class ArmTree(Versioned):
    """The tree an arm decoded with, and where it came from."""

    paths: tuple[tuple[Count, ...], ...] = Field(
        description="each node's ranks from the root on, counted from 0; the root is the empty path"
    )
    origin: str = Field(description="how the tree was chosen, in words")
    predicted_tokens_per_step: Amount | None = Field(
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
    mean_log_likelihood: Finite = Field(description="mean log-likelihood, nats a token")


class Likelihoods(Versioned):
    """Likelihoods of all sampled generations, scored after the timed part."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    rows: tuple[Likelihood, ...] = Field(description="one entry a sampled generation")


class Manifest(Versioned):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["suite"] | None, KIND] = None
    suite: str = Field(description="name of the suite")
    num_planned: Count = Field(description="trials that were to be run")
    num_generations: Count = Field(description="trials that finished")
    num_failures: Count = Field(description="trials that failed and were not repeated with success")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    stages_s: dict[Literal["loading", "preparing", "decoding", "following"], Seconds] = Field(
        default={},
        description="seconds of each stage of that session: loading and packing the model, timing steps and "
        "growing trees, the trials, and what follows them; empty in older records",
    )
    peak_memory_bytes: Count = Field(
        description="most bytes allocated in that session (on a CPU: resident in memory)"
    )
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]

    @property
    def complete(self) -> bool:
        """Return whether every planned trial has an outcome."""
        return self.num_generations + self.num_failures >= self.num_planned


def planned_trials(suite: SuiteSpec, prompt_keys: Iterable[str]) -> frozenset[TrialKey]:
    """Return every trial that a suite asks for on some prompts."""
    keys = tuple(prompt_keys)
    return frozenset(
        TrialKey(arm=arm.name, prompt_key=key, round=number, seed=seed)
        for arm in suite.arms
        for key in keys
        for number in range(suite.rounds)
        for seed in (arm.seeds or (None,))
    )


class RunRecord(RecordFolder):
    """A run's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    withheld: str | None = None  # why its speeds are not shown, in words
    noun = "a run's record"
    core = ("suite.toml", "environment.json", "trees.json", GENERATIONS_FILE)

    @cached_property
    def suite(self) -> SuiteSpec:
        return self._spec("suite.toml", SuiteSpec, parse_suite)

    @cached_property
    def asked(self) -> SuiteSpec:
        """Return the suite that was asked for; `suite` is shorter where a time budget was used up."""
        is_shorter = self.file(ASKED_FILE).exists()
        return self._spec(ASKED_FILE, SuiteSpec, parse_suite) if is_shorter else self.suite

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def manifest(self) -> Manifest | None:
        return self._optional("manifest.json", Manifest)

    @cached_property
    def outcomes(self) -> tuple[Generation | Failure, ...]:
        return read_outcomes(self.file(GENERATIONS_FILE), allow_torn_tail=self.unsealed is not None)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Return the trials that failed and were not repeated with success afterwards."""
        left: list[Failure] = []
        for outcome in self.outcomes:
            if isinstance(outcome, Failure):
                left.append(outcome)
            else:
                left = [failure for failure in left if failure.trial != outcome.trial]
        return tuple(left)

    @cached_property
    def tries(self) -> tuple[BlockTry, ...]:
        """Return the blocks as they were run, repeats and those that a kill cut included."""
        # prompt lookup drafts as many tokens as it finds, so its steps are of many widths
        stock = {arm.name for arm in self.suite.arms if arm.method not in ("vanilla", "medusa")}
        return block_tries(self.outcomes, rule=self.suite.disturbance, unlike_steps=stock)

    @cached_property
    def quiet_prompts(self) -> frozenset[str]:
        """Return the prompts with a block that nothing disturbed."""
        return frozenset(one.prompt_key for one in self.tries if one.is_quiet)

    @property
    def num_quiet_needed(self) -> int:
        """Return how many such prompts the suite's rule asks for; 0 without a rule."""
        rule, prompts = self.suite.disturbance, {one.prompt_key for one in self.tries}
        return 0 if rule is None else max(1, ceil(rule.min_quiet_share * len(prompts)))

    @cached_property
    def generations(self) -> tuple[Generation, ...]:
        """Return one generation a trial: the last whose times may be used, else the last."""
        chosen: dict[TrialKey, Generation] = {}
        for outcome in self.outcomes:
            if isinstance(outcome, Generation):
                before = chosen.get(outcome.trial)
                if before is None or self.is_timed(outcome) or not self.is_timed(before):
                    chosen[outcome.trial] = outcome
        return tuple(sorted(chosen.values(), key=lambda generation: generation.order))

    def is_timed(self, generation: Generation) -> bool:
        """Return whether a generation's times may be used: no kill cut its block, and nothing disturbed it.

        Records of suites without a rule on disturbance know of kills alone.
        """
        return generation.timing_valid and (generation.trial, generation.attempt) not in self._untimed

    @cached_property
    def _untimed(self) -> frozenset[tuple[TrialKey, int]]:
        if self.suite.disturbance is None:
            return frozenset()
        return frozenset(
            (one.trial, one.attempt) for run in self.tries if not run.is_quiet for one in run.outcomes
        )

    @property
    def reports_speed(self) -> bool:
        """Return whether speeds are to be shown: the suite asks for them, and they are not withheld."""
        return self.suite.reports_speed and self.withheld is None

    @property
    def why_no_speed(self) -> str:
        """Return in words why no speed is shown."""
        if self.withheld is None:
            return f"suite {self.suite.name} reports no speed"
        return "the run's speeds are withheld, since checks of its times failed"

    def withholding(self, why: str | None) -> RunRecord:
        """Return this record as one whose speeds are not shown, with the reason; itself without one."""
        if why is None:
            return self
        view = copy.copy(self)
        view.withheld = why
        return view

    @cached_property
    def arm_steps(self) -> tuple[StepCost, ...]:
        """Return the separately timed steps of arms, as they were taken; none where no speed is reported."""
        path = self.file(ARM_STEPS_FILE)
        return read_arm_steps(path, allow_torn_tail=self.unsealed is not None) if path.exists() else ()

    @cached_property
    def trees(self) -> dict[str, ArmTree]:
        """Return the tree of each Medusa arm, by the arm's name.

        Raises: UserError where one is missing or is no tree.
        """
        trees = dict(self._read("trees.json", ArmTrees).trees)
        missing = [arm.name for arm in self.suite.arms if arm.method == "medusa" and arm.name not in trees]
        if missing:
            raise UserError(
                found=f"no tree of arm {missing[0]!r}",
                need="one of each Medusa arm",
                where="trees.json",
                do=f"restore the file or {self.again}",
            )
        for name, tree in trees.items():
            try:
                tree.tree()
            except UserError as error:
                raise UserError(
                    found=error.found, need=error.need, where=f"trees.json: tree of arm {name!r}"
                ) from error
        return trees

    @property
    def repeated(self) -> tuple[int, ...]:
        """Return the lines of the trials' file, from 1, whose attempt at a trial an earlier line tells of."""
        seen: set[tuple[TrialKey, int]] = set()
        found = []
        for number, outcome in enumerate(self.outcomes, start=1):
            if (outcome.trial, outcome.attempt) in seen:
                found.append(number)
            seen.add((outcome.trial, outcome.attempt))
        return tuple(found)

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
    def token_texts(self) -> TokenTexts | None:
        """Return what kept tokens read as; None in older records, and for models without a tokenizer."""
        return self._optional(TOKENS_FILE, TokenTexts)

    @cached_property
    def trace(self) -> Trace | None:
        """Return the trace of the original backbone's greedy vanilla generations."""
        return self.trace_of("original")

    def trace_of(self, backbone: BackboneName) -> Trace | None:
        """Return the trace of one backbone's greedy vanilla generations; it is read once."""
        if backbone not in self._traces:
            path = self.file(file_of(TRACE_FILE, backbone))
            self._traces[backbone] = Trace.load(path) if path.exists() else None
        return self._traces[backbone]

    def calibration_of(self, backbone: BackboneName) -> Trace | None:
        """Return the trace that one backbone's trees were grown on; None where there was none."""
        path = self.file(file_of(CALIBRATION_FILE, backbone))
        return Trace.load(path) if path.exists() else None

    @cached_property
    def _traces(self) -> dict[BackboneName, Trace | None]:
        return {}


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
    lines=LineFile[Generation | Failure](GENERATIONS_FILE, read_outcomes),
    begun=lambda folder: (RunRecord(folder).asked, RunRecord(folder).environment),
    identity=ENGINE_IDENTITY,
)
ARM_STEPS = LineFile[StepCost](ARM_STEPS_FILE, read_arm_steps)
