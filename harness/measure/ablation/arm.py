"""Train one arm of an ablation: its recipe, on its share of the corpus, once over, under its seed."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.device.engine import best_device, load_model
from harness.errors import UserError
from harness.paths import resolve_path, shipped
from harness.safe_text import SafeConsole
from harness.specs.ablation import AblationSpec
from harness.specs.recipe import JointRecipe, load_recipe
from harness.training.joint import train_joint
from harness.training.text import JointText, corpus_text
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.distill import unpack_corpus
from medusa_impl.training.sequences import TrainingSequence


@dataclass(frozen=True)
class ArmJob:
    """All that training one arm takes, fit to be sent to another process."""

    spec: AblationSpec
    suite_file: Path | None
    arm: str
    seed: int
    work: Path
    allow_hub: bool

    @property
    def target(self) -> Path:
        """Where the arm's heads, adapter and step log go."""
        return self.work / "out"


def train_arm(job: ArmJob) -> None:
    """Train one arm; its files are under the job's target."""
    base_folder = job.suite_file.parent if job.suite_file is not None else None
    spec = job.spec
    loaded = load_model(spec.model, device=best_device(), allow_hub=job.allow_hub, base_folder=base_folder)
    recipe = once_over(arm_recipe(spec, job.arm, base_folder=base_folder), seed=job.seed)
    samples = list(
        unpack_corpus(
            resolve_path(spec.packed_corpus, base_folder=base_folder), backbone_sha256=loaded.sha256
        )
    )
    text = corpus_text(samples, max_length=recipe.max_length)
    train = budgeted(text.train, answer_tokens=spec.answer_tokens, seed=job.seed)
    start = None if spec.arm(job.arm).fresh_heads else resolve_path(spec.start_heads, base_folder=base_folder)
    train_joint(
        loaded,
        recipe,
        text=JointText(train=train, held_out=()),  # the bench measures every arm on the same held-out texts
        start_heads=start,
        work=job.work / "training",
        target=job.target,
        console=SafeConsole(stderr=True, quiet=multiprocessing.parent_process() is None),
    )


def once_over(recipe: Medusa2Settings, *, seed: int) -> Medusa2Settings:
    """Return a recipe that sees its text once, under a seed."""
    return recipe.model_copy(update={"num_epochs": 1.0, "num_steps": None, "seed": seed})


def budgeted(
    sequences: Sequence[TrainingSequence], *, answer_tokens: int, seed: int
) -> tuple[TrainingSequence, ...]:
    """Return sequences drawn by a seed until their answers hold the budget.

    They are the same for every arm, and each is seen once.
    Raises: UserError for a corpus that holds less.
    """
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    taken, held = [], 0
    for index in order:
        if held >= answer_tokens:
            break
        taken.append(sequences[index])
        held += sequences[index].num_targets
    if held < answer_tokens:
        raise UserError(
            found=f"{held} answer tokens",
            need=f"{answer_tokens}, the suite's budget",
            where="the corpus",
            do="lower answer_tokens",
        )
    return tuple(taken)


def arm_recipe(spec: AblationSpec, arm: str, *, base_folder: Path | None) -> Medusa2Settings:
    """Return an arm's recipe from its file, a shipped recipe's name or a path.

    Raises: UserError for a recipe of heads alone (a frozen backbone in a joint recipe sees the same batches
    as the other arms), of a 4-bit backbone, or of one trained in full: arms are measured as adapters on the
    suite's own model.
    """
    name = spec.arm(arm).recipe
    own = shipped("recipes", f"{name}.toml")
    path = own if own.is_file() else resolve_path(name, base_folder=base_folder)
    found = load_recipe(path)
    if not isinstance(found, JointRecipe):
        raise UserError(
            found=f"the recipe {found.name!r} of heads alone",
            need='trains = "heads_and_backbone"',
            where=path.name,
        )
    if found.recipe.backbone == "full" or found.recipe.quantisation is not None:
        what = "a backbone trained in full" if found.recipe.backbone == "full" else "a 4-bit backbone"
        raise UserError(
            found=f"the recipe {found.name!r} of {what}",
            need="an adapter, or a frozen backbone",
            where=path.name,
        )
    return found.recipe
