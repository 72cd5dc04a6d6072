"""The step model against sums made by hand: what it adds to the roofline, and that it is never faster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.compose.prices.kernels import ROOFLINE, KernelTimes
from harness.compose.roofline import heads_seconds, step_seconds
from harness.errors import UserError
from harness.records.step_model import EngineCosts
from harness.specs.hardware import Limits
from harness.specs.latency import HeadsForm
from harness.specs.shapes import ModelShape, load_shapes
from harness.tests.compose.prices.planted import HEADS, LIMITS, PLANTED, times

SHAPES = ("smollm2-135m-instruct", "vicuna-7b-v1.5")
TINY = ModelShape(
    num_layers=2,
    hidden_size=4,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_size=4,
    intermediate_size=8,
    vocab_size=16,
)
SHARE = st.floats(0.01, 1.0)
SECONDS = st.floats(0.0, 0.01)
COSTS = st.builds(
    EngineCosts,
    operator_s=SECONDS,
    tree_layer_s=SECONDS,
    product_share=SHARE,
    arithmetic_share=SHARE,
    attention_share=SHARE,
    tree_attention_share=SHARE,
    vanilla_own_s=SECONDS,
    tree_own_s=SECONDS,
)


def test_a_step_by_hand() -> None:
    """Bytes alone matter at one byte a second and endless arithmetic; float32, one node after one token.

    A layer has four products of 4 x 4 (inputs and outputs 8, weights 16) and three of 4 x 8 (12 and 32); the
    unembedding 4 x 16 (20 and 64). Either attention product moves one head's two keys and one query, and two
    scores: 2 + 3 * 4 numbers.
    """
    costs = ROOFLINE.model_copy(
        update={"operator_s": 100.0, "product_share": 0.5, "attention_share": 0.25, "vanilla_own_s": 7.0}
    )
    slow = Limits(bytes_per_s=1.0, flop_per_s=1e18)
    heads = HeadsForm(num_heads=2, num_layers=1, architecture="shared")
    ours = KernelTimes(TINY, slow, costs=costs, heads=heads, dtype="float32")
    numbers = 2 * (4 * (8 + 16) + 3 * (12 + 32)) + (20 + 64)
    attention = 2 * 2 * (2 + 3 * 4)
    launches = 2 * (7 + 2) + 1
    backbone_s = 4 * numbers / 0.5 + 4 * attention / 0.25 + 100 * launches
    assert ours.backbone_seconds(num_nodes=1, context_tokens=1) == pytest.approx(backbone_s)
    own_heads = 4 * (2 * (8 + 16) + (2 * 20 + 64)) / 0.5 + 100 * 3
    assert ours.heads_seconds(num_heads=2) == pytest.approx(own_heads)
    assert ours.heads_seconds(num_heads=0) == 0
    whole_s = ours.step_seconds(num_nodes=1, num_heads=2, context_tokens=1)
    assert whole_s == pytest.approx(backbone_s + own_heads + 7)


def test_a_tree_pays_for_its_mask_and_for_its_own_code() -> None:
    free = PLANTED.model_copy(update={"tree_layer_s": 0.0, "tree_own_s": 0.0})
    with_mask, without = times(SHAPES[1]), times(SHAPES[1], costs=free)
    for nodes in (2, 64):
        at = {"num_nodes": nodes, "num_heads": 5, "context_tokens": 512}
        more = with_mask.step_seconds(**at) - without.step_seconds(**at)
        assert more == pytest.approx(32 * PLANTED.tree_layer_s + PLANTED.tree_own_s)
    at = {"num_nodes": 1, "num_heads": 0, "context_tokens": 512}
    assert with_mask.step_seconds(**at) == without.step_seconds(**at)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_costs_it_is_the_roofline(shape: str) -> None:
    sizes, ideal = load_shapes()[shape].roofline_shape, times(shape, costs=ROOFLINE)
    for nodes, context, batch in ((1, 128, 1), (64, 1024, 1), (16, 300, 8)):
        ours = ideal.backbone_seconds(num_nodes=nodes, context_tokens=context, batch=batch)
        theirs = step_seconds(sizes, LIMITS, num_nodes=nodes, context_tokens=context + nodes, batch=batch)
        assert ours == pytest.approx(theirs)
        own = heads_seconds(sizes, LIMITS, num_heads=3, architecture="own", batch=batch)
        assert ideal.heads_seconds(num_heads=3, batch=batch) == pytest.approx(own)
    assert ideal.own_seconds(num_nodes=1) == ideal.own_seconds(num_nodes=64) == 0


@settings(max_examples=60, deadline=None)
@given(
    costs=COSTS,
    shape=st.sampled_from(SHAPES),
    nodes=st.integers(1, 256),
    context=st.integers(1, 4096),
    batch=st.integers(1, 32),
)
def test_no_costs_make_a_step_faster_than_the_roofline(
    costs: EngineCosts, shape: str, nodes: int, context: int, batch: int
) -> None:
    sizes, ours = load_shapes()[shape].roofline_shape, times(shape, costs=costs)
    least = step_seconds(sizes, LIMITS, num_nodes=nodes, context_tokens=context + nodes, batch=batch)
    found = ours.backbone_seconds(num_nodes=nodes, context_tokens=context, batch=batch)
    assert found >= least * (1 - 1e-12)
    assert ours.step_seconds(num_nodes=nodes, num_heads=0, context_tokens=context, batch=batch) >= found


@pytest.mark.parametrize("shape", SHAPES)
def test_more_bytes_take_more_time(shape: str) -> None:
    """More keys, rows, heads, bytes a number and weights each cost more."""
    ours, wider = times(shape), times(shape, dtype="float32")
    small = {"num_nodes": 16, "num_heads": 2, "context_tokens": 500, "batch": 2}
    base = ours.step_seconds(**small)
    for name, value in (("context_tokens", 501), ("batch", 3), ("num_heads", 3), ("num_nodes", 17)):
        assert ours.step_seconds(**{**small, name: value}) > base, name
    assert wider.step_seconds(**small) > base
    assert times("vicuna-7b-v1.5").step_seconds(**small) < times("vicuna-13b-v1.5").step_seconds(**small)


def test_a_small_model_is_bound_by_launches_and_a_large_one_by_bytes() -> None:
    """Twice the bandwidth hardly helps the first, and nearly halves the step of the second."""
    gains = []
    for shape in SHAPES:
        sizes = load_shapes()[shape].roofline_shape
        twice = Limits(bytes_per_s=2 * LIMITS.bytes_per_s, flop_per_s=LIMITS.flop_per_s)
        one, two = (
            KernelTimes(sizes, limits, costs=PLANTED, heads=HEADS, dtype="bfloat16").backbone_seconds(
                num_nodes=1, context_tokens=128
            )
            for limits in (LIMITS, twice)
        )
        gains.append(one / two)
    assert gains[0] < 1.05 and gains[1] > 1.5


@pytest.mark.parametrize("share", ["product_share", "arithmetic_share", "attention_share"])
@pytest.mark.parametrize("value", [0.0, 1.01, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: str, value: float) -> None:
    with pytest.raises(ValidationError):
        EngineCosts.model_validate({**PLANTED.model_dump(), share: value})


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        times(SHAPES[0]).backbone_seconds(num_nodes=0, context_tokens=4)
    with pytest.raises(UserError, match="no negative number of heads"):
        times(SHAPES[0]).heads_seconds(num_heads=-1)
