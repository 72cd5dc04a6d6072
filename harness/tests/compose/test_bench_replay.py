"""How fast trees are replayed: at least 1,000 a second over 10,000 positions, linear in the trace and flat in
the tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.compose.replay import ReplayIndex
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import GrownTree, grow_by_joint_hits

TOKENS, NUM_HEADS = 125, 5
POSITIONS = 10_000


@cache
def _trace(num_positions: int) -> Trace:
    """Prompts of 125 tokens; ranks fall off like those of trained heads, far tail included, later heads
    worse.
    """
    rng = np.random.default_rng(0)
    beyond = np.arange(1, TOKENS + 1)[:, None] + np.arange(1, NUM_HEADS + 1) > TOKENS
    prompts = []
    for number in range(num_positions // TOKENS):
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


@cache
def _grown() -> GrownTree:
    return grow_by_joint_hits(_trace(POSITIONS).ranks, num_nodes=512, max_rank=16)


def _best_s(work: Callable[[], object], *, repeats: int = 7) -> float:
    """The shortest of several runs, in seconds of a core: what the work costs, whoever else runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def _distinct_trees(count: int) -> list[DraftTree]:
    return [_grown().nested(2 + number % 63) for number in range(count)]


def test_a_thousand_trees_a_second_index_and_all() -> None:
    """100 trees of 2 to 64 nodes, scaled to a thousand, and one index: within a second; a busy core may be
    several times slower.
    """
    trees = _distinct_trees(100)
    index = ReplayIndex(_trace(POSITIONS))
    index_s = _best_s(lambda: ReplayIndex(_trace(POSITIONS)), repeats=3)
    trees_s = _best_s(lambda: [index.replay(tree).total_steps for tree in trees])
    assert index_s + 10 * trees_s <= 1.0


def test_cost_does_not_grow_with_the_tree() -> None:
    """Sixty-four times the nodes; three times the time would still pass, a cost in proportion would not."""
    index = ReplayIndex(_trace(POSITIONS))
    small, large = _grown().nested(8), _grown().nested(512)
    small_s = _best_s(lambda: [index.replay(small) for _ in range(20)])
    assert _best_s(lambda: [index.replay(large) for _ in range(20)]) < 3 * small_s


def test_cost_is_linear_in_the_trace() -> None:
    """Four times the positions in at most eight times the time; a quadratic cost would take sixteen."""
    tree = _grown().nested(64)
    short, long = ReplayIndex(_trace(POSITIONS)), ReplayIndex(_trace(4 * POSITIONS))
    short_s = _best_s(lambda: [short.replay(tree) for _ in range(20)])
    assert _best_s(lambda: [long.replay(tree) for _ in range(20)]) < 8 * short_s


@pytest.mark.parametrize("num_nodes", [1, 8, 64, 512])
def test_bench_replay_by_tree_size(benchmark: BenchmarkFixture, num_nodes: int) -> None:
    index, tree = ReplayIndex(_trace(POSITIONS)), _grown().nested(num_nodes)
    result = benchmark.pedantic(index.replay, args=(tree,), rounds=30, iterations=5, warmup_rounds=2)  # type: ignore[no-untyped-call]
    assert result.total_steps > 0


@pytest.mark.parametrize("num_positions", [2_500, 10_000, 40_000])
def test_bench_replay_by_trace_length(benchmark: BenchmarkFixture, num_positions: int) -> None:
    index, tree = ReplayIndex(_trace(num_positions)), _grown().nested(64)
    result = benchmark.pedantic(index.replay, args=(tree,), rounds=30, iterations=5, warmup_rounds=2)  # type: ignore[no-untyped-call]
    assert result.num_kept_tokens.sum() == num_positions


def test_bench_index(benchmark: BenchmarkFixture) -> None:
    index = benchmark.pedantic(ReplayIndex, args=(_trace(POSITIONS),), rounds=5)  # type: ignore[no-untyped-call]
    assert index.trace is _trace(POSITIONS)
