"""Which models follow a tree is decided when the backbone is made, and with what windows and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tree import DraftTree

SMALL: dict[str, Any] = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALL_FULL = {"layer_types": ["full_attention", "full_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MLA": ("DeepseekV3", {**LATENT, "v_head_dim": 8, "n_routed_experts": 4}, "multi-head latent attention"),
    "MiMo": ("MiMoV2Flash", {**EXPERTS, "n_routed_experts": 4, "head_dim": 8, "v_head_dim": 8}, "shape"),
    "Doge": ("Doge", EXPERTS, "pass over a small tree fails"),
    "RemBERT": ("RemBert", {"is_decoder": True, "output_embedding_size": 48}, "reads 48 numbers"),
    "GPT-NeoX-Japanese": ("GPTNeoXJapanese", {}, "pass over a small tree fails"),
    "Llama-4": ("Llama4", {**EXPERTS, **ALL_FULL, "head_dim": 8}, "pass over a small tree fails"),
    "MiniMax": ("MiniMax", {**EXPERTS, **ALL_FULL, "head_dim": 8}, "pass over a small tree fails"),
}


def random_model(family: str, changes: dict[str, Any]) -> PreTrainedModel:
    names = (f"{family}TextConfig", f"{family}Config")
    classes = (f"{family}ForCausalLM", f"{family}LMHeadModel")
    kind = next(getattr(transformers, name) for name in classes if hasattr(transformers, name))
    config = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config(**{**SMALL, **changes}))
    model.eval()
    return model


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_follow_a_tree_is_refused_when_the_backbone_is_made(family: str) -> None:
    """These came to light in the first pass only, some with a traceback."""
    name, changes, reason = REFUSED[family]
    with pytest.raises(UserError, match=reason):
        Backbone(random_model(name, changes))


def test_a_multimodal_wrapper_is_refused_by_name() -> None:
    text = {**SMALL, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    with pytest.raises(UserError, match="'gemma3' that wraps a text model of type 'gemma3_text'"):
        Backbone(model)


def test_a_model_whose_positions_follow_cache_slots_is_refused() -> None:
    """A family that nobody has listed, and whose pass fails nowhere: its logits tell."""

    class BySlots(LlamaForCausalLM):
        def forward(
            self,
            input_ids: Any,
            attention_mask: Any,
            position_ids: Any,
            past_key_values: Any,
            logits_to_keep: int,
            use_cache: bool,
        ) -> Any:
            start = past_key_values.get_seq_length()
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=torch.arange(start, start + input_ids.shape[1])[None],
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
            )

    model = BySlots(tiny_llama().config)
    model.load_state_dict(tiny_llama().state_dict())
    with pytest.raises(UserError, match="other logits in a tree than in plain text"):
        Backbone(model)


def test_a_window_that_the_model_ignores_is_not_applied() -> None:
    """Llama's code knows no window: a field of that name in its configuration changed vanilla's texts."""
    model = tiny_llama()
    plain = Backbone(model).read(
        torch.arange(20), cache=Backbone(model).new_cache(batch_size=1, max_length=20)
    )
    model.config.sliding_window = 4
    windowed = Backbone(model)
    read = windowed.read(torch.arange(20), cache=windowed.new_cache(batch_size=1, max_length=20))
    assert torch.equal(plain.logits, read.logits)


def longrope_model() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 8.0, 24.0, 60.0],
        "original_max_position_embeddings": 32,
    }
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32, "sliding_window": None}
    return random_model("Phi3", {**changes, "max_position_embeddings": 512})


def test_longrope_ends_at_its_original_length_and_is_exact_up_to_there() -> None:
    """Beyond it, frequencies follow the longest position of a pass: a tree or a batch switched them early.

    The first row ends before the second, and its tree is still written, beyond the original length.
    """
    backbone = Backbone(longrope_model())
    heads = MedusaHeads(
        num_heads=3,
        num_layers=1,
        hidden_size=32,
        vocab_size=TINY_VOCAB,
        architecture="own",
        lm_head=backbone.lm_head,
    )
    tree, prompts = DraftTree.cartesian((2, 2, 1)), [[3, 7, 11, 2, 9, 40, 41, 8], [5, 6]]
    options: dict[str, Any] = {"rule": GreedyRule(), "max_new_tokens": 21, "eos_ids": frozenset()}

    def texts(steps: Any) -> list[list[int]]:
        rows: list[list[int]] = [[], []]
        for step in steps:
            for row, tokens in zip(rows, step.tokens, strict=True):
                row += tokens
        return rows

    vanilla = texts(decode_vanilla(backbone, prompts, **options))
    assert texts(decode_medusa(backbone, heads, tree, prompts, **options)) == vanilla
    model: Any = backbone.model
    with backbone.stock_attention():
        stock = model.generate(torch.tensor(prompts[:1]), max_new_tokens=21, do_sample=False)
    assert stock[0, 8:].tolist() == vanilla[0]
    with pytest.raises(UserError, match=r"at most 32 positions \(the original length"):
        backbone.check_positions(prompt_tokens=8, max_new_tokens=22, depth=3)
    with pytest.raises(UserError, match=r"a text of 33 tokens"):
        backbone.read(
            torch.zeros(33, dtype=torch.long), cache=backbone.new_cache(batch_size=1, max_length=40)
        )


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_a_text_longer_than_learned_positions_is_refused_in_one_line(family: str) -> None:
    """It was an IndexError on a CPU and would stop a GPU's process."""
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "OPT" else {}
    backbone = Backbone(random_model(family, changes))
    cache = backbone.new_cache(batch_size=1, max_length=200)
    backbone.read(torch.zeros(96, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="found a text of 97 tokens; need at most 96 positions"):
        backbone.read(torch.zeros(97, dtype=torch.long), cache=cache)
