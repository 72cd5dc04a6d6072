"""How fast trees are grown, by marginals and by joint hits, and how fast a size is chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from harness.compose.replay import ReplayIndex
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from medusa_impl.tree_search import (
    GrownTree,
    SizeChoice,
    best_size_for_cost,
    grow_by_joint_hits,
    grow_by_marginals,
    marginal_accuracies,
)

TOKENS, NUM_PROMPTS, NUM_HEADS, MAX_RANK, NUM_NODES = 125, 80, 5, 32, 256


@cache
def _trace() -> Trace:
    """10,000 positions whose ranks fall off like those of trained heads, later heads worse."""
    rng = np.random.default_rng(0)
    beyond = np.arange(1, TOKENS + 1)[:, None] + np.arange(1, NUM_HEADS + 1) > TOKENS
    prompts = []
    for number in range(NUM_PROMPTS):
        ranks = np.minimum(
            rng.pareto(1.2 / np.arange(1, NUM_HEADS + 1) ** 0.5, (TOKENS, NUM_HEADS)), 49_000
        ).astype(np.int32)
        ranks[beyond] = -1
        tokens = np.zeros(TOKENS, dtype=np.int64)
        prompts.append(
            PromptTrace(
                key=str(number),
                category=None,
                prompt_tokens=50,
                tokens=tokens,
                ended_by="budget",
                ranks=ranks,
            )
        )
    provenance = TraceProvenance(model_hash="none", heads_hash="none", dtype="float32", max_new_tokens=TOKENS)
    return Trace(provenance=provenance, prompts=tuple(prompts))


def _by_marginals(ranks: NDArray[np.int32]) -> GrownTree:
    return grow_by_marginals(marginal_accuracies(ranks, max_rank=MAX_RANK), num_nodes=NUM_NODES)


def _by_joint_hits(ranks: NDArray[np.int32]) -> GrownTree:
    return grow_by_joint_hits(ranks, num_nodes=NUM_NODES, max_rank=MAX_RANK)


@pytest.mark.parametrize("way", [_by_marginals, _by_joint_hits], ids=["marginals", "joint"])
def test_bench_growth(benchmark: BenchmarkFixture, way: Callable[[NDArray[np.int32]], GrownTree]) -> None:
    grown = benchmark.pedantic(way, args=(_trace().ranks,), rounds=20, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert grown.tree.num_nodes == NUM_NODES
    assert grown.growth[:2] == ((), (0,))  # the likeliest token of head 1 comes first
    assert all(earlier >= later for earlier, later in pairwise(grown.values))


def test_bench_choice_of_a_size(benchmark: BenchmarkFixture) -> None:
    """Twelve nested sizes replayed and priced with a step that is twice as dear at 64 nodes as at one."""
    grown, index = _by_joint_hits(_trace().ranks), ReplayIndex(_trace())

    def choose() -> SizeChoice:
        return best_size_for_cost(
            grown,
            lambda tree: index.replay(tree).tokens_per_step,
            cost=lambda size: 1 + size / 64,
            sizes=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
        )

    choice = benchmark.pedantic(choose, rounds=20, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert len(choice.points) == 12
    assert choice.best.tokens_per_cost == max(point.tokens_per_cost for point in choice.points)
    assert [point.tokens_per_step for point in choice.points] == sorted(
        point.tokens_per_step for point in choice.points
    )
