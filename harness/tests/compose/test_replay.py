"""Traces on disk and their replay, against a slow reference that follows the definition word by word."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compose.replay import Replay, ReplayIndex, replay
from harness.errors import UserError
from harness.records.trace import EndedBy, PromptTrace, Trace, TraceProvenance
from medusa_impl.tree import DraftTree, RankPath

BUDGET = 24


def _provenance(budget: int = BUDGET) -> TraceProvenance:
    return TraceProvenance(
        model_hash="m" * 64,
        heads_hash="h" * 64,
        dtype="float32",
        max_new_tokens=budget,
        versions={"torch": "2"},
    )


def _prompt(
    ranks: list[list[int]], *, key: str = "a", prompt_tokens: int = 10, budget: int = BUDGET
) -> PromptTrace:
    table = np.array(ranks)
    ended_by: EndedBy = "budget" if len(table) == budget else "eos"
    return PromptTrace(
        key=key,
        category="writing",
        prompt_tokens=prompt_tokens,
        tokens=np.arange(len(table)),
        ended_by=ended_by,
        ranks=table,
    )


def _trace(*ranks: list[list[int]]) -> Trace:
    prompts = (
        _prompt(table, key=f"p{number}", prompt_tokens=10 + number) for number, table in enumerate(ranks)
    )
    return Trace(provenance=_provenance(), prompts=tuple(prompts))


def _random_ranks(rng: np.random.Generator, n: int, num_heads: int) -> list[list[int]]:
    ranks = rng.geometric(rng.uniform(0.2, 0.9), (n, num_heads)) - 1
    ranks[rng.random(ranks.shape) < 0.1] = 40_000  # far beyond any tree
    ranks[np.arange(1, n + 1)[:, None] + np.arange(1, num_heads + 1) > n] = -1
    rows: list[list[int]] = ranks.tolist()
    return rows


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(1, BUDGET), min_size=1, max_size=7))
    num_heads = draw(st.integers(1, 4))
    return _trace(*(_random_ranks(rng, n, num_heads) for n in lengths))


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    """Random trees of depth 4 or less, ranks of two digits among them."""
    paths: list[RankPath] = [()]
    for parent, rank in draw(
        st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 0, 1, 2, 3, 10, 12])), max_size=25)
    ):
        path = (*paths[parent % len(paths)], rank)
        if path not in paths and len(path) <= 4:
            paths.append(path)
    return DraftTree.from_paths(paths)


def _reference(trace: Trace, tree: DraftTree, *, num_heads: int, budget: int) -> list[list[tuple[int, int]]]:
    """For every prompt its steps as (position i, tokens kept), by the definition: rows and heads counted from
    1.
    """
    nodes = {path for path in tree.paths if len(path) <= num_heads}
    result = []
    for prompt in trace.prompts:
        n = min(prompt.num_kept_tokens, budget)
        row = {i: prompt.ranks[i - 1].tolist() for i in range(1, n + 1)}
        i, steps = 1, []
        while i < n:
            ranks = [rank if i + k <= n else -1 for k, rank in enumerate(row[i], start=1)]
            d = max(length for length in range(len(ranks) + 1) if tuple(ranks[:length]) in nodes)
            hop = min(d + 1, n - i)
            steps.append((i, hop))
            i += hop
        result.append(steps)
    return result


def _steps(result: Replay) -> list[list[tuple[int, int]]]:
    pairs = list(zip(result.positions.tolist(), result.acceptance_lengths.tolist(), strict=True))
    return [
        pairs[start:stop]
        for start, stop in zip(result.offsets[:-1].tolist(), result.offsets[1:].tolist(), strict=True)
    ]


@settings(max_examples=200)
@given(trace=traces(), tree=trees(), data=st.data())
def test_replay_follows_the_definition(trace: Trace, tree: DraftTree, data: st.DataObject) -> None:
    num_heads = data.draw(st.integers(0, trace.num_heads))
    budget = data.draw(st.integers(1, BUDGET))
    batch = data.draw(st.integers(1, 8))
    result = replay(trace, tree, num_heads=num_heads, budget=budget, batch=batch)
    expected = _reference(trace, tree, num_heads=num_heads, budget=budget)
    assert _steps(result) == expected
    counts = [len(steps) for steps in expected]
    assert result.num_steps.tolist() == counts
    assert result.num_kept_tokens.tolist() == [
        min(prompt.num_kept_tokens, budget) for prompt in trace.prompts
    ]
    assert result.batch_steps.tolist() == [
        max(counts[start : start + batch]) for start in range(0, len(counts), batch)
    ]
    if sum(counts):
        generated = sum(result.num_kept_tokens.tolist()) - len(counts)
        assert result.tokens_per_step == generated / sum(counts)


@given(trace=traces(), tree=trees())
def test_an_index_serves_many_trees(trace: Trace, tree: DraftTree) -> None:
    index = ReplayIndex(trace)
    index.replay(DraftTree.chain(1), budget=3)
    again = index.replay(tree, num_heads=trace.num_heads)
    assert _steps(again) == _steps(replay(trace, tree, num_heads=trace.num_heads))


def test_the_example_of_the_docstring() -> None:
    trace = _trace([[0, 0], [7, 7], [7, 7], [5, 0], [1, -1], [-1, -1]])
    result = replay(trace, DraftTree.from_paths([(0,), (1,), (0, 0)]))
    assert _steps(result) == [[(1, 3), (4, 1), (5, 1)]]
    assert result.tokens_per_step == 5 / 3


@given(trace=traces(), budget=st.integers(2, BUDGET))
def test_vanilla_takes_one_step_a_token(trace: Trace, budget: int) -> None:
    result = replay(trace, DraftTree.root_only(), budget=budget)
    assert result.num_steps.tolist() == [min(prompt.num_kept_tokens, budget) - 1 for prompt in trace.prompts]
    if result.total_steps:
        assert result.tokens_per_step == 1.0


def test_no_heads_is_vanilla() -> None:
    trace = _trace([[0, 0], [0, 0], [0, -1], [-1, -1]])
    assert replay(trace, DraftTree.chain(2), num_heads=0).num_steps.tolist() == [3]
    assert replay(trace, DraftTree.chain(2), num_heads=1).num_steps.tolist() == [2]
    assert replay(trace, DraftTree.chain(2)).num_steps.tolist() == [1]


def test_rank_ten_is_not_the_first_rank_of_the_next_head() -> None:
    """A flat index of ten ranks a head reads rank 10 of head 1 as rank 0 of head 2, and (0, 12) as (1, 2)."""
    trace = _trace([[10, 0], [0, 12], [1, 2], [10, -1], [-1, -1]])
    assert replay(trace, DraftTree.from_paths([(0,), (0, 0), (1,), (1, 2)])).positions.tolist() == [1, 2, 4]
    assert replay(trace, DraftTree.from_paths([(10,), (10, 0)])).positions.tolist() == [1, 4]
    assert replay(trace, DraftTree.from_paths([(10,), (0,), (0, 12)])).positions.tolist() == [1, 3, 4]


def test_the_end_may_fall_inside_a_path() -> None:
    """Row 2 matches one token, the end-of-sequence y_3; the bonus token after it is not counted, and no step
    follows.
    """
    trace = _trace([[4, 0], [0, -1], [-1, -1]])
    result = replay(trace, DraftTree.chain(2))
    assert _steps(result) == [[(1, 1), (2, 1)]]
    assert result.tokens_per_step == 1.0


def test_rows_that_agree_only_at_a_later_head_are_told_apart() -> None:
    """Sorted, (0, 1) and (1, 1) are neighbours with the same second rank; only the first begins with (0,
    1).
    """
    trace = _trace([[1, 1], [0, 1], [9, 9], [9, -1], [-1, -1]])
    assert _steps(replay(trace, DraftTree.from_paths([(0,), (0, 1)]))) == [[(1, 1), (2, 3)]]


def test_nothing_absent_ever_matches() -> None:
    """-1 marks the end; it must not wrap around to some last entry of a table."""
    trace = _trace([[0, -1], [-1, -1]])
    assert _steps(replay(trace, DraftTree.cartesian((3, 3)))) == [[(1, 1)]]


def test_a_smaller_budget_cuts_every_prompt_there() -> None:
    trace = _trace([[0, 0]] * 7 + [[0, -1], [-1, -1]], [[0, -1], [-1, -1]])
    result = replay(trace, DraftTree.chain(2), budget=6)
    assert _steps(result) == [[(1, 3), (4, 2)], [(1, 1)]]
    assert result.num_kept_tokens.tolist() == [6, 2]


def test_a_prompt_that_ends_at_its_first_token_takes_no_step() -> None:
    alone = replay(_trace([[-1]]), DraftTree.chain(1), batch=4)
    assert (alone.total_steps, alone.batch_steps.tolist(), alone.context_tokens.tolist()) == (0, [0], [])
    with pytest.raises(UserError, match="no decoding step"):
        _ = alone.tokens_per_step
    assert replay(_trace([[-1]], [[0], [-1]], [[-1]]), DraftTree.chain(1)).num_steps.tolist() == [0, 1, 0]


def test_contexts_are_prompt_and_known_tokens() -> None:
    trace = _trace([[0], [9], [9], [-1]], [[0], [0], [-1]], [[-1]])
    result = replay(trace, DraftTree.chain(1), batch=2)
    assert [result.hops(prompt).tolist() for prompt in range(3)] == [[1, 3], [1], []]
    assert result.context_tokens.tolist() == [10 + 1, 10 + 3, 11 + 1]
    assert result.batch_steps.tolist() == [2, 0]
    # step 2: row 0 knows 10 + 3, the finished row 1 holds 11 + 3
    assert result.batch_context_tokens.tolist() == [
        12,
        14,
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a tree of depth 3"),
        ({"num_heads": 3}, "3 heads asked for"),
        ({"num_heads": -1}, "-1 heads"),
        ({"num_heads": 2, "budget": 0}, "budget of 0"),
        ({"num_heads": 2, "budget": BUDGET + 1}, f"budget of {BUDGET + 1}"),
        ({"num_heads": 2, "batch": 0}, "batch of 0"),
    ],
)
def test_a_replay_outside_the_trace_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replay(_trace([[0, -1], [-1, -1]]), DraftTree.chain(3), **arguments)


# --- the file ---


def _full_trace(*, optional: bool = True) -> Trace:
    rng = np.random.default_rng(0)
    prompts = []
    for number, n in enumerate((BUDGET, 5, 1)):
        ranks = np.array(_random_ranks(rng, n, 3))
        nll = np.where(ranks < 0, np.nan, rng.random(ranks.shape)).astype(np.float32)
        prompts.append(
            PromptTrace(
                key=f"humaneval/{number}",
                category=None if number else "cödé",
                prompt_tokens=7 + number,
                tokens=rng.integers(0, 50_000, n),
                ended_by="budget" if n == BUDGET else "eos",
                ranks=ranks,
                gaps=rng.random(n, dtype=np.float32) if optional else None,
                nll=nll if optional else None,
            )
        )
    return Trace(provenance=_provenance(), prompts=tuple(prompts))


@pytest.mark.parametrize("optional", [True, False])
def test_a_trace_survives_the_disk(tmp_path: Path, optional: bool) -> None:
    trace = _full_trace(optional=optional)
    file = tmp_path / "deep" / "trace.npz"
    trace.save(file)
    loaded = Trace.load(str(file))
    assert loaded.provenance == trace.provenance
    assert os.listdir(file.parent) == ["trace.npz"]
    for ours, theirs in zip(trace.prompts, loaded.prompts, strict=True):
        for name in ("key", "category", "prompt_tokens", "ended_by"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("tokens", "ranks", "gaps", "nll"):
            if getattr(ours, name) is None:
                assert getattr(theirs, name) is None
            else:
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
                assert getattr(theirs, name).dtype == getattr(ours, name).dtype
    assert (
        replay(loaded, DraftTree.chain(3)).num_steps.tolist()
        == replay(trace, DraftTree.chain(3)).num_steps.tolist()
    )


def test_a_truncated_or_flipped_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    _full_trace().save(whole)
    data = whole.read_bytes()
    broken = tmp_path / "broken.npz"
    for length in range(0, len(data), 37):
        broken.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"broken\.npz"):
            Trace.load(broken)
    # beyond it stands the directory of the archive, where some bytes have no meaning
    headers = data.index(b"PK\x01\x02")
    start = data.index(b"header.npy") + 40
    for position in range(start, headers, 101):
        broken.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            survivor = Trace.load(broken)
        except UserError:
            continue
        # a byte of archive metadata: nothing lost
        np.testing.assert_array_equal(survivor.ranks, _full_trace().ranks)


def _rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.update(schema_version=2), "schema_version"),
        (lambda header, _: header.update(extra=1), "extra"),
        (lambda header, _: header["provenance"].update(max_new_tokens=4), "at most 4 tokens"),
        (lambda header, _: header["prompts"].pop(), "another length"),
        (lambda header, _: header["prompts"][1].update(key="humaneval/0"), "twice"),
        (lambda header, _: header["prompts"][1].update(num_kept_tokens=4), "-1 exactly where"),
        (lambda header, _: header["prompts"][1].update(ended_by="bored"), "ended_by"),
        (lambda _, arrays: arrays.pop("ranks"), "KeyError"),
        (lambda _, arrays: arrays.update(ranks=arrays["ranks"].astype(float)), "ranks of shape"),
        (lambda _, arrays: arrays.update(logits=arrays["gaps"]), "unknown array 'logits'"),
        (lambda _, arrays: arrays.update(tokens=np.array([None] * 30)), "no readable trace"),
    ],
)
def test_a_file_that_breaks_the_rules_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    file = tmp_path / "trace.npz"
    _full_trace().save(file)
    _rewrite(file, change)
    with pytest.raises(UserError, match=message) as caught:
        Trace.load(file)
    assert "trace.npz" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not a trace", b"PK\x03\x04"])
def test_another_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "trace.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="no readable trace"):
        Trace.load(file)


def test_a_single_array_is_not_a_trace(tmp_path: Path) -> None:
    np.save(tmp_path / "ranks.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match="no readable trace"):
        Trace.load(tmp_path / "ranks.npy")


def test_a_full_disk_leaves_the_older_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.npz"
    _full_trace().save(file)
    before = file.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        _full_trace(optional=False).save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["trace.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "at least one token id"),
        ({"tokens": [1.0, 2.0, 3.0]}, "at least one token id"),
        ({"ranks": [[0], [0]]}, "whole numbers of shape"),
        ({"ranks": [[0], [0], [0]]}, "-1 exactly where"),
        ({"ranks": [[-1], [0], [-1]]}, "-1 exactly where"),
        ({"ranks": [[0], [0], [-2]]}, "-1 exactly where"),
        ({"prompt_tokens": 0}, "prompt token"),
        ({"ended_by": "length"}, "eos or budget"),
        ({"gaps": [0.5, 0.5]}, "gaps of shape"),
        ({"nll": [[0.5], [0.5]]}, "nll of shape"),
        ({"nll": [[0.5], [0.5], [0.5]]}, "nan exactly where"),
    ],
)
def test_a_prompt_that_breaks_the_rules_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "key": "q",
        "category": None,
        "prompt_tokens": 3,
        "tokens": [5, 6, 7],
        "ended_by": "eos",
    }
    good |= {"ranks": [[0], [0], [-1]], "gaps": [1.0, 2.0, 3.0], "nll": [[0.1], [0.2], [float("nan")]]}
    PromptTrace(**good)
    with pytest.raises(UserError, match=message) as caught:
        PromptTrace(**(good | change))
    assert "'q'" in str(caught.value)


def test_a_set_of_prompts_that_breaks_the_rules_is_refused() -> None:
    one, two = _prompt([[0], [-1]], key="one"), _prompt([[0, -1], [-1, -1]], key="two")
    for prompts, message in (
        ((), "at least one prompt"),
        ((one, one), "'one' twice"),
        ((one, two), "different heads"),
    ):
        with pytest.raises(UserError, match=message):
            Trace(provenance=_provenance(), prompts=prompts)
    with pytest.raises(UserError, match="at most 1 tokens"):
        Trace(provenance=_provenance(1), prompts=(one,))
    with pytest.raises(UserError, match="exactly as many"):
        Trace(provenance=_provenance(3), prompts=(_prompt([[0], [-1]], budget=2),))


def test_a_trace_cannot_be_changed_after_the_fact() -> None:
    ranks = np.array([[0], [-1]])
    prompt = PromptTrace(
        key="q", category=None, prompt_tokens=1, tokens=np.array([1, 2]), ended_by="eos", ranks=ranks
    )
    ranks[0, 0] = 5
    assert prompt.ranks.tolist() == [[0], [-1]]
    with pytest.raises(ValueError, match="read-only"):
        prompt.ranks[0, 0] = 5
