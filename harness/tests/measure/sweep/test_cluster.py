"""Sweeps on a real Ray cluster of this machine, whose two nodes pretend to have accelerators; workers die and
drivers stop.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from pytest import MonkeyPatch

import harness.device.machine
import harness.measure.sweep.cluster
import harness.report.figures.sweep
from harness.compose.devices import measured_curves
from harness.compose.plan import SweepPlan, plan_sweep
from harness.device.engine import Engine, LoadedModel
from harness.device.machine import git_state
from harness.errors import ExitCode, UserError
from harness.judge.validate.record import validate_record
from harness.measure.sweep.cluster import RayExecutor
from harness.measure.sweep.node import unpacked
from harness.measure.sweep.run import SweepOptions, cell_inputs, plan_runs, run_sweep
from harness.measure.sweep.shipping import keep_record, packed
from harness.measure.sweep.tasks import CellInputs, DecodedTask, SampledTask
from harness.measure.trace import trace_suite
from harness.records.latency import LatencyRecord
from harness.records.provenance import DeviceInfo
from harness.records.store import Store, portable
from harness.records.sweep import CELLS_FILE, SweepRecord
from harness.records.sweep_cells import AnyCell, DecodedCell, FailedCell, SampledCell
from harness.records.trace import Trace
from harness.specs.suite import SuiteSpec, parse_suite
from harness.specs.sweep import ClusterSpec, SampledSetting, SweepSpec, parse_sweep
from harness.tests.fake_latency import write_fake_latency
from harness.tests.fake_sweep import sweep_data
from harness.tests.tiny_suite import (
    BESIDE_ANYTHING,
    QUIET,
    Ran,
    command,
    micro_data,
    smoke_suite,
    write_suite,
)
from medusa_impl.tree import DraftTree

ray: Any = pytest.importorskip("ray", reason="needs medusa-repro[ray]")
TYPES = ("A100", "H100")
TASK_TITLE = "ray::run_cell"  # what Ray calls a worker's process while it runs a cell
VANILLA = SampledTask(SampledSetting(rule="vanilla", temperature=0.7), tree=None, index=None)


@pytest.fixture(scope="module", autouse=True)
def steady() -> Iterator[None]:
    """One state of the checkout for all sweeps, no figures, and a folder for Ray whose sockets have short
    names, as they must.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setattr(harness.device.machine, "git_state", cache(git_state))
        patch.setattr(harness.report.figures.sweep, "_FIGURES", {})
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


def latency_data(heads_file: Path) -> dict[str, Any]:
    """A latency spec of the tiny model that takes about a second."""
    return {
        "schema_version": 1,
        "kind": "latency",
        "name": "tiny_nodes",
        "description": "for tests",
        "model": smoke_suite().model_dump(mode="json", exclude_none=True)["model"],
        "heads": {"path": str(heads_file), "num_heads": 4},
        "dtypes": ["float32"],
        "modes": ["eager"],
        "repeats": 1,
        "grids": [{"num_nodes": [1, 16], "num_heads": [1, 4], "context_tokens": [16, 64]}],
        "disturbance": BESIDE_ANYTHING,
    }


def cluster_data(model: str, **changes: Any) -> dict[str, Any]:
    """A sweep of four settings and two points a type, whose curve is measured on the cluster."""
    cluster = {
        "accelerator_types": list(TYPES),
        "num_gpus": 0,
        "latency": "latency_tiny.toml",
        **changes.pop("cluster", {}),
    }
    return sweep_data(
        **{
            "name": "clustered",
            "shape": model,
            "calibration_trace": "trace.npz",
            "num_heads": [1, 2, 4],
            "trees": [{"kind": "chain", "depths": [1, 3]}, {"kind": "grown", "num_nodes": [4, 8]}],
            "search": {"max_nodes": 8},
            "predicted": None,
            "sampled": {
                "tree_nodes": 8,
                "num_prompts": 2,
                "seeds": [1],
                "max_new_tokens": 12,
                "vanilla": [0.7],
                "rejection": [0.7],
                "typical": [{"temperatures": [0.7], "epsilons": [0.09]}],
            },
            "decoded": {"num_points": 2, "seed": 5, "num_prompts": 2},
            "cluster": cluster,
            **changes,
        }
    )


def cluster_spec(model: str, **changes: Any) -> SweepSpec:
    return parse_sweep(tomli_w.dumps(cluster_data(model, **changes)), where="the test")


@pytest.fixture(scope="module")
def home(heads_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite of the tiny model, its trace and a latency spec."""
    folder = tmp_path_factory.mktemp("clustered")
    data = micro_data(heads_file)
    write_suite(folder / "suite.toml", data)
    write_suite(folder / "latency_tiny.toml", latency_data(heads_file))
    suite = parse_suite(tomli_w.dumps(data), where="the test")
    trace_suite(
        suite,
        suite_file=folder / "suite.toml",
        out=folder / "trace.npz",
        limit=None,
        allow_hub=False,
        console=QUIET,
    )
    return folder


@pytest.fixture(scope="module")
def address(steady: None) -> Iterator[str]:
    """A cluster with a node of each accelerator type, which takes one task at a time; the first is the
    head.
    """
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster()
    for kind in TYPES:
        cluster.add_node(num_cpus=1, resources={f"accelerator_type:{kind}": 1}, include_dashboard=False)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def executor(address: str) -> Iterator[RayExecutor]:
    with RayExecutor(address) as connected:
        yield connected


def noting_appends(patch: MonkeyPatch, note: Callable[[AnyCell], None]) -> None:
    """Call back after each run cell that is on disk."""
    append = Store.append

    def noting(store: Store[AnyCell], cell: AnyCell) -> None:
        append(store, cell)
        if not cell.key.startswith("composed"):
            note(cell)

    patch.setattr(Store, "append", noting)


class OneKill:
    """Kills one worker of this process's cluster in the middle of a cell, at the first chance."""

    def __init__(self) -> None:
        self.killed: int | None = None

    def __call__(self, cell: AnyCell | None = None) -> None:
        for process in psutil.Process().children(recursive=True) if self.killed is None else ():
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(TASK_TITLE):
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed = process.pid
                    return
            except psutil.NoSuchProcess:
                continue


def ran_cells(record: SweepRecord) -> list[SampledCell | DecodedCell]:
    return [*record.sampled, *record.decoded]


def swept(home: Path, spec: SweepSpec, results: Path, executor: RayExecutor | None) -> SweepRecord:
    options = SweepOptions(results=results)
    return SweepRecord(
        run_sweep(spec, spec_file=home / "sweep.toml", options=options, console=QUIET, executor=executor)
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def record(home: Path, tiny: tuple[LoadedModel, Engine], results: Path, executor: RayExecutor) -> SweepRecord:
    """The sweep on the cluster, one of whose workers is killed in the middle of a cell."""
    kill = OneKill()
    with pytest.MonkeyPatch.context() as patch:
        noting_appends(patch, kill)
        done = swept(home, cluster_spec(tiny[0].name), results, executor)
    assert kill.killed is not None and not psutil.pid_exists(kill.killed)
    return done


def test_a_lost_worker_costs_no_cell_and_repeats_none(record: SweepRecord) -> None:
    assert validate_record(record.folder) == () and record.failed == ()
    keys = [cell.key for cell in record.cells]
    assert len(set(keys)) == len(keys) == record.manifest.num_planned == 1 + 4 + 2 * 2  # type: ignore[union-attr]
    places = {cell.tree for cell in record.decoded}
    assert {cell.key for cell in record.decoded} == {
        f"decoded {place} on {kind}" for place in places for kind in TYPES
    }
    assert len(places) == 2 and record.origin.executor == "ray"


def test_cells_say_which_node_ran_them_and_no_file_names_a_host(record: SweepRecord, results: Path) -> None:
    ran = [cell.ran_on for cell in ran_cells(record)]
    assert all(
        one is not None and one.device == record.origin.device.model_copy(update={"num_threads": 1})
        for one in ran
    )
    nodes = {(one.accelerator_type, one.node) for one in ran if one is not None}
    # each type is a node, and did some of the work
    assert {kind for kind, _ in nodes} == set(TYPES) and len(nodes) == len(TYPES)
    written = "".join(path.read_text() for path in results.rglob("*") if path.is_file())
    assert ray.util.get_node_ip_address() not in written and socket.gethostname() not in written
    assert record.run_devices == (f"{record.origin.device.name} (cpu)",)


def test_sampled_texts_are_those_of_the_local_executor(
    record: SweepRecord, home: Path, tiny: tuple[LoadedModel, Engine], results: Path, tmp_path: Path
) -> None:
    (tmp_path / "latency").symlink_to(results / "latency")
    local = swept(home, cluster_spec(tiny[0].name, decoded=None), tmp_path, None)

    def texts(one: SweepRecord) -> dict[str, list[str]]:
        return {cell.key: [row.text_sha256 for row in cell.rows] for cell in one.sampled}

    assert texts(local) == texts(record) and len(local.sampled) == 4
    assert all(cell.ran_on is None for cell in local.sampled) and local.origin.executor == "local"


def test_points_decode_as_replayed_on_every_type(record: SweepRecord) -> None:
    for cell in record.decoded:
        assert cell.differences == () and len(cell.rows) == 2
        assert all(row.vanilla_s > 0 and row.composed_medusa_s > 0 for row in cell.rows)


def test_a_missing_curve_is_measured_once_on_a_node(
    record: SweepRecord, results: Path, executor: RayExecutor
) -> None:
    """Both pretended types are this machine's CPU, so that one record serves both."""
    (folder,) = results.glob("latency/tiny_nodes/*/*")
    assert validate_record(folder) == () and folder in executor.brought
    latency = LatencyRecord(folder)
    assert (latency.environment.commit, latency.environment.dirty) == (
        record.origin.commit,
        record.origin.dirty,
    )
    assert folder.name.endswith(f"-{(record.origin.commit or 'nocommit')[:8]}")
    assert latency.environment.device.name == record.origin.device.name
    assert f"latency record {folder.name}" in record.origin.inputs and {
        cell.curve.shape for cell in record.composed
    } == {record.spec.shape}
    assert [path.name for path in (results / "latency").iterdir()] == ["tiny_nodes"]


def test_nodes_run_the_code_that_was_shipped_and_keep_their_engine(
    record: SweepRecord, executor: RayExecutor
) -> None:
    def look() -> tuple[str, list[str], bool, int]:
        import harness.measure.sweep.node
        import harness.paths

        package = Path(harness.paths.__file__).parent
        found = harness.paths.resolve_path("embedded/medusa1.safetensors", base_folder=None)
        return (
            str(found),
            sorted(path.name for path in package.parent.iterdir()),
            (package / "tests").exists(),
            _hits(harness.measure.sweep.node),
        )

    def _hits(module: Any) -> int:
        return int(module._loaded.cache_info().hits)

    for kind in TYPES:
        heads, packages, has_tests, hits = ray.get(
            ray.remote(num_cpus=1, accelerator_type=kind)(look).remote()
        )
        assert packages == ["harness", "medusa_impl", "suites"] and not has_tests
        assert not heads.startswith(str(Path(__file__).parents[4])) and hits > 0


def test_a_stopped_driver_goes_on_where_it_stopped(
    record: SweepRecord, home: Path, results: Path, executor: RayExecutor, tmp_path: Path
) -> None:
    """What arrived before Ctrl-C stays as it is, nothing is run twice, and the curve is not measured
    again.
    """
    shutil.copytree(results / "latency", tmp_path / "latency")
    arrived = list[str]()

    def stopping(cell: AnyCell) -> None:
        arrived.append(cell.key)
        if len(arrived) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        noting_appends(patch, stopping)
        swept(home, record.spec, tmp_path, executor)
    (folder,) = tmp_path.glob("sweep/clustered/*/*")
    kept = (folder / CELLS_FILE).read_text()
    assert kept.count("\n") == 1 + 3
    with pytest.MonkeyPatch.context() as patch:
        noting_appends(patch, lambda cell: arrived.append(cell.key))
        resumed = swept(home, record.spec, tmp_path, executor)
    assert resumed.folder == folder and (folder / CELLS_FILE).read_text().startswith(kept)
    assert sorted(arrived) == sorted(cell.key for cell in ran_cells(record))
    assert validate_record(folder) == () and len(list(tmp_path.glob("latency/*/*/*"))) == 1
    with pytest.raises(UserError, match="found another executor"):
        unfinished = tmp_path / "unfinished"
        shutil.copytree(folder, unfinished, ignore=shutil.ignore_patterns("manifest.json"))
        options = SweepOptions(results=tmp_path, resume=unfinished)
        run_sweep(record.spec, spec_file=home / "sweep.toml", options=options, console=QUIET)


def test_the_command_line(
    record: SweepRecord,
    home: Path,
    results: Path,
    executor: RayExecutor,
    address: str,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> None:
    """The command line sweeps on the cluster that this module is connected to, and its record does not say
    where that is.
    """
    (tmp_path / "latency").symlink_to(results / "latency")
    monkeypatch.setattr(
        harness.measure.sweep.cluster,
        "RayExecutor",
        lambda asked: nullcontext(executor if asked == address else None),
    )
    sampled = {**cluster_data("any")["sampled"], "vanilla": [], "rejection": [], "typical": []}
    file = write_suite(
        home / "sweep_commanded.toml", cluster_data(record.spec.shape, name="commanded", sampled=sampled)
    )
    ran = command("sweep", file, "--results", tmp_path, "--executor", "ray", "--address", address)
    assert ran.code == ExitCode.OK, ran.err
    assert json.loads(ran.out.splitlines()[-1])["decoded"]["points"] == 4
    (folder,) = tmp_path.glob("sweep/commanded/*/*")
    origin = SweepRecord(folder).origin
    assert origin.command.endswith("--executor ray --address HOST:PORT") and origin.executor == "ray"
    assert command("validate", folder).code == ExitCode.OK


@pytest.fixture(scope="module")
def plan(record: SweepRecord, home: Path, results: Path) -> SweepPlan:
    """The plan of the finished sweep."""
    return plan_sweep(record.spec, base_folder=home, results=results)


@pytest.fixture(scope="module")
def inputs(plan: SweepPlan, home: Path) -> CellInputs:
    """What a node needs for the cells of the finished sweep."""
    return cell_inputs(plan, base_folder=home, allow_hub=False)


def test_points_are_decoded_on_devices_that_have_a_curve(
    plan: SweepPlan, home: Path, record: SweepRecord
) -> None:
    here = record.origin.device
    h100 = here.model_copy(update={"kind": "cuda", "name": "NVIDIA H100 PCIe"})
    devices: dict[str | None, DeviceInfo] = {"A100": here, "H100": h100}
    tasks, without_curve = plan_runs(plan, devices=devices, base_folder=home)
    assert {task.accelerator_type for task in tasks if isinstance(task, DecodedTask)} == {"A100"} and len(
        tasks
    ) == 4 + 2
    assert [(cell.key, cell.message.split(" for ")[0]) for cell in without_curve] == [
        ("decoded none on H100", "no latency record of H100 nodes")
    ]


def test_a_node_with_another_device_than_its_type_promised(
    plan: SweepPlan, inputs: CellInputs, executor: RayExecutor, tmp_path: Path
) -> None:
    """An accelerator type may stand for several devices; a point is never decoded on one and composed with
    the curve of another.
    """
    (curve,) = measured_curves(write_fake_latency(tmp_path / "other", modes=["eager"]))
    task = DecodedTask(plan.drafts[0], 0, curve, "H100")
    (failed,) = executor.run(inputs, [task], on_start=lambda words: None)
    assert isinstance(failed, FailedCell) and failed.key == "decoded 0 on H100" and failed.ran_on is not None
    here = failed.ran_on.device.name
    assert f"found a {here} (another machine: name made-up CPU against {here}" in failed.message
    assert "need the made-up CPU whose curve the point is composed with" in failed.message


def asking(inputs: CellInputs, **changes: Any) -> CellInputs:
    """The same cells, which ask the cluster for something else."""
    cluster = (inputs.spec.cluster or ClusterSpec()).model_copy(update=changes)
    return replace(inputs, spec=inputs.spec.model_copy(update={"cluster": cluster}))


def test_a_cell_that_fails_stands_alone(
    record: SweepRecord, inputs: CellInputs, executor: RayExecutor
) -> None:
    """A tree that is deeper than the heads fails on its node; the next cell runs."""
    deep = DraftTree.from_paths([(0,) * depth for depth in range(9)])
    bad = SampledTask(SampledSetting(rule="greedy"), tree=deep, index=0)
    cells = {cell.key: cell for cell in executor.run(inputs, [bad, VANILLA], on_start=lambda words: None)}
    failed, done = cells[bad.key], cells[VANILLA.key]
    assert isinstance(failed, FailedCell) and failed.ran_on is not None and "heads" in failed.message
    assert isinstance(done, SampledCell) and len(done.rows) == 2


def test_a_trace_of_other_heads_stops_the_sweep(inputs: CellInputs, executor: RayExecutor) -> None:
    """The error of a node reaches the driver as the error that it was."""
    provenance = inputs.trace.provenance.model_copy(update={"heads_hash": "d" * 64})
    other = replace(inputs, trace=Trace(provenance=provenance, prompts=inputs.trace.prompts))
    with pytest.raises(UserError, match="found a trace of another model or other heads") as caught:
        list(executor.run(other, [VANILLA], on_start=lambda words: None))
    assert type(caught.value) is UserError and caught.value.found == "a trace of another model or other heads"


def test_a_type_that_no_node_has(
    home: Path,
    tiny: tuple[LoadedModel, Engine],
    inputs: CellInputs,
    executor: RayExecutor,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> None:
    with pytest.raises(
        UserError,
        match=r"found a cluster with A100 x 1, H100 x 1; need a node with A100 that has 0 GPUs and 64 CPUs",
    ):
        swept(home, cluster_spec(tiny[0].name, cluster={"num_cpus": 64}), tmp_path, executor)
    with pytest.raises(UserError, match="need a node with B200"):
        swept(
            home,
            cluster_spec(tiny[0].name, cluster={"accelerator_types": ["A100", "B200"]}),
            tmp_path,
            executor,
        )
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(harness.measure.sweep.cluster, "_LOOK_S", 0.1)
    monkeypatch.setattr(harness.measure.sweep.cluster, "_PATIENCE_S", 0.0)
    with pytest.raises(UserError, match="need a node with B200"):  # as if the last one had left meanwhile
        list(
            executor.run(asking(inputs, accelerator_types=("B200",)), [VANILLA], on_start=lambda words: None)
        )


def test_a_node_that_cannot_begin(
    home: Path,
    tiny: tuple[LoadedModel, Engine],
    executor: RayExecutor,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
) -> None:
    def lacking(accelerator_type: str | None) -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(harness.measure.sweep.cluster, "describe_node", lacking)
    with pytest.raises(
        UserError,
        match=r"a node that cannot begin .ModuleNotFoundError: No module named 'torch'.; need nodes with "
        r"the packages",
    ):
        swept(home, cluster_spec(tiny[0].name), tmp_path, executor)


def test_a_spec_whose_records_leave_the_measured_curve_out(
    home: Path, tiny: tuple[LoadedModel, Engine], executor: RayExecutor, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="need 'tiny_nodes' among them"):
        swept(home, cluster_spec(tiny[0].name, measured={"records": ["other"]}), tmp_path, executor)


def test_a_worker_that_is_lost_too_often_is_a_failed_cell(inputs: CellInputs, executor: RayExecutor) -> None:
    kill, ended = OneKill(), threading.Event()

    def hunt() -> None:
        while kill.killed is None and not ended.is_set():
            kill()

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        (failed,) = executor.run(asking(inputs, max_retries=0), [VANILLA], on_start=lambda words: None)
    finally:
        ended.set()
        hunter.join()
    assert isinstance(failed, FailedCell) and (failed.key, failed.error_type) == (
        VANILLA.key,
        "WorkerCrashedError",
    )
    assert failed.message == "worker or node lost, with max_retries = 0" and kill.killed is not None


def sweep_command(home: Path, tmp_path: Path, *arguments: str) -> Ran:
    file = write_suite(home / "sweep_tiny.toml", cluster_data("tiny"))
    return command("sweep", file, "--results", tmp_path, *arguments)


def test_commands_that_reach_no_cluster(home: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = sweep_command(home, tmp_path, "--executor", "ray", "--address", nowhere)
        assert (
            ran.code == ExitCode.USER_ERROR and f"found nothing that answers at {nowhere}" in ran.error_line
        )
    for arguments, found in (
        (
            ("--executor", "ray", "--address", "somewhere"),
            "found --address somewhere; need auto, local or HOST:PORT",
        ),
        (("--address", "auto"), "found --executor local --address auto"),
        (("--executor", "slurm"), "found --executor slurm"),
    ):
        ran = sweep_command(home, tmp_path, *arguments)
        assert ran.code == ExitCode.USER_ERROR and found in ran.error_line
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = sweep_command(home, tmp_path, "--executor", "ray")
    assert ran.code == ExitCode.USER_ERROR and "pip install 'medusa-repro[ray]'" in ran.error_line


def test_files_that_a_suite_names_travel_with_it(tmp_path: Path) -> None:
    """What is a path follows from its type: a list of keys lacked `chat_template`, and so did the nodes."""
    for name in (
        "own/heads.bin",
        "tuned/adapter/a.json",
        "tuned/adapter/deep/b.bin",
        "there.npz",
        "chat.jinja",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "suite").mkdir()
    template, tree = str(tmp_path / "chat.jinja"), {"kind": "file", "path": str(tmp_path / "there.npz")}
    vanilla = {"name": "vanilla", "method": "vanilla"}
    medusa = {
        "name": "path",
        "method": "medusa",
        "baseline": "vanilla",
        "tree": tree,
        "acceptance": {"rule": "greedy"},
    }
    suite = SuiteSpec.model_validate(
        micro_data(tmp_path / "unused")
        | {
            "name": "path",
            "model": {"path": "models/big", "adapter": "../tuned/adapter", "chat_template": template},
            "heads": {"path": "own/heads.bin"},
            "arms": [vanilla, medusa],
        }
    )
    with pytest.raises(UserError, match=r"found no file 'own/heads.bin'"):
        packed(suite, base_folder=tmp_path / "suite")
    shutil.copytree(tmp_path / "own", tmp_path / "suite" / "own")
    named, files = packed(suite, base_folder=tmp_path / "suite")
    assert (
        Path(named["model"]["path"]).is_absolute()
        and named["heads"]["path"] == "own/heads.bin"
        and named["name"] == "path"
    )
    assert Path(named["model"]["adapter"]).name == "adapter"
    with unpacked(files) as folder:
        assert (
            folder / named["model"]["adapter"] / "deep" / "b.bin"
        ).read_bytes() == b"tuned/adapter/deep/b.bin"
        assert (folder / named["heads"]["path"]).read_bytes() == b"own/heads.bin"
        assert (folder / named["model"]["chat_template"]).read_bytes() == b"chat.jinja"
        assert (folder / named["arms"][1]["tree"]["path"]).read_bytes() == b"there.npz"
    assert not folder.exists()


def test_a_record_that_changed_on_its_way_is_not_kept(tmp_path: Path) -> None:
    sent = write_fake_latency(tmp_path / "sent")
    files = {path.name: path.read_bytes() for path in sent.folder.iterdir()}
    with pytest.raises(UserError, match=r"found SHA-256 .* in points.jsonl"):
        keep_record(
            tmp_path / "results",
            files | {"points.jsonl": files["points.jsonl"][:-9]},
            checkout=("e" * 40, True),
        )
    with pytest.raises(UserError, match=r"found no manifest.json"):
        keep_record(
            tmp_path / "results",
            {name: files[name] for name in files if name != "manifest.json"},
            checkout=("e" * 40, True),
        )
    assert list((tmp_path / "results" / "latency").iterdir()) == []
    kept = keep_record(tmp_path / "results", files, checkout=("e" * 40, True))
    assert validate_record(kept) == () and LatencyRecord(kept).points == sent.points
    assert (LatencyRecord(kept).environment.commit, kept.name) == ("e" * 40, "20240119T115000Z-eeeeeeee")


def test_what_a_cluster_may_be_asked() -> None:
    for wrong in (
        {"num_gpus": 1.5},
        {"num_cpus": 0},
        {"accelerator_types": ["A100", "A100"]},
        {"workers": 3},
    ):
        with pytest.raises(ValueError, match="validation error"):
            ClusterSpec.model_validate(wrong)
    assert [ClusterSpec(num_gpus=share).num_gpus for share in (0, 0.25, 1, 2)] == [0, 0.25, 1, 2]
    with pytest.raises(UserError, match=r"cluster.latency measures step times"):
        cluster_spec("tiny", measured=None, predicted={"shapes": ["vicuna-7b-v1.5"]})
    absolute = cluster_spec("tiny", cluster={"latency": str(Path.cwd() / "latency_own.toml")})
    assert portable(absolute)["cluster"]["latency"] == "latency_own.toml"


def test_the_record_of_a_command_names_no_address(monkeypatch: MonkeyPatch) -> None:
    from harness.cli.options import command_line

    monkeypatch.setattr(sys, "argv", ["medusa-repro", "sweep", "x.toml", "--address=ray://10.1.2.3:10001"])
    assert (
        json.dumps(command_line(address="ray://10.1.2.3:10001"))
        == '"medusa-repro sweep x.toml --address=HOST:PORT"'
    )
