"""Tree attention in every family of models, compared with plain forward passes of transformers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import decode_medusa, decode_vanilla
from medusa_impl.engine.attention import GROUPED_ATTENTION, grouped_sdpa_attention
from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers

MAX_POSITIONS = 96
WINDOW = 5  # shorter than most prompts below
PROMPTS = [[3, 7, 11, 2, 9, 40, 41, 8, 1, 30, 22], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8]]
SMALL = {
    "vocab_size": TINY_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
GEMMA = {
    **LLAMA_LIKE,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": WINDOW}

FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", LLAMA_LIKE),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen2 mixed": ("Qwen2", {**LLAMA_LIKE, **MIXED, "use_sliding_window": True}),
    "qwen2 sliding": ("Qwen2", {**LLAMA_LIKE, **SLIDING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GEMMA, **MIXED, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3 text": ("Gemma3", {**GEMMA, **MIXED}),
    "phi3": ("Phi3", {**LLAMA_LIKE, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2", LLAMA_LIKE),
    "granite": (
        "Granite",
        {**LLAMA_LIKE, "logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "gpt-neox": ("GPTNeoX", {**SMALL, "intermediate_size": 48}),
    "gpt2": ("GPT2", SMALL),
    "opt": (
        "OPT",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.2, "tie_word_embeddings": True},
    ),
    "falcon": ("Falcon", {**SMALL, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("Mixtral", {**LLAMA_LIKE, **EXPERTS, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3Moe", {**LLAMA_LIKE, **EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "stablelm": ("StableLm", LLAMA_LIKE),
    "gpt-j": ("GPTJ", {**SMALL, "rotary_dim": 4}),
}


def build(family: str, *, attention: str | None = None) -> PreTrainedModel:
    """Return the same tiny random model of a family on every call."""
    name, options = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**options)
    model: PreTrainedModel = getattr(
        transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    )(config).eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@torch.inference_mode()
def stock_pass(model: PreTrainedModel, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return logits `[T, V]` of a stock pass, and the states `[T, H]` that its LM head was given.

    It has no cache, and no mask or positions of ours.
    """
    captured: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: captured.append(inputs[0])
    )
    try:
        logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    finally:
        hook.remove()
    return logits[0], captured[0][0]


def random_tree(seed: int, *, num_nodes: int = 9) -> DraftTree:
    draws = random.Random(seed)
    paths: list[tuple[int, ...]] = [()]
    while len(paths) < num_nodes:
        path = (*draws.choice(paths[-4:]), draws.randrange(4))
        if path not in paths:
            paths.append(path)
    return DraftTree.from_paths(paths)


def ancestors(tree: DraftTree, node: int) -> list[int]:
    """Return the node indices from the root to a node, found from the rank paths alone."""
    return [tree.paths.index(tree.paths[node][:depth]) for depth in range(len(tree.paths[node]) + 1)]


def check_tree_step(
    backbone: Backbone,
    reference: PreTrainedModel,
    prefixes: list[list[int]],
    cache: Any,
    *,
    buffers: TreeBuffers,
    seed: int,
) -> list[list[int]]:
    """Return the prefixes after one tree step, which is checked and of which one random path a row is kept.

    All nodes are compared with stock passes over prefix and path.
    """
    tree, draws = buffers.tree, random.Random(seed)
    tokens = torch.tensor([[draws.randrange(TINY_VOCAB) for _ in range(tree.num_nodes)] for _ in prefixes])
    output = backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache)
    kept, longer = [], []
    for row, prefix in enumerate(prefixes):
        for leaf in tree.leaves:
            path = ancestors(tree, leaf)
            logits, states = stock_pass(reference, prefix + tokens[row, path].tolist())
            torch.testing.assert_close(output.logits[row, path], logits[len(prefix) :], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(output.hidden[row, path], states[len(prefix) :], atol=1e-4, rtol=1e-4)
        kept.append(ancestors(tree, draws.randrange(tree.num_nodes)))
        longer.append(prefix + tokens[row, kept[-1]].tolist())
    width = max(len(path) for path in kept)
    cache.keep(
        torch.tensor([path + [0] * (width - len(path)) for path in kept]),
        torch.tensor([len(path) for path in kept]),
    )
    return longer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tree_node_equals_a_stock_pass_over_its_path(family: str) -> None:
    """Logits and states of every node are those of stock transformers.

    Three rows of unequal length decode two trees, one after the other, and keep any path. The stock pass runs
    eager attention and knows nothing of trees, caches or explicit positions. Most prompts exceed the sliding
    window.
    """
    reference, backbone = build(family, attention="eager"), Backbone(build(family))
    cache = backbone.new_cache(batch_size=3, max_length=60)
    for row, prompt in enumerate(PROMPTS):
        logits, states = stock_pass(reference, prompt)
        output = backbone.prefill(torch.tensor(prompt), cache=cache, row=row)
        assert output.logits.shape == (1, 1, TINY_VOCAB)
        torch.testing.assert_close(output.logits[0], logits[-1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.hidden[0], states, atol=1e-4, rtol=1e-4)
    prefixes = PROMPTS
    for seed in (1, 2):
        buffers = tree_buffers(random_tree(seed), device=backbone.device)
        prefixes = check_tree_step(backbone, reference, prefixes, cache, buffers=buffers, seed=seed)
    assert cache.lengths == [len(prefix) for prefix in prefixes]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_medusa_equals_a_loop_of_stock_passes(family: str) -> None:
    """The tokens are those of a loop that only calls the stock model.

    The heads are random, the rows unequal, the context longer than the window.
    """
    reference, backbone = build(family, attention="eager"), Backbone(build(family))
    heads = MedusaHeads(
        num_heads=3,
        num_layers=1,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        architecture="shared",
    ).eval()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tree = DraftTree.cartesian([3, 2, 1])
    steps = list(
        decode_medusa(
            backbone, heads, tree, PROMPTS[:2], rule=GreedyRule(), max_new_tokens=9, eos_ids=frozenset()
        )
    )
    for row, prompt in enumerate(PROMPTS[:2]):
        text = list(prompt)
        for _ in range(9):
            text.append(int(stock_pass(reference, text)[0][-1].argmax()))
        assert [token for step in steps for token in step.tokens[row]] == text[len(prompt) :]


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-j", "gemma2"])
def test_heads_read_what_the_lm_head_reads(family: str) -> None:
    """The LM head on the returned states gives the model's logits.

    Families that scale or cap their logits afterwards (Gemma 2) do so here too.
    """
    backbone = Backbone(build(family))
    cache = backbone.new_cache(batch_size=1, max_length=30)
    output = backbone.prefill(torch.tensor(PROMPTS[0]), cache=cache)
    logits = backbone.lm_head(output.hidden[:, -1:])
    if family == "gemma2":
        logits = 2.0 * torch.tanh(logits / 2.0)
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=1e-5)
    assert output.hidden.shape[-1] == backbone.hidden_size == (24 if family == "opt" else 32)


def given_masks(backbone: Backbone, *, prompt: list[int], depths: list[int], visible: list[list[int]]) -> Any:
    """Return what the model gets as `attention_mask` for a few nodes after a kept prompt.

    Models whose query heads share keys get its rows once for each head of a group; one of them is returned.
    """
    cache = backbone.new_cache(batch_size=1, max_length=len(prompt) + len(depths) + 2)
    backbone.prefill(torch.tensor(prompt), cache=cache)
    seen: list[Any] = []
    hook = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        backbone.forward(
            torch.ones(1, len(depths), dtype=torch.long),
            depths=torch.tensor(depths),
            visible=torch.tensor(visible).bool(),
            cache=cache,
        )
    finally:
        hook.remove()
    return (
        {name: once(mask, len(depths)) for name, mask in seen[0].items()}
        if isinstance(seen[0], dict)
        else once(seen[0], len(depths))
    )


def once(mask: Tensor, num_nodes: int) -> Tensor:
    """Return the rows of one query head, after a check that those of the others are the same."""
    groups = mask.shape[2] // num_nodes
    assert groups in (1, 2) and torch.equal(mask, mask[:, :, :num_nodes].repeat(1, 1, groups, 1))
    return mask[:, :, :num_nodes]


def drawn(mask: Tensor) -> list[str]:
    return ["".join("0" if value == 0 else "." for value in row) for row in mask[0, 0].tolist()]


def test_the_drawn_mask() -> None:
    """The mask of three kept tokens, a root with two children and unused slots is as `TreeMask` draws it.

    Regression: eager attention adds a boolean mask as 0 and 1, so the mask has the model's floating-point
    type.
    """
    mask = given_masks(
        Backbone(build("llama")),
        prompt=[1, 2, 3],
        depths=[0, 1, 1],
        visible=[[1, 0, 0], [1, 1, 0], [1, 0, 1]],
    )
    assert drawn(mask) == ["0000....", "00000...", "0000.0.."]
    assert mask.shape == (1, 1, 3, 8) and mask.dtype == torch.float32
    assert set(mask.flatten().tolist()) == {0.0, torch.finfo(torch.float32).min}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2", "full"),
        ("mistral", "windowed"),
        ("phi3", "windowed"),
        ("mixtral", "windowed"),
        ("qwen2 sliding", "windowed"),
        ("qwen2 mixed", "both"),
        ("gemma2", "both"),
        ("gemma3 text", "both"),
    ],
)
def test_which_layers_get_the_windowed_mask(family: str, expected: str) -> None:
    """Regression: one plain mask for all layers of a sliding-window model silently gives wrong logits.

    So do swapped names in the dictionary. With six kept tokens, window 5 and a chain of three nodes, the node
    at position 6 + d sees the positions 2 + d to 6 + d.
    """
    chain = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    masks = given_masks(Backbone(build(family)), prompt=[1, 2, 3, 4, 5, 6], depths=[0, 1, 2], visible=chain)
    full = ["0000000....", "00000000...", "000000000.."]
    windowed = ["..00000....", "...00000...", "....00000.."]
    if expected == "both":
        assert set(masks) == {"full_attention", "sliding_attention"}
        assert drawn(masks["full_attention"]) == full and drawn(masks["sliding_attention"]) == windowed
    else:
        assert drawn(masks) == (full if expected == "full" else windowed)


def test_a_window_applies_between_the_tokens_of_one_pass_too() -> None:
    """Regression: the window once hid kept tokens only.

    A prompt longer than the window was then read as if there were no window.
    """
    chain = torch.ones(7, 7).tril().long().tolist()
    mask = given_masks(Backbone(build("mistral")), prompt=[1], depths=list(range(7)), visible=chain)
    assert drawn(mask)[-1] == "...00000.."


ALIBI = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
REFUSED: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "bloom": ("Bloom", ALIBI, "ALiBi"),
    "mpt": ("Mpt", {"vocab_size": 32, "d_model": 32, "n_layers": 1, "n_heads": 4}, "ALiBi"),
    "falcon": ("Falcon", {**ALIBI, "alibi": True}, "ALiBi"),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 4,
            "attention_types": [[["global"], 1]],
        },
        "causal mask of its own",
    ),
    "mamba": (
        "Mamba",
        {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        "takes no .*position_ids",
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **LLAMA_LIKE,
            **EXPERTS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 24,
        },
        "linear_attention",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_cannot_follow_a_tree_are_refused_by_name(model_type: str) -> None:
    """MPT and GPT-Neo would give wrong logits without an error; the others crash deep inside transformers."""
    name, options, why = REFUSED[model_type]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options))
    with pytest.raises(UserError, match=f"model type '{model_type}' .*{why}"):
        Backbone(model)


def test_a_prompt_without_finite_logits_is_refused_at_its_first_pass() -> None:
    """Decoded on, its text would be that of an argmax over nothing."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    backbone = Backbone(model)
    for prompts, fails in (([[1, 2, 3]], False), ([[1, 7, 3]], True), ([[1, 2], [7, 1]], True)):
        steps = decode_vanilla(backbone, prompts, rule=GreedyRule(), max_new_tokens=1, eos_ids=frozenset())
        if fails:
            with pytest.raises(UserError, match="found a logit that is not finite"):
                next(steps)
        else:
            assert len(next(steps).tokens[0]) == 1


def test_position_limits_are_exact_about_what_is_asked() -> None:
    """Prompt, budget and tree depth must fit into learned positions, and the last one that fits works."""
    backbone = Backbone(build("gpt2"))
    backbone.check_positions(prompt_tokens=80, max_new_tokens=12, depth=4)
    with pytest.raises(UserError, match=r"prompt of 80 tokens .* depth 5; need at most 96 positions"):
        backbone.check_positions(prompt_tokens=80, max_new_tokens=12, depth=5)
    prompt = [token % TINY_VOCAB for token in range(MAX_POSITIONS - 4)]
    steps = list(decode_vanilla(backbone, [prompt], rule=GreedyRule(), max_new_tokens=4, eos_ids=frozenset()))
    assert len(steps) == 4


def test_grouped_attention_equals_repeated_keys_and_values() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    mask = torch.zeros(2, 1, 5, 11).masked_fill(torch.rand(2, 1, 5, 11) < 0.3, torch.finfo(torch.float32).min)
    mixed, _ = grouped_sdpa_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.4)
    scores = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) * 0.4 + mask
    expected = (scores.softmax(-1) @ value.repeat_interleave(3, dim=1)).transpose(1, 2)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_stock_attention_survives_a_second_backbone_and_an_exception() -> None:
    """Regression: a second backbone on the same model took the first one's attention for the stock one."""
    model = tiny_llama()
    stock = model.config._attn_implementation
    first, second = Backbone(model), Backbone(model)
    for backbone in (first, second):
        with pytest.raises(ZeroDivisionError), backbone.stock_attention():
            assert model.config._attn_implementation == stock == "sdpa"
            raise ZeroDivisionError
        assert model.config._attn_implementation == GROUPED_ATTENTION
