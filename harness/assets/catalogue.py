"""The project's own training prompts, none of which comes from a benchmark.

Templates are filled with slot values, which makes thousands of combinations a category.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import Frozen, read_toml
from harness.paths import shipped
from harness.specs.recipe import Split

HELD_OUT_PERCENT = 5
_MAX_TRIES = 2000  # fresh draws for one prompt before a catalogue counts as exhausted


class NumberRange(Frozen):
    """A slot filled with a whole number from `min` to `max`, both included."""

    min: int
    max: int

    @model_validator(mode="after")
    def _in_order(self) -> NumberRange:
        if self.min > self.max:
            raise ValueError(f"found a range from {self.min} to {self.max}, need min <= max")
        return self


class CategoryCatalogue(Frozen):
    """One category's templates in `str.format` syntax and the values of their slots."""

    schema_version: Literal[1]
    category: str
    templates: tuple[str, ...] = Field(min_length=1)
    slots: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, NumberRange] = {}

    @model_validator(mode="after")
    def _slots_match(self) -> CategoryCatalogue:
        known, used = {*self.slots, *self.ranges}, set()
        if empty := sorted(name for name, values in self.slots.items() if not values):
            raise ValueError(f"slots without a value: {empty}")
        for template in self.templates:
            used |= (names := _slot_names(template))
            if missing := names - known:
                raise ValueError(f"template {template[:60]!r} uses slots without values: {sorted(missing)}")
        if unused := known - used:
            raise ValueError(f"slots that no template uses: {sorted(unused)}")
        return self


class TrainingPrompt(Frozen):
    """One prompt; its key follows from its text."""

    key: str
    category: str
    text: str


def load_catalogue(folder: Path | None = None) -> tuple[CategoryCatalogue, ...]:
    """Read every category file of a folder (the shipped one by default), sorted by category.

    Raises: UserError naming file and fault.
    """
    root = folder if folder is not None else shipped("prompts")
    catalogues = tuple(
        read_toml(path, CategoryCatalogue, noun="a prompt catalogue") for path in sorted(root.glob("*.toml"))
    )
    if not catalogues:
        raise UserError(found="no *.toml file", need="prompt catalogues", where=root.name)
    return catalogues


def training_prompts(
    *,
    num_prompts: int,
    seed: int,
    split: Split = "train",
    catalogue: Sequence[CategoryCatalogue] | None = None,
) -> tuple[TrainingPrompt, ...]:
    """Return distinct prompts, categories taken in turn; the first n do not depend on how many are asked for.

    The splits are disjoint: a prompt's text decides by its hash whether it is held out.
    Raises: UserError where a category has too few combinations.
    """
    categories = tuple(catalogue) if catalogue is not None else load_catalogue()
    sources = [random.Random(f"{seed}-{split}-{category.category}") for category in categories]
    prompts: list[TrainingPrompt] = []
    seen: set[str] = set()
    while len(prompts) < num_prompts:
        category, source = categories[len(prompts) % len(categories)], sources[len(prompts) % len(categories)]
        for _ in range(_MAX_TRIES):
            text = _fill(category, source)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest not in seen and (int(digest[:8], 16) % 100 < HELD_OUT_PERCENT) == (split == "held_out"):
                break
        else:
            raise UserError(
                found=f"no new prompt in {_MAX_TRIES} draws for category {category.category!r}",
                need=f"{num_prompts} distinct {split} prompts",
                where="the prompt catalogue",
                do="ask for fewer prompts, or add templates to that category",
            )
        seen.add(digest)
        prompts.append(
            TrainingPrompt(key=f"{category.category}-{digest[:12]}", category=category.category, text=text)
        )
    return tuple(prompts)


def _slot_names(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _fill(category: CategoryCatalogue, source: random.Random) -> str:
    template = category.templates[source.randrange(len(category.templates))]
    values: Mapping[str, str] = {
        name: category.slots[name][source.randrange(len(category.slots[name]))]
        if name in category.slots
        else str(source.randint(category.ranges[name].min, category.ranges[name].max))
        for name in sorted(_slot_names(template))
    }
    return template.format_map(values)
