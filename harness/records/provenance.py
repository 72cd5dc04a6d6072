"""Where a record comes from: commit, versions, device."""

from __future__ import annotations

import re
from typing import Any, Literal

from harness.files import Frozen


class DeviceInfo(Frozen):
    """The device under test; no host name, no user name."""

    kind: Literal["cpu", "cuda"]
    name: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    details: dict[str, str] = {}


class TunedOrigin(Frozen):
    """The tuned backbone of a run: `backbone_sha256` stands for model and adapter together."""

    backbone_sha256: str
    adapter_sha256: str
    heads_sha256: str
    heads_provenance: dict[str, Any] = {}
    weight_bytes: int
    packed_bytes: int
    heads_bytes: int


class Provenance(Frozen):
    """Where a record comes from, whatever its kind. `commit` is None outside a git checkout, and the report
    says so.
    """

    schema_version: Literal[1] = 1
    commit: str | None
    dirty: bool | None
    command: str
    python: str
    packages: dict[str, str]
    device: DeviceInfo
    started_utc: str


class Environment(Provenance):
    """Where a record comes from that a loaded model made."""

    engine: str
    dtype: str
    blas: str
    variables: dict[str, str]
    backbone_sha256: str
    heads_sha256: str | None
    prompts_sha256: str
    model_name: str
    weight_bytes: int
    packed_bytes: int = 0
    heads_bytes: int
    heads_provenance: dict[str, Any] = {}
    tuned: TunedOrigin | None = None
    assets: dict[str, str] = {}


ENGINE_IDENTITY = (
    "commit",
    "dirty",
    "packages",
    "device",
    "engine",
    "dtype",
    "backbone_sha256",
    "heads_sha256",
    "tuned",
    "prompts_sha256",
)
"""The fields of an `Environment` that two sessions of one record must agree on."""


def machine_slug(device: DeviceInfo) -> str:
    """Return the folder name of a machine: kind, device name and cores, fit for a path."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{device.kind}-{device.name}-{device.num_cores}c".lower())
    return words.strip("-")
