"""Greedy parity and replay against decode: every kind of difference is found and classed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.compose.differences import RankRanges
from harness.compose.replay import replay
from harness.judge.parity import parity_report, replay_differences, steps_known, tie_margin_of
from harness.records.run import TIE_MARGIN_FLOAT32, TIE_SHIFTS
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.records.trials import Generation
from harness.tests.fake_record import FakeParts, fake_rounding, write_fake_record
from medusa_impl.tree import DraftTree

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
    # chain, cartesian, optimised_64, hf_greedy; two rounds
    assert report.num_compared == report.num_identical == 4 * NUM_PROMPTS * 2
    assert report.divergences == ()
    assert report.num_tokens > 0


@pytest.mark.parametrize(
    ("gap", "kind"), [(TIE_MARGIN_FLOAT32 * 0.9, "tie"), (TIE_MARGIN_FLOAT32 * 1.1, "bug")]
)
def test_the_first_divergence_is_classed_by_the_gap_of_its_reference(
    gap: float, kind: str, tmp_path: Path
) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, gap)
        assert parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1) == 1

    report = parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    (row,) = report.divergences
    assert (row.arm, row.reference, row.prompt_key, row.position, row.kind) == (
        "chain",
        "vanilla",
        KEY,
        9,
        kind,
    )
    assert row.gap == pytest.approx(gap)
    assert report.num_identical == report.num_compared - 1


def test_a_wider_margin_is_an_argument_for_half_precision(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.01)
        parts.edit(change_token, arm="hf_greedy", prompt_key=KEY, limit=1)

    record = write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == ["bug"]
    assert parity_report(record).rounding is None and tie_margin_of(record) is None
    assert [row.kind for row in parity_report(record, tie_margin=0.02).divergences] == ["tie"]


@pytest.mark.parametrize(("gap", "kind"), [(0.24, "tie"), (0.26, "bug")])
def test_half_precision_takes_its_margin_from_the_measured_rounding(
    gap: float, kind: str, tmp_path: Path
) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, gap)
        parts.rounding = fake_rounding(0.125)
        parts.edit(change_token, arm="chain", prompt_key=KEY)

    record = write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    report = parity_report(record)
    assert [row.kind for row in report.divergences] == [kind] * 2  # two rounds
    assert report.rounding is not None and TIE_SHIFTS == 2
    assert (report.rounding.dtype, report.rounding.largest_shift, report.rounding.tie_margin) == (
        "bfloat16",
        0.125,
        0.25,
    )
    assert record.trace is not None
    num_below = NUM_PROMPTS if kind == "tie" else 0  # one place a prompt has that gap, the others 5
    assert report.rounding.share_below == pytest.approx(num_below / record.trace.num_positions)
    length = record.trace.prompts[0].num_kept_tokens
    assert report.rounding.num_equal_tokens == report.num_tokens - 2 * (length - 9)


@pytest.mark.parametrize(("listed", "kind"), [(True, "tie"), (False, "bug")])
def test_only_a_token_that_rounding_may_put_first_is_a_tie(listed: bool, kind: str, tmp_path: Path) -> None:
    """Four places in ten of a bfloat16 text have a close second: without its id any wrong token would pass
    there.
    """

    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.2)
        parts.rounding = fake_rounding(0.125)
        assert parts.trace is not None
        token = int(parts.trace.prompts[0].tokens[9])
        rows = [[KEY, 10, token, token + (1 if listed else 2)], [KEY, 11, token, token + 1]]
        provenance = parts.trace.provenance.model_copy(update={"extra": {"text_ties": rows}})
        parts.trace = Trace(provenance=provenance, prompts=parts.trace.prompts)
        parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1)

    record = write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == [kind]


def test_equal_logits_are_a_tie_whatever_was_measured(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.0)
        parts.rounding = fake_rounding(0.0)
        parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1)

    record = write_fake_record(tmp_path, spoil=spoil, dtype="bfloat16", num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == ["tie"]


def test_a_measured_rounding_changes_nothing_in_float32(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        set_gap(parts, 0.01)
        parts.rounding = fake_rounding(0.125, dtype="float32")
        parts.edit(change_token, arm="chain", prompt_key=KEY, limit=1)

    report = parity_report(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    assert [row.kind for row in report.divergences] == ["bug"] and report.rounding is None


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


def split_a_step(generation: Generation, *, since: int = 0) -> dict[str, Any]:
    """Take the first step that starts at position `since` or later and keeps several tokens in two."""
    steps = generation.step_tokens
    at = next(index for index, kept in enumerate(steps) if kept > 1 and 1 + sum(steps[:index]) >= since)
    times = generation.step_times_s
    return {
        "step_tokens": (*steps[:at], 1, steps[at] - 1, *steps[at + 1 :]),
        "step_times_s": (*times[:at], times[at], *times[at:]),
    }


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
        parts.edit(
            lambda row: {"step_tokens": tuple(sorted(row.step_tokens))}, arm="chain", prompt_key=KEY, limit=1
        )

    (row,) = replay_differences(write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS))
    assert row.decoded_steps == row.replayed_steps
    assert row.kind == "bug"


def test_a_shown_tie_of_the_texts_or_of_a_heads_candidates_excuses_other_steps(tmp_path: Path) -> None:
    def part_at_a_tie(parts: FakeParts) -> None:
        set_gap(parts, 0.0)
        parts.edit(
            lambda row: change_token(row) | split_a_step(row, since=9), arm="chain", prompt_key=KEY, limit=1
        )

    (row,) = replay_differences(
        write_fake_record(tmp_path / "texts", spoil=part_at_a_tie, num_prompts=NUM_PROMPTS)
    )
    assert row.kind == "tie"

    def name_head_tie(parts: FakeParts, *, position: int) -> None:
        assert parts.trace is not None
        provenance = parts.trace.provenance.model_copy(update={"extra": {"head_ties": [[KEY, position, 1]]}})
        parts.trace = Trace(provenance=provenance, prompts=parts.trace.prompts)
        parts.edit(lambda generation: split_a_step(generation, since=9), arm="chain", prompt_key=KEY, limit=1)

    there = write_fake_record(
        tmp_path / "there",
        spoil=lambda parts: name_head_tie(parts, position=row.position),
        num_prompts=NUM_PROMPTS,
    )
    elsewhere = write_fake_record(
        tmp_path / "elsewhere", spoil=lambda parts: name_head_tie(parts, position=30), num_prompts=NUM_PROMPTS
    )
    assert [difference.kind for difference in replay_differences(there)] == ["tie"]
    assert [difference.kind for difference in replay_differences(elsewhere)] == ["bug"]


def test_a_step_that_differs_before_the_texts_part_is_a_bug(tmp_path: Path) -> None:
    """A tie anywhere in a text once excused every other step of it, those before the tie included."""

    def part_late(parts: FakeParts) -> None:
        set_gap(parts, 0.0)

        def change(row: Generation) -> dict[str, Any]:
            last = row.num_tokens - 1
            return {"token_ids": (*row.token_ids[:last], row.token_ids[last] + 1)} | split_a_step(row)

        assert parts.trace is not None
        gaps = [np.zeros(prompt.num_kept_tokens, dtype=np.float32) for prompt in parts.trace.prompts]
        prompts = tuple(
            replace(prompt, gaps=gap) for prompt, gap in zip(parts.trace.prompts, gaps, strict=True)
        )
        parts.trace = Trace(provenance=parts.trace.provenance, prompts=prompts)
        parts.edit(change, arm="chain", prompt_key=KEY, limit=1)

    record = write_fake_record(tmp_path, spoil=part_late, num_prompts=NUM_PROMPTS)
    assert [row.kind for row in parity_report(record).divergences] == ["tie"]
    assert [row.kind for row in replay_differences(record)] == ["bug"]


@pytest.mark.parametrize(("lowest", "highest", "kind"), [(0, 1, "tie"), (0, 0, "bug")])
def test_a_step_is_a_tie_only_if_the_listed_ranks_allow_its_length(
    lowest: int, highest: int, kind: str, tmp_path: Path
) -> None:
    """A chain keeps a head's token at rank 0; at rank 1 it stops, and the rest of the step is a step of its
    own.
    """

    def spoil(parts: FakeParts) -> None:
        assert parts.trace is not None
        prompt = parts.trace.prompts[0]
        at = next(row for row in range(prompt.num_kept_tokens - 12) if prompt.ranks[row, 0] == 0)
        ranks = np.array(prompt.ranks)
        ranks[: at + 7] = 3  # one token a step up to there, and after the step below
        ranks[at, 0] = 0
        traced = replace(prompt, ranks=ranks)
        extra = {"head_ties": [[KEY, at + 1, 1, lowest, highest]]}
        provenance = parts.trace.provenance.model_copy(update={"extra": extra})
        parts.trace = Trace(provenance=provenance, prompts=(traced, *parts.trace.prompts[1:]))
        alone = Trace(provenance=provenance, prompts=(traced,))

        def steps(generation: Generation) -> dict[str, Any]:
            decoded = replay(alone, parts.trees[generation.trial.arm].tree()).acceptance_lengths.tolist()
            assert decoded[at] == 2
            decoded[at : at + 1] = [1, 1]
            return {"step_tokens": tuple(decoded), "step_times_s": (0.02,) * len(decoded)}

        def as_replayed(generation: Generation) -> dict[str, Any]:
            decoded = replay(alone, parts.trees[generation.trial.arm].tree()).acceptance_lengths.tolist()
            return {"step_tokens": tuple(decoded), "step_times_s": (0.02,) * len(decoded)}

        for arm in ("cartesian", "optimised_64"):
            parts.edit(as_replayed, arm=arm, prompt_key=KEY)
        parts.edit(steps, arm="chain", prompt_key=KEY)

    record = write_fake_record(tmp_path, spoil=spoil, num_prompts=NUM_PROMPTS, rounds=1)
    (row,) = replay_differences(record)
    assert (row.arm, row.prompt_key, row.kind) == ("chain", KEY, kind)
    num_steps, num_known = steps_known(record)
    assert num_steps > 0
    # the chain's own step, and those of the other trees that know ranks 0 and 1 as different paths
    assert (num_steps - num_known >= 1) is (kind == "tie")


@pytest.mark.parametrize("seed", range(20))
def test_the_lengths_that_ranges_allow_are_those_of_every_assignment_of_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_heads = 6, 3
    tree = (
        DraftTree.chain(3),
        DraftTree.cartesian((2, 2)),
        DraftTree.from_paths([(1,), (2,), (1, 0), (1, 2), (1, 0, 1)]),
    )[seed % 3]
    beyond = np.arange(1, num_tokens + 1)[:, None] + np.arange(1, num_heads + 1) > num_tokens
    lowest = np.where(beyond, -1, rng.integers(0, 3, size=(num_tokens, num_heads)))
    highest = np.where(beyond, -1, lowest + rng.integers(0, 3, size=(num_tokens, num_heads)))
    ranges = RankRanges(lowest.tolist(), highest.tolist(), set())
    for position in range(1, num_tokens):
        row = position - 1
        possible = set()
        for ranks in itertools.product(
            *(range(lowest[row, head], highest[row, head] + 1) for head in range(num_heads))
        ):
            # all rows but this one end a step at once, so that one starts here
            assigned = np.where(beyond, -1, 9).astype(np.int32)
            assigned[row] = ranks
            prompt = PromptTrace(
                key="p",
                category=None,
                prompt_tokens=1,
                tokens=np.arange(num_tokens),
                ended_by="budget",
                ranks=assigned,
            )
            trace = Trace(
                provenance=TraceProvenance(model_hash="b", heads_hash="h", dtype="float32", max_new_tokens=6),
                prompts=(prompt,),
            )
            replayed = replay(trace, tree)
            assert replayed.positions[row] == position
            possible.add(int(replayed.acceptance_lengths[row]))
        assert ranges.kept_tokens(tree, position, num_heads=None) == possible, position
