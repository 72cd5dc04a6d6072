"""Greedy parity and replay against decode: every kind of difference is found and classed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.quality.parity import TIE_MARGIN_FLOAT32, parity_report, replay_differences
from harness.records import Generation
from harness.tests.fake_record import FakeParts, write_fake_record
from harness.trace import Trace

NUM_PROMPTS = 4
KEY = "mt_bench-81"


def change_token(generation: Generation) -> dict[str, Any]:
    ids = generation.token_ids
    return {"token_ids": (*ids[:9], ids[9] + 1, *ids[10:])}


def set_gap(parts: FakeParts, gap: float) -> None:
    assert parts.trace is not None
    prompts = []
    for prompt in parts.trace.prompts:
        gaps = np.full(prompt.num_kept_tokens, 5.0, dtype=np.float32)
        gaps[9] = gap
        prompts.append(replace(prompt, gaps=gaps))
    parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))


def test_an_unspoilt_record_is_identical(tmp_path: Path) -> None:
    report = parity_report(write_fake_record(tmp_path, num_prompts=NUM_PROMPTS))
    assert report.num_compared == report.num_identical == 4 * NUM_PROMPTS * 2  # chain, cartesian, optimised_64, hf_greedy; two rounds
    assert report.divergences == ()
    assert report.num_tokens > 0


@pytest.mark.parametrize(("gap", "kind"), [(TIE_MARGIN_FLOAT32 * 0.9, "tie"), (TIE_MARGIN_FLOAT32 * 1.1, "bug")])
def test_the_first_divergence_is_classed_by_the_gap_of_its_reference(gap: float, kind: str, tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, gap)
        assert parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1) == 1

    report = parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    (row,) = report.divergences
    assert (row.arm, row.reference, row.prompt_key, row.position, row.kind) == ("chain", "vanilla", KEY, 9, kind)
    assert row.gap == pytest.approx(gap)
    assert report.num_identical == report.num_compared - 1


def test_a_wider_margin_is_an_argument_for_half_precision(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.01)
        parts.edit(change_token, arm="hf_greedy", prompt_key=KEY, limit=1)

    record = write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == ["bug"]
    assert [row.kind for row in parity_report(record, tie_margin=0.02).divergences] == ["tie"]


@pytest.mark.parametrize("cut", [10, -1])
def test_a_text_that_stops_early_is_a_bug_even_at_a_tie(cut: int, tmp_path: Path) -> None:
    """An equality check that zips two files calls a full and a cut file equal (Spec-Bench equal.py)."""

    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.0)
        parts.edit(lambda row: {"token_ids": row.token_ids[:cut]}, arm="chain", prompt_key=KEY, limit=1)

    (row,) = parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS)).divergences
    assert (row.kind, row.gap) == ("bug", None)


def test_a_gap_of_another_text_excuses_nothing(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.0)
        assert parts.trace is not None
        prompts = [replace(prompt, tokens=prompt.tokens[::-1].copy()) for prompt in parts.trace.prompts]
        parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))
        parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1)

    (row,) = parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS)).divergences
    assert (row.kind, row.gap) == ("bug", None)


def test_without_a_trace_a_divergence_is_a_bug(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.trace = None
        parts.edit(change_token, arm="chain", limit=1)

    record = write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == ["bug"]
    assert replay_differences(record) == ()


def test_sampling_arms_are_not_compared(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.edit(change_token, arm="typical")

    assert parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS)).divergences == ()


def split_a_step(generation: Generation) -> dict[str, Any]:
    """Take the first step that keeps several tokens in two."""
    steps = generation.step_tokens
    at = next(index for index, kept in enumerate(steps) if kept > 1)
    times = generation.step_times_s
    return {"step_tokens": (*steps[:at], 1, steps[at] - 1, *steps[at + 1 :]), "step_times_s": (*times[:at], times[at], *times[at:])}


def test_replay_equals_decode_on_an_unspoilt_record(tmp_path: Path) -> None:
    assert replay_differences(write_fake_record(tmp_path, num_prompts=NUM_PROMPTS)) == ()


def test_a_split_step_is_found_where_it_starts(tmp_path: Path) -> None:
    starts: list[int] = []

    def spoil(parts: FakeParts) -> None:
        def split(generation: Generation) -> dict[str, Any]:
            at = next(index for index, kept in enumerate(generation.step_tokens) if kept > 1)
            starts.append(1 + sum(generation.step_tokens[:at]))
            return split_a_step(generation)

        parts.edit(split, arm="optimised_64", prompt_key=KEY, limit=1)

    (row,) = replay_differences(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    assert (row.arm, row.prompt_key, row.kind) == ("optimised_64", KEY, "bug")
    assert row.decoded_steps == row.replayed_steps + 1
    assert row.position == starts[0]


def test_the_same_number_of_steps_in_another_order_is_a_difference(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.edit(lambda row: {"step_tokens": tuple(sorted(row.step_tokens))}, arm="chain", prompt_key=KEY, limit=1)

    (row,) = replay_differences(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    assert row.decoded_steps == row.replayed_steps
    assert row.kind == "bug"


def test_a_shown_tie_of_the_texts_or_of_a_heads_candidates_excuses_other_steps(tmp_path: Path) -> None:
    def part_at_a_tie(parts: FakeParts) -> None:
        set_gap(parts, 0.0)
        parts.edit(lambda row: change_token(row) | split_a_step(row), arm="chain", prompt_key=KEY, limit=1)

    (row,) = replay_differences(write_fake_record(tmp_path / "texts", spoil=part_at_a_tie, num_prompts=NUM_PROMPTS))
    assert row.kind == "tie"

    def name_head_tie(parts: FakeParts, *, position: int) -> None:
        assert parts.trace is not None
        provenance = parts.trace.provenance.model_copy(update={"extra": {"head_ties": [[KEY, position, 1]]}})
        parts.trace = Trace(provenance=provenance, prompts=parts.trace.prompts)
        parts.edit(split_a_step, arm="chain", prompt_key=KEY, limit=1)

    there = write_fake_record(tmp_path / "there", spoil=lambda parts: name_head_tie(parts, position=row.position), num_prompts=NUM_PROMPTS)
    elsewhere = write_fake_record(tmp_path / "elsewhere", spoil=lambda parts: name_head_tie(parts, position=30), num_prompts=NUM_PROMPTS)
    assert [difference.kind for difference in replay_differences(there)] == ["tie"]
    assert [difference.kind for difference in replay_differences(elsewhere)] == ["bug"]
