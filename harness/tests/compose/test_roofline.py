"""The closed forms against every printed intensity, and the step-time model against sums made by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest

from harness.compose.roofline import (
    Simulation,
    Work,
    attention_intensity,
    attention_work,
    heads_seconds,
    linear_intensity,
    linear_work,
    llama_7b_block,
    step_cost,
    step_seconds,
)
from harness.errors import UserError
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.hardware import Limits, load_hardware
from harness.specs.shapes import ModelShape

HeadArchitecture = Literal["own", "shared"]
ARCHITECTURES: tuple[HeadArchitecture, ...] = ("shared", "own")
UNIT = Limits(bytes_per_s=1.0, flop_per_s=4.0)
BYTES_ONLY = Limits(bytes_per_s=1.0, flop_per_s=math.inf)
TINY = ModelShape(
    num_layers=3,
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=2,
    intermediate_size=16,
    vocab_size=32,
)


@pytest.fixture(scope="module")
def registry() -> dict[str, ClaimSpec]:
    return {claim.id: claim for claim in load_claims()}


@pytest.mark.parametrize("claim_id", ["RL-T6", "RL-T7", "RL-T8"])
def test_closed_form_gives_every_printed_intensity(registry: dict[str, ClaimSpec], claim_id: str) -> None:
    table = registry[claim_id].table
    assert table is not None
    compared = 0
    for row, printed in zip(table.rows, table.intensity, strict=True):
        for nodes, value in zip(table.columns, printed, strict=True):
            if claim_id == "RL-T8":
                ours = linear_intensity(nodes, batch=row)
            else:
                ours = attention_intensity(nodes, context_tokens=row if claim_id == "RL-T6" else 1024)
            assert abs(ours - value) <= 0.005 + 1e-9, (row, nodes)
            compared += 1
    assert compared == 56  # 7 rows of 8 columns; the three tables make 168


def test_intensity_is_that_of_the_work() -> None:
    shape = dataclasses.replace(llama_7b_block(), num_attention_heads=1, num_key_value_heads=1)
    work = attention_work(shape, 64, context_tokens=1024, batch=5, dtype_bytes=2)
    assert work.intensity == pytest.approx(attention_intensity(64, context_tokens=1024))
    assert linear_work(4 * 16, inputs=6656, outputs=17920, dtype_bytes=2).intensity == pytest.approx(
        linear_intensity(16, batch=4)
    )


@pytest.mark.parametrize(
    ("work", "seconds"), [(Work(num_bytes=10, flop=4), 10.0), (Work(num_bytes=1, flop=40), 10.0)]
)
def test_time_is_that_of_the_slower_resource(work: Work, seconds: float) -> None:
    assert work.seconds(UNIT) == seconds


def test_step_seconds_adds_up_by_hand() -> None:
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    widths = (8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16)
    attention = 2 * (4 * 10 * 2 + (2 * 10 + 4 * 2) * 2)  # two products: scores, keys once a group, queries
    unembedding = 2 * (8 + 32) + 8 * 32
    by_hand = 4 * (3 * (weights + 2 * widths + attention) + unembedding)
    assert step_seconds(TINY, BYTES_ONLY, num_nodes=2, context_tokens=10, dtype_bytes=4) == by_hand


def test_a_step_without_unembedding_leaves_its_weights_out() -> None:
    counts = {"num_nodes": 2, "context_tokens": 10, "dtype_bytes": 2}
    without = dataclasses.replace(TINY, vocab_size=0)
    seconds = step_seconds(TINY, BYTES_ONLY, **counts), step_seconds(without, BYTES_ONLY, **counts)
    assert seconds[0] - seconds[1] == 2 * (2 * (8 + 32) + 8 * 32)


@pytest.mark.parametrize(
    ("architecture", "unembedding"),
    [
        ("shared", 3 * 5 * (8 + 32) + 8 * 32),  # one product of 3 rows x 5 heads
        ("own", 5 * (3 * (8 + 32) + 8 * 32)),  # five products of 3 rows
    ],
)
def test_heads_seconds_adds_up_by_hand(architecture: HeadArchitecture, unembedding: int) -> None:
    blocks = 5 * 2 * (3 * (8 + 8) + 8 * 8)
    ours = heads_seconds(
        TINY, BYTES_ONLY, num_heads=5, num_layers=2, architecture=architecture, batch=3, dtype_bytes=4
    )
    assert ours == pytest.approx(4 * (blocks + unembedding))


def test_heads_seconds_counts_the_same_arithmetic_for_both_architectures() -> None:
    slow = Limits(bytes_per_s=math.inf, flop_per_s=1.0)  # only flop count
    shared, own = (
        heads_seconds(TINY, slow, num_heads=5, architecture=architecture, batch=3)
        for architecture in ARCHITECTURES
    )
    assert shared == own == 2 * 3 * 5 * (8 * 8 + 8 * 32)


def test_no_heads_take_no_time_and_a_shape_without_unembedding_has_blocks_only() -> None:
    without = dataclasses.replace(TINY, vocab_size=0)
    for architecture in ARCHITECTURES:
        assert heads_seconds(TINY, UNIT, num_heads=0, architecture=architecture) == 0.0
        blocks_s = linear_work(1, inputs=8, outputs=8, dtype_bytes=2).seconds(UNIT)
        assert heads_seconds(without, UNIT, num_heads=3, architecture=architecture) == pytest.approx(
            3 * blocks_s
        )


@pytest.mark.parametrize("change", [{"num_heads": -1}, {"num_layers": 0}, {"batch": 0}, {"dtype_bytes": 0}])
def test_heads_refuse_impossible_counts(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1 of the others"):
        heads_seconds(TINY, UNIT, architecture="own", **({"num_heads": 1} | change))


def test_step_cost_is_near_one_below_the_ridge_and_grows_past_it() -> None:
    limits = load_hardware()["a100-80gb-pcie"].limits
    costs = [
        step_cost(llama_7b_block(), limits, num_nodes=nodes, context_tokens=1024) for nodes in (1, 64, 512)
    ]
    assert costs[0] == 1.0
    assert costs[1] < 1.1
    assert costs[2] > 2.5


def test_best_is_the_maximum_of_speedup() -> None:
    simulation = Simulation(shape=llama_7b_block(), limits=UNIT, slope=0.5, log_base=2.0, max_nodes=12)
    speedups = {nodes: simulation.speedup(nodes, context_tokens=64, batch=2) for nodes in range(2, 13)}
    nodes, speedup = simulation.best(context_tokens=64, batch=2)
    assert speedup == pytest.approx(max(speedups.values()))
    assert speedup == pytest.approx(speedups[nodes])


@pytest.mark.parametrize("change", [{"num_nodes": 0}, {"context_tokens": 0}, {"batch": 0}])
def test_refuses_a_count_below_one(change: dict[str, int]) -> None:
    counts = {"num_nodes": 1, "context_tokens": 1, "batch": 1} | change
    with pytest.raises(UserError, match="at least 1 of each"):
        step_seconds(TINY, UNIT, **counts)


def test_refuses_limits_of_zero() -> None:
    with pytest.raises(UserError, match="limits above 0"):
        Limits(bytes_per_s=0.0, flop_per_s=1.0)
