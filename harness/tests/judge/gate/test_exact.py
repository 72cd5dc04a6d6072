"""What a gate compares without an interval: tokens a step, acceptance, texts, likelihoods, memory."""

from __future__ import annotations

import math

import pytest

from harness.compose.replay import ReplayIndex
from harness.compose.trees import grow
from harness.judge.gate.exact import _exact, acceptance_counts, judge_exact
from harness.paths import shipped
from harness.records.gate.record import Finding, SideName, Turn
from harness.records.trace import Trace
from harness.tests.fake_gate import pair, side, spec_of, turns_of
from medusa_impl.tree import DraftTree

SPEC = spec_of((4, 8))
BOTH = pair(side(), side())


def found(turns: tuple[Turn, ...] | list[Turn], **sides: object) -> dict[str, Finding]:
    infos = pair(side(), side(**sides))
    return {one.name: one for one in judge_exact(turns, infos, SPEC)}


def test_one_version_against_itself_is_equivalent_in_everything() -> None:
    judged = found(turns_of(SPEC, num_blocks=4))
    assert {one.outcome for one in judged.values()} == {"equivalent"}
    assert {"tokens_per_step/tree", "parity/tree", "parity/vanilla", "peak_memory"} <= set(judged)


def without_leaves(tree: DraftTree, index: ReplayIndex, *, share: float) -> DraftTree:
    """Return the tree with as few of its last leaves gone as lose that share of tokens a step."""
    whole, paths = index.replay(tree).tokens_per_step, list(tree.paths)
    while index.replay(DraftTree.from_paths(paths)).tokens_per_step > (1 - share) * whole:
        parents = {path[:-1] for path in paths if path}
        leaf = min((p for p in paths if p and p not in parents), key=lambda p: (-sum(p), -len(p)))
        paths.remove(leaf)
    return DraftTree.from_paths(paths)


@pytest.mark.parametrize("num_nodes", [8, 12, 16, 32, 64])
def test_a_tree_that_loses_a_hundredth_of_its_tokens_a_step_is_always_worse(num_nodes: int) -> None:
    """Trees grown on the shipped trace and cut until they lose 1 %: counts, so that no chance is in it."""
    trace = Trace.load(shipped("embedded", "calibration.npz"))
    index = ReplayIndex(trace)
    tree = grow(trace, num_nodes=num_nodes, values="joint").tree
    cut = without_leaves(tree, index, share=0.01)
    replays = {name: index.replay(one).tokens_per_step for name, one in (("base", tree), ("head", cut))}
    infos = pair(*(side(replayed_tokens_per_step={"tree": replays[name]}) for name in ("base", "head")))
    turns = turns_of(SPEC, num_blocks=2)
    judged = {one.name: one for one in judge_exact(turns, infos, SPEC)}["tokens_per_step/tree"]
    assert judged.outcome == "worse" and judged.change is not None and judged.change >= 0.01
    swapped = pair(infos["head"], infos["base"])
    back = {one.name: one for one in judge_exact(turns, swapped, SPEC)}["tokens_per_step/tree"]
    assert back.outcome == "better"


def test_the_margin_itself_does_not_count_and_just_beyond_it_does() -> None:
    turns = turns_of(SPEC, num_blocks=2)
    at = found(turns, replayed_tokens_per_step={"tree": 2.0 * (1 - 0.005)})["tokens_per_step/tree"]
    beyond = found(turns, replayed_tokens_per_step={"tree": 2.0 * (1 - 0.0051)})["tokens_per_step/tree"]
    assert (at.outcome, beyond.outcome) == ("equivalent", "worse")


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_change_at_the_margin_but_for_rounding_is_none(margin: float) -> None:
    """A billionth more is what rounding may leave; beyond it on either side a change is one."""
    values: dict[SideName, float] = {"base": 1.0, "head": 1.0}
    end = margin + 1e-9
    changes = (math.nextafter(-end, -1), -end, 0.0, end, math.nextafter(end, 1))
    said = [_exact("quality", "a", values, change=change, margin=margin).outcome for change in changes]
    assert said == ["better", "equivalent", "equivalent", "equivalent", "worse"]


def test_without_a_trace_the_decoded_counts_are_compared() -> None:
    whole, fewer = turns_of(SPEC, num_blocks=2), turns_of(SPEC, num_blocks=2, tree_tokens=(2, 1) * 6)
    mixed = [turn for turn in whole if turn.side == "base"] + [turn for turn in fewer if turn.side == "head"]
    judged = found(mixed, replayed_tokens_per_step={})["tokens_per_step/tree"]
    assert judged.base == pytest.approx(22 / 12) and judged.head == pytest.approx(18 / 12)
    assert judged.outcome == "worse"


@pytest.mark.parametrize("short", ["base", "head"])
def test_a_prompt_that_one_version_alone_decoded_does_not_count(short: str) -> None:
    """Two prompts, of which the second has other counts and was cut off in one of the versions."""
    first, second = (2, 2, 1, 1), (3, 3, 3, 3)
    turns = [
        turn.model_copy(update={"step_tokens": second}) if turn.block == 1 and turn.arm == "tree" else turn
        for turn in turns_of(SPEC, num_blocks=2, tree_tokens=first)
        if (turn.block, turn.side) != (1, short)
    ]
    judged = found(turns, replayed_tokens_per_step={})
    rate = judged["tokens_per_step/tree"]
    assert (rate.base, rate.head, rate.outcome) == (6 / 4, 6 / 4, "equivalent")
    depth = judged["acceptance/tree/depth_1"]
    assert depth.base == depth.head == pytest.approx(2 / 3), "the last step is left out"
    assert "acceptance/tree/depth_2" not in judged


def test_acceptance_by_depth_is_a_share_of_the_steps_that_came_so_far() -> None:
    """Steps of 3, 1, 2 tokens, the last left out: depth 1 taken 1 of 2 times, depth 2 then 1 of 1."""
    assert acceptance_counts([(3, 1, 2)]) == [(1, 2), (1, 1)]
    assert acceptance_counts([(1, 1), (4,)]) == [], "no step but last ones accepted any"
    assert acceptance_counts([]) == []
    whole = turns_of(SPEC, num_blocks=2, tree_tokens=(3, 1, 2, 1, 1))
    fewer = turns_of(SPEC, num_blocks=2, tree_tokens=(2, 1, 2, 1, 1))
    mixed = [turn for turn in whole if turn.side == "base"] + [turn for turn in fewer if turn.side == "head"]
    judged = found(mixed)
    assert judged["acceptance/tree/depth_1"].outcome == "equivalent"
    assert judged["acceptance/tree/depth_2"].outcome == "worse", "the head never comes so deep"
    assert (judged["acceptance/tree/depth_2"].base, judged["acceptance/tree/depth_2"].head) == (0.5, 0.0)


def test_the_first_depth_that_the_head_never_reaches_is_judged_by_the_counts_of_that_depth() -> None:
    """Counts that differ at each depth; the head is cut off after depth 1, 2 or 3.

    Of ten steps of the base 8 accepted one token or more, 5 two or more, 3 three or more, 2 four.
    """
    steps = (
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        4,
        5,
        5,
        1,
    )  # kept tokens, one more than were accepted; the last is left out
    assert acceptance_counts([steps]) == [(8, 10), (5, 8), (3, 5), (2, 3)]
    shares = {1: 8 / 10, 2: 5 / 8, 3: 3 / 5, 4: 2 / 3}
    whole = turns_of(SPEC, num_blocks=2, tree_tokens=steps)
    for deepest in (0, 1, 2, 3):
        cut = turns_of(SPEC, num_blocks=2, tree_tokens=[min(one, deepest + 1) for one in steps])
        mixed = [turn for turn in whole if turn.side == "base"] + [
            turn for turn in cut if turn.side == "head"
        ]
        depths = {one.depth: one for one in found(mixed).values() if one.quantity == "acceptance"}
        assert set(depths) == set(range(1, deepest + 2)), "what lies deeper follows from it"
        for depth, one in depths.items():
            assert depth is not None and one.base == pytest.approx(shares[depth])
            assert one.head == pytest.approx(shares[depth] if depth <= deepest else 0.0)
            assert one.change == pytest.approx(0.0 if depth <= deepest else shares[depth])
            assert one.outcome == ("equivalent" if depth <= deepest else "worse")


def test_one_text_of_another_version_is_worse_in_float32() -> None:
    turns = turns_of(
        SPEC,
        num_blocks=4,
        text=lambda side, arm, block: "b" if (side, arm, block) == ("head", "tree", 2) else "a",
    )
    judged = found(turns)
    assert judged["parity/tree"].outcome == "worse" and judged["parity/tree"].head == 0.25
    assert judged["parity/vanilla"].outcome == "equivalent"


def scored(block: int, side: str, likelihood: float) -> Turn:
    return Turn.model_validate(
        {
            "block": block,
            "prompt_key": f"prompt-{block}",
            "arm": "typical",
            "side": side,
            "purpose": "scored",
            "step_s": (),
            "step_tokens": (2, 1),
            "text_sha256": "x",
            "mean_log_likelihood": likelihood,
            "others_share": 0,
            "peak_memory_bytes": 10**9,
        }
    )


@pytest.mark.parametrize(("lost", "outcome"), [(0.0, "equivalent"), (0.019, "equivalent"), (0.03, "worse")])
def test_texts_that_the_backbone_finds_less_likely_are_worse(lost: float, outcome: str) -> None:
    turns = [scored(block, "base", -1.5) for block in range(3)]
    turns += [scored(block, "head", -1.5 - lost) for block in range(3)]
    assert found(turns)["quality/typical"].outcome == outcome


def test_the_most_memory_of_each_version_is_compared() -> None:
    turns = [
        turn.model_copy(update={"peak_memory_bytes": 12 * 10**8})
        if (turn.side, turn.block, turn.arm) == ("head", 1, "tree")
        else turn
        for turn in turns_of(SPEC, num_blocks=2)
    ]
    judged = found(turns)["peak_memory"]
    assert judged.outcome == "worse" and judged.change == pytest.approx(0.2)


def test_what_had_nothing_to_compare_is_withheld_by_name() -> None:
    """It was left out in silence: a gate that compared no text at all found nothing wrong."""
    spec = SPEC.model_copy(update={"quality_prompts": 2})
    bare = pair(side(replayed_tokens_per_step={}), side(replayed_tokens_per_step={}))
    judged = judge_exact((), bare, spec)
    assert [(one.name, one.outcome, one.change) for one in judged] == [
        ("tokens_per_step/tree", "withheld", None),
        ("parity/vanilla", "withheld", None),
        ("parity/tree", "withheld", None),
        ("quality/vanilla_sampled", "withheld", None),
        ("quality/typical", "withheld", None),
        ("peak_memory", "withheld", None),
    ]
    assert {one.margin for one in judged if one.quantity == "parity"} == {SPEC.margin("parity")}
    half = [turn for turn in turns_of(SPEC, num_blocks=2) if (turn.side, turn.arm) != ("head", "tree")]
    lost = {one.name for one in judge_exact(half, BOTH, SPEC) if one.outcome == "withheld"}
    assert lost == {"parity/tree"}, "the replay still tells the tokens a step"


def test_a_quantity_without_a_margin_is_not_judged() -> None:
    bare = SPEC.model_copy(update={"margins": SPEC.margins[:1]})
    assert [one.name for one in judge_exact(turns_of(SPEC, num_blocks=2), BOTH, bare)] == [
        "tokens_per_step/tree"
    ]
