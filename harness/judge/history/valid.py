"""Which kinds of figures of a run hold: its counts and texts, its times."""

from __future__ import annotations

from dataclasses import dataclass

from harness.judge.judgement import CheckStatus, Judgement
from harness.judge.limits import latency_within_limits
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord

TIMING_CHECKS = frozenset(
    {
        "timings_valid",
        "machine_quiet",
        "arms_interleaved",
        "bandwidth_sane",
        "within_limits",
        "steps_as_timed_apart",
        "steps_as_priced",
        "heads_are_timed",
        "profile_adds_up",
        "vanilla_is_least",
        "vanilla_against_generate",
        "processor_busy",
    }
)
"""The checks on times: where one of them fails, tokens, steps and texts are still what they are."""


@dataclass(frozen=True)
class Holds:
    """What holds of a record. `why` names what failed, `asks_speeds` says whether it was to report speed."""

    texts: bool
    speeds: bool
    asks_speeds: bool
    why: tuple[str, ...] = ()

    @property
    def all_that_was_asked(self) -> bool:
        """Return whether every kind of figure that the record was to give holds."""
        return self.texts and (self.speeds or not self.asks_speeds)


def run_holds(record: RunRecord, judgement: Judgement) -> Holds:
    """Return which kinds of figures of a run hold: a failed check on times takes the times alone."""
    failed = tuple(check.name for check in judgement.checks if check.status is CheckStatus.FAILED)
    texts = not record.failures and TIMING_CHECKS.issuperset(failed)
    speeds = texts and record.suite.reports_speed and not failed
    return Holds(texts=texts, speeds=speeds, asks_speeds=record.suite.reports_speed, why=failed)


def latency_holds(record: LatencyRecord) -> Holds:
    """Return whether a latency record's times hold; of texts it has few, which bend under nothing."""
    outcome = latency_within_limits(record)
    is_sound = outcome.status is not CheckStatus.FAILED
    return Holds(texts=True, speeds=is_sound, asks_speeds=True, why=() if is_sound else (outcome.name,))
