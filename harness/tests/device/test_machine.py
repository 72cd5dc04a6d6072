"""Provenance: commit and dirty flag of the right checkout, a device by its own name, and nothing that names a
host, a user or a place.
"""

from __future__ import annotations

import getpass
import re
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest import MonkeyPatch

import harness.device.machine
from harness.device.doctor import examine
from harness.device.engine import Engine
from harness.device.gpu.driver import GpuDriver
from harness.device.machine import blas_settings, device_info, git_state, package_versions, settings
from harness.device.processor import host_processor
from harness.device.prompts import suite_prompts
from harness.measure.run import describe
from harness.paths import default_results, holds_absolute_path
from harness.records.machines.identity import machine_slug
from harness.records.provenance import DeviceInfo
from harness.tests.device.gpu.fake_nvml import FakeNvml
from harness.tests.tiny_suite import smoke_suite
from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository shaped like this one."""
    for name in ("harness/run.py", "results/run/report.md", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_clean_checkout(checkout: Path) -> None:
    commit, dirty = git_state(checkout / "harness")
    assert commit is not None and re.fullmatch(r"[0-9a-f]{40}", commit) and dirty is False


def test_changed_code_is_dirty_wherever_it_lies(checkout: Path) -> None:
    (checkout / "other.py").write_text("one\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "second")
    (checkout / "other.py").write_text("two\n")
    assert git_state(checkout / "harness")[1] is True


def test_what_a_run_writes_is_not_dirt(checkout: Path) -> None:
    """Results and README are looked for at the top of the checkout, not next to the package: they once
    counted as changed code.
    """
    (checkout / "results/run/report.md").write_text("two\n")
    (checkout / "README.md").write_text("two\n")
    (checkout / "results/new.json").write_text("untracked\n")
    assert git_state(checkout / "harness")[1] is False


def test_a_new_module_is_dirt(checkout: Path) -> None:
    (checkout / "harness/new.py").write_text("untracked\n")
    assert git_state(checkout / "harness")[1] is True


def test_no_checkout_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)
    assert git_state(tmp_path / "not" / "there") == (None, None)


def test_a_users_own_checkout_around_an_installed_package_is_not_ours(checkout: Path) -> None:
    """An environment inside another project once lent its commit to the record."""
    (checkout / ".gitignore").write_text("venv/\n")
    installed = checkout / "venv" / "site-packages" / "harness"
    installed.mkdir(parents=True)
    (installed / "run.py").write_text("one\n")
    assert git_state(installed) == (None, None)


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout / "harness") == (None, None)


def test_machine_slug_is_fit_for_a_folder() -> None:
    device = DeviceInfo(
        kind="cuda", name="NVIDIA A100-SXM4 (80GB)/x", num_cores=8, num_threads=8, memory_bytes=1
    )
    assert machine_slug(device) == "cuda-nvidia-a100-sxm4-80gb-x-8c"


def test_environment_names_versions_and_no_place(engine: Engine) -> None:
    suite = smoke_suite()
    prompts = suite_prompts(suite, engine.loaded)
    environment = describe(engine, suite=suite, prompts=prompts, command="medusa-repro reproduce smoke")
    text = environment.model_dump_json()
    assert not holds_absolute_path(text.replace("\\n", " "))
    assert not [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4 and name in text]
    assert {"torch", "transformers", "numpy"} <= set(environment.packages) == set(package_versions())
    assert (
        environment.device == device_info(torch.device("cpu"))
        and environment.device.num_threads == torch.get_num_threads()
    )
    assert (environment.backbone_sha256, environment.heads_sha256) == (
        engine.loaded.sha256,
        engine.heads_sha256,
    )
    assert environment.weight_bytes > environment.heads_bytes > 0
    fewer = describe(engine, suite=suite, prompts=prompts[:3], command="")
    assert fewer.prompts_sha256 != environment.prompts_sha256


def test_variables_that_move_timings_are_kept_and_no_others(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert settings()["OMP_NUM_THREADS"] == "1" and "SECRET_TOKEN" not in settings()


def test_blas_settings_are_one_line() -> None:
    assert "\n" not in blas_settings() and not holds_absolute_path(blas_settings())


def test_peak_memory_sees_what_was_allocated_and_freed() -> None:
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert peak_memory_bytes(device) >= before
    assert before > 10 * 2**20


def test_doctor_says_what_it_found_and_what_to_do(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDUSA_REPRO_CACHE", str(tmp_path / "not" / "made" / "yet"))
    lines = {line.name: line for line in examine(interval_s=0.05)}
    assert {"device", "threads", "load of other processes", "memory", "disk", "packed linear layers"} == set(
        lines
    )
    assert all(line.found and (line.fine or line.advice) for line in lines.values())
    assert not (tmp_path / "not").exists()


def test_doctor_warns_of_too_many_threads(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    line = next(line for line in examine(interval_s=0.05) if line.name == "threads")
    assert not line.fine and "OMP_NUM_THREADS" in line.advice


def test_results_go_to_the_checkout(tmp_path: Path) -> None:
    assert default_results() == Path(__file__).resolve().parents[3] / "results"


def test_a_gpu_is_described_by_its_driver_and_its_host(monkeypatch: MonkeyPatch) -> None:
    """All but the calls themselves runs here: PyTorch's properties and NVML are stand-ins."""
    nvml = FakeNvml()
    nvml.answers = {"version": "580.1", "used": 0, "total": 143771 * 2**20, "limit_milliwatts": 700_000}
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150109880320)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(harness.device.machine, "open_driver", lambda index: GpuDriver(nvml, index))
    device = device_info(torch.device("cuda"))
    assert device.kind == "cuda" and device.name == "NVIDIA H200"
    assert device.details == {
        "capability": "9.0",
        "cuda": str(torch.version.cuda),
        "driver": "580.1",
        "memory": "143771 MiB",
        "power limit": "700 W",
        "host processor": host_processor(),
    }
    slug = machine_slug(device)
    assert re.fullmatch(rf"cuda-nvidia-h200-700w-{device.num_cores}c-[0-9a-f]{{8}}", slug)
    nvml.answers["version"] = "575.2"
    assert machine_slug(device_info(torch.device("cuda"))) == slug
    nvml.answers["limit_milliwatts"] = 600_000
    assert machine_slug(device_info(torch.device("cuda"))) != slug
