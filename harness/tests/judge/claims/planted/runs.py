"""Planted records of runs: for each transfer form, what its bound is about on either side of it."""

from __future__ import annotations

from typing import Any

from harness.compose.replay import replay
from harness.tests.fake_record import FakeParts
from harness.tests.judge.claims.planted.planting import RunPlanting, number
from harness.tests.judge.claims.planted.times import (
    add_to_step,
    cost_nodes,
    cut_tree,
    pace,
    part_texts,
    per_node_for,
    time_steps,
)
from harness.tests.judge.claims.planted.traces import (
    order_categories,
    raise_last_loss,
    redraw,
    redraw_head,
    set_category_apart,
)

TIE_GAP = 5e-4  # of float32: below it two logits may change places by rounding
RATE = 1.2  # what the arms of a pair gain in the other figure than the one that is planted


def _as_it_is(parts: FakeParts) -> None:
    """Leave the made-up calibration text as it is."""


def _parted(form: Any, gap: float, parts: FakeParts) -> None:
    part_texts(parts, getattr(form, "arm", "optimised_64"), gap=gap)


def _parted_by_rejection(form: Any, texts: float, parts: FakeParts) -> None:
    part_texts(parts, form.arm, count=int(texts))


def _faster(form: Any, speed: float, parts: FakeParts) -> None:
    if form.clock == "wall":  # the arm gains in decoding, and its prefill decides
        pace(parts, form.arm, over="vanilla", speed=RATE, wall_speed=speed)
    else:
        pace(parts, form.arm, over="vanilla", speed=speed)


def _climbed_in_speed(form: Any, speed: float, parts: FakeParts) -> None:
    pace(parts, form.arm, over=form.over, rate=RATE, speed=speed)


def _climbed_in_rate(form: Any, rate: float, parts: FakeParts) -> None:
    # No step keeps less than one token, so over vanilla the rate cannot fall below 1.
    pace(parts, form.arm, over=form.over, rate=max(rate, 1.0) if form.over == "vanilla" else rate, speed=RATE)


def _costly_rung(form: Any, excess: float, parts: FakeParts) -> None:
    """Let the rung's step cost so many times what calibration text promises in tokens/step."""
    assert parts.trace is not None
    pace(parts, form.arm, over=form.over, rate=RATE, speed=RATE)
    own, over = (
        replay(parts.trace, parts.trees[name].tree()).tokens_per_step for name in (form.arm, form.over)
    )
    cost_nodes(parts, per_node_for(parts, form.arm, over=form.over, cost=excess * own / over))


def _rate_over(form: Any, rate: float, parts: FakeParts) -> None:
    pace(parts, form.arm, over=form.over, rate=rate, speed=1 + (form.gain or RATE - 1))


def _speed_over(form: Any, speed: float, parts: FakeParts) -> None:
    pace(parts, form.arm, over=form.over, rate=1 + (form.gain or RATE - 1), speed=speed)


def _gain_inside(form: Any) -> tuple[float, ...]:
    return (1.04 * form.bound,) if form.gain is None else (1 + form.gain,)


def _gain_outside(form: Any) -> tuple[float, ...]:
    if form.gain is None:
        return (0.96 * form.bound,)
    return tuple((1 + form.gain) * (1 + side * (form.margin + 0.03)) for side in (1, -1))


def _fifth_head(form: Any, on_top: float, parts: FakeParts) -> None:
    """Let four heads be good, and the fifth right on top so often and nowhere else."""
    good = {"search_depth": (0.7, 0.6, 0.5, 0.4, 0.3), "extra_head": (0.9, 0.9, 0.9, 0.9, 0.3)}[form.test]
    redraw(parts, good)
    redraw_head(parts, 5, on_top=on_top)


def _less_accurate(form: Any, fall: float, parts: FakeParts) -> None:
    redraw(parts, (0.7, 0.55, 0.4, 0.25, 0.0))
    # As `redraw` draws the fourth head's: 0.25 on top, and 0.68 of the others among the first five.
    redraw_head(parts, 5, on_top=0.25 - fall, among=0.76 - fall, first=5)


def _speed_peaks_on_poor_calibration(parts: FakeParts) -> None:
    redraw(parts, (0.5, 0.02, 0.02, 0.02, 0.02), together=1.0, reach=0.0)


def _costly_nodes(form: Any, per_node: float, parts: FakeParts) -> None:
    redraw(parts, (0.95,) * 5)
    cost_nodes(parts, per_node)


def _second_tokens(form: Any, reach: float, parts: FakeParts) -> None:
    redraw(parts, (0.6, 0.5, 0.0, 0.0, 0.0), reach=reach)
    cost_nodes(parts, 0.02)


RUNS: dict[str, tuple[RunPlanting, ...]] = {
    "lossless": (
        RunPlanting(
            figure="gap of the top two logits where one text parts from vanilla's",
            plant=_parted,
            holds=number(0.8 * TIE_GAP),
            fails=number(1.2 * TIE_GAP),
            differ=("trace gaps",),
        ),
    ),
    "faster": (
        RunPlanting(
            figure="speedup on the form's clock",
            plant=_faster,
            holds=lambda form: (1.03 * form.bound,),
            fails=lambda form: (0.97 * form.bound,),
            differ=("generations of {arm}",),
        ),
        RunPlanting(
            figure="gap of the top two logits where one of the arm's texts parts from vanilla's",
            plant=_parted,
            holds=number(0.8 * TIE_GAP),
            fails=number(1.2 * TIE_GAP),
            differ=("trace gaps",),
        ),
    ),
    "ladder_step": (
        RunPlanting(
            figure="speed over the rung below",
            plant=_climbed_in_speed,
            holds=lambda form: (1.03 * form.bound,),
            fails=lambda form: (0.97 * form.bound,),
            differ=("generations of {arm}",),
            calibrate=_as_it_is,
        ),
        RunPlanting(
            figure="tokens/step over the rung below",
            plant=_climbed_in_rate,
            holds=lambda form: (1.04 * form.bound,),
            fails=lambda form: (0.96 * form.bound,),
            differ=("generations of {arm}",),
            calibrate=_as_it_is,
        ),
        RunPlanting(
            figure="step cost over what calibration text promises in tokens/step",
            plant=_costly_rung,
            holds=lambda form: (0.9 * form.slack,),
            fails=number(),
            cannot=lambda form: (1.1 * form.slack,),
            differ=("bare steps",),
            calibrate=_as_it_is,
            where=lambda form: form.slack is not None,
        ),
    ),
    "rate_over": (
        RunPlanting(
            figure="tokens/step over the other arm",
            plant=_rate_over,
            holds=_gain_inside,
            fails=_gain_outside,
            differ=("generations of {arm}",),
        ),
        RunPlanting(
            figure="tokens/s over the other arm",
            plant=_speed_over,
            holds=_gain_inside,
            fails=_gain_outside,
            differ=("generations of {arm}",),
        ),
    ),
    "sparse_beats_dense": (
        RunPlanting(
            figure="nodes of the sparse tree",
            plant=lambda form, nodes, parts: cut_tree(parts, form.tree, num_nodes=int(nodes)),
            holds=lambda form: (0.75 * form.max_nodes,),
            fails=lambda form: (0.375 * form.max_nodes,),
            differ=("tree of {tree}",),
        ),
    ),
    "search_depth": (
        RunPlanting(
            figure="accuracy of the fifth head, with which a fifth level pays or not",
            plant=_fifth_head,
            holds=number(0.05),
            fails=number(0.1),
            differ=("trace ranks",),
        ),
    ),
    "loss_grows": (
        RunPlanting(
            figure="rise of the mean loss from the fourth head to the fifth, nats",
            plant=lambda form, rise, parts: raise_last_loss(parts, rise),
            holds=lambda form: (form.bound + 0.02,),
            fails=lambda form: (form.bound - 0.02,),
            differ=("trace nll",),
        ),
    ),
    "extra_head": (
        RunPlanting(
            figure="accuracy of the fifth head, which adds 1 % or 8 % to tokens/step",
            plant=_fifth_head,
            holds=number(0.1),
            fails=number(0.7),
            differ=("trace ranks",),
        ),
    ),
    "speed_identity": (
        RunPlanting(
            figure="separately timed steps of the Medusa arms over those of decoding, less one",
            plant=lambda form, gap, parts: time_steps(parts, dict.fromkeys(form.arms, lambda cost: 1 + gap)),
            holds=lambda form: (0.5 * form.margin, -0.5 * form.margin),
            fails=lambda form: (1.5 * form.margin, -1.5 * form.margin),
            differ=("steps of chain", "steps of cartesian", "steps of optimised_64"),
        ),
    ),
    "log_growth": (
        RunPlanting(
            figure="accuracy of all heads: the better they are, the sooner five levels are all there is",
            plant=lambda form, accuracy, parts: redraw(parts, (accuracy,) * 5),
            holds=number(0.6),
            fails=number(0.8),
            differ=("trace ranks",),
        ),
    ),
    "speed_peaks": (
        RunPlanting(
            figure="cost of a node, where calibration text puts the peak at two nodes",
            plant=_costly_nodes,
            holds=number(0.035),
            fails=number(0.018),
            differ=("bare steps",),
            calibrate=_speed_peaks_on_poor_calibration,
        ),
        RunPlanting(
            figure="share of the wrong tokens whose right one a larger tree reaches",
            plant=_second_tokens,
            holds=number(0.1),
            fails=number(0.0),
            differ=("trace ranks",),
        ),
    ),
    "category_order": (
        RunPlanting(
            figure="rank correlation of the categories with the stated order",
            plant=lambda form, correlation, parts: order_categories(
                parts, form.tree, figures=form.figures, correlation=correlation
            ),
            holds=lambda form: (form.bound + 0.6,),
            fails=lambda form: (form.bound - 0.6,),
            differ=("trace category",),
        ),
    ),
    "category_above": (
        RunPlanting(
            figure="tokens/step of the category over those of all others",
            plant=lambda form, ratio, parts: set_category_apart(
                parts, form.tree, category=form.category, ratio=ratio
            ),
            holds=lambda form: (1.07 * form.bound,),
            fails=lambda form: (0.93 * form.bound,),
            differ=("trace category",),
        ),
    ),
    "accuracy_falls": (
        RunPlanting(
            figure="fall of the accuracy from the fourth head to the fifth",
            plant=_less_accurate,
            holds=lambda form: (form.bound + 0.06,),
            fails=lambda form: (form.bound - 0.06,),
            differ=("trace ranks",),
        ),
    ),
    "more_candidates": (
        RunPlanting(
            figure="right among the first tokens over right on top",
            plant=lambda form, ratio, parts: redraw_head(
                parts, form.head, on_top=0.5, among=0.5 * ratio, first=form.first
            ),
            holds=lambda form: (1.05 * form.bound,),
            fails=lambda form: (0.95 * form.bound,),
            differ=("trace ranks",),
        ),
    ),
    "search_promise": (
        RunPlanting(
            figure="share of the rows whose heads are right together, where the promise has none",
            plant=lambda form, together, parts: redraw(parts, (0.5,) * 5, together=together, reach=0.0),
            holds=number(0.05),
            fails=number(0.4),
            differ=("trace ranks",),
        ),
        RunPlanting(
            figure="accuracy of the heads, which is 0.5 on the calibration text",
            plant=lambda form, accuracy, parts: redraw(parts, (accuracy,) * 5, reach=0.0),
            holds=number(0.5),
            fails=number(0.38, 0.62),
            differ=("trace ranks",),
            calibrate=lambda parts: redraw(parts, (0.5,) * 5, reach=0.0),
        ),
    ),
    "added_step": (
        RunPlanting(
            figure="whole step over what it is held against",
            plant=lambda form, ratio, parts: add_to_step(parts, form.arm, against=form.against, ratio=ratio),
            holds=lambda form: (0.97 * form.bound,),
            fails=lambda form: (1.03 * form.bound,),
            differ=("steps of {arm}",),
        ),
    ),
    "rejection_exact": (
        RunPlanting(
            figure="texts that part from sampled vanilla's, in 10,240 tokens",
            plant=_parted_by_rejection,
            holds=number(1),
            fails=number(2),
            differ=("generations of {arm}",),
            num_prompts=128,
        ),
    ),
}
