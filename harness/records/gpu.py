"""The acceptance of a GPU machine on disk: one line a part, and the files of parts that have no record."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Count, FileName, Seconds, Sha256, StepSeconds, Utc
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder
from harness.records.probes import DeviceLimits
from harness.records.profiles.kernels import KernelRaces
from harness.records.profiles.training import TrainingProfile
from harness.records.provenance import Provenance
from harness.records.store import LineFile, StoreKind
from harness.specs.gpu import GpuSpec, PartName, parse_gpu_spec
from harness.versions import VERSION, Versioned, read_versioned_lines

PLAN_FILE, ORIGIN_FILE, PARTS_FILE = "plan.toml", "origin.json", "parts.jsonl"
TESTS_FILE, CORPUS_FILE, TRAINING_FILE = "tests.json", "corpus.json", "training.json"
KERNELS_FILE = "kernels.json"
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
    elapsed_s: StepSeconds = Field(description="seconds from the first prefill to the last of these answers")

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens a second."""
        return self.num_tokens / self.elapsed_s


class GpuManifest(Versioned):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["gpu"] | None, KIND] = None
    plan: str = Field(description="name of the plan")
    num_planned: Count = Field(description="parts that were to be run")
    num_accepted: Count = Field(description="parts that ended well")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]


class GpuRecord(RecordFolder):
    """The folder of a machine's acceptance, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun, again = "a record of a GPU machine", "run it again"
    core = (PLAN_FILE, ORIGIN_FILE, PARTS_FILE)
    origin_file = ORIGIN_FILE

    @cached_property
    def spec(self) -> GpuSpec:
        return self._spec(PLAN_FILE, GpuSpec, parse_gpu_spec)

    @cached_property
    def origin(self) -> Provenance:
        return self._read(ORIGIN_FILE, Provenance)

    @cached_property
    def parts(self) -> tuple[PartResult, ...]:
        return read_parts(self.file(PARTS_FILE), allow_torn_tail=self.unsealed is not None)

    @cached_property
    def limits(self) -> dict[str, DeviceLimits]:
        """Return what the device could do, by dtype."""
        names = {dtype: limits_of(dtype) for dtype in ("float32", "bfloat16", "float16")}
        found = {dtype: self._optional(name, DeviceLimits) for dtype, name in names.items()}
        return {dtype: limits for dtype, limits in found.items() if limits is not None}

    @cached_property
    def tests(self) -> TestCounts | None:
        return self._optional(TESTS_FILE, TestCounts)

    @cached_property
    def corpus(self) -> CorpusRate | None:
        return self._optional(CORPUS_FILE, CorpusRate)

    @cached_property
    def training(self) -> TrainingProfile | None:
        return self._optional(TRAINING_FILE, TrainingProfile)

    @cached_property
    def kernels(self) -> KernelRaces | None:
        return self._optional(KERNELS_FILE, KernelRaces)

    @cached_property
    def manifest(self) -> GpuManifest | None:
        return self._optional("manifest.json", GpuManifest)


def limits_of(dtype: str) -> str:
    """Return the file of the device's limits in a dtype."""
    return f"device_limits_{dtype}.json"


def read_parts(path: Path, *, allow_torn_tail: bool = False) -> tuple[PartResult, ...]:
    """Return the lines of a `parts.jsonl`, read as `files.read_lines` does."""
    return read_versioned_lines(
        path, PartResult.model_validate_json, holds="one part", allow_torn_tail=allow_torn_tail
    )


GPU = StoreKind(
    record_kind="gpu",
    noun="run",
    spec_noun="plan",
    spec_file=PLAN_FILE,
    provenance_file=ORIGIN_FILE,
    lines=LineFile[PartResult](PARTS_FILE, read_parts),
    begun=lambda folder: (GpuRecord(folder).spec, GpuRecord(folder).origin),
    identity=("commit", "dirty", "packages", "device"),
    home=("gpu",),
)
