"""What may go wrong amid a run without ending it: memory that runs out, a mode that cannot prepare a step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from harness.errors import UserError
from harness.paths import without_paths

# They compile or capture each new size of a step before they run it, and that can fail where eager does not.
PREPARING_MODES = ("compiled", "cuda_graph", "fused_graph")
UNPREPARED = "mode could not run it"  # in the words of such a failure


@contextlib.contextmanager
def noting_fault(mode: str, *, device: torch.device, note: Callable[[str], None]) -> Iterator[None]:
    """Tell `note` in words of an error that concerns one size of a step; any other error is raised.

    What the failed attempt held is freed, so that the next size finds the memory as it was.
    """
    try:
        yield
    except Exception as error:
        if (reason := fault_in_words(error, mode=mode)) is None:
            raise
        note(reason)
    else:
        return
    release(device)


def fault_in_words(error: Exception, *, mode: str) -> str | None:
    """Return what went wrong, in one line without paths; None for an error that is no fault of a size.

    Any error of a mode that prepares its steps counts as one of the preparation: a mistake of the step's own
    fails in eager mode as well, where it is raised.
    """
    words = " ".join(without_paths(str(error)).split())[:200]
    if is_out_of_memory(error):
        return f"ran out of memory: {words}"
    if mode in PREPARING_MODES and not isinstance(error, UserError):
        return f"{mode} {UNPREPARED}: {type(error).__name__}: {words}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release(device: torch.device) -> None:
    """Free what Python no longer uses, on the device too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
