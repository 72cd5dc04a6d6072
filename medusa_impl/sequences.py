"""Training text of Medusa-2: whole sequences, the tokens in them that the model is asked for, and batches padded on the right.

What is asked for is said by spans of token positions, never by token values: a padding id that equals the end-of-sequence id, or an
answer that quotes the prompt, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medusa_impl.distill import CorpusSample
from medusa_impl.errors import UserError
from medusa_impl.losses import NO_TARGET

IGNORED = -100  # the label that transformers' Trainer leaves out when it counts the targets of a batch


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids and the half-open spans of them that are the assistant's answers, one a turn."""

    token_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        ends = [0, *(bound for span in self.answers for bound in span)]
        if ends != sorted(ends) or ends[-1] > len(self.token_ids) or any(start == end for start, end in self.answers):
            raise UserError(
                found=f"answers at {self.answers} in {len(self.token_ids)} tokens",
                need="spans of at least one token, in order, within the sequence",
                where="a training sequence",
            )
        if self.answers and self.answers[0][0] == 0:
            raise UserError(found="an answer to nothing", need="a token before the first answer", where="a training sequence")

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


def sequences_of(samples: Iterable[CorpusSample], *, max_length: int) -> tuple[TrainingSequence, ...]:
    """Return prompts and answers of a corpus as sequences, cut at `max_length`; what is left without an answer token is left out."""
    sequences = []
    for sample in samples:
        token_ids = (*sample.prompt_ids, *sample.token_ids)[:max_length]
        if len(token_ids) > len(sample.prompt_ids):
            sequences.append(TrainingSequence(token_ids=token_ids, answers=((len(sample.prompt_ids), len(token_ids)),)))
    return tuple(sequences)


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch padded on the right; the padding's id is 0 and of no consequence, since masks come from the lengths.

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
    """Return what each position is asked for: column 0 the next token, column k the token k places after it, `NO_TARGET` where none.

    A position counts where its next token belongs to an answer; its further targets end with that answer, so that no head is asked to
    look across a turn. With p the prompt and a the answer, K = 2:

        tokens     p0 p1 a0 a1 a2 p2
        column 0    .  a0 a1 a2 .  .
        column 1    .  a1 a2 .  .  .
        column 2    .  a2 .  .  .  .

    Shapes: labels `[B, T]`, result `[B, T, num_heads + 1]`.
    """
    batch, length = labels.shape
    padded = torch.cat([labels, labels.new_full((batch, num_heads + 1), IGNORED)], dim=1)
    columns = torch.stack([padded[:, 1 + offset : 1 + offset + length] for offset in range(num_heads + 1)], dim=-1)
    unbroken = (columns != IGNORED).int().cumprod(-1).bool()
    return torch.where(unbroken, columns, NO_TARGET)
