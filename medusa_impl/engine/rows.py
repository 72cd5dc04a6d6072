"""The rows of one batch while they decode: where each row's new tokens are cut, and which rows go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

EndedBy = Literal["eos", "budget"]


class Rows:
    """The rows of a batch, each of which ends at its first end-of-sequence token or at the budget.

    Vanilla and Medusa decoding cut their tokens here and nowhere else, so that both end at the same token.

    `live` is 1 for rows that go on and 0 for rows that have ended. It exists twice, as a list on the host and
    as `device_live` `[B]` on the device, so that neither side has to ask the other.
    """

    def __init__(
        self, num_rows: int, *, max_new_tokens: int, eos_ids: frozenset[int], device: torch.device
    ) -> None:
        self.live = [1] * num_rows
        self.device_live = torch.ones(num_rows, dtype=torch.long, device=device)
        self._left = [max_new_tokens] * num_rows
        self._ended: list[EndedBy | None] = [None] * num_rows
        self._eos_ids = eos_ids

    @property
    def going(self) -> bool:
        """Return whether any row goes on."""
        return any(self.live)

    @property
    def ended(self) -> tuple[EndedBy | None, ...]:
        """Return why each row has ended, None for rows that go on."""
        return tuple(self._ended)

    def add(self, new_tokens: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Return the new tokens of each row up to where the row ends; nothing for rows that had ended."""
        return tuple(self._cut(row, tokens) for row, tokens in enumerate(new_tokens))

    def _cut(self, row: int, tokens: Sequence[int]) -> tuple[int, ...]:
        if not self.live[row]:
            return ()
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            self._left[row] -= 1
            # A last token that is also end-of-sequence counts as end-of-sequence.
            if token in self._eos_ids:
                self._ended[row] = "eos"
            elif self._left[row] == 0:
                self._ended[row] = "budget"
            if self._ended[row] is not None:
                self.live[row] = 0
                self.device_live[row] = 0
                break
        return tuple(taken)
