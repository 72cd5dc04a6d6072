"""Which kinds of figures of a run hold: its counts and texts, its times."""

from __future__ import annotations

from dataclasses import dataclass

from harness.judge.judgement import CheckStatus, Judgement
from harness.judge.latency_checks import latency_checks
from harness.records.latency import LatencyRecord
from harness.records.run import RunRecord


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
    texts = not record.failures and judgement.valid_texts
    return Holds(
        texts=texts,
        speeds=texts and judgement.valid_speeds is True,
        asks_speeds=record.suite.reports_speed,
        why=tuple(check.name for check in judgement.failed),
    )


def latency_holds(record: LatencyRecord) -> Holds:
    """Return whether a latency record's times hold; of texts it has few, which bend under nothing."""
    why = tuple(one.name for one in latency_checks(record) if one.status is CheckStatus.FAILED)
    return Holds(texts=True, speeds=not why, asks_speeds=True, why=why)
