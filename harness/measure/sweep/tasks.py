"""What a sweep runs on a device: settings and trees as tasks, and what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.compose.devices import StepTimes
from harness.paths import without_paths
from harness.records.sweep_cells import FailedCell, decoded_key, sampled_key
from harness.records.trace import Trace
from harness.specs.suite import SuiteSpec
from harness.specs.sweep import SampledSetting, SweepSpec
from medusa_impl.tree import DraftTree


@dataclass(frozen=True)
class SampledTask:
    """One setting to run, with the tree and its index in the sweep; vanilla has none."""

    setting: SampledSetting
    tree: DraftTree | None
    index: int | None

    @property
    def key(self) -> str:
        """The key of the cell that it becomes."""
        return sampled_key(self.setting)

    @property
    def words(self) -> str:
        """What is run, in one line."""
        return self.setting.words


@dataclass(frozen=True)
class DecodedTask:
    """One tree to decode for real where its curve is from.

    That is this machine, or a cluster's node of that accelerator type.
    """

    tree: DraftTree
    index: int
    curve: StepTimes
    accelerator_type: str | None = None

    @property
    def key(self) -> str:
        """The key of the cell that it becomes."""
        return decoded_key(self.index, accelerator_type=self.accelerator_type)

    @property
    def words(self) -> str:
        """What is run, in one line."""
        where = f" on {self.accelerator_type}" if self.accelerator_type is not None else ""
        return f"tree {self.index}, {self.tree.num_nodes} nodes, decoded{where}"


RunTask = SampledTask | DecodedTask


@dataclass(frozen=True)
class CellInputs:
    """What all run cells of a sweep share, whichever machine runs them.

    `base_folder` is the folder of the suite's file, from which its paths go on.
    """

    spec: SweepSpec
    suite: SuiteSpec
    base_folder: Path
    trace: Trace
    knots: tuple[int, ...]
    allow_hub: bool


def failed_cell(task: RunTask, *, error_type: str, message: str) -> FailedCell:
    """Return the cell of a task that could not be run."""
    return FailedCell(
        key=task.key, words=task.words, error_type=error_type, message=without_paths(message)[:500]
    )
