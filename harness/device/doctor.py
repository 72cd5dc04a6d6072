"""Is this machine fit to measure on: threads, memory, disk, load of other processes, device."""

from __future__ import annotations

import os
import shutil
import sys

import psutil
import torch

from harness.device.engine import best_device
from harness.device.gpu.watch import GpuWatch, gpu_watch
from harness.device.machine import device_info
from harness.errors import UserError
from harness.files import Frozen
from harness.paths import cache_dir
from harness.records.machines.identity import machine_slug
from medusa_impl.engine.packed_linear import packing_available

_NEEDED_MEMORY_BYTES, _NEEDED_DISK_BYTES, _QUIET_SHARE = 8 * 10**9, 3 * 10**9, 0.25


class DoctorLine(Frozen):
    """One finding: what it is, whether it is fine, and what to do where it is not."""

    name: str
    fine: bool
    found: str
    advice: str = ""


def examine(*, interval_s: float = 1.0) -> tuple[DoctorLine, ...]:
    """Return the findings of this machine; takes `interval_s` to watch other processes."""
    device = device_info(best_device())
    busy = psutil.cpu_percent(interval=interval_s) / 100
    free_memory = psutil.virtual_memory().available
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free_disk = shutil.disk_usage(folder).free
    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
    )
    lines = [
        DoctorLine(
            name="device",
            fine=True,
            found=f"{device.kind}: {device.name}, {device.memory_bytes / 1e9:.1f} GB, known as "
            f"{machine_slug(device)}",
        ),
        DoctorLine(
            name="threads",
            fine=threads <= cores,
            found=f"{threads} threads on {cores} cores",
            advice="set OMP_NUM_THREADS to the number of cores or less",
        ),
        DoctorLine(
            name="load of other processes",
            fine=busy <= _QUIET_SHARE,
            found=f"{100 * busy:.0f} % of all cores busy over {interval_s:g} s",
            advice="stop other work: it moves timings",
        ),
        DoctorLine(
            name="memory",
            fine=free_memory >= _NEEDED_MEMORY_BYTES or device.kind == "cuda",
            found=f"{free_memory / 1e9:.1f} GB free",
            advice=f"the embedded suite needs up to {_NEEDED_MEMORY_BYTES / 1e9:.0f} GB",
        ),
        DoctorLine(
            name="disk",
            fine=free_disk >= _NEEDED_DISK_BYTES,
            found=f"{free_disk / 1e9:.1f} GB free at the cache",
            advice="set MEDUSA_REPRO_CACHE to a folder on a larger disk",
        ),
        DoctorLine(
            name="packed linear layers",
            fine=device.kind == "cuda" or packing_available(torch.float32),
            found="available" if packing_available(torch.float32) else "missing in this PyTorch",
            advice="the engine falls back to eager mode, which is slower for trees",
        ),
    ]
    return (*lines, *_gpu_lines(best_device()))


def require_own_gpu() -> GpuWatch | None:
    """Refuse to measure while other processes use the GPU: they move every figure. Return a watch over it.

    Where it cannot be known whose the listed processes are, the run goes on. None without a GPU, or where its
    driver tells nothing.
    Raises: UserError where there are other processes.
    """
    watch = gpu_watch(best_device())
    if watch is not None and (others := watch.num_others()):
        raise UserError(
            found=f"{others} other {'process' if others == 1 else 'processes'} on the GPU",
            need="a GPU of our own",
            where="this machine",
            do="stop them, or wait until they end",
        )
    return watch


def _gpu_lines(device: torch.device) -> tuple[DoctorLine, ...]:
    """Return who else uses the GPU; nothing without one."""
    if device.type != "cuda":
        return ()
    watch = gpu_watch(device)
    others = watch.num_others() if watch is not None else None
    unknown = (
        "not known: install nvidia-ml-py, with medusa-repro[gpu]"
        if watch is None
        else "cannot be told from ours"
    )
    return (
        DoctorLine(
            name="other processes on the GPU",
            fine=not others,
            found=unknown if others is None else str(others),
            advice="stop them: they move timings",
        ),
    )
