"""The record of a GPU machine's acceptance: one line a part, and the files of parts that have no record."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Count, FileName, Seconds, Sha256, Utc
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder
from harness.records.gpu.parts import CorpusRate, PartResult, TestCounts
from harness.records.probes import DeviceLimits
from harness.records.profiles.kernels import KernelRaces
from harness.records.profiles.training import TrainingProfile
from harness.records.provenance import Provenance
from harness.records.store import LineFile, StoreKind
from harness.specs.gpu import GpuSpec, parse_gpu_spec
from harness.versions import VERSION, Versioned, read_versioned_lines

PLAN_FILE, ORIGIN_FILE, PARTS_FILE = "plan.toml", "origin.json", "parts.jsonl"
TESTS_FILE, CORPUS_FILE, TRAINING_FILE = "tests.json", "corpus.json", "training.json"
KERNELS_FILE = "kernels.json"


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
