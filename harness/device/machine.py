"""What machine, software and commit a record comes from; nothing here names a host, a user or a path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from harness.device.gpu.driver import gpu_details, open_driver
from harness.device.processor import cpu_details, cpu_name, host_processor
from harness.files import lines_of
from harness.paths import code_folder
from harness.records.machines.identity import HOST_PROCESSOR
from harness.records.provenance import VARIABLES, DeviceInfo
from harness.records.store import utc_now

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "gguf",
    "medusa-repro",
)


class Machine(TypedDict):
    """The device and the software on it, as the fields of a record have them."""

    device: DeviceInfo
    python: str
    packages: dict[str, str]


class Origin(Machine):
    """Where a record comes from, as the fields of a `Provenance` have it."""

    commit: str | None
    dirty: bool | None
    command: str
    started_utc: str


def origin(device: torch.device, *, command: str) -> Origin:
    """Return where a record comes from that a command begins now on a device."""
    commit, dirty = checkout_state()
    return Origin(**machine(device), commit=commit, dirty=dirty, command=command, started_utc=utc_now())


def machine(device: torch.device) -> Machine:
    """Return what the device is and which software runs on it."""
    return Machine(device=device_info(device), python=python_version(), packages=package_versions())


def checkout_state() -> tuple[str | None, bool | None]:
    """Return the commit of this code and whether tracked files differ from it, as `git_state` does."""
    return git_state(code_folder())


def package_versions() -> dict[str, str]:
    """Return the versions of Python packages that can move a figure."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that tracks `folder`, and whether tracked files differ.

    Both are None outside a checkout. A checkout of something else around it (an environment inside a user's
    own project) does not count.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "--", ".") is not None else None
    outside = (":(top,exclude)results", ":(top,exclude)README.md")  # what a run itself writes
    changes = git("status", "--porcelain", "--", ":(top)", *outside) if commit else None
    return commit, None if changes is None else bool(changes)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that this process can still take: of the GPU, else of the host.

    What PyTorch has set aside on the GPU and does not use counts as free.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def device_info(device: torch.device) -> DeviceInfo:
    """Return what the device is, by its own name."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        details = {
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
            **gpu_details(open_driver(device.index or 0)),
            HOST_PROCESSOR: host_processor(),
        }
        kind, name, memory = "cuda", properties.name, properties.total_memory
    else:
        kind, name, memory, details = (
            "cpu",
            cpu_name(),
            psutil.virtual_memory().total,
            {"capability": torch.backends.cpu.get_cpu_capability(), **cpu_details()},
        )
    return DeviceInfo.model_validate(
        {
            "kind": kind,
            "name": name,
            "num_cores": os.cpu_count() or 1,
            "num_threads": torch.get_num_threads(),
            "memory_bytes": memory,
            "details": details,
        }
    )


def blas_settings() -> str:
    """Return the BLAS and vector settings that PyTorch was built with, in one line."""
    shown = torch.__config__.show()
    parts = [
        line.strip(" -")
        for line in lines_of(shown)
        if any(word in line for word in ("BLAS", "MKL", "capability", "OpenMP"))
    ]
    return "; ".join(
        part.split("Build settings")[0].strip()[:90]
        for part in parts
        if part and "Build settings" not in part
    )


def settings() -> dict[str, str]:
    """Return the environment variables that change threading or kernels, where set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def python_version() -> str:
    """Return the interpreter's version."""
    return platform.python_version()
