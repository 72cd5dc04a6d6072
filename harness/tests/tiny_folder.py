"""A model's folder of a few kilobytes: a Llama, a tokenizer of single characters, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = ["<end>", "<unknown>", *map(chr, range(32, 127))]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def write_tiny_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a whole model folder and return it; `changes` go into its configuration."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(LETTERS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(str(folder))
    words = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(LETTERS)}, "<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Write changes into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
