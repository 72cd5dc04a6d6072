"""What a device can do, measured: read bandwidth and matrix throughput."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch

from harness.device.clock import Clock
from harness.records.probes import DeviceLimits
from medusa_impl.engine.memory import reset_peak_memory

_BANDWIDTH_BYTES, _MATMUL_SIZE, _LIMIT_REPEATS = 512 * 2**20, 1536, 8
_GPU_MEMORY_SHARE, _DOUBLINGS = 0.25, 6
_FLAT_GAIN = 0.03  # a doubling that gains less than this share has met the limit
_LONG_S = (
    0.02  # a launch and a wait, some 30 microseconds on an H200, do not show in work that takes this long
)


def measure_device_limits(device: torch.device, dtype: torch.dtype, *, clock: Clock) -> DeviceLimits:
    """Return the best read bandwidth and matrix throughput of several repeats.

    All threads of this process take part. On a GPU the work doubles in size until the figure grows no more:
    small work measures the launch and the wait.
    """
    on_gpu = device.type == "cuda"
    # none: the first sizes only
    room_bytes = int(_GPU_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]) if on_gpu else 0
    read_bytes, read_s = plateau(
        lambda size: _read_seconds(size, device=device, clock=clock),
        float,
        sizes=_doublings(_BANDWIDTH_BYTES, lambda size: size <= room_bytes),
    )
    matmul_size, matmul_s = plateau(
        lambda size: _matmul_seconds(size, device=device, dtype=dtype, clock=clock),
        lambda size: 2.0 * size**3,
        sizes=_doublings(_MATMUL_SIZE, lambda size: 3 * 4 * size**2 <= room_bytes),
    )
    if on_gpu:  # a run's free memory and peak are those of its model
        torch.cuda.empty_cache()
        reset_peak_memory(device)
    grown = (
        f"; sizes doubled until one gained less than {100 * _FLAT_GAIN:g} %, took {1000 * _LONG_S:g} "
        "ms or met the memory"
    )
    return DeviceLimits(
        read_bandwidth_bytes_per_s=read_bytes / read_s,
        matmul_flop_per_s=2 * matmul_size**3 / matmul_s,
        method=f"best of {_LIMIT_REPEATS}: sum over {read_bytes >> 20} MiB of float32; "
        f"{matmul_size}-square product in {dtype}" + (grown if on_gpu else ""),
    )


def plateau(
    seconds: Callable[[int], float], work: Callable[[int], float], *, sizes: Iterable[int]
) -> tuple[int, float]:
    """Return the size with the greatest rate, which is work a second, and its seconds.

    Sizes are tried in order; one that gains little, or takes long enough that waits do not show, is the last.
    """
    best_size, best_s, best_rate = 0, 0.0, 0.0
    for size in sizes:
        taken_s = seconds(size)
        gain = work(size) / taken_s / best_rate - 1 if best_rate else math.inf
        if gain > 0:
            best_size, best_s, best_rate = size, taken_s, work(size) / taken_s
        if gain < _FLAT_GAIN or taken_s >= _LONG_S:
            break
    return best_size, best_s


def _doublings(first: int, fits: Callable[[int], bool]) -> list[int]:
    """Return the first size, whether it fits or not, and the doubled ones up to the last that fits."""
    return [first, *itertools.takewhile(fits, (first << step for step in range(1, _DOUBLINGS + 1)))]


def _read_seconds(num_bytes: int, *, device: torch.device, clock: Clock) -> float:
    block = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return _best_seconds(block.sum, clock=clock)


def _matmul_seconds(size: int, *, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    square = torch.randn(size, size, device=device).to(dtype)
    return _best_seconds(lambda: square @ square, clock=clock)


def _best_seconds(call: Callable[[], object], *, clock: Clock) -> float:
    taken_s = []
    for _ in range(_LIMIT_REPEATS):
        started = clock()
        call()
        taken_s.append(clock() - started)
    return min(taken_s)
