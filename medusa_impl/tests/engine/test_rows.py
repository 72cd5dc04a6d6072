"""Where the tokens of a row are cut, and which rows go on."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_impl.engine.rows import EndedBy, Rows

EOS = frozenset([9])


def settle(
    rows: Rows, paths: list[list[int]], bonus: list[int]
) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Settle paths of unequal length, padded to one width, root first; return the outcome."""
    width = max(len(path) for path in paths)
    padded = torch.tensor([path + [9] * (width - len(path)) for path in paths])
    rows.settle(padded, torch.tensor([len(path) for path in paths]), torch.tensor(bonus))
    return rows.read()


def begin(rows: Rows, roots: list[int], *, budget: int) -> tuple[tuple[int, ...], ...]:
    rows.begin(torch.tensor(roots), max_new_tokens=budget, eos_ids=EOS)
    return rows.read()[1]


def test_a_row_ends_at_its_first_end_of_sequence_or_at_the_budget() -> None:
    rows = Rows(3, most_new=3, num_eos=1, device=torch.device("cpu"))
    assert begin(rows, [1, 1, 1], budget=3) == ((1,), (1,), (1,))
    assert rows.going and not any(rows.ended)
    counts, tokens = settle(rows, [[1, 9], [1, 2, 3], [1]], bonus=[2, 4, 5])
    assert (counts, tokens) == ([2, 3, 1], ((9,), (2, 3), (5,)))
    assert list(rows.ended) == ["eos", "budget", None]
    # A last token that is also end-of-sequence counts as end-of-sequence.
    counts, tokens = settle(rows, [[9], [4], [5]], bonus=[7, 7, 9])
    assert (counts, tokens) == ([0, 0, 1], ((), (), (9,)))
    assert list(rows.ended) == ["eos", "budget", "eos"] and not rows.going


def test_rows_that_begin_anew_forget_what_ended_them() -> None:
    rows = Rows(2, most_new=1, num_eos=1, device=torch.device("cpu"))
    for roots, budget, ended in (([9, 3], 1, ["eos", "budget"]), ([3, 9], 2, [None, "eos"])):
        assert begin(rows, roots, budget=budget) == tuple((root,) for root in roots)
        assert list(rows.ended) == ended


def test_without_an_end_token_only_the_budget_ends_a_row() -> None:
    rows = Rows(1, most_new=2, num_eos=0, device=torch.device("cpu"))
    rows.begin(torch.tensor([9]), max_new_tokens=2, eos_ids=frozenset())
    assert rows.read()[1] == ((9,),) and rows.going
    assert settle(rows, [[9, 9]], bonus=[9])[1] == ((9,),) and rows.ended == ("budget",)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.integers(1, 5), budget=st.integers(1, 12))
def test_steps_give_the_stream_up_to_its_first_end_or_the_budget(
    data: st.DataObject, width: int, budget: int
) -> None:
    """Against the plainest reference: all tokens in a row, cut once."""
    rows = Rows(2, most_new=width, num_eos=1, device=torch.device("cpu"))
    token = st.integers(5, 9)
    roots = data.draw(st.lists(token, min_size=2, max_size=2))
    taken = [list(row) for row in begin(rows, roots, budget=budget)]
    streams = [[root] for root in roots]
    while rows.going:
        before = rows.ended
        paths = [[root, *data.draw(st.lists(token, max_size=width - 1))] for root in roots]
        bonus = data.draw(st.lists(token, min_size=2, max_size=2))
        counts, tokens = settle(rows, paths, bonus)
        for row, (path, last) in enumerate(zip(paths, bonus, strict=True)):
            streams[row] += [*path[1:], last]
            taken[row] += tokens[row]
            assert counts[row] == (0 if before[row] else len(path))
        roots = bonus
    for stream, tokens_of_row, ended in zip(streams, taken, rows.ended, strict=True):
        expected = stream[:budget]
        if 9 in expected:
            expected = expected[: expected.index(9) + 1]
        reason: EndedBy = "eos" if expected[-1] == 9 else "budget"
        assert (tokens_of_row, ended) == (expected, reason)
