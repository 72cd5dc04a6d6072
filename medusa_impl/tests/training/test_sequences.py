"""Which tokens are targets: expected masks, several turns, padding that is also end-of-sequence."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_impl.errors import UserError
from medusa_impl.training.sequences import (
    IGNORED,
    LikeLengthSampler,
    SequenceDataset,
    TrainingSequence,
    answer_targets,
    collate,
)

TWO_TURNS = TrainingSequence(token_ids=(5, 6, 10, 11, 2, 7, 20, 2), answers=((2, 5), (6, 8)))


def test_labels_are_the_answers_and_nothing_else() -> None:
    """Regression: masks that should mark the assistant's tokens were true everywhere.

    Here both answers count, end-of-sequence included.
    """
    row = SequenceDataset([TWO_TURNS])[0]
    assert row["labels"] == [IGNORED, IGNORED, 10, 11, 2, IGNORED, 20, 2]
    assert TWO_TURNS.num_targets == 5


def test_targets_as_the_docstring_draws_them() -> None:
    sequence = TrainingSequence(token_ids=(90, 91, 10, 11, 12, 92), answers=((2, 5),))
    labels = torch.tensor([SequenceDataset([sequence])[0]["labels"]])
    expected = [[-1, -1, -1], [10, 11, 12], [11, 12, -1], [12, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert answer_targets(labels, num_heads=2)[0].tolist() == expected


def test_no_head_looks_across_a_turn() -> None:
    labels = torch.tensor([SequenceDataset([TWO_TURNS])[0]["labels"]])
    targets = answer_targets(labels, num_heads=4)[0]
    assert targets[1].tolist() == [10, 11, 2, -1, -1]
    assert targets[4].tolist() == [-1] * 5, (
        "the end of the first answer does not predict the user's next tokens"
    )
    assert targets[5].tolist() == [20, 2, -1, -1, -1]
    assert int((targets[:, 0] >= 0).sum()) == TWO_TURNS.num_targets


def test_padding_is_masked_by_length_whatever_its_id() -> None:
    """Regression: if padding and end-of-sequence have one id, a mask by id hides every end of a sequence."""
    short = TrainingSequence(token_ids=(3, 0, 0), answers=((1, 3),))  # token id 0 is the filler's id too
    batch = collate([SequenceDataset([short, TWO_TURNS])[index] for index in range(2)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8]
    assert batch["labels"][0].tolist() == [IGNORED, 0, 0, *[IGNORED] * 5]
    assert answer_targets(batch["labels"], num_heads=1)[0, :3].tolist() == [[0, 0], [0, -1], [-1, -1]]


@pytest.mark.parametrize("answers", [((0, 2),), ((2, 2),), ((1, 9),), ((3, 5), (2, 4))])
def test_spans_that_cannot_be_are_refused(answers: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UserError, match="a training sequence"):
        TrainingSequence(token_ids=(1, 2, 3, 4, 5, 6), answers=answers)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=400),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_an_order_of_like_lengths_holds_every_sequence_once(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    sampler, again = (LikeLengthSampler(lengths, batch_size=batch_size, seed=seed) for _ in range(2))
    for one in (sampler, again):
        one.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(lengths)
    assert order == list(again), "the same seed and epoch must give the same order"


def test_batches_of_like_lengths_are_hardly_padded_and_come_in_no_order_of_length() -> None:
    source = random.Random(0)
    lengths = [source.randrange(20, 400) for _ in range(403)]
    sampler = LikeLengthSampler(lengths, batch_size=8, seed=1)
    order = list(sampler)

    def padded(indices: list[int]) -> int:
        batches = [indices[start : start + 8] for start in range(0, len(indices), 8)]
        return sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)

    assert padded(order) < 1.1 * sum(lengths) < 1.4 * sum(lengths) < padded(list(range(403)))
    longest = [max(lengths[index] for index in order[start : start + 8]) for start in range(0, 400, 8)]
    assert abs(statistics.correlation(range(50), longest)) < 0.4
    sampler.set_epoch(1)
    assert list(sampler) != order
