"""The acceptance of a machine: every part for real in small form, time that runs out, kills, and resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from pytest import MonkeyPatch
from rich.console import Console

import harness.measure.gpu.run
from harness.errors import ExitCode
from harness.files import DataPath, Frozen, file_sha256, write_json
from harness.judge.validate.record import validate_record
from harness.measure.gpu.outcome import outcome_of, told_of, told_steps
from harness.measure.gpu.process import Ended, run_child
from harness.measure.gpu.run import GpuOptions, print_gpu_plan, run_gpu
from harness.measure.gpu.self_test import read_counts, test_files
from harness.measure.latency.run import LatencyOptions, run_latency
from harness.paths import code_folder, shipped
from harness.records.gpu.record import KERNELS_FILE, GpuRecord
from harness.records.latency import LatencyPoint
from harness.records.profiles.kernels import Contender, KernelRaces, Race
from harness.records.provenance import Provenance
from harness.specs.gpu import GpuSpec, KernelsPart, LatencyPart, load_gpu_spec, schedule
from harness.specs.latency import load_latency_spec
from harness.tests.tiny_suite import QUIET, command, small_device_limits, small_device_limits_of_others

ROOT = code_folder().parent
PARTS = ["tests", "limits", "latency", "suite", "rates", "kernels"]
NO_NETWORK = """
import socket

def no_network(*arguments):
    raise OSError("there is no network")

socket.socket.connect = socket.create_connection = no_network
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine without network, nox, git, pytest-benchmark and datasets."""
    place = tmp_path_factory.mktemp("hiding")
    return {
        **os.environ,
        **small_device_limits_of_others(
            place, hidden=("nox", "datasets", "pytest_benchmark"), more=NO_NETWORK
        ),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whose list names what is hidden
        "PATH": str(place),
        "OMP_NUM_THREADS": "1",
    }


def bare_command(bare: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, words)],
        env=bare,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


class Accepted(Frozen):
    """The small form of the acceptance, run once on a bare machine."""

    results: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def accepted(bare: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Accepted:
    results = tmp_path_factory.mktemp("gpu") / "results"
    done = bare_command(bare, "gpu", "--device", "cpu", "--results", results)
    return Accepted(results=results, code=done.returncode, out=done.stdout, err=done.stderr)


def test_every_part_runs_on_a_bare_machine_and_leaves_a_sealed_record(accepted: Accepted) -> None:
    assert accepted.code == ExitCode.OK, accepted.err
    assert "Traceback" not in accepted.err
    last = json.loads(accepted.out.splitlines()[-1])
    assert [one["part"] for one in last["parts"]] == PARTS and last["accepted"] is True
    (folder,) = (accepted.results / "gpu" / "cpu").glob("*/*")
    record = GpuRecord(folder)
    assert validate_record(folder) == () and record.origin.commit is None, "there is no git"
    assert [result.part for result in record.parts] == PARTS
    assert all(0 < result.elapsed_s < result.limit_s for result in record.parts)
    assert record.kernels is not None
    last_one = "short" if record.kernels.num_left_out else "ok"  # a slow machine has time for one race
    assert [result.outcome for result in record.parts] == ["ok"] * 5 + [last_one]
    for result in record.parts:
        if result.record is not None:
            own = accepted.results / result.record
            assert validate_record(own) == () and (own / "report.md").is_file()
            assert result.manifest_sha256 == file_sha256(own / "manifest.json")
    assert [result.record is None for result in record.parts] == [True, True, False, False, True, True]
    for line in accepted.err.splitlines():
        assert str(accepted.results) not in line


def test_every_part_says_what_it_found(accepted: Accepted) -> None:
    (folder,) = (accepted.results / "gpu" / "cpu").glob("*/*")
    record = GpuRecord(folder)
    told = {result.part: result.told for result in record.parts}
    counts, limits, corpus, training = record.tests, record.limits, record.corpus, record.training
    assert counts is not None and counts.num_passed >= 2 and counts.num_failed == 0
    assert told["tests"] == f"{counts.num_passed} passed, 0 failed, {counts.num_skipped} skipped"
    assert list(limits) == ["float32"] and told["limits"].startswith("float32 reads ")
    counted, steps = told["latency"].split("; ")
    assert counted == "6 sizes timed, 0 left out for want of time, 0 skipped for other reasons"
    assert re.fullmatch(r"eager, batch 1, context 32: a step takes \S+ ms, \S+ times that at 16 nodes", steps)
    assert told["suite"] == "valid"
    assert corpus is not None and training is not None and corpus.num_answers > 0
    assert corpus.num_tokens == 16 * corpus.num_answers, "a tiny model has no end-of-sequence token"
    assert told["rates"].startswith("corpus ") and "training, subset, " in told["rates"]
    assert training.recipe == "tiny" and {stage.name for stage in training.stages} == {"subset", "full"}
    assert record.kernels is not None and told["kernels"].startswith(f"{len(record.kernels.races)} races in ")
    for result in record.parts:
        line = f"{result.part}: {result.outcome} "
        assert line in accepted.err and line in accepted.out
    report = (folder / "report.md").read_text()
    assert all(f"| {part} " in report for part in PARTS) and "## Device limits" in report


def test_the_plan_is_printed_on_a_bare_machine_in_little_time(bare: dict[str, str], tmp_path: Path) -> None:
    done = bare_command(bare, "gpu", "--dry-run", "--results", tmp_path / "results")
    assert done.returncode == ExitCode.OK and not (tmp_path / "results").exists(), done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    spec = load_gpu_spec(shipped("gpu", "cuda.toml"))
    assert last["seconds"] == schedule(spec) and last["device"] == "cuda"
    for part in PARTS:
        assert f"  {part}: from " in done.stdout


def test_a_printed_plan_says_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    ran = command("gpu", "--dry-run", "--minutes", "2", "--skip", "limits")
    assert ran.code == ExitCode.OK
    assert json.loads(ran.out.splitlines()[-1])["seconds"] == {
        "tests": 60.0,
        "latency": 60.0,
        "suite": None,
        "rates": None,
        "kernels": None,
    }
    assert "suite: left out: too little time" in ran.out
    loaded = load_gpu_spec(shipped("gpu", "cuda.toml"))
    assert (
        sum(seconds or 0 for seconds in print_gpu_plan(loaded, console=Console(quiet=True)).values()) == 300
    )


def test_a_machine_without_a_cuda_device_is_told_so_in_one_line(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        ran = command("gpu", "--results", tmp_path)
    assert ran.code == ExitCode.USER_ERROR and not list(tmp_path.iterdir())
    assert ran.error_line.startswith("error: found no CUDA device; need one that PyTorch ")
    assert "--device cpu" in ran.error_line


def test_a_part_that_does_not_exist_is_a_user_error() -> None:
    ran = command("gpu", "--only", "limits,curve")
    assert ran.code == ExitCode.USER_ERROR and "no part 'curve'" in ran.error_line


@pytest.mark.parametrize(("plan", "device"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_plan_for_another_device_than_asked_for_is_refused(plan: str, device: str) -> None:
    """`gpu cuda --device cpu` once took the plan and left out what the option says."""
    ran = command("gpu", plan, "--device", device, "--dry-run")
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line.startswith(
        f"error: found --device {device} with the plan {plan}; need --device {plan}"
    )
    same = command("gpu", plan, "--device", plan, "--dry-run")
    assert same.code == ExitCode.OK and json.loads(same.out.splitlines()[-1])["device"] == plan


# Parts that are stopped, and their processes


def small_plan(tmp_path: Path, *parts: dict[str, Any], **changes: Any) -> tuple[GpuSpec, Path]:
    file = tmp_path / "plan.toml"
    data = {
        "schema_version": 1,
        "kind": "gpu",
        "name": "small",
        "description": "for tests",
        "device": "cpu",
        "parts": list(parts),
        **changes,
    }
    file.write_text(tomli_w.dumps(data))
    return load_gpu_spec(file), file


def test_a_part_that_runs_over_is_stopped_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Pytest takes the interrupt as Ctrl-C, and its counts are kept.

    Parts run in the checkout's folder, while the results folder goes from where the command was typed.
    """
    monkeypatch.chdir(tmp_path)
    for name, value in small_device_limits_of_others(tmp_path).items():
        monkeypatch.setenv(name, value)
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(300)\n")
    over = {"part": "tests", "files": [str(tests)], "limit_s": 8, "least_s": 1}
    limits = {"part": "limits", "dtypes": ["float32"], "limit_s": 60}
    file = small_plan(tmp_path, over, limits, minutes=68 / 60)[1]
    ran = command("gpu", file, "--results", "results")
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    last = json.loads(ran.out.splitlines()[-1])
    assert [(one["part"], one["outcome"]) for one in last["parts"]] == [
        ("tests", "stopped"),
        ("limits", "ok"),
    ]
    assert 8 <= last["parts"][0]["seconds"] < 20 and not last["accepted"]
    (folder,) = (tmp_path / "results" / "gpu" / "small").glob("*/*")
    assert validate_record(folder) == ()
    first = GpuRecord(folder).parts[0]
    assert first.told == "stopped at its limit; 1 passed, 0 failed, 0 skipped"
    assert str(tmp_path) not in (folder / "plan.toml").read_text()


def test_a_latency_run_that_its_budget_cut_short_is_told_from_a_whole_one(tmp_path: Path) -> None:
    spec = load_latency_spec(shipped("latency", "tiny.toml"))
    part = LatencyPart(
        part="latency", spec=DataPath("latency/tiny.toml"), limit_s=30, least_s=10, reserve_s=4
    )
    with small_device_limits():
        own = run_latency(
            spec, spec_file=None, options=LatencyOptions(results=tmp_path, time_budget_s=0.0), console=QUIET
        )
    told = told_of(part, ended(), folder=tmp_path, record=own)
    assert outcome_of(part, ended(), folder=tmp_path, record=own) == "short"
    assert told == "0 sizes timed, 6 left out for want of time, 0 skipped for other reasons"
    (own / "manifest.json").unlink()
    told = told_of(part, ended(-9, overran=True), folder=tmp_path, record=own)
    assert told.startswith("stopped at its limit, and killed since it did not end; ")
    assert told.endswith("its record is unfinished, and its own command resumes it")


@pytest.mark.parametrize(("num_left_out", "outcome"), [(0, "ok"), (7, "short")])
def test_races_that_their_budget_cut_short_are_told_from_whole_ones(
    asked: Ended, tmp_path: Path, num_left_out: int, outcome: str
) -> None:
    """Races cut by their budget once counted as all there are."""
    part = KernelsPart(part="kernels", limit_s=30, least_s=20, reserve_s=8)
    ways = (Contender(name="a", call_s=(2.0,), max_error=0), Contender(name="b", call_s=(1.0,), max_error=0))
    races = KernelRaces(
        origin=Provenance.model_validate_json(asked.last_line),
        dtype="float32",
        calls_a_repeat=20,
        races=(Race(computation="product", shape="small", read_bytes=1, contenders=ways),),
        num_left_out=num_left_out,
    )
    write_json(tmp_path / KERNELS_FILE, races)
    assert outcome_of(part, ended(), folder=tmp_path, record=None) == outcome
    told = told_of(part, ended(), folder=tmp_path, record=None)
    left_out = ", 7 left out for want of time" if num_left_out else ""
    assert told == f"1 races in float32, the engine's way is not the fastest in 1{left_out}"


def test_a_curve_is_told_by_its_first_batch_and_longest_context(tmp_path: Path) -> None:
    """Of 1, 4, 64 and 128 nodes it is 64: the paper's trees have as many."""
    sizes = {1: 0.004, 4: 0.005, 64: 0.006, 128: 0.1}
    points = [
        LatencyPoint(
            dtype="float32",
            mode="eager",
            num_nodes=nodes,
            num_heads=min(4, nodes - 1),
            context_tokens=context,
            batch=batch,
            backbone_s=(1.0,),
            step_s=(step_s * batch * context, 9.0, step_s * batch * context),
        )
        for batch in (2, 1)
        for context in (1, 2)
        for nodes, step_s in sizes.items()
    ]
    assert told_steps(points) == "eager, batch 1, context 2: a step takes 8 ms, 1.50 times that at 64 nodes"
    assert told_steps(points[:1]) == "eager, batch 2, context 1: a step takes 8 ms"
    assert told_steps(points[1:4]) == told_steps([]) == ""


@pytest.fixture
def quick_grace(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("harness.measure.gpu.process._GRACE_S", 1.0)


def module(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "planted_module.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}


def run_module(tmp_path: Path, text: str, *, limit_s: float = 60.0) -> tuple[Ended, list[str]]:
    said: list[str] = []
    environment = module(tmp_path, text)
    return run_child(
        ["module", "planted_module"], limit_s=limit_s, environment=environment, say=said.append
    ), said


def test_a_process_tells_its_last_line_and_what_went_wrong(tmp_path: Path) -> None:
    text = "import sys\nprint('first')\nprint('last')\nprint('error: no disk at /root/x', file=sys.stderr)\n"
    ended, said = run_module(tmp_path, text + "print('more', file=sys.stderr)\nsys.exit(3)\n")
    assert (ended.code, ended.overran, ended.last_line) == (3, False, "last")
    assert ended.complaint == "error: no disk at ..." and said == ["error: no disk at /root/x", "more"]


def test_a_process_that_heeds_no_interrupt_is_killed_with_all_that_it_started(
    tmp_path: Path, quick_grace: None
) -> None:
    text = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(300)\n"
    )
    ended, _ = run_module(tmp_path, text, limit_s=3.0)
    assert ended.overran and ended.was_killed and 3 <= ended.elapsed_s < 15
    gone(int(ended.last_line))


def test_a_package_that_is_missing_is_one_line() -> None:
    ended = run_child(["module", "no_such_package"], limit_s=60, environment={}, say=lambda line: None)
    assert ended.code == ExitCode.USER_ERROR
    assert ended.complaint.startswith("error: found no package no_such_package; need it for this part")


def test_a_part_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    """Else it would go on to write into a record that the same command, run again, takes up."""
    environment = module(
        tmp_path, "import os, sys, time\nprint(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(300)\n"
    )
    code = (
        "from harness.measure.gpu.process import run_child\n"
        "say = lambda line: print(line, flush=True)\n"
        "run_child(['module', 'planted_module'], limit_s=300, environment={}, say=say)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone(child)


def gone(process: int) -> None:
    """Wait until a process is gone; fails where it stays."""
    for _ in range(150):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} is still there")


# What a plan's run makes of its parts


@pytest.fixture(scope="module")
def asked() -> Ended:
    """What the process says that asks the device."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return run_child(["origin", "medusa-repro gpu"], limit_s=120, environment=hidden, say=lambda line: None)


@pytest.fixture
def planted(asked: Ended, monkeypatch: MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Parts whose processes end as planted; that of the first one, which asks the device, was real."""

    def plant(*ends: Ended | BaseException) -> list[list[str]]:
        begun: list[list[str]] = []

        def run(words: list[str], **options: Any) -> Ended:
            if words[0] == "origin":
                return asked
            begun.append(words)
            end = ends[len(begun) - 1]
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(harness.measure.gpu.run, "run_child", run)
        return begun

    return plant


def ended(code: int = 0, *, overran: bool = False, complaint: str = "", last_line: str = "") -> Ended:
    return Ended(code=code, overran=overran, elapsed_s=1.0, last_line=last_line, complaint=complaint)


LATENCY = {"part": "latency", "spec": "latency/tiny.toml", "limit_s": 30, "least_s": 10, "reserve_s": 4}
SUITE = {
    "part": "suite",
    "suite": "smoke.toml",
    "num_prompts": 2,
    "limit_s": 30,
    "least_s": 10,
    "reserve_s": 4,
}
LIMITS = {"part": "limits", "dtypes": ["float32"], "limit_s": 30}


def run_plan(tmp_path: Path, *parts: dict[str, Any], **changes: Any) -> GpuRecord:
    spec, file = small_plan(tmp_path, *parts, **changes)
    options = GpuOptions(results=tmp_path / "results", command="medusa-repro gpu")
    return GpuRecord(run_gpu(spec, spec_file=file, options=options, console=QUIET))


def test_a_part_that_fails_says_why_and_the_next_one_runs(
    planted: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    invalid = json.dumps({"valid": {"texts": False, "speeds": None}, "failed_checks": ["token_counts"]})
    begun = planted(
        ended(3, complaint="error: found too little memory"), ended(2, last_line=invalid), ended(-11)
    )
    record = run_plan(tmp_path, LATENCY, SUITE, LIMITS)
    assert [(result.outcome, result.told) for result in record.parts] == [
        ("failed", "error: found too little memory"),
        ("invalid", "ended with exit code 2; checks that failed: token_counts"),
        ("failed", "ended with exit code -11"),
    ]
    assert validate_record(record.folder) == ()
    assert begun[0][:3] == ["module", "harness", "latency"] and begun[1][:3] == [
        "module",
        "harness",
        "reproduce",
    ]
    assert begun[1][begun[1].index("--limit") + 1] == "2" and begun[2][0] == "limits"


def test_a_command_gets_the_time_of_its_part_less_the_reserve(
    planted: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    begun = planted(ended())
    run_plan(tmp_path, LATENCY, minutes=10)
    budget_s = 60 * float(begun[0][begun[0].index("--time-budget") + 1])
    assert 580 < budget_s <= 596, "ten minutes, less the 4 s of its reserve"


def test_a_part_without_time_left_is_skipped_and_said_so(
    planted: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    planted()
    record = run_plan(tmp_path, LATENCY, minutes=0.1)
    assert [result.outcome for result in record.parts] == ["skipped"]
    assert record.parts[0].told.endswith("of 0.1 minutes are left, need 10")
    assert validate_record(record.folder) == ()


def test_a_killed_run_goes_on_with_the_parts_that_are_left(
    planted: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    planted(ended(3), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_plan(tmp_path, SUITE, LATENCY, LIMITS)
    (folder,) = (tmp_path / "results" / "gpu" / "small").glob("*/*")
    assert [result.part for result in GpuRecord(folder).parts] == ["suite"]
    begun = planted(ended(3), ended(3))
    record = run_plan(tmp_path, SUITE, LATENCY, LIMITS)
    assert record.folder == folder and [result.part for result in record.parts] == [
        "suite",
        "latency",
        "limits",
    ]
    assert [words[2] if words[0] == "module" else words[0] for words in begun] == ["latency", "limits"]


def test_another_choice_of_parts_is_another_run(
    planted: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    planted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_plan(tmp_path, SUITE, LATENCY)
    planted(ended(3))
    run_plan(tmp_path, LATENCY)
    assert len(list((tmp_path / "results" / "gpu" / "small").glob("*/*"))) == 2


# Which tests are run, and their counts


def test_the_files_of_a_marker_are_those_that_use_it() -> None:
    (part,) = (one for one in load_gpu_spec(shipped("gpu", "cuda.toml")).parts if one.part == "tests")
    files = test_files(part, checkout=ROOT)
    assert "medusa_impl/tests/engine/test_runner.py" in files
    assert all(f"pytest.mark.{part.marker}" in (ROOT / name).read_text() for name in files)
    assert "harness/tests/device/test_clock.py" not in files


def test_an_installed_package_has_no_tests(tmp_path: Path, planted: Callable[..., list[list[str]]]) -> None:
    planted()
    record = run_plan(tmp_path, {"part": "tests", "files": ["harness/tests/no_such_test.py"], "limit_s": 30})
    assert record.parts[0].outcome == "failed" and "found no tests; need a checkout" in record.parts[0].told


def test_counts_come_from_the_report_of_pytest(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    assert read_counts(report) is None
    report.write_text("<testsuites><testsuite hostname='h'><testcase classname='a.b' name='c'/></test")
    assert read_counts(report) is None, "pytest was killed while it wrote"
    report.write_text(
        "<testsuites><testsuite hostname='h' tests='4' failures='1' errors='1' skipped='1'>"
        "<testcase classname='a.b' name='c'/><testcase classname='a.b' name='interrupted'/>"
        "<testcase classname='a.b' name='d'><failure message='x'/></testcase>"
        "<testcase classname='a.b' name='e'><error message='x'/></testcase>"
        "<testcase classname='a.b' name='f'><skipped message='x'/></testcase></testsuite></testsuites>"
    )
    counts = read_counts(report)
    assert counts is not None
    assert (counts.num_passed, counts.num_failed, counts.num_skipped) == (1, 2, 1)
    assert counts.failed == ("a.b.d", "a.b.e")
