"""Where a record comes from: commit, versions, device."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.bounds import Count, Utc
from harness.files import Frozen
from harness.versions import VERSION, Versioned

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "OPENBLAS_CORETYPE",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
    "CUDA_VISIBLE_DEVICES",
)
"""The environment variables that change threads or kernels: a record keeps those, and no other."""


class DeviceInfo(Frozen):
    """The device under test; no host name, no user name."""

    kind: Literal["cpu", "cuda"] = Field(description="which backend of PyTorch runs it")
    name: str = Field(description="its own name, such as NVIDIA A100-SXM4-80GB")
    num_cores: Count = Field(description="logical cores of the host's CPU")
    num_threads: Count = Field(description="threads that PyTorch uses on the CPU")
    memory_bytes: Count = Field(description="bytes of memory: of the GPU, else of the host")
    details: dict[str, str] = Field(
        default={},
        description="what it says of itself beyond its name: architecture, family, model, stepping, "
        "instruction sets, hypervisor and caches of a CPU; compute capability, CUDA version, driver, memory, "
        "power limit and host processor of a GPU",
    )


class TunedOrigin(Frozen):
    """The tuned backbone of a run."""

    backbone_sha256: str = Field(description="SHA-256 that stands for model and adapter together")
    adapter_sha256: str = Field(description="SHA-256 of the adapter's tensors")
    behaviour_sha256: str | None = Field(
        default=None, description="SHA-256 of all parts of the behaviour; null in older records"
    )
    behaviour: dict[str, str] = Field(
        default={}, description="SHA-256 of each part of what model and adapter do with their tensors"
    )
    heads_sha256: str = Field(description="SHA-256 of the heads' tensors")
    heads_provenance: dict[str, Any] = Field(
        default={}, description="what the heads' file says of their training"
    )
    weight_bytes: Count = Field(description="bytes of the backbone's weights that one decoding step reads")
    packed_bytes: Count = Field(description="bytes of packed copies of weights that the engine keeps as well")
    heads_bytes: Count = Field(description="bytes that one call of all heads reads")


class Provenance(Versioned):
    """Where a record comes from, whatever its kind."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    commit: str | None = Field(description="commit of the code; null outside a git checkout")
    dirty: bool | None = Field(
        description="whether tracked files differed from the commit; null where unknown"
    )
    command: str = Field(description="command line, without paths")
    python: str = Field(description="version of Python")
    packages: dict[str, str] = Field(description="versions of the packages that can move a figure, by name")
    device: DeviceInfo = Field(description="the machine that measured or, for a sweep, composed")
    started_utc: Utc = Field(description="time at which the record was begun, ISO 8601, in UTC")


class Environment(Provenance):
    """Where a record comes from that a loaded model made."""

    engine: str = Field(description="mode of the engine, or the modes that the record compares")
    dtype: str = Field(description="dtype of the backbone, or the dtypes that the record compares")
    blas: str = Field(description="libraries and vector instructions that PyTorch was built with")
    variables: dict[str, str] = Field(
        description="environment variables that change threads or kernels, where set"
    )
    backbone_sha256: str = Field(description="SHA-256 of the backbone's stored tensors")
    behaviour_sha256: str | None = Field(
        default=None,
        description="SHA-256 of all parts of the behaviour; null in older records and without a folder",
    )
    behaviour: dict[str, str] = Field(
        default={},
        description="SHA-256 of each part of what the model does with its tensors: numbers of the forward "
        "pass, end tokens, tokenizer, template, adapter",
    )
    heads_sha256: str | None = Field(description="SHA-256 of the heads' tensors; null without heads")
    prompts_sha256: str = Field(description="SHA-256 of keys and token ids of all texts that were read")
    model_name: str = Field(description="name of the backbone")
    weight_bytes: Count = Field(description="bytes of the backbone's weights that one decoding step reads")
    packed_bytes: Count = Field(
        default=0, description="bytes of packed copies of weights that the engine keeps"
    )
    heads_bytes: Count = Field(description="bytes that one call of all heads reads; 0 without heads")
    heads_provenance: dict[str, Any] = Field(
        default={}, description="what the heads' file says of their training"
    )
    tuned: TunedOrigin | None = Field(
        default=None, description="the suite's tuned backbone; null without one"
    )
    assets: dict[str, str] = Field(default={}, description="source and SHA-256 of each asset, by name")
    chat_date: date | None = Field(
        default=None, description="day that the chat template wrote; null where it asks for no date"
    )


ENGINE_IDENTITY = (
    "commit",
    "dirty",
    "packages",
    "device",
    "engine",
    "dtype",
    "backbone_sha256",
    "behaviour_sha256",
    "heads_sha256",
    "tuned",
    "prompts_sha256",
)
"""The fields of an `Environment` that two sessions of one record must agree on."""
