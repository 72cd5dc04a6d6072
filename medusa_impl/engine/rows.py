"""The rows of one batch while they decode: where each row's new tokens are cut, and which rows go on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EndedBy = Literal["eos", "budget"]
_ENDED: tuple[EndedBy | None, ...] = (None, "eos", "budget")
_NO_TOKEN = -1


class Rows:
    """The rows of a batch, each of which ends at its first end-of-sequence token or at the budget.

    Vanilla and Medusa decoding cut their tokens here and nowhere else, so that both end at the same token.
    The device cuts them. A row that has ended has nothing `left`: it idles along with the others, keeps
    nothing and adds nothing. All that the host needs of a step is in one tensor, `outcome`, since every
    transfer makes the host wait for the device.

        outcome of a row      kept nodes | new tokens | why it ended | the tokens of the path and the bonus

    Shapes: left `[B]`; eos_ids `[E]`; outcome `[B, 3 + D]`, where a step adds at most D tokens to a row.
    """

    def __init__(self, num_rows: int, *, most_new: int, num_eos: int, device: torch.device) -> None:
        self.left = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.eos_ids = torch.full((max(num_eos, 1),), _NO_TOKEN, device=device)
        self.outcome = torch.zeros(num_rows, 3 + most_new, dtype=torch.long, device=device)
        self._steps = torch.arange(most_new, device=device)
        self._ended: list[EndedBy | None] = [None] * num_rows

    @property
    def going(self) -> bool:
        """Return whether any row goes on."""
        return not all(self._ended)

    @property
    def ended(self) -> tuple[EndedBy | None, ...]:
        """Return why each row has ended, None for rows that go on."""
        return tuple(self._ended)

    def begin(self, roots: Tensor, *, max_new_tokens: int, eos_ids: frozenset[int]) -> None:
        """Start all rows anew with the token that their prefill yielded.

        Shapes: roots `[B]`.
        """
        self._ended = [None] * len(self._ended)
        self.left.fill_(max_new_tokens)
        self.eos_ids.copy_(torch.tensor(sorted(eos_ids) or [_NO_TOKEN]))
        self.settle(roots[:, None], torch.ones_like(roots), roots)

    def settle(self, path: Tensor, num_kept: Tensor, bonus: Tensor) -> Tensor:
        """Cut the new tokens of every row, write the outcome, and return how many nodes each row keeps.

        The path's root is not new: the step before has yielded it as its bonus token. A last token that is
        also end-of-sequence counts as end-of-sequence.

        Shapes: path `[B, D']` with D' up to D, the tokens of the kept nodes first; num_kept and bonus `[B]`;
        result `[B]`.
        """
        kept = num_kept * (self.left > 0)
        steps = self._steps[: path.shape[1]]
        new = torch.where(steps == num_kept[:, None] - 1, bonus[:, None], path.roll(-1, 1))
        is_new = steps < torch.minimum(kept, self.left)[:, None]
        ends = (new[..., None] == self.eos_ids).any(-1) & is_new
        # nothing after an end is new
        is_new = is_new & (ends.long().cumsum(1) - ends.long() == 0)
        taken, has_ended = is_new.sum(1), ends.any(1)
        self.left.copy_((self.left - taken) * ~has_ended)
        reason = torch.where(has_ended, 1, 2 * (self.left == 0)) * (taken > 0)
        for column, value in enumerate((kept, taken, reason)):
            self.outcome[:, column] = value
        self.outcome[:, 3 : 3 + path.shape[1]] = new
        return kept

    def read(self) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
        """Return how many nodes each row has kept, and its new tokens; the host waits for the device here."""
        counts, tokens = [], []
        for row, (kept, taken, reason, *new) in enumerate(self.outcome.tolist()):
            counts.append(kept)
            tokens.append(tuple(new[:taken]))
            self._ended[row] = _ENDED[reason] or self._ended[row]
        return counts, tuple(tokens)
