"""Saved micro-benchmarks name their device and nobody's host, and are compared on the machine that they come
from only.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.device.machine import device_info
from harness.paths import holds_absolute_path

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
QUICK = (
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--benchmark-max-time=0.001",
    "--benchmark-min-rounds=1",
    "--benchmark-disable-gc",
)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with one benchmark and this project's hooks."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # workers disable benchmarks
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile(test_bench="def test_bench(benchmark):\n    assert benchmark(lambda: 3) == 3\n")
    return pytester


def saved(project: pytest.Pytester) -> dict[str, Any]:
    """Save a result and return it."""
    assert project.runpytest_inprocess(*QUICK, "--benchmark-json=saved.json").ret == pytest.ExitCode.OK
    result: dict[str, Any] = json.loads((project.path / "saved.json").read_text())
    return result


def compared(project: pytest.Pytester, data: dict[str, Any]) -> pytest.RunResult:
    """Compare with an altered result."""
    (project.path / "other.json").write_text(json.dumps(data))
    return project.runpytest_inprocess(*QUICK, "--benchmark-compare=other.json")


def keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys(inner)}
    return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()


def test_a_saved_result_says_where_it_comes_from_and_names_nobody(project: pytest.Pytester) -> None:
    result = saved(project)
    device = device_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine = result["machine_info"]
    assert machine["device"]["kind"] == device.kind and machine["device"]["name"] == device.name
    assert (
        machine["device"]["num_threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    )
    assert isinstance(machine["packed_operators"], list)
    assert not {"node", "user", "branch", "cpu"} & keys(result)
    assert set(result["commit_info"]) == {"id", "dirty", "project"}
    assert not holds_absolute_path(json.dumps(result))
    assert platform.node() not in json.dumps(machine).replace('"', " ").split()


def test_the_same_machine_is_compared(project: pytest.Pytester) -> None:
    run = compared(project, saved(project))
    assert run.ret == pytest.ExitCode.OK
    for line in ("test_bench (other)*", "test_bench (NOW)*"):  # the faster stands first
        run.stdout.fnmatch_lines([line])
    assert "machine_info is different" not in run.stdout.str() + run.stderr.str()


@pytest.mark.filterwarnings("ignore:Benchmark machine_info is different")  # pytest-benchmark's own
def test_another_driver_or_a_little_less_memory_is_the_same_machine(project: pytest.Pytester) -> None:
    result = saved(project)
    device = result["machine_info"]["device"]
    device["details"] |= {"driver": "1.0", "capability": "another word of PyTorch's"}
    device["memory_bytes"] -= 8192
    if device["kind"] == "cpu":
        assert compared(project, result).ret == pytest.ExitCode.OK


def test_another_machine_fails_the_comparison(project: pytest.Pytester) -> None:
    """pytest-benchmark itself only warns, so that a slower machine reads as a slower commit."""
    result = saved(project)
    here = result["machine_info"]["device"]["name"]
    result["machine_info"]["device"] |= {"name": "Abacus 9", "num_threads": 77}
    result["machine_info"]["torch"] = "0.1"
    run = compared(project, result)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    message = run.stderr.str()
    assert (
        f"found torch 0.1 against {torch.__version__}; another machine: name Abacus 9 against {here}"
        in message
    )
    assert f"; 77 threads against {torch.get_num_threads()}; need one saved on this machine" in message
    assert "passed" not in run.stdout.str()

    # as saved without this project's hooks
    result["machine_info"] = {
        "node": "elsewhere",
        "machine": "x86_64",
    }
    run = compared(project, result)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert "a benchmark that does not say which device it was measured on" in run.stderr.str()


def test_a_benchmark_saved_before_machines_said_who_they_are_is_refused(project: pytest.Pytester) -> None:
    """Only its name is known, and one name has stood for several machines."""
    result = saved(project)
    result["machine_info"]["device"]["details"] = {"capability": "AVX512"}
    run = compared(project, result)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert "perhaps another machine of that name: one does not tell its" in run.stderr.str()
