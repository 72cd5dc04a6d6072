"""How many steps of a record can be compared with its replay, counted here step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.parity import parity_report, steps_known
from harness.tests.fake_record import FakeParts, write_fake_record

GREEDY = ("chain", "cartesian", "optimised_64")


@pytest.mark.parametrize("position", [None, 1, 9, 30])
def test_steps_are_counted_until_a_text_differs(tmp_path: Path, position: int | None) -> None:
    def spoil(parts: FakeParts) -> None:
        if position is not None:
            parts.edit(
                lambda one: {
                    "token_ids": (
                        *one.token_ids[:position],
                        one.token_ids[position] + 1,
                        *one.token_ids[position + 1 :],
                    )
                },
                arm="cartesian",
                limit=1,
            )

    record = write_fake_record(tmp_path, spoil=spoil, rounds=1, num_prompts=4)
    parted = {(row.arm, row.prompt_key): row.position for row in parity_report(record).divergences}
    assert list(parted.values()) == ([] if position is None else [position])
    expected = 0
    for one in record.generations:
        if one.trial.arm not in GREEDY:
            continue
        end = parted.get((one.trial.arm, one.trial.prompt_key), one.num_tokens)
        known = 1  # the prefill's
        for kept in one.step_tokens:
            expected += known + kept <= end
            known += kept
    num_steps, num_known = steps_known(record)
    assert num_steps == expected == num_known  # a trace without ranks that rounding moved leaves one length
