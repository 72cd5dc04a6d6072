"""A folder with a tiny model that reads text: that of the smoke suite, and a tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.assets.catalogue import training_prompts
from harness.device.engine import load_model
from harness.tests.tiny_suite import smoke_suite

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
# so many words that two days differ in their number, whatever words the tokenizer knows
DATED = "It is {{ strftime_now('%d %b') }} {{ 'the ' * (strftime_now('%d') | int) }}. " + TEMPLATE


def save_text_model(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the model and a tokenizer of the words that training prompts have most often."""
    loaded = load_model(smoke_suite().model, device=torch.device("cpu"))
    loaded.model.save_pretrained(str(folder))
    texts = [prompt.text for prompt in training_prompts(num_prompts=200, seed=1, split="train")]
    most = Counter(word for text in texts for word in text.split()).most_common(126)
    words = {"<unknown>": 0, **{word: index for index, (word, _) in enumerate(most, start=1)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unknown>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder
