"""The one door to what others recorded: a record of any kind, a run, or a trace that lies in one."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError
from harness.records.ablation import AblationRecord
from harness.records.folder import MANIFEST_FILE, RecordKind, kind_of
from harness.records.gate.folder import GateFolder
from harness.records.gpu.record import GpuRecord
from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import MeasuredMachine
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.records.trace import Trace

AnyRecord = RunRecord | LatencyRecord | SweepRecord | AblationRecord | GpuRecord | GateFolder
RECORDS: dict[
    RecordKind,
    type[RunRecord]
    | type[LatencyRecord]
    | type[SweepRecord]
    | type[AblationRecord]
    | type[GpuRecord]
    | type[GateFolder],
] = {
    "suite": RunRecord,
    "latency": LatencyRecord,
    "sweep": SweepRecord,
    "ablation": AblationRecord,
    "gpu": GpuRecord,
    "gate": GateFolder,
}
LOOK = "; to look at it all the same: --unsealed"


def open_record(folder: Path, *, unsealed: bool = False) -> AnyRecord:
    """Return a record of any kind whose seal is whole; with `unsealed`, any other as well, marked so.

    Raises: UserError as `RecordFolder.open` does, and for a folder that holds no record.
    """
    kind = RECORDS[kind_of(folder)]
    try:
        return kind.open(folder, unsealed=unsealed)
    except UserError as error:
        if unsealed or not _is_unsealed(kind, folder):
            raise
        do = f"{error.do}{LOOK}" if error.do else LOOK.removeprefix("; ")
        raise UserError(found=error.found, need=error.need, where=error.where, do=do) from error


def machine_of(record: AnyRecord) -> MeasuredMachine:
    """Return the machine that a record was made on, with its best measured bandwidth of all dtypes.

    Trainings, sweeps and gates measure none.
    """
    if isinstance(record, RunRecord):
        return MeasuredMachine.of(record.environment.device, [record.device_limits])
    if isinstance(record, LatencyRecord):
        limits = [record.limits(dtype) for dtype in record.spec.dtypes]
        return MeasuredMachine.of(record.environment.device, limits)
    if isinstance(record, GpuRecord):
        return MeasuredMachine.of(record.origin.device, record.limits.values())
    origin = record.origin if isinstance(record, SweepRecord | GateFolder) else record.environment
    return MeasuredMachine(origin.device)


def open_trace(path: Path, *, unsealed: bool = False) -> Trace:
    """Return a trace; where it lies in a record, the record's seal is checked.

    A trace that lies elsewhere has no seal but its own rules.
    Raises: UserError as `open_record` does, and for a file that is no whole trace.
    """
    if seal_fault_of(path) is not None and not unsealed:
        open_record(path.resolve().parent)
    return Trace.load(path)


def seal_fault_of(path: Path) -> str | None:
    """Return what is wrong with the seal of the record that a file lies in; None where nothing is.

    A file that lies in no record has no seal, and so nothing wrong with it.
    """
    folder = path.resolve().parent  # a link has the seal of what it names
    try:
        kind = RECORDS[kind_of(folder)]
    except UserError as error:
        return str(error) if (folder / MANIFEST_FILE).exists() else None
    is_record = (folder / MANIFEST_FILE).exists() or all((folder / name).exists() for name in kind.core[:2])
    return open_record(folder, unsealed=True).unsealed if is_record else None


def _is_unsealed(kind: type[AnyRecord], folder: Path) -> bool:
    """Return whether it is only the seal that is wrong with a record, so that it can be looked at."""
    try:
        return kind.open(folder, unsealed=True).unsealed is not None
    except UserError:
        return False
