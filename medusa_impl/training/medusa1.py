"""Medusa-1: training the heads alone, on states of the frozen backbone.

The states are those that were computed once and kept (`features.py`), or the backbone computes them in each
step (`states.py`). Heads, loss and optimiser are where the LM head is, on any device.

Paper: Section 2.2.1 and Appendix B.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medusa_impl.checkpoints.tensors import write_by_rename
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.batches import AnswerBatches, Batches, PositionBatches
from medusa_impl.training.evaluation import evaluate_heads
from medusa_impl.training.features import AnswerSet, AnswerTable, FeatureSet
from medusa_impl.training.heads_trainer import HeadsTrainer, StepItems, heads_arguments
from medusa_impl.training.losses import Medusa1Loss, TokenSubset, head_weights, logits_bytes, medusa1_loss
from medusa_impl.training.states import BackboneStates, DeviceStates, FileStates, StateSource
from medusa_impl.training.whole_checkpoints import last_checkpoint
from medusa_impl.training_log import TrainingFigures, TrainingStep

STATE_SCHEMA_VERSION = 2  # 1 was one file, of a loop that ran on the CPU only
_RUN_FILE = "heads-run.json"
_ELSEWHERE = {"device"}  # settings that may differ when a run goes on: they change no batch


class HeadsTrainingModel(nn.Module):
    """The heads, and the unembedding that they learn against, as one module with one loss.

    The heads alone are its parameters; the backbone is read through the source of states.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        lm_head_weight: Tensor,
        *,
        source: StateSource,
        recipe: Medusa1Settings,
        num_steps: int,
        subset: TokenSubset | None,
    ) -> None:
        super().__init__()
        device = lm_head_weight.device
        self.heads = heads.to(device)
        self.source, self.recipe, self.num_steps = source, recipe, num_steps
        self.lambdas = head_weights(num_heads=heads.num_heads, lambda_base=recipe.lambda_base)
        self.subset = None if subset is None else subset.to(device)
        self.num_subset_steps = 0 if subset is None else recipe.subset_steps(num_steps)
        self._dtype = torch.bfloat16 if recipe.matmul_dtype == "bfloat16" else torch.float32
        # Cast and cut once for the whole run. In a dictionary: these are no parameters of the heads.
        self._weights = {"full": lm_head_weight.detach(), "subset": lm_head_weight.detach()}
        if heads.architecture == "shared":
            self._weights["full"] = lm_head_weight.detach().to(self._dtype)
            if self.subset is not None:
                self._weights["subset"] = lm_head_weight.detach()[self.subset.token_ids].to(self._dtype)

    def vocabulary(self, step: int) -> Literal["subset", "full"]:
        """Return which vocabulary a step computes its loss over."""
        return "subset" if step < self.num_subset_steps else "full"

    def forward(self, inputs: dict[str, Any], *, vocabulary: Literal["subset", "full"]) -> Medusa1Loss:
        """Return Eq. 1 of a step's item.

        Paper: Section 2.2.1, Eq. 1.
        """
        states, targets = self.source.read(inputs)
        subset = self.subset if vocabulary == "subset" else None
        return medusa1_loss(
            states,
            targets if subset is None else subset.localise(targets),
            heads=self.heads,
            lm_head_weight=self._weights[vocabulary],
            lambdas=self.lambdas,
            subset=subset,
            max_logits_bytes=logits_bytes(states.device),
            own_dtype=self._dtype,
        )


def train_medusa1(
    features: AnswerTable,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    *,
    recipe: Medusa1Settings,
    checkpoint_dir: Path,
    decoder: nn.Module | None = None,
    batches: Batches | None = None,
    resume: bool = True,
    on_step: Callable[[TrainingStep], None] | None = None,
    log_every_steps: int = 10,
    save_every_steps: int = 100,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingFigures:
    """Return the counts and results of a training; the given heads are trained, and moved to the LM head.

    `features` are a `FeatureSet`, or an `AnswerSet` with the frozen backbone's `decoder` in addition, which
    then runs in each step. `batches` are by default those that go with it.

    Every `save_every_steps` the state of the run (heads, optimiser, counts) is saved in `checkpoint_dir`.
    With `resume`, a run that was cut off continues from there and gives the same heads.
    `training-log.jsonl` in the same folder gets one `TrainingStep` a line. The LM head is only read.

    Shapes: lm_head_weight `[V, H]`.
    Raises: UserError if the saved state belongs to another recipe or other features, if heads and recipe
    differ, or if a loss or a gradient is not finite; the last good state stays on disk then.
    Paper: Section 2.2.1, Eq. 1.
    """
    _check_heads(heads, features, recipe)
    source = state_source(features, recipe=recipe, decoder=decoder, device=lm_head_weight.device)
    batches = _batches(features, recipe) if batches is None else batches
    num_steps = recipe.steps_of(batches.num_per_epoch)
    model = HeadsTrainingModel(
        heads,
        lm_head_weight,
        source=source,
        recipe=recipe,
        num_steps=num_steps,
        subset=_subset(features, recipe, vocab_size=heads.vocab_size),
    )
    _begin(checkpoint_dir, features=features, recipe=recipe, batches=batches, resume=resume)
    arguments = heads_arguments(
        recipe,
        folder=checkpoint_dir,
        num_steps=num_steps,
        save_steps=save_every_steps,
        device=lm_head_weight.device,
    )
    trainer = HeadsTrainer(
        model,
        items=StepItems(source, batches, num_steps=num_steps),
        arguments=arguments,
        recipe=recipe,
        on_step=on_step,
        log_every_steps=log_every_steps,
        clock=clock,
    )
    _run_to_the_end(trainer, checkpoint_dir)
    return _figures(trainer, model, features, lm_head_weight=lm_head_weight)


def _run_to_the_end(trainer: HeadsTrainer, folder: Path) -> None:
    """Take all steps that the folder's last checkpoint has not taken."""
    last = last_checkpoint(folder)
    if last is not None and last.is_finished:
        trainer.load_finished(last.folder)
    else:
        trainer.train(resume_from_checkpoint=str(last.folder) if last is not None else None)


def state_source(
    features: AnswerTable, *, recipe: Medusa1Settings, decoder: nn.Module | None, device: torch.device
) -> StateSource:
    """Return where a recipe's states come from, given what there is of them."""
    if isinstance(features, AnswerSet):
        assert decoder is not None
        return BackboneStates(features, decoder)
    assert isinstance(features, FeatureSet)
    return FileStates(features) if recipe.features == "file" else DeviceStates(features, device=device)


def _batches(features: AnswerTable, recipe: Medusa1Settings) -> Batches:
    kind = AnswerBatches if isinstance(features, AnswerSet) else PositionBatches
    return kind(features, batch_positions=recipe.batch_positions, seed=recipe.seed)


def _subset(features: AnswerTable, recipe: Medusa1Settings, *, vocab_size: int) -> TokenSubset | None:
    size = recipe.subset_size
    if size is None or size >= vocab_size:
        return None
    return TokenSubset.most_frequent(features.token_counts(vocab_size=vocab_size), size=size)


def _begin(
    folder: Path, *, features: AnswerTable, recipe: Medusa1Settings, batches: Batches, resume: bool
) -> None:
    """Note in the folder what is trained there, or see that it is what the folder began with.

    Raises: UserError if the saved state belongs to another recipe or other features.
    """
    # What decides the heads: which way the states come does not, but by their batches.
    kept = recipe.model_dump(mode="json", exclude=_ELSEWHERE | {"features"})
    ours = {
        "schema_version": STATE_SCHEMA_VERSION,
        "recipe": {**kept, "batches": type(batches).__name__},
        "features": features.fingerprint(),
    }
    path = folder / _RUN_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        path.unlink(missing_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    if not path.exists():
        text = json.dumps(ours, indent=1) + "\n"
        write_by_rename(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return
    try:
        theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in ours if theirs[key] != ours[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            found=f"an unreadable training state ({type(error).__name__})",
            need="one that this program wrote",
            where=path.name,
            do="remove the folder to start from the beginning",
        ) from error
    if changed:
        raise UserError(
            found=f"a training state with another {changed[0].replace('_', ' ')}",
            need="the one of this run",
            where=path.name,
            do="resume with the recipe and corpus that it began with, or remove the folder to start from the "
            "beginning",
        )


def _figures(
    trainer: HeadsTrainer, model: HeadsTrainingModel, features: AnswerTable, *, lm_head_weight: Tensor
) -> TrainingFigures:
    """Return the run's counts, and its heads' evaluation on what was held out."""
    rows = features.held_out_rows()
    held_out = evaluate_heads(
        features,
        rows,
        heads=model.heads,
        lm_head_weight=lm_head_weight,
        source=model.source,
    )
    num_held_out_answers = int(features.held_out.sum())
    return TrainingFigures(
        num_steps=model.num_steps,
        num_subset_steps=model.num_subset_steps,
        subset_size=None if model.subset is None else len(model.subset.token_ids),
        num_positions_seen=trainer.num_positions_seen,
        num_targets_outside=trainer.num_targets_outside,
        num_train_rows=len(features.train_rows()),
        num_held_out_rows=len(rows),
        num_train_answers=len(features.keys) - num_held_out_answers,
        num_held_out_answers=num_held_out_answers,
        num_corpus_tokens=features.num_tokens,
        final_loss=trainer.last_loss,
        held_out=held_out if len(rows) else None,
    )


def _check_heads(heads: MedusaHeads, features: AnswerTable, recipe: Medusa1Settings) -> None:
    if not len(features.train_rows()):
        raise UserError(
            found="no training rows", need="at least one answer that is not held out", where="the features"
        )
    ours = (heads.num_heads, heads.num_layers, heads.architecture)
    theirs = (recipe.num_heads, recipe.num_layers, recipe.architecture)
    if ours != theirs or features.num_heads != heads.num_heads:
        raise UserError(
            found=f"heads {ours} and features for {features.num_heads} heads",
            need=f"number of heads, layers and unembedding {theirs}",
            where="the training recipe",
        )
