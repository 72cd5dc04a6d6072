"""Where a record comes from that a loaded model makes: an `Environment`, built in one place."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.assets.chat import taken_date
from harness.device.engine import Engine, LoadedModel
from harness.device.machine import blas_settings, origin, settings
from harness.files import canonical_sha256
from harness.records.provenance import Environment, TunedOrigin
from medusa_impl.checkpoints.tensors import backbone_sha256
from medusa_impl.heads import MedusaHeads


def describe_engine(
    engine: Engine,
    *,
    dtype: str,
    texts: list[list[Any]],
    command: str,
    modes: str | None = None,
    tuned: Engine | None = None,
) -> Environment:
    """Return where a record made with this engine now comes from.

    `texts` are key and token ids of all that it reads; `modes` stands in for the engine's own mode where a
    record compares several; `tuned` is the engine of the same model with an adapter.
    """
    return _environment(
        engine.loaded,
        dtype=dtype,
        texts=texts,
        command=command,
        engine=modes or engine.runner.mode,
        heads_sha256=engine.heads_sha256,
        weight_bytes=engine.weight_bytes,
        packed_bytes=engine.runner.packed_bytes,
        heads_bytes=engine.heads_bytes,
        heads_provenance=dict(engine.heads_provenance),
        tuned=_tuned_origin(tuned) if tuned is not None else None,
    )


def describe_training(
    loaded: LoadedModel, heads: MedusaHeads, *, dtype: str, texts: list[list[Any]], command: str
) -> Environment:
    """Return where the profile of a training comes from; bytes are those of all parameters.

    No engine is built, which would change the attention that joint training runs.
    """
    return _environment(
        loaded,
        dtype=dtype,
        texts=texts,
        command=command,
        engine="eager",
        heads_sha256=backbone_sha256(heads),
        weight_bytes=_parameter_bytes(loaded.model),
        heads_bytes=_parameter_bytes(heads),
    )


def _environment(
    loaded: LoadedModel, *, dtype: str, texts: list[list[Any]], command: str, **runs: Any
) -> Environment:
    """Return an environment; `runs` are the fields that depend on what runs the model."""
    return Environment(
        **origin(loaded.model.device, command=command),
        dtype=dtype,
        blas=blas_settings(),
        variables=settings(),
        backbone_sha256=loaded.sha256,
        behaviour_sha256=loaded.behaviour_sha256,
        behaviour=dict(loaded.behaviour),
        prompts_sha256=canonical_sha256(texts),
        model_name=loaded.name,
        assets=loaded.assets,
        chat_date=taken_date(loaded.tokenizer, begun=None),
        **runs,
    )


def _tuned_origin(tuned: Engine) -> TunedOrigin:
    assert tuned.loaded.adapter_sha256 is not None and tuned.heads_sha256 is not None
    return TunedOrigin(
        backbone_sha256=tuned.loaded.sha256,
        adapter_sha256=tuned.loaded.adapter_sha256,
        behaviour_sha256=tuned.loaded.behaviour_sha256,
        behaviour=dict(tuned.loaded.behaviour),
        heads_sha256=tuned.heads_sha256,
        heads_provenance=dict(tuned.heads_provenance),
        weight_bytes=tuned.weight_bytes,
        packed_bytes=tuned.runner.packed_bytes,
        heads_bytes=tuned.heads_bytes,
    )


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
