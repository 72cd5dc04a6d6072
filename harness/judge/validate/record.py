"""Whether a record folder is whole: every file loads, agrees with the others and with the seal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from harness.judge.validate.ablation import ablation_faults
from harness.judge.validate.gate import gate_faults
from harness.judge.validate.gpu import gpu_faults
from harness.judge.validate.latency import latency_faults
from harness.judge.validate.run import run_faults
from harness.judge.validate.sweep import sweep_faults
from harness.records.folder import RecordKind, kind_of


def validate_record(folder: Path) -> tuple[str, ...]:
    """Return every fault of a record folder of any kind, as one line each; none for a whole record.

    Looked at: each file's schema, bounds and version, the seal, the manifest's counts, that the lines are
    those of the plan and each there once, each generation's sums, each Medusa arm's tree, the trace against
    the vanilla text, and that nothing names a folder of one machine.
    Raises: UserError if there is no such folder, or no record in it.
    """
    faults: Mapping[RecordKind, Callable[[Path], tuple[str, ...]]] = {
        "suite": run_faults,
        "latency": latency_faults,
        "sweep": sweep_faults,
        "ablation": ablation_faults,
        "gpu": gpu_faults,
        "gate": gate_faults,
    }
    return faults[kind_of(folder)](folder)
