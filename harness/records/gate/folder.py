"""A gate's folder: the record in one file, what other programs read, and the seal over all of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from harness.bounds import Count, FileName, Seconds, Sha256, Utc
from harness.errors import UserError
from harness.files import first_fault
from harness.records.folder import (
    ELAPSED_S,
    FILE_HASHES,
    FINISHED_UTC,
    KIND,
    MANIFEST_FILE,
    RecordFolder,
)
from harness.records.gate.record import GATE_FILE, GateRecord, read_gate
from harness.records.provenance import Provenance
from harness.specs.gate import GateSpec
from harness.versions import VERSION, Versioned, check_version


class GateManifest(Versioned):
    """Written last: a folder without it was left before its end."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["gate"] | None, KIND] = None
    gate: str = Field(description="name of the gate")
    num_turns: Count = Field(description="turns of both versions together")
    num_findings: Count = Field(description="quantities of which something was found")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]


class GateFolder(RecordFolder):
    """A gate's folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun, finished, again = "a gate's record", "a finished gate", "run the gate again"
    mend_unsealed = again
    core = (GATE_FILE,)
    origin_file = GATE_FILE

    @cached_property
    def gate(self) -> GateRecord:
        return self._read(GATE_FILE, GateRecord)

    @cached_property
    def spec(self) -> GateSpec:
        check_version(self.gate.gate, GateSpec, where=GATE_FILE)
        try:
            return GateSpec.model_validate(self.gate.gate)
        except ValidationError as error:
            raise UserError(found=first_fault(error), need="a gate's data", where=GATE_FILE) from error

    @cached_property
    def origin(self) -> Provenance:
        """Where the record comes from: that of the head, whose process measured."""
        head = self.gate.sides.get("head")
        if head is None:
            raise UserError(found="no head", need="both versions", where=GATE_FILE)
        return Provenance(
            commit=head.commit,
            dirty=head.dirty,
            command=self.gate.command,
            python=head.python,
            packages=head.packages,
            device=head.device,
            started_utc=self.gate.started_utc,
        )

    @cached_property
    def manifest(self) -> GateManifest | None:
        return self._optional(MANIFEST_FILE, GateManifest)


def stored_gate(path: Path) -> tuple[GateRecord, bool]:
    """Return a gate's record, by its folder or file, and whether it lies under a whole seal.

    Raises: UserError for an altered record; one of before gates were sealed has no manifest and no seal.
    """
    folder = path.parent if path.name == GATE_FILE else path
    if folder.is_dir() and (folder / MANIFEST_FILE).exists():
        return GateFolder.open(folder).gate, True
    return read_gate(path), False
