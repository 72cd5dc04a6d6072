"""Clocks on a pretended GPU, which works on while the host goes ahead, and on this machine's processor."""

from __future__ import annotations

import time

import pytest
import torch

from harness.device.clock import SectionTimer, device_clock, processor_clock

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class PretendedGpu:
    """A device with a queue: starting work takes the host no time, waiting for it takes all of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.queued_s = 0.0, 0.0
        self.waited_for: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    def start(self, seconds: float) -> None:
        self.queued_s += seconds

    def synchronize(self, device: torch.device) -> None:
        self.waited_for.append(device)
        self.now_s, self.queued_s = self.now_s + self.queued_s, 0.0


def test_the_clock_of_a_gpu_waits_for_the_work_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that did not wait read no time for all kernels, and every test of a CPU passed."""
    gpu = PretendedGpu(monkeypatch)
    now = device_clock(CUDA)
    started = now()
    gpu.start(0.25)
    assert now() - started == 0.25
    gpu.start(0.5)
    gpu.start(0.5)
    assert now() - started == 1.25
    assert now() - started == 1.25
    assert gpu.waited_for == [CUDA] * 4


def test_the_parts_of_a_step_on_a_gpu_hold_the_work_that_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGpu(monkeypatch)
    timer = SectionTimer(device_clock(CUDA))
    for name, seconds in (("heads", 0.25), ("backbone", 2.0), ("heads", 0.5)):
        with timer(name):
            gpu.start(seconds)
    assert dict(timer.seconds) == {"heads": 0.75, "backbone": 2.0}


def test_the_clock_of_a_cpu_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGpu(monkeypatch)
    gpu.start(1.0)
    assert device_clock(CPU)() == 0.0
    assert gpu.waited_for == []


def test_processor_time_leaves_a_pause_out() -> None:
    """The pause is exactly what the two clocks differ by at least, however busy the machine is."""
    processor, wall = processor_clock(CPU), device_clock(CPU)
    assert processor is not None
    before = (processor(), wall())
    while processor() - before[0] < 0.02:
        pass
    time.sleep(0.05)
    busy_s, whole_s = processor() - before[0], wall() - before[1]
    assert 0.02 <= busy_s <= whole_s - 0.05


def test_no_processor_time_is_told_where_the_host_waits_for_a_device() -> None:
    assert processor_clock(CUDA) is None
