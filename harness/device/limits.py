"""What a device can do, measured: read bandwidth and matrix throughput."""

from __future__ import annotations

import torch

from harness.device.clock import Clock
from harness.records.run import DeviceLimits

_BANDWIDTH_BYTES, _MATMUL_SIZE, _LIMIT_REPEATS = 512 * 2**20, 1536, 8


def measure_device_limits(device: torch.device, dtype: torch.dtype, *, clock: Clock) -> DeviceLimits:
    """Return the best read bandwidth and matrix throughput of several repeats, with all threads of this process."""
    block = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    square = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device=device).to(dtype)
    read_s, matmul_s = [], []
    for _ in range(_LIMIT_REPEATS):
        started = clock()
        block.sum()
        read_s.append(clock() - started)
        started = clock()
        square @ square
        matmul_s.append(clock() - started)
    return DeviceLimits(
        read_bandwidth_bytes_per_s=_BANDWIDTH_BYTES / min(read_s),
        matmul_flop_per_s=2 * _MATMUL_SIZE**3 / min(matmul_s),
        method=f"best of {_LIMIT_REPEATS}: sum over {_BANDWIDTH_BYTES >> 20} MiB of float32; {_MATMUL_SIZE}-square product in {dtype}",
    )
