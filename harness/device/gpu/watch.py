"""Who else uses the GPU: at the start of a run, and over each of its trials."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from harness.device.gpu.driver import GpuDriver, GpuProcess, open_driver
from harness.records.trials import GpuObservation

_OUTSIDE_BYTES = 2 * 2**30  # of our own memory that PyTorch's allocator does not count: context and libraries


def own_process(
    before: Sequence[GpuProcess] | None, now: Sequence[GpuProcess], *, pid: int, memory_bytes: int
) -> int | None:
    """Return which of the listed processes is this one, by the number that the driver gives it.

    A container's processes have other numbers on the host, which the driver lists. So ours is the one that
    was not there `before` this process used the GPU; of several, the only one whose memory fits. None where
    that cannot be known.
    """
    known = {one.pid for one in before or ()}
    new = [one for one in now if one.pid not in known]
    if any(one.pid == pid for one in new):
        return pid
    if before is not None and len(new) == 1:
        return new[0].pid
    fitting = [
        one.pid
        for one in new
        if one.memory_bytes is not None
        and 0 < memory_bytes <= one.memory_bytes <= memory_bytes + _OUTSIDE_BYTES
    ]
    return fitting[0] if len(fitting) == 1 else None


class GpuWatch:
    """Watches one GPU over a run; begin before this process uses it, so that others are known from ours.

    `uses_gpu` says whether this process does yet, `own_bytes` how much memory PyTorch holds of it.
    """

    def __init__(
        self,
        driver: GpuDriver,
        *,
        pid: int,
        uses_gpu: Callable[[], bool],
        own_bytes: Callable[[], int],
    ) -> None:
        self._driver, self._pid, self._uses_gpu, self._own_bytes = driver, pid, uses_gpu, own_bytes
        is_used = uses_gpu()
        self._before = None if is_used else driver.processes()
        self._idle_bytes = None if is_used else driver.memory_used_bytes
        self._context_bytes: int | None = None
        self._own: int | None = None
        driver.utilisation()  # what was before is no business of the first trial

    def num_others(self) -> int | None:
        """Return how many other processes compute on the GPU, None where that cannot be known."""
        listed = self._driver.processes()
        if listed is None:
            return None
        if not self._uses_gpu():
            return len(listed)
        own = self._own_number(listed)
        return None if own is None else sum(one.pid != own for one in listed)

    def observe(self) -> GpuObservation:
        """Return the GPU as it is now, and who else used it since the last call."""
        driver = self._driver
        num_others, shares = self.num_others(), driver.utilisation()
        others = None
        if shares is not None and self._own is not None:
            others = min(sum(share for pid, share in shares.items() if pid != self._own), 1.0)
        return GpuObservation(
            num_others=num_others,
            others_share=others,
            others_memory_bytes=self._others_bytes(),
            sm_clock_mhz=driver.sm_clock_mhz,
            memory_clock_mhz=driver.memory_clock_mhz,
            temperature_c=driver.temperature_c,
            power_w=driver.power_w,
            throttle_reasons=driver.throttle_reasons,
        )

    def _own_number(self, listed: Sequence[GpuProcess]) -> int | None:
        """Return our number in a list; once it is known it stays."""
        if self._own is None or all(one.pid != self._own for one in listed):
            self._own = own_process(self._before, listed, pid=self._pid, memory_bytes=self._own_bytes())
        return self._own

    def _others_bytes(self) -> int | None:
        """Return the memory in use that is neither ours nor was in use before.

        What the first call finds beyond that is taken for our context, which no allocator counts.
        """
        used = self._driver.memory_used_bytes
        if used is None or self._idle_bytes is None:
            return None
        rest = used - self._idle_bytes - self._own_bytes()
        if self._context_bytes is None:
            self._context_bytes = min(max(rest, 0), _OUTSIDE_BYTES)
        return max(rest - self._context_bytes, 0)


def gpu_watch(device: torch.device) -> GpuWatch | None:
    """Return a watch over a GPU; None for another device, or where the driver does not tell of it."""
    driver = open_driver(device.index or 0) if device.type == "cuda" else None
    if driver is None:
        return None

    def uses_gpu() -> bool:
        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    return GpuWatch(
        driver,
        pid=os.getpid(),
        uses_gpu=uses_gpu,
        own_bytes=lambda: torch.cuda.memory_reserved(device) if uses_gpu() else 0,
    )
