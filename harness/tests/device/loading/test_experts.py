"""Of a mixture's experts a token is sent to some: only these count as read and multiplied."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedModel

from harness.device.engine import Engine, LoadedModel, embedding_weights
from harness.device.loading.experts import chosen_share
from harness.measure.latency.engine import facts_of_engine
from medusa_impl.engine.runner import StepRunner
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.engine.test_backbone import EXPERTS, LLAMA_LIKE, build


def engine_of(model: PreTrainedModel) -> Engine:
    loaded = LoadedModel(model=model, tokenizer=None, name="tiny", sha256="0", eos_ids=frozenset(), assets={})
    weight = model.get_output_embeddings().weight
    heads = MedusaHeads(
        num_heads=2,
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        num_layers=1,
        architecture="own",
    )
    runner = StepRunner(model, heads, mode="eager", clock=time.perf_counter)
    return Engine(loaded=loaded, runner=runner, heads_sha256=None, heads_provenance={})


def dense_numbers(model: PreTrainedModel) -> int:
    """Return the numbers outside of experts and embedding, by the module that owns them."""
    every = sum(one.numel() for one in model.parameters())
    embedding = embedding_weights(model)[0].numel()
    return every - embedding - expert_numbers(model)


def expert_numbers(model: PreTrainedModel) -> int:
    modules = {name: one for name, one in model.named_modules() if name.endswith(".experts")}
    assert len(modules) == LLAMA_LIKE["num_hidden_layers"]
    return sum(one.numel() for module in modules.values() for one in module.parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_half_of_the_experts_are_read_where_two_of_four_are_chosen(family: str) -> None:
    """All experts once counted, so that every step of a mixture was faster than its device could be."""
    model = build(family)
    assert EXPERTS["num_experts_per_tok"] * 2 == EXPERTS["num_experts"]
    expected = dense_numbers(model) + expert_numbers(model) // 2
    engine = engine_of(model)
    assert engine.weight_bytes == 4 * expected
    facts = facts_of_engine(engine)
    assert facts.step_parameters == expected
    assert facts.num_parameters == sum(one.numel() for one in model.parameters())


def test_a_model_without_experts_is_read_whole() -> None:
    model = build("llama")
    embedding = embedding_weights(model)[0].numel()
    assert engine_of(model).weight_bytes == 4 * (sum(one.numel() for one in model.parameters()) - embedding)


@pytest.mark.parametrize(
    ("told", "share"),
    [
        ({}, 1.0),
        ({"num_local_experts": 8}, 1.0),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, 0.25),
        ({"n_routed_experts": 64, "moe_topk": 16}, 0.25),
        ({"num_experts": 4, "num_experts_per_tok": 9}, 1.0),
    ],
)
def test_the_share_is_that_of_both_counts(told: dict[str, Any], share: float) -> None:
    assert chosen_share(LlamaConfig(**told)) == share
