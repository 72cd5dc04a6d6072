"""Rules for every test of the project: no hub is asked, tests whose needs are not met skip with a reason, and
saved micro-benchmarks say which device they come from and are compared on that device only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# a machine that only measures need not have pytest-benchmark
_OF_BENCHMARKS = pytest.hookimpl(optionalhook=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--wheel`, which lets the tests of the built wheel run."""
    parser.addoption("--wheel", action="store_true", help="build the wheel and test it (nox -s wheel)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests as skipped whose needs are not met: `wheel` without `--wheel`, `gpu` without a CUDA device.

    Torch is imported only if a `gpu` test was collected.
    """
    if not config.getoption("--wheel"):
        for item in items:
            if item.get_closest_marker("wheel") is not None:
                item.add_marker(pytest.mark.skip(reason="builds the wheel: run by nox -s wheel"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))


@_OF_BENCHMARKS
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Return what moves a micro-benchmark: device, threads, versions, packed operators.

    It stands in for pytest-benchmark's own, which holds the host's name and clock rates that differ from run
    to run.
    """
    import torch

    from harness.device.machine import device_info, python_version
    from medusa_impl.engine.packed_linear import packing_available

    device = device_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": python_version(),
        "torch": torch.__version__,
        "device": device.model_dump(mode="json"),
        "packed_operators": [
            str(dtype) for dtype in (torch.float32, torch.bfloat16) if packing_available(dtype)
        ],
    }


@_OF_BENCHMARKS
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    """Return the commit and whether the checkout differs from it; pytest-benchmark's own also names folder
    and branch.
    """
    from harness.device.machine import git_state
    from harness.paths import code_folder

    commit, dirty = git_state(code_folder())
    return {"id": commit, "dirty": dirty, "project": "medusa-repro"}


@_OF_BENCHMARKS
def pytest_benchmark_compare_machine_info(
    machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse to compare with a result of another machine, of which pytest-benchmark itself only warns.

    Raises: pytest.UsageError, which ends the session with exit code 4.
    """
    from harness.errors import UserError

    # through JSON, as the saved one went
    saved, here = compared_benchmark.get("machine_info", {}), json.loads(json.dumps(machine_info))
    if faults := [*_other_software(saved, here), *_other_machine(saved.get("device"), here["device"])]:
        found = UserError(
            found="; ".join(faults),
            need="one saved on this machine with its software and threads",
            where="the benchmark to compare with",
            do="save one here with --benchmark-save=NAME and compare with that",
        )
        raise pytest.UsageError(str(found))


def _other_software(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what differs beside the device, saved against here."""
    for name, value in here.items():
        if name != "device" and saved.get(name) != value:
            yield f"{name} {saved.get(name, 'absent')} against {value}"


def _other_machine(saved: Any, here: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a saved benchmark's device must not be compared with this one, by the rule of records."""
    from pydantic import ValidationError

    from harness.records.machines.comparable import MeasuredMachine, not_comparable
    from harness.records.provenance import DeviceInfo

    try:
        one, other = DeviceInfo.model_validate(saved), DeviceInfo.model_validate(here)
    except ValidationError:
        yield "a benchmark that does not say which device it was measured on"
        return
    if reason := not_comparable(MeasuredMachine(one), MeasuredMachine(other)):
        yield reason
    if one.num_threads != other.num_threads:
        yield f"{one.num_threads} threads against {other.num_threads}"
