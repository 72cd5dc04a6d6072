"""A tiny random model, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from harness.specs.suite import TinyModelSpec

# Embeddings that outweigh the layers make the next token depend mostly on the last one: text that tiny heads
# can learn. A larger LM head makes the law sharp enough for sampling rules to accept drafts.
_TINY_STD, _TINY_EMBEDDING_SCALE, _TINY_LM_HEAD_SCALE = 0.1, 20.0, 4.0


def tiny_model(spec: TinyModelSpec, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a tiny configuration, in evaluation mode; the seed decides its weights."""
    torch.manual_seed(spec.seed)
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        max_position_embeddings=spec.max_positions,
        initializer_range=_TINY_STD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(_TINY_EMBEDDING_SCALE)
        model.get_output_embeddings().weight.mul_(_TINY_LM_HEAD_SCALE)
    model = model.to(dtype).eval()
    model.generation_config = GenerationConfig()
    ready: PreTrainedModel = model
    return ready
