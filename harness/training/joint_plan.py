"""The least memory of training heads and backbone together, counted before anything is loaded.

What is held all the time is counted to the byte, on the meta device: weights, heads, adapter, gradients,
moments. Activations come on top, and depend on the length of the texts; so a plan that fits is a necessary
condition, and one that does not fit is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.device.engine import heads_like
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.medusa2 import MedusaTrainingModel


def joint_bytes(model: PreTrainedModel, recipe: Medusa2Settings, *, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of what a joint training holds all the time, by what they are.

    `model` stands on the meta device and is changed: it gets the recipe's adapter. Linear layers of a 4-bit
    backbone have half a byte a weight, their scales left out; the moments of the 8-bit optimiser one byte
    each.
    """
    on_meta: Any = model
    on_meta = on_meta.to(dtype)
    packed = _packed_weights(on_meta) if recipe.quantisation is not None else set()
    with torch.device("meta"):
        trained = MedusaTrainingModel(on_meta, heads_like(on_meta, recipe), recipe=recipe)
    heads, backbone = trained.parameter_groups()
    learning = [*heads, *backbone]
    moment = 1 if recipe.optimizer == "adamw_8bit" else 4
    held = _bytes(heads)
    adapter = _bytes(backbone) if recipe.backbone == "lora" else 0
    every = sum(
        one.numel() // 2 if one in packed else one.numel() * one.element_size()
        for one in _unique([*trained.parameters(), *trained.buffers()])
    )
    return {
        "weights": every - held - adapter,
        "heads": held,
        "adapter": adapter,
        "gradients": _bytes(learning),
        "optimiser": sum(2 * moment * one.numel() for one in learning),
    }


def _packed_weights(model: PreTrainedModel) -> set[torch.Tensor]:
    """Return the weights that 4 bits hold: those of all linear layers but the LM head."""
    lm_head = model.get_output_embeddings()
    return {
        module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not lm_head
    }


def _unique(tensors: list[Any]) -> list[Any]:
    return list({id(one): one for one in tensors}.values())


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(one.numel() * one.element_size() for one in parameters)
