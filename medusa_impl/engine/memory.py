"""Peak memory of this process and of its GPU, resettable per trial where the platform allows it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak: of the GPU's allocator, or of the resident set where Linux lets a process reset
    it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since the last reset (GPU bytes allocated, or resident bytes); elsewhere the current
    resident set.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
