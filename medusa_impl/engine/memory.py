"""Peak memory of this process or of its GPU, counted from a point that the caller sets."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# Linux: writing 5 to clear_refs resets the peak, which status then reports as VmHWM.
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak.

    On a GPU this is the peak of PyTorch's allocator, else that of the resident set, which only Linux resets.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since the last reset.

    Where the system reports no peak, this is the present resident set.

    Units: bytes, allocated on the GPU or resident in memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        line = next(
            line for line in _STATUS.read_text(encoding="utf-8").split("\n") if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
