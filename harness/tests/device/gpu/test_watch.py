"""Who else uses the GPU, from what the driver lists: on the host, in a container, at first and mid-run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

from harness.device import doctor
from harness.device.gpu.driver import GpuDriver, GpuProcess, _handle
from harness.device.gpu.watch import GpuWatch, gpu_watch, own_process
from harness.errors import UserError
from harness.records.trials import NOTICED_BYTES
from harness.tests.device.gpu.fake_nvml import FakeNvml, sample

GB = 2**30


def listing(*pids: int, memory_bytes: int | None = None) -> tuple[GpuProcess, ...]:
    return tuple(GpuProcess(pid, memory_bytes) for pid in pids)


@pytest.mark.parametrize(
    ("before", "now", "own"),
    [
        (listing(), listing(7), 7),  # on the host
        (listing(), listing(7, 8), 7),
        (listing(), listing(4007), 4007),  # in a container, by the host's number
        (listing(8), listing(8, 4007), 4007),
        (listing(7), listing(7, 4007), 4007),  # another one on the host bears our number
        (listing(), listing(), None),  # a list that does not show even us tells nothing
        (listing(), listing(4007, 4008), None),
        (listing(8), listing(8), None),
        (None, listing(7), 7),
        (None, listing(4007), None),  # the GPU was in use before the first look: ours, or another one
    ],
)
def test_our_process_is_the_one_that_was_not_there_before(
    before: tuple[GpuProcess, ...] | None, now: tuple[GpuProcess, ...], own: int | None
) -> None:
    """In a container `os.getpid()` is not among the numbers that the driver lists."""
    assert own_process(before, now, pid=7, memory_bytes=GB) == own


@pytest.mark.parametrize(
    ("memories", "own"),
    [
        ((5 * GB, 1 * GB), 4001),
        ((5 * GB, 6 * GB), None),  # either may be ours
        ((8 * GB, 9 * GB), None),
        ((3 * GB, None), None),
        ((4 * GB, 7 * GB), 4001),
        ((6 * GB + 1, 6 * GB), 4002),
    ],
)
def test_of_several_new_processes_the_one_whose_memory_fits_is_ours(
    memories: tuple[int | None, int | None], own: int | None
) -> None:
    now = tuple(GpuProcess(pid, used) for pid, used in zip((4001, 4002), memories, strict=True))
    for before in ((), None):
        assert own_process(before, now, pid=7, memory_bytes=4 * GB) == own
    assert own_process((), now, pid=7, memory_bytes=0) is None


class Machine:
    """A GPU with a fake driver; the test says when this process uses it, and how much of its memory."""

    def __init__(self, *listed: int, **answers: int) -> None:
        self.nvml = FakeNvml({0: [(pid, None) for pid in listed]})
        self.nvml.answers = dict(answers)
        self.is_used, self.own_bytes = False, 0
        self.nvml.nvmlInit()

    def watch(self) -> GpuWatch:
        return GpuWatch(
            GpuDriver(self.nvml, 0), pid=7, uses_gpu=lambda: self.is_used, own_bytes=lambda: self.own_bytes
        )

    def use(self, *listed: int) -> None:
        self.is_used = True
        self.nvml.listed[0] = [(pid, None) for pid in listed]


@pytest.mark.parametrize(
    ("before", "now", "others"),
    [
        ((), (7,), 0),
        ((), (4007,), 0),
        ((), (7, 8), 1),
        ((8,), (8, 4007), 1),
        ((), (), None),
        ((), (4007, 4008), None),
    ],
)
def test_others_are_all_but_ours(before: tuple[int, ...], now: tuple[int, ...], others: int | None) -> None:
    """Every idle GPU was once refused: torch's sentence "no processes are running" holds the counted word."""
    machine = Machine(*before)
    watch = machine.watch()
    assert watch.num_others() == len(before)
    machine.use(*now)
    assert watch.num_others() == others


def test_a_process_that_comes_mid_run_is_told_from_ours_and_its_trials_are_marked() -> None:
    machine = Machine()
    machine.nvml.samples = [sample(99, 80, at_us=1)]  # of before the run
    watch = machine.watch()
    machine.use(4007)
    machine.nvml.samples += [sample(4007, 90, at_us=2)]
    quiet = watch.observe()
    assert (quiet.num_others, quiet.others_share, quiet.is_shared) == (0, 0.0, False)
    machine.use(4007, 4008)
    machine.nvml.samples += [sample(4007, 60, at_us=3), sample(4008, 30, at_us=3), sample(4009, 5, at_us=3)]
    busy = watch.observe()
    assert (busy.num_others, busy.is_shared) == (1, True) and busy.others_share == pytest.approx(0.35)
    machine.use(4007)
    gone = watch.observe()
    assert (gone.num_others, gone.others_share, gone.is_shared) == (0, 0.0, False)


def test_kernels_of_a_process_that_was_gone_at_the_end_mark_the_trial() -> None:
    machine = Machine()
    machine.nvml.samples = []
    watch = machine.watch()
    machine.use(4007)
    watch.observe()
    machine.nvml.samples += [sample(4008, 10, at_us=5)]
    seen = watch.observe()
    assert (seen.num_others, seen.others_share, seen.is_shared) == (0, 0.1, True)


def test_where_processes_cannot_be_told_apart_the_record_says_so_and_memory_still_tells() -> None:
    machine = Machine(used=GB)  # what the driver itself holds
    watch = machine.watch()
    machine.use()  # a container whose list stays empty
    machine.own_bytes, machine.nvml.answers["used"] = 4 * GB, 6 * GB  # 1 GB is our context
    first = watch.observe()
    assert (first.num_others, first.others_share, first.others_memory_bytes) == (None, None, 0)
    assert not first.is_shared
    machine.own_bytes, machine.nvml.answers["used"] = 5 * GB, 7 * GB + 1000
    assert watch.observe().others_memory_bytes == 1000 and not watch.observe().is_shared
    machine.nvml.answers["used"] = 7 * GB + NOTICED_BYTES
    assert watch.observe().is_shared
    machine.nvml.answers["used"] = 3 * GB  # less than ours is no negative amount
    assert watch.observe().others_memory_bytes == 0


def test_what_is_not_ours_at_the_first_look_is_not_all_context() -> None:
    machine = Machine(used=0)
    watch = machine.watch()
    machine.use()
    machine.nvml.answers["used"] = 10 * GB
    assert watch.observe().others_memory_bytes == 8 * GB


def test_an_observation_holds_clocks_temperature_power_and_reasons() -> None:
    machine = Machine(
        sm_clock=1200, memory_clock=3201, temperature=88, milliwatts=699_000, reasons=0x40, used=GB
    )
    machine.is_used = True  # before the first look
    seen = machine.watch().observe()
    assert (seen.sm_clock_mhz, seen.memory_clock_mhz) == (1200, 3201)
    assert (seen.temperature_c, seen.power_w) == (88, 699.0)
    assert seen.throttle_reasons == ("hardware thermal slowdown",)
    assert seen.others_memory_bytes is None, "what the GPU held before is not known"


def test_a_driver_without_a_list_tells_nothing_of_others(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetComputeRunningProcesses")
    watch = Machine().watch()
    assert watch.num_others() is None and watch.observe().num_others is None


def require_on(monkeypatch: MonkeyPatch, nvml: FakeNvml | None, *, used_gpu: bool = False) -> GpuWatch | None:
    """Ask as process 7 on a machine with a GPU and this driver's library."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(doctor, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: used_gpu)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    monkeypatch.setattr("os.getpid", lambda: 7)
    return doctor.require_own_gpu()


def test_a_run_is_refused_where_others_are_known_and_goes_on_where_not(monkeypatch: MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"found 2 other processes on the GPU; need a GPU of our own"):
        require_on(monkeypatch, FakeNvml({0: [(8, None), (9, None)]}))
    with pytest.raises(UserError, match="found 1 other process on"):
        require_on(monkeypatch, FakeNvml({0: [(7, None), (8, None)]}), used_gpu=True)
    assert require_on(monkeypatch, FakeNvml({0: []})) is not None
    assert require_on(monkeypatch, FakeNvml({0: [(4007, None)]}), used_gpu=True) is not None
    assert require_on(monkeypatch, None) is None


@pytest.mark.parametrize(
    ("nvml", "found", "fine"),
    [
        (FakeNvml({0: []}), "0", True),
        (FakeNvml({0: [(8, None)]}), "1", False),
        (None, "not known: install nvidia-ml-py, with medusa-repro[gpu]", True),
    ],
)
def test_the_doctor_tells_of_other_processes(
    nvml: FakeNvml | None, found: str, fine: bool, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    (line,) = doctor._gpu_lines(torch.device("cuda"))
    assert (line.found, line.fine, bool(line.advice)) == (found, fine, True)
    assert doctor._gpu_lines(torch.device("cpu")) == ()


def test_a_cpu_is_not_watched() -> None:
    assert gpu_watch(torch.device("cpu")) is None


@pytest.mark.gpu
def test_on_a_gpu_of_our_own_nobody_else_is_seen() -> None:
    pynvml = pytest.importorskip("pynvml")
    torch.ones(1, device="cuda")
    watch = gpu_watch(torch.device("cuda"))
    assert watch is not None
    seen = watch.observe()
    assert seen.num_others in (0, None) and not seen.is_shared
    # A part of a GPU, or a virtual one, may tell none of these.
    assert (seen.sm_clock_mhz or 0) > 0 or not answers(pynvml, "nvmlDeviceGetClockInfo", 1)
    assert (seen.temperature_c or 0) > 0 or not answers(pynvml, "nvmlDeviceGetTemperature", 0)
    asked = "nvmlDeviceGetCurrentClocksThrottleReasons"
    assert seen.throttle_reasons is not None or not answers(pynvml, asked)


def answers(nvml: Any, name: str, *arguments: int) -> bool:
    """Return whether a driver's library answers a question about the GPU that PyTorch calls the first."""
    nvml.nvmlInit()
    try:
        getattr(nvml, name)(_handle(nvml, 0), *arguments)
    except nvml.NVMLError:
        return False
    finally:
        nvml.nvmlShutdown()
    return True


def test_a_question_is_answered_or_not(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml()
    nvml.answers["temperature"] = 40
    assert answers(nvml, "nvmlDeviceGetTemperature", 0) and nvml.num_open == 0
    assert not answers(nvml, "nvmlDeviceGetClockInfo", 1) and nvml.num_open == 0
