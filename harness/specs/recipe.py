"""Training recipes as data: what `suites/recipes/*.toml` may say.

`trains` tells heads on a frozen backbone from heads and backbone together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel, model_validator

from harness.errors import UserError
from harness.files import DataFile, DataPath, read_toml, with_paths
from harness.paths import resolve_path
from harness.specs.bounds import PromptCount, Seed, Spec, TextLength, TokenCount
from harness.specs.suite import ModelSpec
from medusa_impl.recipes import Medusa1Settings, Medusa2Settings

Split = Literal["train", "held_out"]


class CalibrationSpec(Spec):
    """The text that trees are searched on: greedy answers to held-out training prompts.

    It has nothing in common with the training text or a benchmark.
    """

    num_prompts: PromptCount = 160
    max_new_tokens: TextLength = 128
    seed: Seed = 3


class _Recipe(DataFile):
    kind: Literal["recipe"] = "recipe"
    description: str
    model: ModelSpec
    calibration: CalibrationSpec = CalibrationSpec()
    num_workers: int | None = Field(default=None, ge=1, le=1024)
    packed_corpus: DataPath | None = None


class CorpusSpec(Spec):
    """What text to make: prompts are drawn until `num_tokens` or `num_samples` are answered.

    A share of the answers is sampled, the rest is greedy. `num_rows` of them are made together; on a GPU
    more, where half of its free memory holds them. No text depends on that.
    `prompts_file` holds prompts of the user's own instead of the project's. `second_turn_share` of the
    conversations whose first answer came to its end go on: through all further turns of the file's, one after
    another, or to one other of the project's prompts of that category. A conversation ends before its last
    question where an answer used up its budget, where a question is longer than `max_prompt_tokens`, or where
    the model has too few positions for all that was said and another answer.
    """

    num_tokens: int | None = Field(default=None, ge=1, le=10**12)
    num_samples: int | None = Field(default=None, ge=1, le=10**9)
    max_new_tokens: TextLength = 160
    max_prompt_tokens: TokenCount = 512
    sampled_share: float = Field(default=0.34, ge=0, le=1)
    temperature: float = Field(default=0.3, ge=0, le=1000)
    num_rows: int = Field(default=48, ge=1, le=65_536)
    seed: Seed = 1
    split: Split = "train"
    prompts_file: DataPath | None = None
    second_turn_share: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_goal(self) -> CorpusSpec:
        if (self.num_tokens is None) == (self.num_samples is None):
            raise ValueError("set exactly one of num_tokens and num_samples")
        return self

    @property
    def goal(self) -> int:
        """How much is wanted, in `unit`."""
        return self.num_tokens or self.num_samples or 0

    @property
    def unit(self) -> str:
        """What the goal counts."""
        return "tokens" if self.num_tokens is not None else "answers"

    def num_prompts(self) -> int:
        """Return enough prompts for the goal.

        Answers average more than half of their budget, and few prompts are too long.
        """
        return (
            -(-2 * self.num_tokens // self.max_new_tokens) if self.num_tokens is not None else 2 * self.goal
        )


class HeadsRecipe(_Recipe):
    """A recipe for heads alone: model, text, heads and calibration.

    The text is a corpus to be made, or `conversations`: a file in ShareGPT's layout, whose states are not
    kept. `packed_corpus` names a shipped corpus, which spares making it.
    """

    trains: Literal["heads"] = "heads"
    corpus: CorpusSpec | None = None
    conversations: DataPath | None = None
    recipe: Medusa1Settings

    @model_validator(mode="after")
    def _one_text(self) -> HeadsRecipe:
        if (self.corpus is None) == (self.conversations is None):
            raise ValueError("give either corpus or conversations")
        if self.conversations is not None and self.packed_corpus is not None:
            raise ValueError("conversations are text of their own: leave out packed_corpus")
        if self.conversations is not None and self.recipe.features in ("device", "file"):
            raise ValueError('no states of conversations are kept: set features = "none", or leave it out')
        return self


class JointRecipe(_Recipe):
    """A recipe for heads and backbone together.

    The text is a packed corpus, a corpus to be made, or `conversations`: a file in ShareGPT's layout.
    `start_heads` names trained heads to start from, on the same backbone; without it they start as the LM
    head.
    """

    trains: Literal["heads_and_backbone"]
    corpus: CorpusSpec | None = None
    conversations: DataPath | None = None
    start_heads: DataPath | None = None
    recipe: Medusa2Settings

    @model_validator(mode="after")
    def _some_text(self) -> JointRecipe:
        if self.corpus is None and self.conversations is None and self.packed_corpus is None:
            raise ValueError("give packed_corpus, corpus or conversations")
        if self.conversations is not None and (self.corpus is not None or self.packed_corpus is not None):
            raise ValueError("conversations are text of their own: leave out corpus and packed_corpus")
        return self


AnyRecipe = HeadsRecipe | JointRecipe


class _RecipeFile(RootModel[Annotated[AnyRecipe, Field(discriminator="trains")]]):
    """A recipe of either form."""


def load_recipe(path: Path) -> AnyRecipe:
    """Return the recipe in a file, its paths made absolute: those that are found from its own folder.

    Raises: UserError as `read_toml` does.
    """

    def located(named: DataPath) -> str:
        try:
            return str(resolve_path(named, base_folder=path.parent).absolute())
        except UserError:
            return named  # whatever reads it says that it is not there

    recipe = read_toml(path, _RecipeFile, noun="a recipe", kind="recipe", prepare=_of_heads).root
    return recipe_of(with_paths(recipe, located))


def recipe_of(data: dict[str, object]) -> AnyRecipe:
    """Return the recipe that data of either form describe."""
    return _RecipeFile.model_validate(_of_heads(data)).root


def _of_heads(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a recipe; one that does not say what it trains is for heads alone."""
    return {"trains": "heads", **data}


def needed_corpus(spec: AnyRecipe) -> CorpusSpec:
    """Return the corpus that a recipe has made.

    Raises: UserError for a recipe that names its text instead.
    """
    if spec.corpus is None:
        raise UserError(
            found=f"recipe {spec.name!r} without a corpus to make",
            need="a [corpus] table, which says what to ask",
            where=f"{spec.name}.toml",
            do="add one, or name another recipe",
        )
    return spec.corpus
