"""Logits of cached steps at every position, across the edges of the cache's buckets.

Attention reads the cache up to a whole bucket. A view that was one slot short there moved logits by 0.04 at
two positions of a text, and the greedy text stayed what it was: only the logits themselves tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import BUCKET_TOKENS
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

FIRST, LAST = (
    BUCKET_TOKENS - 12,
    2 * BUCKET_TOKENS + 6,
)  # the tokens in the cache, from before to after two edges
TOLERANCE = 2e-4  # of logits near 10: float32 rounds them by less than 5e-5 here


def text() -> Tensor:
    return torch.randint(TINY_VOCAB, (LAST + 1,), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def stock_logits(token_ids: Tensor) -> Tensor:
    """Return logits of a pass without a cache, by the stock model of the same weights.

    Shapes: token_ids `[B, T]`, result `[B, T, V]`.
    """
    logits: Tensor = tiny_llama()(input_ids=token_ids, use_cache=False).logits
    return logits


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def test_vanilla_steps_have_the_logits_of_one_pass_at_every_position() -> None:
    backbone, token_ids = Backbone(tiny_llama()), text()
    root = tree_buffers(DraftTree.root_only(), device=backbone.device)
    cache = backbone.new_cache(batch_size=1, max_length=LAST + BUCKET_TOKENS)
    expected = stock_logits(token_ids[None])[0]
    first = backbone.prefill(token_ids[:FIRST], cache=cache).logits[0, 0]
    assert off_by(first, expected[FIRST - 1]) < TOLERANCE
    wrong = {}
    for position in range(FIRST, LAST + 1):
        output = backbone.forward(
            token_ids[None, position : position + 1], depths=root.depths, visible=root.visible, cache=cache
        )
        if (shift := off_by(output.logits[0, 0], expected[position])) > TOLERANCE:
            wrong[position] = shift
        cache.keep(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    assert wrong == {}


def test_prompts_of_every_length_have_the_logits_of_one_pass() -> None:
    backbone, token_ids = Backbone(tiny_llama()), text()
    expected = stock_logits(token_ids[None])[0]
    cache = backbone.new_cache(batch_size=1, max_length=LAST + BUCKET_TOKENS)
    for length in range(FIRST, LAST + 1):
        cache.clear_rows()
        logits = backbone.prefill(token_ids[:length], cache=cache).logits[0, 0]
        assert off_by(logits, expected[length - 1]) < TOLERANCE, length


def test_tree_steps_have_the_logits_of_a_pass_over_each_candidate() -> None:
    """At every number of kept tokens, and so with the last node on either side of every edge."""
    backbone, token_ids = Backbone(tiny_llama()), text()
    tree = DraftTree.cartesian((2, 2, 1))
    buffers = tree_buffers(tree, device=backbone.device)
    cache = backbone.new_cache(batch_size=1, max_length=LAST + BUCKET_TOKENS)
    draws = torch.Generator().manual_seed(6)
    stock = tiny_llama()
    wrong = {}
    backbone.prefill(token_ids[:FIRST], cache=cache)
    for kept in range(FIRST, LAST + 1):
        drafted = torch.randint(TINY_VOCAB, (tree.num_nodes,), generator=draws)
        drafted[0] = token_ids[kept]
        output = backbone.forward(drafted[None], depths=buffers.depths, visible=buffers.visible, cache=cache)
        candidates = torch.cat(
            [token_ids[:kept].expand(len(buffers.paths), -1), drafted[buffers.paths]], dim=1
        )
        with torch.inference_mode():
            expected = stock(input_ids=candidates, use_cache=False).logits[:, kept:]
        if (shift := off_by(output.logits[0][buffers.paths], expected)) > TOLERANCE:
            wrong[kept] = shift
        cache.keep(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    assert wrong == {}
