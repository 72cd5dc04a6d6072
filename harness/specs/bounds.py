"""How large, how small and how many: the bounds of every number and list that a data file may give.

Each is far above anything that makes sense, and so small that nothing of it exhausts memory or never ends. A
number beyond its bound is refused as the file is read, before anything is built.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

from harness.files import Frozen
from medusa_impl.recipes import MAX_HEADS, MAX_LAYERS, Seed

__all__ = ["Seed"]

MAX_TOKENS = 2**20  # of one text, prompt or context: eight times the longest of the published models
MAX_PROMPTS = 10**6
MAX_TREE_NODES = 4096  # the paper's trees have 64, the widest of Fig. 4 has 256
MAX_RESAMPLES = 10**5  # 25 times what the suites ask for; more costs minutes a figure
MAX_ENTRIES = 1000  # of any list
MAX_SIZE = 2**24  # of a dimension of a model: sixty times the largest published vocabulary

T = TypeVar("T")
HashableT = TypeVar("HashableT", bound=Hashable)


class Spec(Frozen):
    """Base of what data files say: no number in them is infinite or NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


def _distinct(entries: tuple[HashableT, ...]) -> tuple[HashableT, ...]:
    for entry in entries:
        if entries.count(entry) > 1:
            raise ValueError(f"{entry!r} stands twice")
    return entries


Some = Annotated[tuple[T, ...], Field(min_length=1, max_length=MAX_ENTRIES)]
"""A list with an entry at least."""
Many = Annotated[tuple[T, ...], Field(max_length=MAX_ENTRIES)]
"""A list that may be empty."""
Distinct = Annotated[tuple[HashableT, ...], Field(max_length=MAX_ENTRIES), AfterValidator(_distinct)]
"""A list that may be empty, of which no entry stands twice."""
SomeDistinct = Annotated[
    tuple[HashableT, ...], Field(min_length=1, max_length=MAX_ENTRIES), AfterValidator(_distinct)
]
"""A list with an entry at least, of which none stands twice."""

HeadCount = Annotated[int, Field(ge=1, le=MAX_HEADS)]
LayerCount = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
NodeCount = Annotated[int, Field(ge=1, le=MAX_TREE_NODES)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TextLength = Annotated[int, Field(ge=2, le=MAX_TOKENS)]
"""Tokens of a text that a decoding rate can be taken of: the first comes from the prefill."""
PromptCount = Annotated[int, Field(ge=1, le=MAX_PROMPTS)]
Repeats = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=MAX_TREE_NODES)]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Temperature = Annotated[float, Field(gt=0, le=1000)]
