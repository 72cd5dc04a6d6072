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

from harness.errors import UserError

_YIELD_S = 0.2  # between two holds of the device, so that another process that waits for it gets its turn


def device_lock_file(device: torch.device) -> Path:
    """Return the file that stands for a device among this user's processes on this machine."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    return Path(tempfile.gettempdir()) / f"medusa-repro-{getpass.getuser()}-{uuid}.lock"


@contextlib.contextmanager
def device_held(device: torch.device, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a device for as long as something is timed on it; another run of this user waits for its turn,
    block by block.

    `on_wait` is called once where another process holds it.
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


@contextlib.contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for as long as this process writes to it; the lock lies outside of it, since a
    record seals all its files.

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
