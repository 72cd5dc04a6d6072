"""What runs on a node of a cluster."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.device.engine import best_device
from harness.device.machine import machine
from harness.measure.latency.run import LatencyOptions, run_latency
from harness.measure.sweep.cells import CellRunner
from harness.measure.sweep.tasks import CellInputs, RunTask
from harness.records.sweep_cells import AnyCell, RanOn
from harness.specs.latency import LatencySpec

_NODE_ID_DIGITS = 12


@dataclass(frozen=True)
class Shipment:
    """What a node needs for the cells of one sweep; `digest` is that of all the rest, and stands for it."""

    digest: str
    inputs: CellInputs = field(compare=False)
    files: Mapping[str, bytes] = field(compare=False)


# ---- on a node


def run_cell(shipment: Shipment, task: RunTask, accelerator_type: str | None) -> AnyCell:
    """Run one cell on the engine that this worker process keeps.

    Raises: UserError where that engine cannot be loaded.
    """
    return _loaded(shipment).run(task).model_copy(update={"ran_on": describe_node(accelerator_type)})


@lru_cache(maxsize=1)
def _loaded(shipment: Shipment) -> CellRunner:
    """Return the engine of a shipment, kept until another sweep's comes."""
    with unpacked(shipment.files) as folder:
        suite = shipment.inputs.suite
        if suite.prompts.path is not None:
            prompts = suite.prompts.model_copy(update={"path": str(folder / suite.prompts.path)})
            suite = suite.model_copy(update={"prompts": prompts})
        return CellRunner(replace(shipment.inputs, suite=suite, base_folder=folder))


def measure_curve(
    spec: LatencySpec, files: Mapping[str, bytes], *, allow_hub: bool, command: str
) -> dict[str, bytes]:
    """Measure a latency spec on this node and return the files of the sealed record.

    Raises: UserError for what cannot be measured.
    """
    with unpacked(files) as folder:
        options = LatencyOptions(results=folder / "results", allow_hub=allow_hub, command=command)
        record = run_latency(
            spec, spec_file=folder / "latency.toml", options=options, console=Console(quiet=True)
        )
        return {path.name: path.read_bytes() for path in record.iterdir() if path.is_file()}


def describe_node(accelerator_type: str | None) -> RanOn:
    """Return what the node is that this worker runs on."""
    ray: Any = importlib.import_module("ray")
    return RanOn(
        node=str(ray.get_runtime_context().get_node_id())[:_NODE_ID_DIGITS],
        accelerator_type=accelerator_type,
        **machine(best_device()),
    )


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Give a temporary folder that holds the files under their names."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        yield folder
