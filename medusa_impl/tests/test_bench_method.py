"""Times the method's own parts of a step, without the model: one row, a tree of 64 nodes.

The sizes are those of the embedded model. Every timed call waits for the device at its end, so that queued
kernels count where they were started.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from medusa_impl.acceptance import Acceptance, AcceptanceRule, GreedyRule, RejectionRule, TypicalRule
from medusa_impl.decode import draft_tokens
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.tree_mask import TreeMask
from medusa_impl.heads import MedusaHeads
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers
from medusa_impl.tree_search import grow_by_marginals

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, HIDDEN, LAYERS, KEY_VALUE_HEADS, HEAD_SIZE = 49_152, 576, 30, 3, 64  # SmolLM2-135M-Instruct
NUM_HEADS, NUM_NODES, CONTEXT = 5, 64, 192


def timed(
    benchmark: BenchmarkFixture, work: Callable[[], Any], *, setup: Callable[[], None] | None = None
) -> Any:
    """Return the last result of `work`, after timing its calls, each to the end of what it queued.

    `setup` runs before each call and is not timed.
    """

    def to_the_end() -> Any:
        with torch.inference_mode():
            result = work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return result

    return benchmark.pedantic(to_the_end, setup=setup, rounds=30, warmup_rounds=3)  # type: ignore[no-untyped-call]


@cache
def tree() -> DraftTree:
    """Return a sparse tree of 64 nodes, as a search grows it.

    Head k is right with its rank r at a rate of 0.6 / k / 2^r.
    """
    accuracy = [[0.6 / head / 2**rank for rank in range(8)] for head in range(1, NUM_HEADS + 1)]
    return grow_by_marginals(accuracy, num_nodes=NUM_NODES).tree


@cache
def buffers() -> TreeBuffers:
    return tree_buffers(tree(), device=DEVICE)


@cache
def deepest_path() -> tuple[int, ...]:
    return max(tree().candidates, key=len)


@cache
def verified() -> tuple[Tensor, Tensor]:
    """Return logits `[1, 64, 49152]` and tokens `[1, 64]` for which every rule keeps the deepest path.

    Each token of this path has all but 1e-8 of the probability. The first token of any other branch has none
    of it.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, NUM_NODES, VOCAB, generator=generator)
    tokens = torch.randint(0, VOCAB, (1, NUM_NODES), generator=generator)
    path = deepest_path()
    for parent, child in pairwise(path):
        logits[0, parent, tokens[0, child]] = 30.0
    return logits.to(DEVICE), tokens.to(DEVICE)


def test_bench_tree_buffers(benchmark: BenchmarkFixture) -> None:
    made = timed(benchmark, lambda: tree_buffers(tree(), device=DEVICE))
    # each node sees its ancestors and itself
    assert int(made.visible.sum()) == sum(len(path) + 1 for path in tree().paths)
    assert made.depths.tolist() == [len(path) for path in tree().paths]


def test_bench_mask(benchmark: BenchmarkFixture) -> None:
    tree_mask = TreeMask(sliding_window=None, mixed_layers=False)
    lengths, view_length = torch.tensor([CONTEXT], device=DEVICE), CONTEXT + NUM_NODES
    slots = torch.arange(view_length, device=DEVICE)
    depths = buffers().depths
    tables = tree_mask.tables(depths, buffers().visible, dtype=torch.float32)
    mask: Any = timed(benchmark, lambda: tree_mask(lengths, depths, tables, slots=slots))
    assert mask.shape == (1, 1, NUM_NODES, view_length)
    assert int((mask == 0).sum()) == NUM_NODES * CONTEXT + int(buffers().visible.sum())


def greedy() -> AcceptanceRule:
    return GreedyRule()


def typical() -> AcceptanceRule:
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    return TypicalRule(temperature=0.7, epsilon=0.09, delta=0.3, root="sampled", generator=generator)


def rejection() -> AcceptanceRule:
    return RejectionRule(temperature=0.7, generator=torch.Generator(device=DEVICE).manual_seed(1))


@pytest.mark.parametrize("make_rule", [greedy, typical, rejection])
def test_bench_acceptance(benchmark: BenchmarkFixture, make_rule: Callable[[], AcceptanceRule]) -> None:
    rule, (logits, tokens) = make_rule(), verified()
    acceptance: Acceptance = timed(benchmark, lambda: rule.verify(logits, tokens, buffers()))
    path = deepest_path()
    assert acceptance.num_kept.tolist() == [len(path)]
    assert acceptance.nodes[0, : len(path)].tolist() == list(path)


def test_bench_compaction(benchmark: BenchmarkFixture) -> None:
    """One path of the tree is moved to the end of a context of 192 tokens, in every layer."""
    path = deepest_path()
    cache = TreeCache(num_layers=LAYERS, batch_size=1, max_length=CONTEXT + 2 * NUM_NODES, device=DEVICE)
    state = torch.zeros(1, KEY_VALUE_HEADS, 1, HEAD_SIZE, device=DEVICE)
    cache.allocate(state, state)
    slots = torch.arange(cache.row_slots, dtype=torch.float32, device=DEVICE)[None, :, None, None]
    nodes, num_kept = torch.tensor([path], device=DEVICE), torch.tensor([len(path)], device=DEVICE)

    def setup() -> None:
        cache.clear_rows()
        cache.keep_all(row=0, count=CONTEXT)
        for layer in range(LAYERS):
            for storage in cache.layer_storage(layer):
                storage.copy_(slots.expand_as(storage))

    timed(benchmark, lambda: cache.keep(nodes, num_kept, counts=[len(path)]), setup=setup)
    assert cache.lengths == cache.device_lengths.tolist() == [CONTEXT + len(path)]
    for layer in (0, LAYERS - 1):
        for storage in cache.layer_storage(layer):
            assert storage[0, CONTEXT : CONTEXT + len(path), 0, 0].tolist() == [
                CONTEXT + node for node in path
            ]
            assert storage[0, :CONTEXT, -1, -1].tolist() == list(range(CONTEXT))


def test_bench_heads(benchmark: BenchmarkFixture) -> None:
    """Five heads on the shared unembedding: one state in, five rows of logits out."""
    torch.manual_seed(0)
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False).to(DEVICE)
    heads = (
        MedusaHeads(
            num_heads=NUM_HEADS, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB, architecture="shared"
        )
        .to(DEVICE)
        .eval()
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=HIDDEN**-0.5)
    states = torch.randn(1, HIDDEN, device=DEVICE)
    logits = timed(benchmark, lambda: heads(states, lm_head=lm_head))
    assert logits.shape == (1, NUM_HEADS, VOCAB)
    with torch.inference_mode():
        last = lm_head(heads.blocks[-1](states))
    torch.testing.assert_close(logits[:, -1], last, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits[:, 0], last, atol=1e-1)


def test_bench_candidates(benchmark: BenchmarkFixture) -> None:
    """The tokens of 64 nodes from the logits of five heads."""
    head_logits = torch.randn(1, NUM_HEADS, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    roots = torch.tensor([7], device=DEVICE)
    tokens = timed(benchmark, lambda: draft_tokens(head_logits, roots, buffers()))
    order = head_logits[0].argsort(dim=-1, descending=True, stable=True).tolist()
    assert tokens.tolist() == [[7, *(order[len(path) - 1][path[-1]] for path in tree().paths[1:])]]
