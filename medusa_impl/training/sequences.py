"""Training data of Medusa-2: whole sequences, which of their tokens are targets, and padded batches.

Targets are given by spans of token positions, never by token values. So it does no harm if the padding has
the id of end-of-sequence, or if an answer quotes the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from medusa_impl.errors import UserError
from medusa_impl.training.losses import NO_TARGET

IGNORED = -100  # the label that transformers' Trainer leaves out when it counts the targets of a batch
# Sequences are sorted by length within windows of this many batches. Larger windows mean less padding,
# smaller ones batches that differ more from epoch to epoch.
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids, and the spans of them that are the assistant's answers: one a turn, end excluded.

    Raises: UserError if the spans are empty, out of order or outside the sequence, or the first starts at 0.
    """

    token_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        ends = [0, *(bound for span in self.answers for bound in span)]
        if (
            ends != sorted(ends)
            or ends[-1] > len(self.token_ids)
            or any(start == end for start, end in self.answers)
        ):
            raise UserError(
                found=f"answers at {self.answers} in {len(self.token_ids)} tokens",
                need="spans of at least one token, in order, within the sequence",
                where="a training sequence",
            )
        # Every target is predicted from the token before it.
        if self.answers and self.answers[0][0] == 0:
            raise UserError(
                found="an answer at the start of the sequence",
                need="a token before the first answer",
                where="a training sequence",
            )

    @property
    def num_targets(self) -> int:
        """Return the number of answer tokens, each of which is the target of one position."""
        return sum(end - start for start, end in self.answers)


class SequenceDataset(Dataset[dict[str, list[int]]]):
    """Sequences as token ids and labels, which are `IGNORED` outside of the answers."""

    def __init__(self, sequences: Sequence[TrainingSequence]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sequence = self.sequences[index]
        labels = [IGNORED] * len(sequence.token_ids)
        for start, end in sequence.answers:
            labels[start:end] = sequence.token_ids[start:end]
        return {"input_ids": list(sequence.token_ids), "labels": labels}


class LikeLengthSampler(Sampler[int]):
    """A random order in which the sequences of a batch have similar lengths, which saves padding.

    Sequences are shuffled, then sorted by length within windows of `WINDOW_BATCHES` batches, then cut into
    batches, and the batches are shuffled again, so that long ones do not come first. A batch that is not full
    comes last. The order depends on seed and epoch only, so a resumed run sees the same one.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        source = random.Random(f"{self.seed}, {self.epoch}")
        order = source.sample(range(len(self.lengths)), len(self.lengths))
        remainder = len(order) % self.batch_size
        whole, rest = order[: len(order) - remainder], order[len(order) - remainder :]
        window = self.batch_size * WINDOW_BATCHES
        grouped = [
            index
            for start in range(0, len(whole), window)
            for index in sorted(whole[start : start + window], key=self._length)
        ]
        batches = [
            grouped[start : start + self.batch_size] for start in range(0, len(grouped), self.batch_size)
        ]
        source.shuffle(batches)
        return iter([index for batch in (*batches, rest) for index in batch])

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def _length(self, index: int) -> int:
        return self.lengths[index]


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch of sequences, padded on the right.

    The padding has the id 0, which may also be a token: masks come from the lengths, not from ids.

    Shapes: input_ids, attention_mask and labels `[B, T]`.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": (torch.arange(length)[None, :] < lengths[:, None]).long(),
        "labels": padded("labels", IGNORED),
    }


def answer_targets(labels: Tensor, *, num_heads: int) -> Tensor:
    """Return the targets of each position: column 0 is the LM head's, column k is that of head k.

    The LM head's target is the next token, if it belongs to an answer. Head k's is k tokens later, if the
    same answer reaches so far: no head has to predict across a turn. For the rest there is `NO_TARGET`.
    With p a prompt's token, a an answer's, and K = 2:

        tokens     p0 p1 a0 a1 a2 p2
        column 0    .  a0 a1 a2 .  .
        column 1    .  a1 a2 .  .  .
        column 2    .  a2 .  .  .  .

    Shapes: labels `[B, T]`, result `[B, T, num_heads + 1]`.
    """
    batch, length = labels.shape
    padded = torch.cat([labels, labels.new_full((batch, num_heads + 1), IGNORED)], dim=1)
    columns = torch.stack(
        [padded[:, 1 + offset : 1 + offset + length] for offset in range(num_heads + 1)], dim=-1
    )
    # A target counts only if all targets before it do, so that none skips from one answer to the next.
    unbroken = (columns != IGNORED).int().cumprod(-1).bool()
    return torch.where(unbroken, columns, NO_TARGET)
