"""Is this machine fit to measure on: threads, memory, disk, load of other processes, device."""

from __future__ import annotations

import os
import shutil
import sys

import psutil
import torch

from harness.device.engine import best_device
from harness.device.machine import device_info
from harness.errors import UserError
from harness.files import Frozen
from harness.paths import cache_dir
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
            found=f"{device.kind}: {device.name}, {device.memory_bytes / 1e9:.1f} GB",
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
    return tuple(lines)


def foreign_gpu_processes() -> int | None:
    """Return how many other processes compute on the GPU, or None where that cannot be known.

    The driver's list (NVML) holds numbers of the host, so a container does not find its own among them. A
    listed process is another one for certain where ours is listed too, or where we have not used the GPU yet.
    """
    listed = _gpu_processes(best_device().index or 0) if torch.cuda.is_available() else None
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if listed is None or (listed and os.getpid() not in listed and used):
        return None
    return len(listed - {os.getpid()})


def require_own_gpu() -> None:
    """Refuse to measure while other processes use the GPU: they move every figure.

    Raises: UserError where there are some.
    """
    if foreign := foreign_gpu_processes():
        raise UserError(
            found=f"{foreign} other processes on the GPU",
            need="a GPU of our own",
            where="this machine",
            do="stop them",
        )


def _gpu_processes(index: int) -> frozenset[int] | None:
    """Return the numbers of the processes that compute on one of the GPUs that we see.

    It is None where NVML does not tell.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        name = visible.split(",")[index].strip() if visible else str(index)
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name)
        )
        return frozenset(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except (pynvml.NVMLError, IndexError):
        return None
    finally:
        pynvml.nvmlShutdown()
