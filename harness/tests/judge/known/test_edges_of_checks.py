"""Where a check of a run does not apply, and what it is told by then."""

from __future__ import annotations

from pathlib import Path

from harness.judge.checks import run_checks
from harness.judge.judgement import CheckStatus
from harness.tests.fake_record import FakeParts, write_fake_record


def test_seeds_pair_texts_on_a_cpu_alone(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        device = parts.environment.device.model_copy(update={"kind": "cuda"})
        parts.environment = parts.environment.model_copy(update={"device": device})
        parts.edit(
            lambda one: {"token_ids": (*one.token_ids[:3], 7, *one.token_ids[4:])}, arm="rejection", limit=1
        )

    record = write_fake_record(tmp_path, spoil=spoil, num_prompts=4, rounds=1)
    found = {one.name: one for one in run_checks(record)}["sampled_parity"]
    assert found.status is CheckStatus.SKIPPED
    assert found.found == "a GPU draws on after a path has ended, so seeds do not pair texts"
