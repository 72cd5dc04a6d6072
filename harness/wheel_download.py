"""One wheel from a Python package index through pip, so that the user's own index, proxy and certificates apply."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from harness.asset_files import Progress
from harness.errors import UserError

POLL_S = 0.2


class SourceUnavailable(Exception):
    """A source that does not have the asset here and now; the next source is tried. Its text holds no local path."""


class WheelDownloader(Protocol):
    """Puts the wheel of `requirement` into `folder` and returns its path."""

    def __call__(self, requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None) -> Path: ...


def _size_bytes(folder: Path) -> int:
    total_bytes = 0
    for path in folder.rglob("*"):
        try:
            total_bytes += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip renames its files while we look
            continue
    return total_bytes


def _refuse(requirement: str, output: str) -> None:
    """Raises what a failed pip run means."""
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in output:
        raise UserError(
            found="no pip in this Python environment",
            need="pip, which fetches the wheel",
            do="run `python -m ensurepip`, or name a local folder for the asset",
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["no output"])[-1]
    unreached = "; an index did not answer" if "Retrying (" in output else ""
    raise SourceUnavailable(f"pip could not fetch {requirement}{unreached}: {last}")


def pip_download(requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None) -> Path:
    """Returns the wheel that `pip download` put into `folder`; dependencies are neither fetched nor looked at.

    Raises:
        SourceUnavailable: pip failed; its last error line is in the text.
        UserError: there is no pip.
        OSError: pip ran out of disk space.
    """
    scratch = folder / "pip-scratch"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        progress(f"download {requirement}", min(_size_bytes(folder), total_bytes), total_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        _refuse(requirement, log.read_text(encoding="utf-8", errors="replace"))
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceUnavailable(f"pip could not fetch {requirement}: it reported success and left {len(wheels)} wheels")
    return wheels[0]
