"""What a device can do, measured: plain reading, matrix products, and products of one row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import psutil
import torch
from torch.nn.functional import linear

from harness.device.clock import Clock
from harness.records.probes import DeviceLimits
from medusa_impl.engine.memory import reset_peak_memory
from medusa_impl.engine.packed_linear import packing_available

_BANDWIDTH_BYTES = 512 * 2**20  # more than caches hold
_MATMUL_SIZE = 1024
# Inputs and outputs of the widest product of a decoder layer of Vicuna-7B, as suites/shapes.toml has them.
_ROW_SHAPE = (4096, 11008)
_ROW_MATRICES = 4  # 360 MB in half precision, read in turn: no cache still holds the next one
_READ_DOUBLINGS, _MATMUL_DOUBLINGS, _ROW_DOUBLINGS = 5, 4, 4
_MEMORY_SHARE = 0.25  # of what is free
_LEAST_REPEATS, _MOST_REPEATS, _REPEATS_S = 3, 8, 0.25
_FLAT_GAIN, _FLAT_SIZES = 0.03, 2  # so many sizes in a row that gain less than this share have met the limit
_LONGEST_S = 0.15  # no larger size is tried whose call would take longer


def measure_device_limits(device: torch.device, dtype: torch.dtype, *, clock: Clock) -> DeviceLimits:
    """Return the best rates of reading, of matrix products and of products of one row, over growing sizes.

    All threads of this process take part. Small work measures the launch and the wait, so the work grows
    until the figure grows no more, a call would take too long, or a quarter of the free memory is in use.
    """
    room_bytes = _MEMORY_SHARE * _free_bytes(device)
    matrix_bytes = math.prod(_ROW_SHAPE) * dtype.itemsize
    # a square, its packed copy and the product, and the random numbers that the square is made of
    largest_square = math.sqrt(room_bytes / (3 * dtype.itemsize + 4))
    read_bytes, read_s = plateau(
        partial(_read_seconds, device=device, dtype=dtype, clock=clock),
        float,
        sizes=_growing(_BANDWIDTH_BYTES, _READ_DOUBLINGS, largest=room_bytes),
    )
    matmul_size, matmul_s = plateau(
        partial(_matmul_seconds, device=device, dtype=dtype, clock=clock),
        lambda size: 2.0 * size**3,
        sizes=_growing(_MATMUL_SIZE, _MATMUL_DOUBLINGS, largest=largest_square, halves=True),
    )
    num_matrices, rows_s = plateau(
        partial(_row_seconds, device=device, dtype=dtype, clock=clock),
        float,
        sizes=_growing(_ROW_MATRICES, _ROW_DOUBLINGS, largest=room_bytes / matrix_bytes),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)  # a run's free memory and peak are those of its model
    name = str(dtype).removeprefix("torch.")
    return DeviceLimits(
        read_bandwidth_bytes_per_s=read_bytes / read_s,
        matmul_flop_per_s=2 * matmul_size**3 / matmul_s,
        row_product_bytes_per_s=num_matrices * matrix_bytes / rows_s,
        method=f"best of {_LEAST_REPEATS} to {_MOST_REPEATS}: one pass over {read_bytes >> 20} MiB; "
        f"{matmul_size}-square product in {name}; products of one row with {num_matrices} matrices of "
        f"{_ROW_SHAPE[0]} x {_ROW_SHAPE[1]} in {name}; each at the best of growing sizes",
    )


def better_limits(
    before: DeviceLimits | None, device: torch.device, dtype: torch.dtype, *, clock: Clock
) -> DeviceLimits:
    """Return the limits measured now, or the better of them and of those before, figure by figure.

    On a CPU whatever else the machine does lowers them for as long as it lasts, so a run measures them before
    and after its steps. A GPU is our own: there the limits before stay.
    """
    if before is None:
        return measure_device_limits(device, dtype, clock=clock)
    if device.type == "cuda":
        return before
    return before.best_with(measure_device_limits(device, dtype, clock=clock))


def plateau(
    seconds: Callable[[int], float], work: Callable[[int], float], *, sizes: Sequence[int]
) -> tuple[int, float]:
    """Return the size with the greatest rate, which is work a second, and its seconds.

    Sizes are tried in order. None is tried after several in a row that gain little on the best before them,
    nor one whose call would take long at the rate of the last.
    """
    best_size, best_s = sizes[0], seconds(sizes[0])
    last_size, last_s, num_flat = best_size, best_s, 0
    for size in sizes[1:]:
        if num_flat == _FLAT_SIZES or last_s * work(size) / work(last_size) > _LONGEST_S:
            break
        last_size, last_s = size, seconds(size)
        gain = (work(size) / last_s) / (work(best_size) / best_s) - 1
        num_flat = num_flat + 1 if gain < _FLAT_GAIN else 0
        if gain > 0:
            best_size, best_s = size, last_s
    return best_size, best_s


def _growing(first: int, num_doublings: int, *, largest: float, halves: bool = False) -> list[int]:
    """Return the first size, whether it fits or not, and the doubled ones up to the largest that fits.

    With `halves` there is one half as large again between each and the next.
    """
    doubled = [first << step for step in range(num_doublings + 1)]
    between = [3 * size // 2 for size in doubled[:-1]] if halves else []
    first, *others = sorted({*doubled, *between})
    return [first, *itertools.takewhile(lambda size: size <= largest, others)]


def _free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free: of the GPU, else of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _read_seconds(num_bytes: int, *, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Return the seconds in which so many bytes are read once, by the fastest of several ways.

    They are summed as float32 and as the dtype. A CPU also multiplies them with themselves, as its BLAS does
    in products of one row: that can be faster than PyTorch's own sum, and is no more reading.
    """
    block = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    ways: list[Callable[[], object]] = [block.sum]
    if dtype != torch.float32:
        ways.append(block.view(dtype).sum)
    if device.type == "cpu":
        ways.append(lambda: torch.dot(block, block))
    return min(_best_seconds(way, clock=clock) for way in ways)


@torch.inference_mode()
def _matmul_seconds(size: int, *, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Return the seconds of a square's product with itself, by the fastest of the ways that steps take."""
    square = torch.randn(size, size, device=device).to(dtype)
    ways: list[Callable[[], object]] = [lambda: square @ square, lambda: linear(square, square)]
    if device.type == "cpu" and packing_available(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(square, size)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(square, packed, None, "none", [], ""))
    return min(_best_seconds(way, clock=clock) for way in ways)


@torch.inference_mode()
def _row_seconds(num_matrices: int, *, device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Return the seconds of a row's product with each of several matrices, one after another."""
    num_inputs, num_outputs = _ROW_SHAPE
    row = torch.ones(1, num_inputs, dtype=dtype, device=device)
    matrices = [torch.ones(num_outputs, num_inputs, dtype=dtype, device=device) for _ in range(num_matrices)]

    def products() -> None:
        for matrix in matrices:
            linear(row, matrix)

    return _best_seconds(products, clock=clock)


def _best_seconds(call: Callable[[], object], *, clock: Clock) -> float:
    """Return the shortest of several calls, fewer of them where they take long."""
    taken_s: list[float] = []
    while len(taken_s) < _LEAST_REPEATS or (len(taken_s) < _MOST_REPEATS and sum(taken_s) < _REPEATS_S):
        started = clock()
        call()
        taken_s.append(clock() - started)
    return min(taken_s)
