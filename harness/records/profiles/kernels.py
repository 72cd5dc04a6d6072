"""Races of kernels: several ways to compute the same thing, timed on one device, each with its error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.bounds import Amount, Count, StepSeconds
from harness.files import Frozen
from harness.records.provenance import Provenance
from harness.versions import VERSION, Versioned, read_versioned_file


class Contender(Frozen):
    """One way to compute what a race is about."""

    name: str = Field(description="the way, such as masked, flex or prefix + tail for attention")
    call_s: tuple[StepSeconds, ...] = Field(
        default=(), description="seconds of a call, one a repeat of many calls; empty where it did not run"
    )
    max_error: Amount | None = Field(
        default=None,
        description="largest difference from the result in float64; of ranks the number that differ",
    )
    failure: str | None = Field(default=None, description="why it did not run; null where it did")


class Race(Frozen):
    """One size of one computation, and the ways that were tried."""

    computation: str = Field(description="what is computed: attention, top-k, heads or product")
    shape: str = Field(description="sizes of the tensors, in words")
    read_bytes: Count = Field(description="bytes that any way has to read")
    contenders: tuple[Contender, ...] = Field(min_length=1, description="the ways, that of the engine first")


class KernelRaces(Versioned):
    """All races on one device in one dtype."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    origin: Provenance = Field(description="where the races were run")
    dtype: str = Field(description="dtype of the tensors")
    calls_a_repeat: Count = Field(description="calls that one time is the mean of")
    races: tuple[Race, ...] = Field(min_length=1, description="one entry a computation and size")
    num_left_out: Count = Field(
        default=0,
        description="races that were not run, for want of time or by an interrupt; 0 in older files",
    )


def read_kernel_races(path: Path) -> KernelRaces:
    """Return the races in a file.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    return read_versioned_file(path, KernelRaces, noun="races of kernels")
