"""Whether a model's step can be recorded: one pass over tensors without data tells.

A step that asks a tensor for a value (`item`, a branch, a list, a length by a tensor) cannot be replayed
without the host. On the meta device, whose tensors have shapes but no values, such a question is an error.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from medusa_impl.engine.attention import GROUPED_ATTENTION

_NUM_TOKENS = 3


def host_question(model: PreTrainedModel) -> str:
    """Return why a step of this model's class cannot run without the host, or an empty text.

    The pass runs on a copy that is made from the configuration and has no weights.
    """
    try:
        twin = _without_weights(model)
        ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, _NUM_TOKENS, _NUM_TOKENS, dtype=model.dtype, device="meta")
        with torch.inference_mode():
            twin(
                input_ids=ids,
                position_ids=ids,
                attention_mask=_masks(model, mask),
                past_key_values=DynamicCache(),
                use_cache=True,
            )
    except Exception as error:  # whatever a family's own code raises
        text = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {text}"
    return ""


def _without_weights(model: PreTrainedModel) -> Any:
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin: nn.Module = type(model)(config)
    twin.to(model.dtype).eval()
    attention: str = model.config._attn_implementation
    # Ours is the stock function for this question; some models must not be given another one.
    if attention != GROUPED_ATTENTION:
        twin.set_attn_implementation(attention)  # type: ignore[operator]
    return twin


def _masks(model: PreTrainedModel, mask: torch.Tensor) -> Any:
    types = set(getattr(model.config, "layer_types", None) or ())
    return dict.fromkeys(types, mask) if len(types) > 1 else mask
