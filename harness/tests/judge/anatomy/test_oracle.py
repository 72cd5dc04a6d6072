"""The oracle by hand: what a step that drafts exactly the accepted tokens costs and yields."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from harness.judge.anatomy.oracle import oracle_step_s, oracles
from harness.records.probes import StepCost, StepCosts
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.report.formatting import percent, ratio_interval
from harness.report.run import render_report
from harness.tests.fake_judgement import judge
from harness.tests.fake_record import FakeParts, write_fake_record

ROOT = Path(__file__).resolve().parents[4]
DEFAULT = ROOT / "results" / "embedded" / "cpu-amd-epyc-2c" / "20261125T202908Z-e4ce6458"
BACKBONE_S = {1: 1.0, 2: 1.1, 4: 1.3, 64: 4.0}
OWN_S = 0.1
KEPT = {"vanilla": (1,) * 6, "chain": (1, 2, 1, 2), "optimised_64": (3, 1, 2), "cartesian": (2, 2, 2)}
TAKEN_S = {"vanilla": 1.0, "chain": 1.5, "optimised_64": 4.2, "cartesian": 4.2}


def planted(parts: FakeParts) -> None:
    """Six tokens after the first on every prompt, steps of known costs."""

    def steps(one: Generation) -> dict[str, Any]:
        kept = KEPT[one.trial.arm]
        return {
            "step_tokens": kept,
            "step_times_s": (TAKEN_S[one.trial.arm],) * len(kept),
            "token_ids": one.token_ids[:7],
        }

    for arm in KEPT:
        parts.edit(steps, arm=arm)
    rows = [
        StepCost(
            num_nodes=size,
            num_heads=min(5, size - 1),
            context_tokens=8,
            backbone_s=(seconds,),
            step_s=(seconds + OWN_S,) if size > 1 else (),
        )
        for size, seconds in BACKBONE_S.items()
    ]
    parts.step_costs = StepCosts(costs=tuple(rows))


def test_a_right_draft_costs_its_nodes_and_a_step_without_one_the_heads(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=4, spoil=planted)
    found = [oracle_step_s(record, accepted) for accepted in (0, 1, 2, 3)]
    assert found == pytest.approx([1.0 + 0.1, 1.1 + 0.1, 1.2 + 0.1, 1.3 + 0.1])
    assert oracle_step_s(record, 64) is None, "no step of 65 nodes was timed"


def test_the_gap_is_acceptance_times_cost(tmp_path: Path) -> None:
    """64 nodes keep 6 tokens in 3 steps of 1.3, 1.1 and 1.2 s, where vanilla takes 6 s: 6 over 3.6."""
    record = write_fake_record(tmp_path, rounds=1, num_prompts=4, spoil=planted)
    found = {one.arm: one for one in oracles(record)}
    chain, tree = found["chain"], found["optimised_64"]
    assert chain.of == tree.of == "optimised_64", "three steps as the other tree of 64 nodes, and named first"
    for one in (chain, tree):
        assert one.tokens_per_step == pytest.approx(2.0)
        assert one.speedup.estimate == pytest.approx(6 / 3.6)
        assert one.speedup.low == one.speedup.high == pytest.approx(6 / 3.6), "all prompts are alike"
    assert chain.acceptance == pytest.approx(2.0 / 1.5) and chain.cost == pytest.approx(1.5 / 1.2)
    assert tree.acceptance == pytest.approx(1.0) and tree.cost == pytest.approx(4.2 / 1.2)
    assert tree.cost_share == pytest.approx(1.0)
    assert chain.cost_share == pytest.approx(math.log(1.25) / math.log(1.25 * 2 / 1.5))


def test_an_arm_at_its_oracle_has_no_gap_to_part(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=4, spoil=planted)
    (tree,) = (one for one in oracles(record) if one.arm == "optimised_64")
    at_best = type(tree)(**{**vars(tree), "acceptance": 1.0, "cost": 1.0})
    assert at_best.cost_share is None


def test_without_speeds_or_costs_there_is_none(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path / "a", rounds=1, num_prompts=4, spoil=planted)
    assert oracles(record.withholding("a test")) == ()
    bare = write_fake_record(tmp_path / "b", rounds=1, num_prompts=4)
    assert oracles(bare) == (), "whole steps of other sizes were not timed"


def test_the_default_records_oracle_gives_back_its_speedups() -> None:
    record = RunRecord.open(DEFAULT)
    speedups = {one.arm: one.speedup for one in judge(record).comparisons}
    found = oracles(record)
    assert len(found) == 8
    for one in found:
        speedup = speedups[one.arm]
        assert speedup is not None
        assert one.speedup.estimate / (one.acceptance * one.cost) == pytest.approx(speedup.estimate, rel=0.01)
    (fastest,) = (one for one in found if one.arm == "fastest")
    assert fastest.of == "optimised" and 1.5 < fastest.speedup.estimate < 1.8
    report = render_report(record, judge(record))
    assert "## How far from the best" in report
    told = f"The best that these heads allow on this device is {ratio_interval(fastest.speedup)}; "
    assert f"{told}{percent(fastest.cost_share)} of the gap is the step's cost." in report
