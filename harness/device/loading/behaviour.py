"""What a model does with its tensors, as hashes of written-out lists: its identity besides the tensors' hash.

    forward     numbers and names of the configuration that enter the forward pass
    end         token ids that end a text
    tokenizer   how text becomes token ids
    template    how a conversation becomes text
    adapter     how the tensors of an adapter are scaled and where they are added

A part is a hash of values that are read one by one and brought into one form, never of a file as a whole or
of what a library writes. So one folder has one hash, whichever transformers reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from harness.device.loading.folder import read_json_object
from harness.errors import UserError
from harness.files import canonical_sha256
from medusa_impl.engine.families import sliding_window

PARTS = ("forward", "end", "tokenizer", "template", "adapter")

# Fields of the families' configurations that enter the forward pass. Some families call the same number by
# another name: transformers' own aliases are read through, the others stand here under both.
FORWARD_FIELDS = (  # noqa: SIM905
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "max_position_embeddings hidden_act hidden_activation activation activation_function layer_types "
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon layer_norm_elementwise_affine "
    "attention_bias mlp_bias bias use_bias qkv_bias use_qkv_bias enable_bias lm_head_bias "
    "attention_out_bias "
    "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar clip_qkv qk_layernorm use_qk_norm "
    "attention_multiplier embedding_multiplier embedding_scale residual_multiplier logits_scaling "
    "logit_scale "
    "scale_embedding rescale_embeddings mup_enabled lambda_std_dev "
    "rotary_dim no_rope_layers no_rope_layer_interval layer_rope_theta "
    "alibi parallel_attn new_decoder_architecture multi_query num_ln_in_parallel_attn use_parallel_residual "
    "num_kv_heads num_attention_heads_per_layer kv_channels sliding_window_pattern "
    "global_attn_every_n_layers "
    "full_attn_idxs use_bidirectional_attention attention_type num_random_blocks block_size prefix_lm "
    "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn "
    "attention_softmax_in_fp32 scale_attention_softmax_in_fp32 "
    "do_layer_norm_before _remove_final_layer_norm word_embed_proj_dim ffn_dim ffn_hidden_size dff n_inner "
    "intermediate_multiple_size block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of "
    "input_embedding_size output_embedding_size embedding_size type_vocab_size use_post_norm "
    "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok moe_topk moe_k "
    "num_shared_experts n_shared_experts moe_num_shared_experts moe_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size "
    "prefix_dense_intermediate_size prefix_dense_sliding_window_pattern "
    "norm_topk_prob decoder_sparse_step mlp_only_layers mlp_layer_types first_k_dense_replace "
    "num_dense_layers moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min n_group "
    "topk_group route_scale routed_scaling_factor router_scaling_factor moe_routed_scaling_factor "
    "moe_router_logit_softcapping moe_apply_router_weight_on_input shared_expert_combination_strategy "
    "expert_selection_fn enable_moe_fp32_combine gating swiglu_alpha swiglu_limit "
    "H_cycles L_cycles num_layers_per_stack "
    "index_block_size index_head_dim index_local_blocks index_n_heads index_topk_blocks"
).split()
# Fields that do not: training, names, what a tokenizer or `generate` reads, other tasks, and those that
# `_forward` brings into one form by hand.
OTHER_FIELDS = (  # noqa: SIM905
    "architectures transformers_version dtype is_encoder_decoder is_decoder add_cross_attention use_cache "
    "return_dict output_hidden_states output_router_logits chunk_size_feed_forward problem_type id2label "
    "label2id bos_token_id eos_token_id pad_token_id sep_token_id eod_token_id decoder_start_token_id "
    "initializer_range init_std attention_dropout attention_probs_dropout_prob attn_pdrop embd_pdrop "
    "embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop residual_dropout dropout layerdrop "
    "activation_dropout classifier_dropout classifier_dropout_prob router_aux_loss_coef aux_loss_coef "
    "router_jitter_noise input_jitter_noise pretraining_tp summary_activation summary_first_dropout "
    "summary_last_dropout summary_proj_to_labels summary_type summary_use_proj num_mtp_layers "
    "rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings "
    "sliding_window use_sliding_window max_window_layers num_key_value_heads tie_word_embeddings"
).split()
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKEN_FIELDS = ("id", "content", "single_word", "lstrip", "rstrip", "special")
# Texts whose token ids show what a tokenizer does besides its words: spaces, newlines, figures, case, code,
# accents in one and in two characters, a ligature, other scripts, and what no vocabulary holds.
_PROBES = (
    "Hello, world!",
    "  two spaces  and a tab\t, then\n\n lines \r\n",
    "In 1984 it cost 12,345.67 or 8.9e-10",
    "UPPER lower CamelCase snake_case don't we'll",
    "def f(x):\n    return {'a': [x**2, -1]}  # done",
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01ne \u00bd \u2126",
    "\u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u3053\u3093",
    "\U0001f600\u200d\U0001f680 \u2581 <s> </s> \ufffd",
)
_ADAPTER_FIELDS = (  # noqa: SIM905
    "peft_type r lora_alpha target_modules target_parameters exclude_modules layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern use_rslora use_dora fan_in_fan_out bias lora_bias "
    "modules_to_save trainable_token_indices"
).split()
_ADAPTER_LISTS = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")


def behaviour_of(model: PreTrainedModel, tokenizer: Any, *, eos_ids: Iterable[int]) -> dict[str, str]:
    """Return the hash of each part of a model's behaviour; without a tokenizer the first two only."""
    parts = {"forward": _sha256(_forward(model)), "end": _sha256(sorted(eos_ids))}
    if tokenizer is None:
        return parts
    return {
        **parts,
        "tokenizer": _sha256(_tokenizer(tokenizer)),
        "template": _sha256(_template(tokenizer)),
    }


def adapter_behaviour(folder: Path) -> str:
    """Return the hash of what an adapter's configuration adds to its tensors.

    Raises: UserError for a broken configuration.
    """
    config = read_json_object(folder / "adapter_config.json", name=folder.name) or {}
    fields = {name: config.get(name) for name in _ADAPTER_FIELDS}
    lists = {name: sorted(listed) for name in _ADAPTER_LISTS if isinstance(listed := fields[name], list)}
    return _sha256({**fields, **lists})


def eos_ids_of(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a text: the generation configuration's, else the configuration's."""
    generation: Any = model.generation_config
    eos = getattr(generation, "eos_token_id", None)
    eos = eos if eos is not None else model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list | tuple) else [eos])


def differing(mine: Mapping[str, str], theirs: Mapping[str, str], *, parts: Iterable[str]) -> list[str]:
    """Return which of the parts differ, of those that both know."""
    return [part for part in parts if part in mine and part in theirs and mine[part] != theirs[part]]


def check_pinned(found: Mapping[str, str], pinned: Mapping[str, str], *, name: str) -> None:
    """Refuse an asset whose tensors are right and whose other files are not.

    Raises: UserError that names the parts.
    """
    if changed := differing(found, pinned, parts=PARTS):
        told = ", ".join(f"{part} {found[part][:16]}" for part in changed)
        raise UserError(
            found=f"another behaviour ({told}) of the pinned tensors",
            need=", ".join(f"{part} {pinned[part][:16]}" for part in changed),
            where=f"asset {name}",
            do="remove its folder in the cache, so that it is made again, or give these files an asset of "
            "their own",
        )


def _forward(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    found: dict[str, Any] = {name: getattr(config, name, None) for name in FORWARD_FIELDS}
    heads = found["num_attention_heads"]
    if found["head_dim"] is None and heads and found["hidden_size"]:
        found["head_dim"] = found["hidden_size"] // heads
    if set(found["layer_types"] or ()) == {"full_attention"}:
        found["layer_types"] = None  # what older configurations leave out
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()
    return {
        **found,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "rope": _rope(config),
        "sliding_window": sliding_window(model),
        "tied": lm_head is not None and embedding.weight.data_ptr() == lm_head.weight.data_ptr(),
    }


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters, wherever a version of transformers keeps them."""
    written = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = {key: table for key, table in written.items() if isinstance(table, dict)}
    if tables:  # one table for each type of layer
        return {
            key: {name: value for name, value in table.items() if name != "type"}
            for key, table in tables.items()
        }
    rope = {
        "rope_type": written.get("rope_type", written.get("type")) or "default",
        **{name: value for name, value in written.items() if name not in ("rope_type", "type")},
    }
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            rope[name] = getattr(config, name, None)
    return rope


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return words, merges, added tokens, and the ids of texts that show the rest.

    How the rest is written down differs between versions that do the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # one in Python has none
    state = json.loads(backend.to_str()) if backend is not None else {}
    added = [{name: token.get(name) for name in _TOKEN_FIELDS} for token in state.get("added_tokens") or ()]
    return {
        "vocab": tokenizer.get_vocab(),
        "merges": (state.get("model") or {}).get("merges"),
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "probes": [tokenizer(text)["input_ids"] for text in _PROBES],
    }


def _template(tokenizer: Any) -> dict[str, Any]:
    """Return the chat template and the special tokens that it names."""
    template = getattr(tokenizer, "chat_template", None)
    text = json.dumps(template)
    named = {name: getattr(tokenizer, name, None) for name in _SPECIAL_TOKENS if name in text}
    return {"template": template, **named}


def _sha256(value: Any) -> str:
    return canonical_sha256(_plain(value))


def _plain(value: Any) -> Any:
    """Return a value in one form: no entry that is absent, None or false, and whole numbers as integers."""
    if isinstance(value, dict):
        plain = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in plain.items() if inner is not None and inner is not False}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return str(value)  # a token object, a dtype
