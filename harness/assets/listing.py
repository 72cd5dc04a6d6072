"""The table of assets: what is cached, how large it is, where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from harness.assets.fetch import hub_paths, local_paths
from harness.assets.wheels import SourceUnavailable, wheel_paths
from harness.files import Frozen
from harness.specs.assets import AssetSpec, HubSource, LocalSource, PypiWheelSource


class AssetRow(Frozen):
    """One line of the table of assets.

    `size_bytes` is what lies on disk, or else what would be downloaded, where that is known.
    """

    name: str
    kind: str
    licence: str
    is_cached: bool
    size_bytes: int | None
    source: str


def find_cached(
    spec: AssetSpec, *, cache_dir: Path, environ: Mapping[str, str] | None = None
) -> tuple[str, dict[str, Path]] | None:
    """Return the kind of source and the files by role that need no network, or None.

    Only looks, and hashes nothing.
    """
    environment = os.environ if environ is None else environ
    for source in spec.sources:
        paths: dict[str, Path] | None
        if isinstance(source, LocalSource):
            paths = local_paths(spec, source, environ=environment)
        elif isinstance(source, HubSource):
            try:
                paths = hub_paths(spec, source, ask_hub=False)[0]
            except SourceUnavailable:
                paths = None
        else:
            paths = wheel_paths(spec, source, cache_dir=cache_dir)
        if paths is not None and all(path.exists() for path in paths.values()):
            return source.type, paths
    return None


def _tree_bytes(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def asset_rows(
    specs: Mapping[str, AssetSpec], cache: Path, *, environ: Mapping[str, str] | None = None
) -> list[AssetRow]:
    """Return one table line an asset, in the order of the file: where it would come from, or does."""
    rows = []
    for spec in specs.values():
        cached = find_cached(spec, cache_dir=cache, environ=environ)
        if cached is not None:
            source_type, paths = cached
            size_bytes: int | None = sum(_tree_bytes(path) for path in set(paths.values()))
        else:
            first = next(
                (source for source in spec.sources if not isinstance(source, LocalSource)), spec.sources[0]
            )
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
