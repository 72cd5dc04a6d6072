"""Training recipes as data: what `suites/recipes/*.toml` may say. `kind` tells heads on a frozen backbone from joint training."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from harness.config import ModelSpec
from harness.corpus import CorpusSpec
from harness.errors import UserError
from harness.files import Frozen
from medusa_impl.medusa2 import Medusa2Recipe
from medusa_impl.training import Medusa1Recipe


class CalibrationSpec(Frozen):
    """Text that trees are searched on: greedy answers to held-out training prompts, disjoint from training and benchmark."""

    num_prompts: int = 160
    max_new_tokens: int = 128
    seed: int = 3


class _Recipe(Frozen):
    schema_version: Literal[1]
    name: str
    description: str
    model: ModelSpec
    calibration: CalibrationSpec = CalibrationSpec()
    num_workers: int | None = None
    packed_corpus: str | None = None


class TrainingSuite(_Recipe):
    """A recipe for heads alone: model, corpus, heads and calibration; `packed_corpus` names a shipped corpus that spares making it."""

    kind: Literal["heads"] = "heads"
    corpus: CorpusSpec
    recipe: Medusa1Recipe


class JointSuite(_Recipe):
    """A recipe for heads and backbone together.

    The text is a packed corpus, a corpus to be made, or `conversations`: a file in ShareGPT's layout. `start_heads` names trained heads
    to start from, on the same backbone; without it they start as the LM head.
    """

    kind: Literal["joint"]
    corpus: CorpusSpec | None = None
    conversations: str | None = None
    start_heads: str | None = None
    recipe: Medusa2Recipe

    @model_validator(mode="after")
    def _some_text(self) -> JointSuite:
        if self.corpus is None and self.conversations is None and self.packed_corpus is None:
            raise ValueError("give packed_corpus, corpus or conversations")
        if self.conversations is not None and (self.corpus is not None or self.packed_corpus is not None):
            raise ValueError("conversations are text of their own: leave out corpus and packed_corpus")
        return self


AnySuite = TrainingSuite | JointSuite


def load_training_suite(path: Path) -> AnySuite:
    """Read and validate a recipe file.

    Raises: UserError naming the key at fault.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(found=f"no readable recipe ({type(error).__name__})", need="a TOML recipe", where=path.name) from error
    return parse_training_suite(text, where=path.name)


def parse_training_suite(text: str, *, where: str) -> AnySuite:
    """Validate the text of a recipe file; `where` names it in errors."""
    try:
        return training_suite_of(tomllib.loads(text))
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise UserError(found=f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}", need="a training recipe", where=where) from error


def training_suite_of(data: dict[str, object]) -> AnySuite:
    """Return the suite that data of either kind describe."""
    return JointSuite.model_validate(data) if data.get("kind") == "joint" else TrainingSuite.model_validate(data)


def needed_corpus(spec: AnySuite) -> CorpusSpec:
    """Return the corpus that a recipe has made.

    Raises: UserError for a recipe that names its text instead.
    """
    if spec.corpus is None:
        raise UserError(found=f"recipe {spec.name!r} without a corpus to make", need="a [corpus] table", where=f"{spec.name}.toml")
    return spec.corpus
