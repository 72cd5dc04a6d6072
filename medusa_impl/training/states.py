"""Where Medusa-1's states come from while the heads train: three ways, the same loss.

    device   the states of all answers lie on the device; a step takes its rows there
    file     they lie in a memory-mapped file; a step's rows are copied to the device
    none     nothing is kept: the frozen backbone reads the step's answers, then the heads learn from them

The first two need one pass of the backbone over the corpus before, and 2 H bytes a position after. For 7B and
ShareGPT that would be terabytes, so the third way runs the backbone anew in each step.

A source does its work in two halves. `item` runs on the host, in the data loader, and decides all shapes.
`read` runs on the device and decides nothing, so the device never waits for the host there. One question is
transformers' own: once a pass it asks whether several texts are packed into one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medusa_impl.training.features import AnswerSet, FeatureSet
from medusa_impl.training.sequences import TrainingSequence

# Tokens that the backbone reads in one pass, padding included. Its states of one layer at a time are all that
# has to fit: nothing is kept for gradients.
PASS_TOKENS = 8192


class StateSource(Protocol):
    """The states and targets of any rows of a table of answers."""

    def item(self, rows: Tensor) -> dict[str, Any]:
        """Return what the device needs for these rows, on the host."""

    def read(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return states and targets of the rows whose item is now on the device.

        Shapes: `[T, H]` float32, `[T, K]` int32.
        """

    def split(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Yield parts of about `size` rows, in order, that can be read by themselves."""


class DeviceStates:
    """States that lie on the device as a whole, and so do the targets."""

    def __init__(self, features: FeatureSet, *, device: torch.device) -> None:
        self._states, self._targets = features.states.to(device), features.targets.to(device)

    def item(self, rows: Tensor) -> dict[str, Any]:
        """Return the numbers of the rows."""
        return {"rows": rows}

    def read(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the rows of the tables on the device."""
        rows = inputs["rows"]
        return self._states[rows].float(), self._targets[rows]

    def split(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Yield parts of exactly `size` rows, but for the last."""
        yield from torch.split(rows, size)


class FileStates:
    """States that are mapped from a file, or lie in the host's memory; each step's rows go to the device."""

    def __init__(self, features: FeatureSet) -> None:
        self._features = features

    def item(self, rows: Tensor) -> dict[str, Any]:
        """Return states and targets of the rows, out of the file."""
        return {"states": self._features.states[rows], "targets": self._features.targets[rows]}

    def read(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the rows that were copied."""
        return inputs["states"].float(), inputs["targets"]

    def split(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Yield parts of exactly `size` rows, but for the last."""
        yield from torch.split(rows, size)


class BackboneStates:
    """States that the frozen backbone computes from the answers' tokens, in every step anew.

    The rows asked for are those of whole answers. Neither dropout nor gradients run through the backbone.
    """

    def __init__(self, answers: AnswerSet, decoder: nn.Module, *, pass_tokens: int = PASS_TOKENS) -> None:
        self._answers, self._pass_tokens = answers, pass_tokens
        # In a list, so that no module takes it for a part of its own: it neither learns nor is saved.
        self._decoder = [decoder.eval()]
        self._lengths = torch.bincount(answers.sample_index.long(), minlength=len(answers.keys))

    def item(self, rows: Tensor) -> dict[str, Any]:
        """Return the answers' tokens, padded on the right, in parts of at most `pass_tokens` tokens."""
        chosen, _ = self._answers.answers_of(rows)
        if int(self._lengths[chosen].sum()) != len(rows):
            raise ValueError("states are computed for whole answers only")
        parts, texts, longest = list[dict[str, Tensor]](), list[TrainingSequence](), 0
        for index in chosen.tolist():
            text = self._answers.texts[index]
            length = len(text.token_ids)
            if texts and max(longest, length) * (len(texts) + 1) > self._pass_tokens:
                parts.append(_padded(texts))
                texts, longest = [], 0
            texts.append(text)
            longest = max(longest, length)
        return {"parts": [*parts, _padded(texts)], "targets": self._answers.targets[rows]}

    @torch.no_grad()
    def read(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the states by one pass over each part."""
        (decoder,) = self._decoder
        states = [
            decoder(input_ids=part["input_ids"], use_cache=False).last_hidden_state.flatten(0, 1)[
                part["places"]
            ]
            for part in inputs["parts"]
        ]
        return torch.cat(states).float(), inputs["targets"]

    def split(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the rows of as many whole answers as make up `size` rows, at least one."""
        _, lengths = self._answers.answers_of(rows)
        counts, held = list[int](), 0
        for length in lengths.tolist():
            if held and held + length > size:
                counts.append(held)
                held = 0
            held += length
        yield from torch.split(rows, [*counts, held] if held else [])


def _padded(texts: list[TrainingSequence]) -> dict[str, Tensor]:
    """Return a part: ids of some texts, padded on the right, and where in it the answers' states are.

    No token sees those after it, so the padding needs no mask.

    An answer y_1 .. y_n has n - 1 rows: the state that predicted y_1, which is that of the token before it,
    up to the state that predicted y_(n-1). So the last two tokens of a text need not be read.

    Shapes: input_ids `[B, T]`; places `[R]`, indices into B x T.
    """
    read = [torch.tensor(text.token_ids[: text.answers[-1][1] - 2]) for text in texts]
    width = max(len(tokens) for tokens in read)
    input_ids = torch.zeros(len(texts), width, dtype=torch.long)
    for row, tokens in enumerate(read):
        input_ids[row, : len(tokens)] = tokens
    places = [
        torch.arange(start - 1, end - 2) + row * width
        for row, text in enumerate(texts)
        for start, end in text.answers
        if end - start > 1
    ]
    return {"input_ids": input_ids, "places": torch.cat(places)}
