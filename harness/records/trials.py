"""One trial as it lies on disk, and what was seen of the machine meanwhile."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from harness.bounds import Amount, Count, Finite, Seconds, Share, Whole
from harness.files import Frozen
from harness.specs.disturbance import DisturbanceRule, OthersRule
from harness.stats import long_share
from harness.versions import VERSION, Versioned, read_versioned_lines

# A GPU whose processes the driver does not tell apart is taken to be shared from here on: our own memory
# outside of PyTorch's allocator (libraries, graphs) grows by a few hundred MiB.
NOTICED_BYTES = 2**30


# The operating system counts a core's time in ticks of 10 ms, so that a difference may be off by one a core.
TICK_S = 0.01
# Reasons for lower clocks that lie outside of a run, in the words of the GPU's watch. A run's own draw of
# power, a pause and fixed clocks are no disturbance.
_HELD_BACK_BY = (
    "hardware slowdown",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "board limit",
    "reliability",
)


class ProcessorObservation(Frozen):
    """What all cores of the host did over one trial, besides our own work."""

    clock_s: Seconds = Field(description="seconds of the trial, its reading of these figures included")
    num_cores: Count = Field(description="logical cores whose time is counted")
    others_s: Finite = Field(
        description="seconds of all cores together that other processes used; a little below 0 where ticks "
        "of 10 ms fall so"
    )
    steal_s: Seconds | None = Field(
        description="seconds of all cores together that the hypervisor gave to other machines; null where "
        "the system does not tell"
    )
    forced_switches: Count | None = Field(
        description="times that a thread of ours was made to leave its core; null where the system does not "
        "tell"
    )
    clock_mhz: Amount | None = Field(
        description="clock of the cores at the trial's end, their mean, MHz; null where it cannot be read"
    )

    @property
    def others_share(self) -> float:
        """Return the share of all cores' time that was not ours to have, for certain: ticks are taken off."""
        return self.others_cores / self.num_cores if self.num_cores else 0.0

    @property
    def others_cores(self) -> float:
        """Return how many cores on average were not ours to have, for certain: ticks are taken off."""
        certain_s = self.others_s + (self.steal_s or 0.0) - TICK_S * self.num_cores
        return max(0.0, certain_s) / self.clock_s if self.clock_s > 0 else 0.0


class GpuObservation(Frozen):
    """A GPU as its driver described it at the end of a trial; null is what it did not tell."""

    num_others: Count | None = Field(
        default=None,
        description="other processes that computed on the GPU; null where ours cannot be told from them",
    )
    others_share: Share | None = Field(
        default=None,
        description="share of the time in which kernels of other processes ran, since the trial before; null "
        "where it is not known",
    )
    others_memory_bytes: Count | None = Field(
        default=None,
        description="bytes of the GPU in use that are not ours nor were in use before the run, an estimate",
    )
    sm_clock_mhz: Amount | None = Field(default=None, description="clock of the multiprocessors, MHz")
    memory_clock_mhz: Amount | None = Field(default=None, description="clock of the memory, MHz")
    temperature_c: Finite | None = Field(default=None, description="temperature, degrees Celsius")
    power_w: Amount | None = Field(default=None, description="power drawn, watts")
    throttle_reasons: tuple[str, ...] | None = Field(
        default=None, description="why the clocks are lower than they could be; empty where they are not"
    )

    @property
    def is_shared(self) -> bool:
        """Return whether another process is known to have used the GPU.

        Where processes cannot be told apart, much memory that is not ours tells of one.
        """
        if self.num_others is None and self.others_share is None:
            return (self.others_memory_bytes or 0) >= NOTICED_BYTES
        return bool(self.num_others or self.others_share)

    @property
    def is_held_back(self) -> bool:
        """Return whether heat or the machine lowered its clocks, and not this run's own draw of power."""
        return any(reason in _HELD_BACK_BY for reason in self.throttle_reasons or ())


def disturbances(
    step_times_s: Sequence[float],
    processor: ProcessorObservation | None,
    gpu: GpuObservation | None,
    *,
    rule: DisturbanceRule,
) -> tuple[str, ...]:
    """Return in words what disturbed a trial by the rule; nothing where nothing did.

    Units: seconds.
    """
    share = long_share(step_times_s, factor=rule.long_step)
    if share > rule.max_long_share:
        steps = f"{share:.0%} of the time in steps of over {rule.long_step:g} times the median"
        return (*disturbed_by_others(processor, gpu, rule=rule), steps)
    return disturbed_by_others(processor, gpu, rule=rule)


def disturbed_by_others(
    processor: ProcessorObservation | None, gpu: GpuObservation | None, *, rule: OthersRule
) -> tuple[str, ...]:
    """Return in words what others did to the machine that the rule does not allow; nothing where nothing."""
    found = []
    if processor is not None and (
        processor.others_share > rule.max_others_share or processor.others_cores > rule.max_others_cores
    ):
        used = f"{processor.others_share:.0%} of all cores"
        if processor.others_share <= rule.max_others_share:
            used = f"{processor.others_cores:.1f} of {processor.num_cores} cores"
        found.append(f"others used {used}")
    if gpu is not None and gpu.is_shared:
        found.append("another process used the GPU")
    if gpu is not None and gpu.is_held_back:
        found.append("the GPU's clocks were lowered")
    return tuple(found)


class MachineObservation(Frozen):
    """What was seen of the machine over some times."""

    processor: ProcessorObservation | None = Field(
        default=None, description="what the host's cores did meanwhile; null where compilers run as well"
    )
    gpu: GpuObservation | None = Field(
        default=None, description="the GPU afterwards; null on a CPU, and without its driver's package"
    )

    def disturbances(self, rule: OthersRule | None) -> tuple[str, ...]:
        """Return in words what disturbed these times by a rule; nothing without one."""
        return disturbed_by_others(self.processor, self.gpu, rule=rule) if rule is not None else ()


class TrialKey(Frozen):
    """One arm on one prompt in one round with one seed: the unit that is run once."""

    arm: str = Field(description="name that the suite gives the arm")
    prompt_key: str = Field(description="prompt, such as mt_bench-81; pairs the arms")
    round: Count = Field(description="which pass over all arms and prompts, from 0")
    seed: Whole | None = Field(default=None, description="seed of the draws; null where nothing is drawn")


class Generation(Versioned):
    """One finished trial: raw token ids, raw counts and times of its steps."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["generation"] = Field(default="generation", description="tells it from a failure")
    trial: TrialKey = Field(description="what was run")
    order: Count = Field(description="index in the plan of the run, from 0; arms of a prompt may take turns")
    attempt: Count = Field(default=0, description="0 for the first try, one more for each repeat")
    category: str | None = Field(description="category of the prompt; null where it has none")
    prompt_tokens: Count = Field(description="number of tokens of the prompt")
    token_ids: tuple[Count, ...] = Field(
        description="ids of the kept tokens y_1..y_n, cut after the end of sequence or at the budget"
    )
    ended_by: Literal["eos", "budget"] = Field(description="end of sequence, or the budget of tokens")
    step_tokens: tuple[Count, ...] = Field(
        description="kept tokens of each decoding step; their sum is n - 1, since the prefill yields y_1"
    )
    step_times_s: tuple[Seconds, ...] = Field(description="seconds of each decoding step, as in step_tokens")
    prefill_s: Seconds = Field(description="seconds until y_1 is on the host; then the decode clock starts")
    timing_valid: bool = Field(default=True, description="false where a kill cut its block of trials")
    peak_memory_bytes: Count | None = Field(
        default=None, description="most bytes allocated during the trial (on a CPU: resident in memory)"
    )
    cache_bytes: Count | None = Field(default=None, description="bytes of the key-value cache")
    load_average: Amount | None = Field(default=None, description="one-minute load average at its end")
    processor_s: Seconds | None = Field(
        default=None,
        description="seconds for which the thread that decodes had a processor during the trial; null where "
        "it waits for another device, and in older records",
    )
    processor: ProcessorObservation | None = Field(
        default=None,
        description="what the host's cores did meanwhile, and during the trials that took turns with this "
        "one; null in older records",
    )
    gpu: GpuObservation | None = Field(
        default=None,
        description="the GPU at the trial's end, and who else used it; null on a CPU, without its driver's "
        "package, and in older records",
    )

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

    def disturbances(
        self, rule: DisturbanceRule | None, *, unlike_steps: Container[str] = ()
    ) -> tuple[str, ...]:
        """Return in words what disturbed it by a rule; nothing without one.

        `unlike_steps` are arms whose steps differ in width by themselves: none of theirs is a long one.
        """
        if rule is None:
            return ()
        alike = () if self.trial.arm in unlike_steps else self.step_times_s
        return disturbances(alike, self.processor, self.gpu, rule=rule)


class Failure(Versioned):
    """A trial that raised: no metric, never a data point."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["failure"] = Field(default="failure", description="tells it from a generation")
    trial: TrialKey = Field(description="what was run")
    order: Count = Field(description="index in the plan of the run, from 0; arms of a prompt may take turns")
    attempt: Count = Field(default=0, description="0 for the first try, one more for each repeat")
    error_type: str = Field(description="class of the exception")
    message: str = Field(description="what the exception said, without paths, at most 500 characters")


TrialOutcome = Annotated[Generation | Failure, Field(discriminator="kind")]


@dataclass(frozen=True)
class BlockTry:
    """The trials of one prompt in one round, as they were run one after another.

    `is_whole` is false where a kill cut it. `disturbances` says in words what disturbed which arm.
    """

    prompt_key: str
    round: int
    outcomes: tuple[Generation | Failure, ...]
    is_whole: bool
    disturbances: tuple[str, ...]

    @property
    def is_quiet(self) -> bool:
        """Return whether its times may be used."""
        return self.is_whole and not self.disturbances


_OUTCOME: TypeAdapter[Generation | Failure] = TypeAdapter(TrialOutcome)


def block_tries(
    outcomes: Sequence[Generation | Failure],
    *,
    rule: DisturbanceRule | None,
    unlike_steps: Container[str] = (),
) -> tuple[BlockTry, ...]:
    """Return the blocks as they were run, in the order of their outcomes.

    A repeat of a trial begins a new try. `unlike_steps` is as in `Generation.disturbances`.
    A try is whole if it has every trial of its block that any try has.
    """
    runs: list[list[Generation | Failure]] = []
    trials: dict[tuple[str, int], set[TrialKey]] = {}
    for outcome in outcomes:
        block, last = _block(outcome), runs[-1] if runs else []
        trials.setdefault(block, set()).add(outcome.trial)
        if last and block == _block(last[0]) and all(outcome.trial != one.trial for one in last):
            last.append(outcome)
        else:
            runs.append([outcome])
    return tuple(
        BlockTry(
            *_block(run[0]),
            outcomes=tuple(run),
            is_whole=len(run) == len(trials[_block(run[0])]),
            disturbances=tuple(
                f"{one.trial.arm}: {words}"
                for one in run
                if isinstance(one, Generation)
                for words in one.disturbances(rule, unlike_steps=unlike_steps)
            ),
        )
        for run in runs
    )


def _block(outcome: Generation | Failure) -> tuple[str, int]:
    return outcome.trial.prompt_key, outcome.trial.round


def read_outcomes(path: Path, *, allow_torn_tail: bool = False) -> tuple[Generation | Failure, ...]:
    """Return the trial outcomes of a `generations.jsonl`, read as `read_lines` does."""
    return read_versioned_lines(
        path, _OUTCOME.validate_json, holds="one trial outcome", allow_torn_tail=allow_torn_tail
    )
