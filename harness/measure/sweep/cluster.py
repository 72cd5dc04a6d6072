"""Run a sweep's cells, and measure the curves that it lacks, as tasks of a Ray cluster.

The driver composes and keeps the one store. Ray ships the code, places tasks, and runs again what a lost
worker or node took with it. A task brings all it needs but model assets, which every node takes from its own
cache, and gives its cell back; the driver appends cells as they come, so that a task that Ray runs twice is
still counted once.

    driver: measure missing curves -> compose -> tasks ---> nodes: load once a worker, run a cell
            sweep's folder <- append, one by one <--------- cell, or why there is none
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from harness.device.machine import checkout_state
from harness.errors import UserError
from harness.measure.sweep.node import describe_node, measure_curve, run_cell
from harness.measure.sweep.run import SweepOptions
from harness.measure.sweep.shipping import code_to_ship, keep_record, measured_machines, packed, ship
from harness.measure.sweep.tasks import CellInputs, RunTask, SampledTask, failed_cell
from harness.paths import CACHE_VARIABLE, resolve_path
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.machines.identity import machine_slug
from harness.records.provenance import DeviceInfo
from harness.records.sweep_cells import AnyCell, RanOn
from harness.specs.latency import LatencySpec, load_latency_spec
from harness.specs.sweep import ClusterSpec, SweepSpec

_VARIABLES = (CACHE_VARIABLE, "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")  # of the driver, where set
_CONNECT_S, _LOOK_S, _PATIENCE_S = 5.0, 10.0, 300.0

Name = TypeVar("Name")


@dataclass(frozen=True)
class Sent:
    """A task that Ray was given, and the type of node that it waits for."""

    accelerator_type: str | None
    ref: Any


class _Lost(Exception):
    """A task that ended without a result, in a message that names no host and no address."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---- on the driver


class RayExecutor:
    """A Ray cluster, connected to for as long as the `with` statement lasts.

    `address` is `auto` (a cluster of this machine, or RAY_ADDRESS), `local` (one of this machine alone,
    started now), or HOST:PORT. A worker keeps its engine between cells, except where a node offers several
    slots with GPUs: there each cell has its own process, as is Ray's rule, since a process cannot move to
    the next GPU and would keep memory on the last.
    Raises: UserError where Ray is not installed, or no cluster answers.
    """

    name: Literal["ray"] = "ray"

    def __init__(self, address: str) -> None:
        self._address = address
        self._ray: Any = None
        self._cluster = ClusterSpec()
        self.brought: list[Path] = []  # latency records that nodes measured and that lie here now
        self._checkout: tuple[str | None, bool | None] = (None, None)

    def __enter__(self) -> RayExecutor:
        self._ray = _import_ray()
        _check_answers(self._address)
        variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        local = {"include_dashboard": False} if self._address == "local" else {}
        self._checkout = checkout_state()  # of what is shipped
        with code_to_ship() as folder:
            environment = {"working_dir": str(folder), "env_vars": variables}
            try:
                self._ray.init(
                    address=self._address,
                    runtime_env=environment,
                    log_to_driver=False,
                    logging_level="WARNING",
                    **local,
                )
            except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
                found = f"no Ray cluster that takes this program ({str(error).splitlines()[0]})"
                raise _no_cluster(found, address=self._address) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def ready(
        self, spec: SweepSpec, *, base_folder: Path | None, options: SweepOptions, console: Console
    ) -> Mapping[str | None, DeviceInfo]:
        """Return the device of each accelerator type.

        Every curve is then there that `cluster.latency` asks for.
        Raises: UserError where no node has a wanted type with room for a cell, or a curve cannot be measured.
        """
        self._cluster = spec.cluster or ClusterSpec()
        latency = self._latency_spec(spec, base_folder=base_folder)
        places = {kind: self._places(kind) for kind in self._types}
        for kind, found in places.items():
            if not found:
                raise self._no_node(kind)
        words = ", ".join(f"{kind or 'any node'} x {sum(found)}" for kind, found in places.items())
        console.print(f"Ray: {words}; waiting for a node of each", highlight=False)
        probes = {kind: Sent(kind, self._task(describe_node, kind).remote(kind)) for kind in self._types}
        nodes = dict[str | None, RanOn]()
        with closing(self._each(probes)) as ended:
            for kind, ref in ended:
                try:
                    nodes[kind] = self._value(ref)
                except _Lost as lost:
                    need = "nodes with the packages that this project depends on: Ray ships its code alone"
                    raise UserError(
                        found=f"a node that cannot begin ({lost.kind}: {lost})", need=need, where="cluster"
                    ) from lost
        if latency is not None:
            self._measure(latency, nodes, base_folder=base_folder, options=options, console=console)
        return {kind: nodes[kind].device for kind in self._types}

    def run(
        self, inputs: CellInputs, tasks: Sequence[RunTask], *, on_start: Callable[[str], None]
    ) -> Generator[AnyCell]:
        """Yield cells as they arrive.

        Sampled settings are dealt out over the types, as many to each as it has room for cells.
        Raises: UserError where a node cannot load the engine, or a type's last node is gone and none comes.
        """
        if not tasks:
            return
        self._cluster = inputs.spec.cluster or ClusterSpec()
        places = {kind: self._places(kind) for kind in self._types}
        single = all(max(found, default=1) == 1 for found in places.values())
        runs = {kind: self._task(run_cell, kind, keeps_worker=single) for kind in self._types}
        deal = cycle([kind for kind in self._types for _ in range(max(1, sum(places[kind])))])
        shipment = self._ray.put(ship(inputs))
        sent = {}
        for task in tasks:
            kind = next(deal) if isinstance(task, SampledTask) else task.accelerator_type
            sent[task] = Sent(kind, runs[kind].remote(shipment, task, kind))
        on_start(f"run on Ray ({', '.join(kind or 'any node' for kind in self._types)})")
        with closing(self._each(sent)) as ended:
            for task, ref in ended:
                try:
                    yield self._value(ref)
                except _Lost as lost:
                    yield failed_cell(task, error_type=lost.kind, message=str(lost))

    @property
    def _types(self) -> tuple[str | None, ...]:
        return self._cluster.accelerator_types or (None,)

    def _places(self, accelerator_type: str | None) -> list[int]:
        """Return how many cells fit on each node of a type at once; nodes without room are left out."""
        wants = {"CPU": float(self._cluster.num_cpus), "GPU": self._cluster.num_gpus}
        found = []
        for node in self._ray.nodes():
            has: Mapping[str, float] = node["Resources"]
            if node["Alive"] and (accelerator_type is None or f"accelerator_type:{accelerator_type}" in has):
                found.append(
                    min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in wants.items() if amount)
                )
        return [room for room in found if room]

    def _no_node(self, accelerator_type: str | None) -> UserError:
        kinds = Counter(
            name.removeprefix("accelerator_type:")
            for node in self._ray.nodes()
            if node["Alive"]
            for name in node["Resources"]
            if name.startswith("accelerator_type:")
        )
        there = (
            ", ".join(f"{kind} x {number}" for kind, number in sorted(kinds.items())) or "no accelerator type"
        )
        room = f"{self._cluster.num_gpus:g} GPUs and {self._cluster.num_cpus} CPUs"
        return UserError(
            found=f"a cluster with {there}",
            need=f"a node{f' with {accelerator_type}' if accelerator_type is not None else ''} that has "
            f"{room} for a cell",
            where="cluster",
            do="start such a node, or change accelerator_types, num_gpus or num_cpus",
        )

    def _task(
        self, function: Callable[..., Any], accelerator_type: str | None, *, keeps_worker: bool = False
    ) -> Any:
        """Return a function as a Ray task for a node of a type.

        Without GPUs the worker outlives the task anyway.
        """
        options: dict[str, Any] = {
            "num_gpus": self._cluster.num_gpus,
            "num_cpus": self._cluster.num_cpus,
            "max_retries": self._cluster.max_retries,
            "retry_exceptions": False,  # only what a lost worker took with it is run again
        }
        if accelerator_type is not None:
            options["accelerator_type"] = accelerator_type
        if keeps_worker:
            options["max_calls"] = 0
        return self._ray.remote(**options)(function)

    def _each(self, sent: Mapping[Name, Sent]) -> Generator[tuple[Name, Any]]:
        """Yield tasks as they end.

        What is left when it is closed is cancelled, so close it while there is a connection.
        Raises: UserError where tasks wait for a node that has been gone for minutes.
        """
        waiting = {one.ref: (name, one.accelerator_type) for name, one in sent.items()}
        all_there_s = time.monotonic()
        try:
            while waiting:
                ready, _ = self._ray.wait(list(waiting), timeout=_LOOK_S)
                wanted = {kind for _, kind in waiting.values()} if not ready else set()
                gone = [kind for kind in wanted if not self._places(kind)]
                if not gone:
                    all_there_s = time.monotonic()
                elif time.monotonic() - all_there_s > _PATIENCE_S:
                    raise self._no_node(gone[0])
                for ref in ready:
                    yield waiting.pop(ref)[0], ref
        finally:
            for ref in waiting:
                self._ray.cancel(ref)

    def _value(self, ref: Any) -> Any:
        """Return what a task gave back.

        Raises: UserError where it, or Ray, refused; _Lost where it failed or its worker was lost too often.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None  # without Ray's own text, which names the node
            raise _Lost(type(error.cause).__name__, str(error.cause)) from error
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        ) as error:
            raise _Lost(
                type(error).__name__, f"worker or node lost, with max_retries = {self._cluster.max_retries}"
            ) from error
        except errors.RayError as error:
            found = f"{type(error).__name__} ({str(error).splitlines()[0]})"
            raise UserError(found=found, need="a cluster that can run the task", where="Ray") from error

    def _latency_spec(self, spec: SweepSpec, *, base_folder: Path | None) -> LatencySpec | None:
        if self._cluster.latency is None:
            return None
        latency = load_latency_spec(resolve_path(self._cluster.latency, base_folder=base_folder))
        records = spec.measured.records if spec.measured is not None else ()
        if records != "all" and latency.name not in records:
            need = f"{latency.name!r} among them, which cluster.latency measures"
            raise UserError(found=f"records {list(records)}", need=need, where="measured.records")
        return latency

    def _measure(
        self,
        latency: LatencySpec,
        nodes: Mapping[str | None, RanOn],
        *,
        base_folder: Path | None,
        options: SweepOptions,
        console: Console,
    ) -> None:
        """Measure a latency spec once on every machine that has no sealed record of it.

        Each record is kept as it comes.
        """
        known = tuple(measured_machines(options.results, name=latency.name))
        missing = {
            machine_slug(node.device): kind
            for kind, node in nodes.items()
            if all(not_comparable(one, MeasuredMachine(node.device)) for one in known)
        }
        if not missing:
            return
        console.print(f"Ray: measuring {latency.name} on {', '.join(sorted(missing))}", highlight=False)
        data, files = packed(
            latency,
            base_folder=_folder_of(self._cluster.latency, base_folder=base_folder),
        )
        spec, shipped = LatencySpec.model_validate(data), self._ray.put(files)
        sent = {
            device: Sent(
                kind,
                self._task(measure_curve, kind).remote(
                    spec, shipped, allow_hub=options.allow_hub, command=options.command
                ),
            )
            for device, kind in missing.items()
        }
        failures = list[UserError]()
        with closing(self._each(sent)) as ended:
            for device, ref in ended:
                try:
                    folder = keep_record(options.results, self._value(ref), checkout=self._checkout)
                    self.brought.append(folder)
                    console.print(f"Ray: {folder.parent.name} is measured", highlight=False)
                except UserError as error:
                    failures.append(error)
                except _Lost as lost:
                    failures.append(
                        UserError(
                            found=f"no curve of {device} ({lost.kind}: {lost})",
                            need="one",
                            where=latency.name,
                        )
                    )
        if failures:
            raise failures[0]


def _folder_of(name: str | None, *, base_folder: Path | None) -> Path | None:
    return resolve_path(name, base_folder=base_folder).parent if name is not None else None


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no command reports to anyone
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        do = "pip install 'medusa-repro[ray]'"
        raise UserError(
            found="no ray", need="it for --executor ray", where="this environment", do=do
        ) from error


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise UserError(
            found=f"--address {address}", need="auto, local or HOST:PORT", where="the command line"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _no_cluster(f"nothing that answers at {address}", address=address) from error


def _no_cluster(found: str, *, address: str) -> UserError:
    do = "start one with ray start --head" if address != "local" else "look at Ray's own logs"
    return UserError(
        found=found,
        need="a running Ray cluster with this Python and this version of Ray",
        where="--address",
        do=do,
    )
