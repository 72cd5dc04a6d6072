"""Where a check of a run does not apply, and what it is told by then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.judge.checks import run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus
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


@pytest.mark.parametrize(
    ("beyond", "status"), [(-1, CheckStatus.FAILED), (0, CheckStatus.FAILED), (1, CheckStatus.PASSED)]
)
def test_a_step_is_held_to_its_price_up_to_three_times_the_priced_context(
    tmp_path: Path, beyond: int, status: CheckStatus
) -> None:
    """Steps that take twice as long are told where the text is short enough; a longer text has no price."""

    def spoil(parts: FakeParts) -> None:
        longest = 3 * parts.suite.probes.step_context_tokens
        parts.edit(
            lambda one: {
                "prompt_tokens": longest + beyond - one.num_tokens,
                "step_times_s": tuple(2 * time for time in one.step_times_s),
            },
            arm="vanilla",
        )

    found = _checked(tmp_path, spoil)["steps_as_priced"]
    assert found.status is status
    # the fake device prices vanilla's 20 ms step at 19.6 ms; the longer text of it is not among the arms
    assert ("wrong: vanilla at 2.04" in found.found) == (status is CheckStatus.FAILED)
    assert f"of the price in {2 if status is CheckStatus.FAILED else 1} arms" in found.found


@pytest.mark.parametrize(
    ("step_s", "rest_s", "status"),
    [
        (2.0, 0.049, CheckStatus.PASSED),  # of 100 steps half a millisecond each may be in no part
        (2.0, 0.051, CheckStatus.FAILED),
        (10.0, 0.19, CheckStatus.PASSED),  # of longer steps 2 %
        (10.0, 0.21, CheckStatus.FAILED),
    ],
)
def test_what_is_in_no_part_of_a_step_may_be_its_share_or_half_a_millisecond(
    tmp_path: Path, step_s: float, rest_s: float, status: CheckStatus
) -> None:
    def spoil(parts: FakeParts) -> None:
        assert parts.profile is not None
        rows = []
        for row in parts.profile.rows:
            assert row.num_steps == 100
            others = row.heads_s + row.candidates_s + row.acceptance_s + row.cache_s
            update = {"step_s": step_s, "backbone_s": step_s - rest_s - others}
            rows.append(row.model_copy(update=update))
        parts.profile = parts.profile.model_copy(update={"rows": tuple(rows)})

    found = _checked(tmp_path, spoil)["profile_adds_up"]
    assert found.status is status
    assert (f"{rest_s / step_s:.1%} of a step of vanilla is in no part" in found.found) == (
        status is CheckStatus.FAILED
    )


def _checked(folder: Path, spoil: Callable[[FakeParts], object]) -> dict[str, CheckOutcome]:
    record = write_fake_record(folder, spoil=spoil, num_prompts=4, rounds=1, jitter=0)
    return {one.name: one for one in run_checks(record)}
