"""What a gate leaves on disk: the turns of both versions, what was found of each quantity, and a baseline.

A gate's folder holds `gate.json`, all of it in one file, what others read (`junit.xml`, `bmf.json`,
`headline.json`), its seal and its report. A calibration is one file a device and gate, in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.bounds import Amount, Count, Finite, Seconds, Share, Utc
from harness.files import Frozen
from harness.records.provenance import DeviceInfo
from harness.specs.gate import Quantity
from harness.versions import VERSION, Versioned, read_versioned_file

SideName = Literal["base", "head"]
Purpose = Literal["timed", "scored"]
Outcome = Literal["better", "equivalent", "worse", "inconclusive", "withheld"]
SIDES: tuple[SideName, ...] = ("base", "head")
GATE_FILE, JUNIT_FILE, BMF_FILE, HEADLINE_FILE = "gate.json", "junit.xml", "bmf.json", "headline.json"


class Turn(Frozen):
    """One generation of one version: an arm on a prompt, in a block."""

    block: Count = Field(description="which block, in the order in which they were taken, from 0")
    prompt_key: str = Field(description="prompt; a block is one prompt, all arms, both versions")
    arm: str = Field(description="name that the gate gives the arm")
    side: SideName = Field(description="which version decoded")
    purpose: Purpose = Field(
        description="timed, step by step in turn with the other version, or scored, for its text alone"
    )
    step_s: tuple[Seconds, ...] = Field(description="seconds of each decoding step after the prefill")
    step_tokens: tuple[Count, ...] = Field(description="kept tokens of each of these steps")
    text_sha256: str = Field(description="SHA-256 of the kept token ids")
    parts_s: dict[str, tuple[Seconds, ...]] = Field(
        default={}, description="seconds of each part in every marked step, by the part's name"
    )
    mean_log_likelihood: Finite | None = Field(
        default=None, description="of the text under the version's own backbone, nats a token; scored turns"
    )
    others_share: Share = Field(
        description="share of all cores' time that other processes used while both versions decoded"
    )
    num_foreign: Count = Field(
        default=0, description="other processes on the GPU, the two versions' own left out"
    )
    peak_memory_bytes: Count = Field(description="most bytes that the version's process held until its end")


class SideInfo(Frozen):
    """One version as its process told of it."""

    commit: str | None = Field(description="commit of its code; null outside a git checkout")
    dirty: bool | None = Field(description="whether tracked files differed from it; null where unknown")
    python: str = Field(default="unknown", description="version of Python; unknown in older records")
    packages: dict[str, str] = Field(
        default={}, description="versions of the packages that can move a figure; none in older records"
    )
    device: DeviceInfo = Field(description="the device under test")
    mode: str = Field(description="mode of the engine")
    dtype: str = Field(description="dtype of the backbone")
    prompts_sha256: str = Field(description="SHA-256 of keys and token ids of all prompts")
    backbone_sha256: str = Field(description="SHA-256 of the backbone's stored tensors")
    replayed_tokens_per_step: dict[str, Amount] = Field(
        default={}, description="tokens a step of each arm's tree, replayed on the calibration trace"
    )


class Finding(Frozen):
    """What was found of one quantity; `change` is positive where the head is worse."""

    quantity: Quantity = Field(description="what is compared")
    arm: str | None = Field(default=None, description="arm; null for a quantity of the whole version")
    depth: Count | None = Field(default=None, description="depth in the tree, of the acceptance")
    base: Finite | None = Field(description="the base's value, in the quantity's unit")
    head: Finite | None = Field(description="the head's value")
    change: Finite | None = Field(description="by how much the head is worse, in the margin's unit")
    low: Finite | None = Field(default=None, description="lower bound of the change; null where it is exact")
    high: Finite | None = Field(default=None, description="upper bound of the change; null where it is exact")
    level: Share | None = Field(default=None, description="coverage of the interval, all corrections made")
    margin: Amount = Field(description="how much worse does not count")
    sees: Finite | None = Field(
        default=None, description="the slowdown that this quantity's noise lets the last look find"
    )
    num_blocks: Count | None = Field(default=None, description="blocks that it was decided from")
    outcome: Outcome = Field(description="better, equivalent, worse, inconclusive or withheld")

    @property
    def name(self) -> str:
        """The quantity with its arm and depth, in one word."""
        parts = (self.quantity, self.arm, None if self.depth is None else f"depth_{self.depth}")
        return "/".join(part for part in parts if part is not None)


class SlowedPart(Frozen):
    """A part of a step in both versions."""

    arm: str = Field(description="arm whose steps were cut into parts")
    part: str = Field(description="part, such as heads; host is what no part covers")
    base_s: Seconds = Field(description="median seconds a step in the base")
    head_s: Seconds = Field(description="median seconds a step in the head")


class NoiseFloor(Frozen):
    """The noise of one timed quantity on a runner."""

    spread: Amount = Field(description="standard deviation of a block's logarithm of head over base")
    between: Amount = Field(
        description="standard deviation that is left between runs, such as of where memory lies"
    )
    floor: Amount = Field(
        description="the least margin that a change of nothing stays within at the last look"
    )
    sees: Amount = Field(description="the least slowdown that the last look finds with the gate's power")


class Calibration(Versioned):
    """Runs of one version against itself: a runner's noise, and the smallest effect that it can see."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    gate: str = Field(description="name of the gate")
    gate_sha256: str = Field(description="SHA-256 of the gate's data")
    device: DeviceInfo = Field(description="the runner")
    commit: str | None = Field(description="commit of the code; null outside a git checkout")
    taken_utc: Utc = Field(description="time of its end, ISO 8601, in UTC")
    num_runs: Count = Field(description="runs against itself, each with processes of its own")
    num_blocks: Count = Field(description="quiet blocks of all runs together")
    floors: dict[str, NoiseFloor] = Field(description="noise of each timed quantity, by its name")


class GateRecord(Versioned):
    """A gate from its beginning to its end."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Literal["gate"] = Field(default="gate", description="kind of the record")
    gate: dict[str, Any] = Field(description="the gate's data, as it was run")
    command: str = Field(description="command line, without paths")
    repeat: str = Field(description="the command that repeats it on the same versions")
    started_utc: Utc = Field(description="time at which it began, ISO 8601, in UTC")
    elapsed_s: Seconds = Field(description="seconds that it took")
    sides: dict[SideName, SideInfo] = Field(description="both versions")
    base_from: str = Field(description="how the base was found: merge base, revision, or a stored baseline")
    disturbed_blocks: tuple[Count, ...] = Field(description="blocks that others disturbed: kept, not judged")
    looks_taken: tuple[Count, ...] = Field(description="quiet blocks at each look that was taken")
    findings: tuple[Finding, ...] = Field(description="what was found of each quantity")
    slowed: SlowedPart | None = Field(default=None, description="the part that got slower most")
    parts: tuple[SlowedPart, ...] = Field(default=(), description="all parts of all timed arms")
    notes: tuple[str, ...] = Field(default=(), description="what a reader has to know besides")
    exit_code: Count = Field(description="what the command returned")
    turns: tuple[Turn, ...] = Field(description="every turn, in order")


def read_gate(path: Path) -> GateRecord:
    """Return a gate's record, by its folder or file. Raises: UserError as `read_versioned_file` does."""
    return read_versioned_file(
        path / GATE_FILE if path.is_dir() else path, GateRecord, noun="a gate's record"
    )


def read_calibration(path: Path) -> Calibration:
    """Return a runner's calibration. Raises: UserError as `read_versioned_file` does."""
    return read_versioned_file(path, Calibration, noun="a gate's calibration")
