"""Where the tokens of a row are cut, and which rows go on."""

from __future__ import annotations

import torch

from medusa_impl.engine.rows import Rows


def test_a_row_ends_at_its_first_end_of_sequence_or_at_the_budget() -> None:
    rows = Rows(3, max_new_tokens=3, eos_ids=frozenset([9]), device=torch.device("cpu"))
    assert rows.add([[1], [1], [1]]) == ((1,), (1,), (1,))
    assert rows.going and not any(rows.ended)
    assert rows.add([[9, 2], [2, 3, 4], [5]]) == ((9,), (2, 3), (5,))
    assert list(rows.ended) == ["eos", "budget", None]
    assert rows.live == rows.device_live.tolist() == [0, 0, 1]
    # A last token that is also end-of-sequence counts as end-of-sequence.
    assert rows.add([[7], [7], [9]]) == ((), (), (9,))
    assert list(rows.ended) == ["eos", "budget", "eos"] and not rows.going
