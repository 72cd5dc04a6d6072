"""The device's limits, on clocks and machines whose right answers are known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from harness.device import limits as limits_module
from harness.device.clock import device_clock
from harness.device.limits import better_limits, measure_device_limits, plateau
from harness.records.probes import DeviceLimits
from harness.tests.tiny_suite import TickClock

CPU = torch.device("cpu")


def tiny_work() -> ExitStack:
    """Let every probe begin with very little work."""
    stack = ExitStack()
    for name, value in (("_BANDWIDTH_BYTES", 4096), ("_MATMUL_SIZE", 10), ("_ROW_SHAPE", (8, 6))):
        stack.enter_context(patch.object(limits_module, name, value))
    return stack


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_limits_are_work_over_the_best_time(dtype: torch.dtype, num_bytes: int) -> None:
    """On a clock that takes one second for everything, the limits are the work of the first sizes itself."""
    with tiny_work():
        limits = measure_device_limits(CPU, dtype, clock=TickClock())
    assert limits.read_bandwidth_bytes_per_s == 4096 and limits.matmul_flop_per_s == 2000
    assert limits.row_product_bytes_per_s == 4 * 8 * 6 * num_bytes
    assert "10-square" in limits.method and "4 matrices of 8 x 6" in limits.method
    assert not limits.are_under_measured


def test_work_grows_on_a_fast_clock_and_stays_within_the_memory() -> None:
    """A clock on which all work takes as long makes the largest size the best one."""
    asked: list[int] = []

    class Fast(TickClock):
        def __call__(self) -> float:
            return super().__call__() / 1e6

    def seconds(size: int, **_: object) -> float:
        asked.append(size)
        return 1e-3

    with tiny_work(), patch.object(limits_module, "_free_bytes", lambda device: 4 * 20_000):
        limits = measure_device_limits(CPU, torch.float32, clock=Fast())
        assert limits.read_bandwidth_bytes_per_s == pytest.approx(16384 * 1e6)  # 32,768 bytes do not fit
        with patch.object(limits_module, "_matmul_seconds", seconds):
            measure_device_limits(CPU, torch.float32, clock=Fast())
    assert asked == [10, 15, 20, 30]  # 40 need 40**2 * 16 bytes, more than 20,000


def read_seconds(size: int, *, wait_s: float = 30e-6, bytes_per_s: float = 4.5e12) -> float:
    """The seconds of a read on a GPU whose launch and wait take as long as 135 MB."""
    return wait_s + size / bytes_per_s


def test_work_grows_until_launches_and_waits_do_not_show() -> None:
    """512 MiB once showed 3.6 of 4.5 TB/s: a step could be faster than the device's limit."""
    sizes = [2**29 << step for step in range(8)]
    size, seconds = plateau(read_seconds, float, sizes=sizes)
    assert 2**29 / read_seconds(2**29) < 0.82 * 4.5e12 and 0.97 * 4.5e12 < size / seconds < 4.5e12
    assert size < sizes[-1]


def by_table(table: dict[int, float]) -> Callable[[int], float]:
    """The seconds of each size; any other size is an error."""
    return lambda size: table[size]


@pytest.mark.parametrize(
    ("seconds", "sizes", "best"),
    [
        ({1: 0.001}, [1], 1),
        # two in a row gain little: the next is not tried
        ({1: 0.001, 2: 0.00199, 4: 0.00398}, [1, 2, 4, 8], 2),
        # one dip does not end it
        ({1: 0.001, 2: 0.003, 4: 0.002, 8: 0.004, 16: 0.008}, [1, 2, 4, 8, 16, 32], 4),
        # a doubling that gains enough starts the count of flat ones afresh
        ({1: 0.001, 2: 0.002, 4: 0.0038, 8: 0.0076, 16: 0.0152}, [1, 2, 4, 8, 16, 32], 4),
        # a call of 0.12 s leads to one of 0.24 s, which is too long
        ({1: 0.07, 2: 0.12}, [1, 2, 4], 2),
        ({1: 0.2}, [1, 2], 1),
    ],
)
def test_growth_ends_at_flat_figures_and_before_long_calls(
    seconds: dict[int, float], sizes: list[int], best: int
) -> None:
    assert plateau(by_table(seconds), float, sizes=sizes) == (best, seconds[best])


def test_the_time_of_the_next_size_follows_its_work() -> None:
    """A square twice as wide takes eight times as long."""
    table = {10: 0.04, 20: 0.2}
    assert plateau(by_table(table), lambda size: 2.0 * size**3, sizes=[10, 20]) == (10, 0.04)
    assert plateau(by_table({10: 0.018, 20: 0.12}), lambda size: 2.0 * size**3, sizes=[10, 20, 40]) == (
        20,
        0.12,
    )


def test_sizes_grow_as_far_as_they_fit() -> None:
    assert limits_module._growing(3, 4, largest=24) == [3, 6, 12, 24]
    assert limits_module._growing(4, 2, largest=99, halves=True) == [4, 6, 8, 12, 16]
    assert limits_module._growing(3, 4, largest=0) == [3], "a device with little room still has figures"


def limits_of(read: float, product: float, row: float | None) -> DeviceLimits:
    return DeviceLimits(
        read_bandwidth_bytes_per_s=read,
        matmul_flop_per_s=product,
        row_product_bytes_per_s=row,
        method="made up",
    )


def test_the_better_of_two_measurements_is_taken_figure_by_figure() -> None:
    better = limits_of(5.0, 20.0, None).best_with(limits_of(6.0, 10.0, 3.0))
    assert (better.read_bandwidth_bytes_per_s, better.matmul_flop_per_s) == (6.0, 20.0)
    assert better.row_product_bytes_per_s == 3.0 and "twice" in better.method
    assert limits_of(1.0, 1.0, None).best_with(limits_of(1.0, 1.0, None)).are_under_measured


def test_a_cpu_is_measured_again_and_a_gpu_is_not() -> None:
    """A neighbour that was busy for the first seconds of a run once made a step faster than the limit."""
    before = limits_of(1.0, 1e17, 1.0)
    with tiny_work():
        again = better_limits(before, CPU, torch.float32, clock=TickClock())
        first = better_limits(None, CPU, torch.float32, clock=TickClock())
    assert again.read_bandwidth_bytes_per_s == first.read_bandwidth_bytes_per_s == 4096
    assert again.matmul_flop_per_s == 1e17
    assert better_limits(before, torch.device("cuda"), torch.float32, clock=TickClock()) is before


@pytest.mark.gpu
def test_limits_of_a_gpu_are_those_of_its_largest_work() -> None:
    device = torch.device("cuda")
    clock = device_clock(device)
    limits = measure_device_limits(device, torch.bfloat16, clock=clock)
    first_s = limits_module._read_seconds(2**29, device=device, dtype=torch.bfloat16, clock=clock)
    assert limits.read_bandwidth_bytes_per_s > 0.95 * 2**29 / first_s
    assert limits.row_product_bytes_per_s is not None
    assert limits.row_product_bytes_per_s < 1.1 * limits.read_bandwidth_bytes_per_s
    assert "1024-square" not in limits.method
