"""Locks between processes: one run a folder, one timed block a device."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from harness.errors import UserError

Held = Callable[[], contextlib.AbstractContextManager[None]]

_YIELD_S = 0.2  # between two holds of the device, so that another process that waits for it gets its turn


def device_lock_file(device: torch.device) -> Path:
    """Return the file that stands for a device among this user's processes on this machine."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    return Path(tempfile.gettempdir()) / f"medusa-repro-{getpass.getuser()}-{uuid}.lock"


@contextlib.contextmanager
def device_held(device: torch.device, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a device for as long as something is timed on it.

    Another run of this user waits for its turn, block by block. `on_wait` is called once where another
    process holds it.
    """
    lock = FileLock(device_lock_file(device))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        time.sleep(_YIELD_S)


def device_turns(device: torch.device, *, console: Console) -> Held:
    """Return what holds a device for one timed block, and says so where it has to wait for another run."""

    def held() -> contextlib.AbstractContextManager[None]:
        return device_held(
            device, on_wait=lambda: console.print("another run holds the device: waiting for its turn")
        )

    return held


@contextlib.contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for as long as this process writes to it.

    The lock lies outside of the folder, since a record seals all its files.
    Raises: UserError where another process holds it.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"medusa-repro-{getpass.getuser()}-run-{digest}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            found="another process that writes to this run",
            need="one at a time",
            where=folder.name,
            do="wait until it is done, or stop it",
        ) from None
    try:
        yield
    finally:
        lock.release()
