"""How the parts of a GPU machine's acceptance went, and what those found that make no record of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Count, FileName, Seconds, Sha256, StepSeconds
from harness.specs.gpu import PartName
from harness.versions import VERSION, Versioned

Outcome = Literal["ok", "short", "invalid", "failed", "stopped", "skipped"]
# what a machine is accepted with: a part that ended before it measured all is no fault of the machine
ACCEPTED: tuple[Outcome, ...] = ("ok", "short")


class PartResult(Versioned):
    """How one part went."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    part: PartName = Field(description="which part of the plan")
    outcome: Outcome = Field(
        description="ok; short: ended by its own time budget, its record sealed; invalid: its record fails a "
        "check; failed: ended with an error; stopped: at its time limit; skipped: not begun, too little time"
    )
    elapsed_s: Seconds = Field(description="seconds that the part took, its process' start included")
    limit_s: Seconds = Field(description="seconds after which it was to be stopped")
    told: str = Field(description="what there is to say of it, in one line")
    record: str | None = Field(
        default=None,
        description="the part's own record as a path from the results folder, unsealed where it was stopped; "
        "null for a part whose files lie in this record, or that made none",
    )
    manifest_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 of the manifest of the part's own record; null without a sealed one",
    )
    files: tuple[FileName, ...] = Field(default=(), description="files of this record that the part wrote")


class TestCounts(Versioned):
    """What the tests said."""

    __test__ = False  # no test, whatever pytest takes from its name
    schema_version: Annotated[Literal[1], VERSION] = 1
    num_passed: Count = Field(description="tests that passed")
    num_failed: Count = Field(description="tests that failed, errors of their fixtures among them")
    num_skipped: Count = Field(description="tests that were skipped")
    failed: tuple[str, ...] = Field(default=(), description="names of the tests that failed")


class CorpusRate(Versioned):
    """How fast answers for a corpus were made."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    recipe: str = Field(description="name of the recipe")
    model: str = Field(description="name of the model that answered")
    dtype: str = Field(description="dtype of the model")
    num_rows: Count = Field(description="answers that were in progress together")
    num_answers: Count = Field(description="answers that came to their end")
    num_tokens: Count = Field(
        description="tokens of these answers; those of answers in progress at the end do not count"
    )
    elapsed_s: StepSeconds = Field(
        description="seconds from the first prefill until these answers are stored"
    )

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens a second."""
        return self.num_tokens / self.elapsed_s
