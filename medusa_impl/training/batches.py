"""Which rows of the answers' table each step of Medusa-1 training takes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from medusa_impl.recipes import steps_per_epoch
from medusa_impl.training.features import AnswerTable

_WINDOW_BATCHES = 16  # answers are sorted by length within windows of so many batches, which saves padding


class Batches(Protocol):
    """The rows of every step, which depend on the answers, the recipe's numbers and the step alone."""

    num_per_epoch: int

    def rows(self, step: int) -> Tensor:
        """Return the rows of a step, counted from 0.

        Shapes: `[T]` int64.
        """


def epoch_order(num_rows: int, *, epoch: int, seed: int) -> Tensor:
    """Return the order of the rows in an epoch.

    It depends on seed and epoch only, so a resumed run sees the same batches as one that was never cut off.

    Shapes: `[num_rows]`, a permutation.
    """
    # The factor exceeds any number of epochs, so no two pairs of seed and epoch have the same generator.
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class PositionBatches:
    """Batches of single positions, drawn from all answers: for states that were computed before."""

    def __init__(self, table: AnswerTable, *, batch_positions: int, seed: int) -> None:
        self._rows, self._size, self._seed = table.train_rows(), batch_positions, seed
        self.num_per_epoch = steps_per_epoch(len(self._rows), batch_positions=batch_positions)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> Tensor:
        """Return `batch_positions` rows of a step; those left over at the end of an epoch are not used."""
        epoch, index = divmod(step, self.num_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._rows), epoch=epoch, seed=self._seed)
        return self._rows[self._order[index * self._size : (index + 1) * self._size]]


class AnswerBatches:
    """Batches of whole answers, about `batch_positions` positions each: one pass computes all their states.

    An epoch has as many batches as one of single positions, and every answer is in one of them. Answers of a
    batch have similar lengths.
    """

    def __init__(self, table: AnswerTable, *, batch_positions: int, seed: int) -> None:
        train = table.train_rows()
        answers, self._lengths = table.answers_of(train)
        self._starts = train[self._lengths.cumsum(0) - self._lengths]
        self.num_per_epoch = min(
            steps_per_epoch(len(train), batch_positions=batch_positions), max(1, len(answers))
        )
        self._seed, self._epoch, self._parts = seed, -1, list[Tensor]()

    def rows(self, step: int) -> Tensor:
        """Return the rows of whole answers, answer after answer."""
        epoch, index = divmod(step, self.num_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._parts = epoch, self._cut(epoch)
        return torch.cat(
            [
                torch.arange(start, start + length)
                for start, length in zip(
                    self._starts[self._parts[index]].tolist(),
                    self._lengths[self._parts[index]].tolist(),
                    strict=True,
                )
            ]
        )

    def _cut(self, epoch: int) -> list[Tensor]:
        """Return the answers of each batch: shuffled, sorted by length in windows, cut, shuffled again."""
        order = epoch_order(len(self._lengths), epoch=epoch, seed=self._seed)
        window = -(-len(order) * _WINDOW_BATCHES // self.num_per_epoch)
        order = torch.cat(
            [part[self._lengths[part].argsort(stable=True)] for part in torch.split(order, window)]
        )
        # An answer belongs to the batch in which its middle lies, if the epoch's rows are cut evenly. Where
        # an answer is longer than a batch, some batches would be empty: then answers are dealt by number.
        lengths = self._lengths[order]
        middle = lengths.cumsum(0) * 2 - lengths
        places = middle * self.num_per_epoch // (2 * int(lengths.sum()))
        if len(torch.unique(places)) < self.num_per_epoch:
            places = torch.arange(len(order)) * self.num_per_epoch // len(order)
        parts = [order[places == batch] for batch in range(self.num_per_epoch)]
        shuffled = epoch_order(self.num_per_epoch, epoch=epoch, seed=self._seed + 1)
        return [parts[batch] for batch in shuffled.tolist()]
