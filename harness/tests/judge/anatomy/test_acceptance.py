"""How drafts are accepted: by hand on a made-up record, and the committed one's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.judge.anatomy.acceptance import acceptances
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.report.anatomy.acceptance import render_acceptance, vllm_counters
from harness.report.run import render_report
from harness.tests.fake_judgement import judge
from harness.tests.fake_record import FakeParts, write_fake_record

ROOT = Path(__file__).resolve().parents[4]
DEFAULT = ROOT / "results" / "embedded" / "cpu-amd-epyc-2c" / "20261125T202908Z-e4ce6458"
# kept tokens of each step, by prompt: 2 steps without a draft, 3 with one, 2 with two, 1 with four
STEPS = {"mt_bench-81": (1, 2, 3, 2), "mt_bench-82": (5, 1, 3, 2)}


def planted(parts: FakeParts) -> None:
    def steps(one: Generation) -> dict[str, Any]:
        kept = STEPS[one.trial.prompt_key]
        return {
            "step_tokens": kept,
            "step_times_s": (0.02,) * len(kept),
            "token_ids": one.token_ids[: 1 + sum(kept)],
        }

    parts.edit(steps, arm="chain")


def test_counts_rates_and_extremes_by_hand(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=2, spoil=planted)
    (chain,) = (one for one in acceptances(record) if one.arm == "chain")
    depth = record.trees["chain"].tree().depth
    assert depth == 5 and chain.histogram == (2, 3, 2, 0, 1, 0) and chain.drafted == (1,) * 5
    assert chain.reached == (6, 3, 1, 1, 0)
    rates = [None if one is None else one.estimate for one in chain.conditional]
    assert rates == pytest.approx([6 / 8, 3 / 6, 1 / 3, 1 / 1, 0 / 1])
    assert (chain.num_steps, chain.num_accepted, chain.num_drafted) == (8, 11, 40)
    assert chain.use_of_nodes == pytest.approx(11 / 40)
    assert chain.lowest == ("mt_bench-81", 8 / 4) and chain.highest == ("mt_bench-82", 11 / 4)
    for one in chain.conditional:
        assert one is not None and one.low <= one.estimate <= one.high and one.num_prompts == 2


def test_along_the_text_steps_count_where_they_begin(tmp_path: Path) -> None:
    """Steps of the first prompt begin after 1, 2, 4, 7 tokens, of the second after 1, 6, 7, 10."""

    def short(parts: FakeParts) -> None:
        planted(parts)
        parts.suite_text = parts.suite_text.replace(
            f"max_new_tokens = {parts.suite.max_new_tokens}", "max_new_tokens = 12"
        )

    record = write_fake_record(tmp_path, rounds=1, num_prompts=2, spoil=short)
    (chain,) = (one for one in acceptances(record) if one.arm == "chain")
    assert [(part.start, part.end, part.num_steps, part.num_accepted) for part in chain.along] == [
        (0, 3, 3, 0 + 1 + 4),
        (3, 6, 1, 2),
        (6, 9, 3, 1 + 0 + 2),
        (9, 12, 1, 1),
    ]
    assert [part.tokens_per_step for part in chain.along] == pytest.approx([8 / 3, 3.0, 2.0, 2.0])


def test_a_depth_that_no_step_got_to_has_no_rate(tmp_path: Path) -> None:
    def none_accepted(parts: FakeParts) -> None:
        parts.edit(
            lambda one: {
                "step_tokens": (1,) * (one.num_tokens - 1),
                "step_times_s": (0.02,) * (one.num_tokens - 1),
            },
            arm="chain",
        )

    record = write_fake_record(tmp_path, rounds=1, num_prompts=2, spoil=none_accepted)
    (chain,) = (one for one in acceptances(record) if one.arm == "chain")
    assert chain.conditional[0] is not None and chain.conditional[0].estimate == 0
    assert chain.conditional[1:] == (None,) * 4 and chain.use_of_nodes == 0
    row = next(line for line in render_acceptance(record).splitlines() if line.startswith("| chain"))
    assert "100.0 %" in row


def test_counters_have_the_names_that_vllm_gives_them(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, rounds=1, num_prompts=2, spoil=planted)
    assert vllm_counters(record)["chain"] == {
        "num_drafts": 8,
        "num_draft_tokens": 40,
        "num_accepted_tokens": 11,
        "num_accepted_tokens_per_pos": [6, 3, 1, 1, 0],
        "mean_acceptance_length": pytest.approx(19 / 8),
        "per_position_acceptance_rate": pytest.approx([6 / 8, 3 / 8, 1 / 8, 1 / 8, 0]),
        "draft_acceptance_rate": pytest.approx(11 / 40),
    }


def test_the_default_records_tree_of_64_nodes_accepts_none_one_two_or_more_drafts() -> None:
    """Counted from outside: 32, 50, 14 and 4 % of steps; by depth .68, .27, .22, .20, .33."""
    record = RunRecord.open(DEFAULT)
    (tree,) = (one for one in acceptances(record) if one.arm == "optimised")
    shares = [count / tree.num_steps for count in tree.histogram]
    assert [round(share, 2) for share in (*shares[:3], sum(shares[3:]))] == [0.32, 0.50, 0.14, 0.04]
    rates = [one.estimate for one in tree.conditional if one is not None]
    assert [round(rate, 2) for rate in rates] == [0.68, 0.27, 0.22, 0.20, 0.33]
    (arm,) = (one for one in judge(record).arms if one.arm == "optimised")
    assert arm.acceleration_rate is not None
    assert 1 + tree.num_accepted / tree.num_steps == pytest.approx(arm.acceleration_rate.estimate)
    assert "## Acceptance" in render_report(record, judge(record))
