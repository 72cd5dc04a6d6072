"""A judgement holds what its parts say, on the claims that it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.checks import CHECKS
from harness.judge.judgement import CheckStatus
from harness.judge.metrics import arm_metrics, comparisons
from harness.judge.parity import parity_report
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.specs.claims import load_claims
from harness.tests.fake_record import FakeParts, write_fake_record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return write_fake_record(tmp_path_factory.mktemp("run"), rounds=2, num_prompts=4)


def test_the_parts_of_a_judgement(record: RunRecord) -> None:
    found = judge(record)
    assert found.valid and [one.name for one in found.checks] == [check.__name__ for check in CHECKS]
    assert {one.arm for one in arm_metrics(record)} == {arm.name for arm in record.suite.arms}
    assert [one.arm for one in found.arms] == [arm.name for arm in record.suite.arms]
    assert found.comparisons == comparisons(record) and found.parity == parity_report(record)
    decided = [one.claim_id for one in found.verdicts if one.decides]
    assert decided == [claim.id for claim in load_claims()]


def test_other_claims_and_none(record: RunRecord) -> None:
    some = load_claims()[:3]
    decided = [one.claim_id for one in judge(record, claims=some).verdicts if one.decides]
    assert decided == [claim.id for claim in some]
    assert judge(record, claims=()).verdicts == ()


def test_one_failed_check_makes_a_run_invalid(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.edit(lambda one: {"step_times_s": one.step_times_s[1:]}, limit=1)

    found = judge(write_fake_record(tmp_path, spoil=spoil, rounds=2, num_prompts=4), claims=())
    assert not found.valid
    assert "token_counts" in {one.name for one in found.checks if one.status is CheckStatus.FAILED}
