"""One GPU as NVIDIA's driver describes it, by the package nvidia-ml-py; what it does not tell is None."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The bits of nvmlDeviceGetCurrentClocksThrottleReasons, as NVML's reference lists them.
_THROTTLE_REASONS: Mapping[int, str] = {
    0x1: "idle",
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
    0x200: "board limit",
    0x400: "reliability",
}
_SUCCESS, _NOT_FOUND = 0, 6  # NVML_SUCCESS, NVML_ERROR_NOT_FOUND
_SM_CLOCK, _MEMORY_CLOCK, _CHIP_SENSOR = 1, 2, 0  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on the GPU, by its number on the host.

    `memory_bytes` is None where the driver does not tell it.
    """

    pid: int
    memory_bytes: int | None


class GpuDriver:
    """What the driver says of one GPU.

    `nvml` is the module `pynvml`, or a stand-in that answers as it does. It stays open as long as this object
    lives.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._seen_us = 0
        weakref.finalize(self, nvml.nvmlShutdown)

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Return the processes that compute on the GPU, each once."""
        listed = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if listed is None:
            return None
        found = {one.pid: GpuProcess(one.pid, one.usedGpuMemory) for one in listed}
        return tuple(found.values())

    def utilisation(self) -> dict[int, float] | None:
        """Return the share of time in which each process's kernels ran since the last call, by its number."""
        samples = self._ask("nvmlDeviceGetProcessUtilization", self._seen_us, nothing=())
        if samples is None:
            return None
        new = [one for one in samples if one.timeStamp > self._seen_us]
        self._seen_us = max((one.timeStamp for one in new), default=self._seen_us)
        shares: dict[int, float] = {}
        for one in new:
            shares[one.pid] = max(shares.get(one.pid, 0.0), min(one.smUtil / 100, 1.0))
        return shares

    @property
    def memory_used_bytes(self) -> int | None:
        """Return the bytes in use, by whomever."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    @property
    def memory_total_bytes(self) -> int | None:
        """Return all bytes of the GPU's memory."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    @property
    def sm_clock_mhz(self) -> float | None:
        """Return the present clock of the multiprocessors."""
        return _number(self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK))

    @property
    def memory_clock_mhz(self) -> float | None:
        """Return the present clock of the memory."""
        return _number(self._ask("nvmlDeviceGetClockInfo", _MEMORY_CLOCK))

    @property
    def temperature_c(self) -> float | None:
        """Return the chip's temperature in degrees Celsius."""
        return _number(self._ask("nvmlDeviceGetTemperature", _CHIP_SENSOR))

    @property
    def power_w(self) -> float | None:
        """Return the power that the GPU draws, in watts."""
        return _number(self._ask("nvmlDeviceGetPowerUsage"), unit=1000)

    @property
    def power_limit_w(self) -> float | None:
        """Return the power that the GPU may draw, in watts."""
        return _number(self._ask("nvmlDeviceGetEnforcedPowerLimit"), unit=1000)

    @property
    def throttle_reasons(self) -> tuple[str, ...] | None:
        """Return why the clocks are lower than they could be."""
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return None
        unknown = bits & ~sum(_THROTTLE_REASONS)
        named = [name for bit, name in _THROTTLE_REASONS.items() if bits & bit]
        return (*named, *([f"reason {unknown:#x}"] if unknown else []))

    @property
    def version(self) -> str | None:
        """Return the driver's version."""
        try:
            return str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            return None

    def _ask(self, name: str, *arguments: Any, nothing: Any = None) -> Any:
        """Return an answer of the driver; `nothing` where it found none, None where it has no answer."""
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            # A list that is empty is an error that says "not found", or one that says "success".
            return nothing if getattr(error, "value", None) in (_SUCCESS, _NOT_FOUND) else None
        except AttributeError:  # another version of the package
            return None


def open_driver(index: int) -> GpuDriver | None:
    """Return the driver's view of one of the GPUs that this process sees, by PyTorch's index.

    None where the package nvidia-ml-py is missing, or the driver does not know the GPU.
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
        handle = _handle(pynvml, index)
    except (pynvml.NVMLError, IndexError):
        handle = None
    if handle is None:
        pynvml.nvmlShutdown()
        return None
    return GpuDriver(pynvml, handle)


def gpu_details(driver: GpuDriver | None) -> dict[str, str]:
    """Return what the driver says of a GPU, where it does: its own version, memory and power limit."""
    if driver is None:
        return {}
    memory, limit_w = driver.memory_total_bytes, driver.power_limit_w
    details = {
        "driver": driver.version,
        "memory": f"{memory >> 20} MiB" if memory is not None else None,
        "power limit": f"{limit_w:g} W" if limit_w is not None else None,
    }
    return {name: told for name, told in details.items() if told is not None}


def _handle(nvml: Any, index: int) -> Any:
    """Return NVML's handle of a GPU; which ones a process sees, and in which order, a variable may say.

    NVML counts GPUs as they stand on the bus, CUDA from the fastest on if it is not told otherwise. So a
    number is the same GPU for both where there is one, or where CUDA was told; else the GPU's own name
    decides, and None is returned where PyTorch does not tell it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name: str | None = visible.split(",")[index].strip() if visible else str(index)
    if name is not None and name.isdigit():
        if nvml.nvmlDeviceGetCount() == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        name = _own_name(index)
    return None if name is None else nvml.nvmlDeviceGetHandleByUUID(name)


def _own_name(index: int) -> str | None:
    """Return the name that a GPU bears on any machine, or None where PyTorch does not tell it."""
    import torch  # after which PyTorch counts as in use, so this is asked only where nothing else tells

    try:
        found = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    except (AssertionError, RuntimeError):
        return None
    return None if found is None else f"GPU-{found}"


def _number(answer: Any, *, unit: int = 1) -> float | None:
    return None if answer is None else answer / unit
