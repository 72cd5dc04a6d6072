"""Training text of Medusa-2: whole sequences, the tokens in them that the model is asked for, and batches
padded on the right.

What is asked for is said by spans of token positions, never by token values: a padding id that equals the
end-of-sequence id, or an answer that quotes the prompt, changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from medusa_impl.errors import UserError
from medusa_impl.training.distill import CorpusSample
from medusa_impl.training.losses import NO_TARGET

IGNORED = -100  # the label that transformers' Trainer leaves out when it counts the targets of a batch
# sequences are sorted by length within as many batches: less padding, and batches still differ from epoch to
# epoch
WINDOW_BATCHES = 16


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids and the half-open spans of them that are the assistant's answers, one a turn."""

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
        if self.answers and self.answers[0][0] == 0:
            raise UserError(
                found="an answer to nothing",
                need="a token before the first answer",
                where="a training sequence",
            )

    @property
    def num_targets(self) -> int:
        """Answer tokens, each the target of one position."""
        return sum(end - start for start, end in self.answers)


class SequenceDataset(Dataset[dict[str, list[int]]]):
    """Sequences as what the collator takes: ids, and labels that are `IGNORED` outside of the answers."""

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
    """A random order in which the sequences of a batch are of like length, so that little of a batch is
    padding.

    Sequences are shuffled, sorted by length within windows of `WINDOW_BATCHES` batches, and the whole batches
    shuffled once more: no batch comes early for being long. A batch that is not full comes last. Seed and
    epoch decide the order, so a resumed run sees the same one.
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
        """Take the order of another epoch, as the Trainer asks before each."""
        self.epoch = epoch

    def _length(self, index: int) -> int:
        return self.lengths[index]


def sequences_of(samples: Iterable[CorpusSample], *, max_length: int) -> tuple[TrainingSequence, ...]:
    """Return prompts and answers of a corpus as sequences, cut at `max_length`; what is left without an
    answer token is left out.
    """
    sequences = []
    for sample in samples:
        token_ids = (*sample.prompt_ids, *sample.token_ids)[:max_length]
        if len(token_ids) > len(sample.prompt_ids):
            sequences.append(
                TrainingSequence(token_ids=token_ids, answers=((len(sample.prompt_ids), len(token_ids)),))
            )
    return tuple(sequences)


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch padded on the right; the padding's id is 0 and of no consequence, since masks come from
    the lengths.

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
    """Return what each position is asked for: column 0 the next token, column k the token k places after it,
    `NO_TARGET` where none.

    A position counts where its next token belongs to an answer; its further targets end with that answer, so
    that no head is asked to look across a turn. With p the prompt and a the answer, K = 2:

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
    unbroken = (columns != IGNORED).int().cumprod(-1).bool()
    return torch.where(unbroken, columns, NO_TARGET)
