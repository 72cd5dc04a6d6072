"""A model of a published shape with random weights.

A dense model's step takes as long whatever its weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from harness.errors import UserError
from harness.specs.shapes import ShapeSpec

_WEIGHT_STD = 0.02  # initializer_range in the config.json of these families


def random_model(
    shape: ShapeSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """Return a model of that shape in evaluation mode, with at most `num_layers` of its layers.

    It has no end-of-sequence token. The weights are drawn in place on the device in their own dtype: no copy
    in float32 or on the host, no default initialisation.
    Raises: UserError for a number of layers that the shape does not have.
    """
    num_layers = shape.num_layers if num_layers is None else num_layers
    if not 1 <= num_layers <= shape.num_layers:
        raise UserError(
            found=f"{num_layers} layers", need=f"1 to {shape.num_layers}", where=f"the shape {shape.name}"
        )
    model: Any = shape_without_weights(shape, num_layers=num_layers, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()  # moving off the meta device parts tied tensors
    _fill(model, buffers=_buffers(shape), seed=seed)
    model.generation_config = GenerationConfig()
    ready: PreTrainedModel = model.eval()
    return ready


def shape_without_weights(
    shape: ShapeSpec, *, num_layers: int | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a model of that shape on the meta device, whose tensors have no data."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            transformers_config(shape, num_layers=num_layers), dtype=dtype
        )
    return model


def transformers_config(
    shape: ShapeSpec, *, num_layers: int | None = None
) -> LlamaConfig | MistralConfig | Qwen2Config:
    """Return the configuration of a shape, or of its first layers, without special tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers if num_layers is None else num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.model_type == "qwen2":
        return Qwen2Config(**sizes)
    if shape.model_type == "mistral":
        return MistralConfig(**sizes, sliding_window=shape.sliding_window)
    return LlamaConfig(**sizes)


def _buffers(shape: ShapeSpec) -> dict[str, Tensor]:
    """Return the buffers (rotary frequencies) of a normally built model of that shape.

    A model without layers and of one token has them all.
    """
    stub = shape.model_copy(update={"vocab_size": 1})
    with torch.random.fork_rng(devices=[]):  # its one embedding row is drawn from the global generator
        model: Any = AutoModelForCausalLM.from_config(
            transformers_config(stub, num_layers=0), dtype=torch.float32
        )
    return dict(model.named_buffers())


@torch.no_grad()
def _fill(model: PreTrainedModel, *, buffers: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=_WEIGHT_STD, generator=generator)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
