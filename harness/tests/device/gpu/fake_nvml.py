"""The driver's library with answers that a test sets; all that is tested with it is what we make of them."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any


class FakeNvml(ModuleType):
    """A machine whose GPUs the tests describe.

    `listed` holds the processes on each GPU by its index or name, as number and memory; an answer that is not
    set is one that the driver does not give.
    """

    class NVMLError(Exception):
        """An error by NVML's number: 3 for what the GPU does not support, 6 for what is not found."""

        def __init__(self, value: int = 3) -> None:
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(self, listed: dict[int | str, list[tuple[int, int | None]]] | None = None) -> None:
        super().__init__("pynvml")
        self.listed = listed if listed is not None else {0: []}
        self.samples: list[SimpleNamespace] | None = None
        self.answers: dict[str, Any] = {}
        self.num_open = 0
        self.nothing_new = 6  # or 0: drivers differ

    def nvmlInit(self) -> None:
        if "nvmlInit" in self.answers:
            raise self.answers["nvmlInit"]
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return int(self.answers.get("count", 1))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._check(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        self._check(name)
        return name

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int | str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.listed[handle]]

    def nvmlDeviceGetProcessUtilization(self, handle: int | str, since_us: int) -> list[SimpleNamespace]:
        if self.samples is None:
            raise self.NVMLError
        found = [sample for sample in self.samples if sample.timeStamp > since_us]
        if not found:
            raise self.NVMLError(self.nothing_new)
        return found

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> SimpleNamespace:
        return SimpleNamespace(used=self._answer("used"), total=self.answers.get("total", 0))

    def nvmlDeviceGetClockInfo(self, handle: int | str, clock: int) -> int:
        return int(self._answer({1: "sm_clock", 2: "memory_clock"}[clock]))

    def nvmlDeviceGetTemperature(self, handle: int | str, sensor: int) -> int:
        assert sensor == 0
        return int(self._answer("temperature"))

    def nvmlDeviceGetPowerUsage(self, handle: int | str) -> int:
        return int(self._answer("milliwatts"))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int | str) -> int:
        return int(self._answer("limit_milliwatts"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int | str) -> int:
        return int(self._answer("reasons"))

    def nvmlSystemGetDriverVersion(self) -> str:
        return str(self._answer("version"))

    def _answer(self, name: str) -> Any:
        if name not in self.answers:
            raise self.NVMLError
        return self.answers[name]

    def _check(self, name: int | str) -> None:
        if name not in self.listed:
            raise self.NVMLError(6)


def sample(pid: int, utilisation: int, *, at_us: int) -> SimpleNamespace:
    """One of the driver's samples: percent of the time in which a process's kernels ran."""
    return SimpleNamespace(pid=pid, smUtil=utilisation, timeStamp=at_us)
