"""A tiny random backbone for tests of the method."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_impl.engine.backbone import Backbone

TINY_VOCAB = 61


def tiny_llama(
    *, seed: int = 0, vocab_size: int = TINY_VOCAB, num_layers: int = 2, scale: float = 0.4
) -> LlamaForCausalLM:
    """Return a random Llama whose logits are far from uniform, so that greedy decoding meets no ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=scale,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """The backbone that most tests share; nothing may change its weights."""
    return Backbone(tiny_llama())
