"""Medusa-1: training the heads alone, on states of the frozen backbone.

The backbone's states were computed once and kept (`features.py`), so the backbone itself never runs here.

Paper: Section 2.2.1 and Appendix B.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medusa_impl.checkpoints.tensors import write_by_rename
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings, steps_per_epoch
from medusa_impl.training.evaluation import evaluate_heads
from medusa_impl.training.features import FeatureSet
from medusa_impl.training.losses import (
    DEFAULT_LOGITS_BYTES,
    Medusa1Loss,
    TokenSubset,
    head_weights,
    medusa1_loss,
)
from medusa_impl.training.step_log import append_line, trim_log
from medusa_impl.training_log import TrainingFigures, TrainingStep

STATE_SCHEMA_VERSION = 1
_STATE_FILE, _LOG_FILE = "training-state.pt", "training-log.jsonl"


def epoch_order(num_rows: int, *, epoch: int, seed: int) -> Tensor:
    """Return the order of the rows in an epoch.

    It depends on seed and epoch only, so a resumed run sees the same batches as one that was never cut off.

    Shapes: `[num_rows]`, a permutation.
    """
    # The factor exceeds any number of epochs, so no two pairs of seed and epoch have the same generator.
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train_medusa1(
    features: FeatureSet,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    *,
    recipe: Medusa1Settings,
    checkpoint_dir: Path,
    resume: bool = True,
    on_step: Callable[[TrainingStep], None] | None = None,
    log_every_steps: int = 10,
    save_every_steps: int = 100,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingFigures:
    """Return the counts and results of a training; the given heads are trained.

    Every `save_every_steps` the state of the run (heads, optimiser, counts) is saved in `checkpoint_dir`.
    With `resume`, a run that was cut off continues from there and gives the same heads.
    `training-log.jsonl` in the same folder gets one `TrainingStep` a line. The LM head is only read.

    Shapes: lm_head_weight `[V, H]`.
    Raises: UserError if the saved state belongs to another recipe or other features, if heads and recipe
    differ, or if a loss or a gradient is not finite; the last good state stays on disk then.
    Paper: Section 2.2.1, Eq. 1.
    """
    _check_heads(heads, features, recipe)
    run = _Run(features, heads, lm_head_weight, recipe=recipe, folder=checkpoint_dir)
    if resume:
        run.restore()
    trim_log(run.log_file, last_step=run.step)
    window, started = _Window(heads.num_heads), clock()
    while run.step < run.num_steps:
        loss, gradient_norm = run.take_step()
        window.add(loss)
        last = run.step == run.num_steps
        # No line of the log mixes losses of both vocabularies: they are not comparable.
        if (
            run.step % log_every_steps == 0
            or last
            or run.vocabulary(run.step) != run.vocabulary(run.step - 1)
        ):
            now = clock()
            record = window.record(run, gradient_norm=gradient_norm, elapsed_s=now - started)
            append_line(run.log_file, record.model_dump_json())
            window, started = _Window(heads.num_heads), now
            if on_step is not None:
                on_step(record)
        if run.step % save_every_steps == 0 or last:
            run.save()
    return run.figures()


class _Run:
    """The state of one training run, which changes with every step."""

    def __init__(
        self,
        features: FeatureSet,
        heads: MedusaHeads,
        lm_head_weight: Tensor,
        *,
        recipe: Medusa1Settings,
        folder: Path,
    ) -> None:
        self.features, self.heads, self.recipe = features, heads, recipe
        self.state_file, self.log_file = folder / _STATE_FILE, folder / _LOG_FILE
        self.full_weight = lm_head_weight.detach()
        self.rows = features.train_rows()
        if len(self.rows) == 0:
            raise UserError(
                found="no training rows",
                need="at least one answer that is not held out",
                where="the features",
            )
        self.num_steps = recipe.steps_for(len(self.rows))
        self.lambdas = head_weights(num_heads=heads.num_heads, lambda_base=recipe.lambda_base)
        self.subset = self._subset()
        self.num_subset_steps = (
            0
            if self.subset is None
            else self.num_steps - math.ceil(self.num_steps * recipe.full_vocabulary_rate)
        )
        # Cast and cut once for the whole run.
        dtype = torch.bfloat16 if recipe.matmul_dtype == "bfloat16" else torch.float32
        self._weights = {"full": self.full_weight.to(dtype)}
        if self.subset is not None:
            self._weights["subset"] = self.full_weight[self.subset.token_ids].to(dtype)
        self.optimizer = torch.optim.AdamW(
            heads.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.step = self.num_positions_seen = self.num_targets_outside = 0
        self.last_loss = math.nan
        # A saved state is only taken up by a run that agrees in all of these.
        self._identity = {
            "schema_version": STATE_SCHEMA_VERSION,
            "recipe": recipe.model_dump_json(),
            "features": features.fingerprint(),
        }
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        folder.mkdir(parents=True, exist_ok=True)

    def _subset(self) -> TokenSubset | None:
        size = self.recipe.subset_size
        if size is None or size >= self.heads.vocab_size:
            return None
        return TokenSubset.most_frequent(
            self.features.token_counts(vocab_size=self.heads.vocab_size), size=size
        )

    def vocabulary(self, step: int) -> Literal["subset", "full"]:
        """Return which vocabulary a step computes its loss over."""
        return "subset" if step < self.num_subset_steps else "full"

    def take_step(self) -> tuple[Medusa1Loss, float]:
        """Return the loss of the next batch and the norm of its gradient, after learning from it.

        Raises: UserError if either is not finite.
        """
        batch = self._batch()
        vocabulary = self.vocabulary(self.step)
        subset = self.subset if vocabulary == "subset" else None
        targets = self.features.targets[batch]
        loss = medusa1_loss(
            self.features.states[batch].float(),
            targets if subset is None else subset.localise(targets),
            heads=self.heads,
            lm_head_weight=self._weights[vocabulary],
            lambdas=self.lambdas,
            subset=subset,
            max_logits_bytes=DEFAULT_LOGITS_BYTES,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()  # type: ignore[no-untyped-call]
        gradient_norm = float(
            nn.utils.clip_grad_norm_(self.heads.parameters(), self.recipe.max_gradient_norm)
        )
        self.last_loss = float(loss.loss.detach())
        if not (math.isfinite(self.last_loss) and math.isfinite(gradient_norm)):
            raise UserError(
                found=f"a loss of {self.last_loss} and a gradient norm of {gradient_norm} at step "
                f"{self.step}",
                need="finite ones",
                where="the training of the heads",
                do="lower the learning rate, or look for states that are not finite; the last good state "
                "is kept",
            )
        # Checked before the step, so that neither heads nor optimiser take up a bad number.
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step, num_steps=self.num_steps)
        self.optimizer.step()
        self.step += 1
        self.num_positions_seen += loss.num_positions
        self.num_targets_outside += loss.num_outside
        return loss, gradient_norm

    def _batch(self) -> Tensor:
        """Return the rows of the next batch."""
        size = self.recipe.batch_positions
        epoch, index = divmod(self.step, steps_per_epoch(len(self.rows), batch_positions=size))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.rows), epoch=epoch, seed=self.recipe.seed)
        return self.rows[self._order[index * size : (index + 1) * size]]

    def save(self) -> None:
        """Write everything that the next step depends on."""
        state = {
            **self._identity,
            "step": self.step,
            "num_positions_seen": self.num_positions_seen,
            "num_targets_outside": self.num_targets_outside,
            "last_loss": self.last_loss,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_by_rename(self.state_file, lambda temporary: torch.save(state, temporary))

    def restore(self) -> None:
        """Take up the state that an earlier run saved, if there is one.

        Raises: UserError if it cannot be read, or belongs to another recipe or other features.
        """
        path = self.state_file
        if not path.exists():
            return
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            identity = {key: state[key] for key in self._identity}
        except Exception as error:
            raise UserError(
                found=f"an unreadable training state ({type(error).__name__})",
                need="one that this program wrote",
                where=path.name,
                do="remove it to start from the beginning",
            ) from error
        for key, ours in self._identity.items():
            if identity[key] != ours:
                raise UserError(
                    found=f"a training state with another {key.replace('_', ' ')}",
                    need="the one of this run",
                    where=path.name,
                    do="resume with the recipe and corpus that it began with, or remove it to start from the "
                    "beginning",
                )
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.last_loss = int(state["step"]), float(state["last_loss"])
        self.num_positions_seen, self.num_targets_outside = (
            int(state["num_positions_seen"]),
            int(state["num_targets_outside"]),
        )

    def figures(self) -> TrainingFigures:
        """Return the run's counts, and its heads' evaluation on what was held out."""
        held_out_rows = self.features.held_out_rows()
        held_out = evaluate_heads(
            self.features, held_out_rows, heads=self.heads, lm_head_weight=self.full_weight
        )
        num_held_out_answers = int(self.features.held_out.sum())
        return TrainingFigures(
            num_steps=self.step,
            num_subset_steps=self.num_subset_steps,
            subset_size=None if self.subset is None else len(self.subset.token_ids),
            num_positions_seen=self.num_positions_seen,
            num_targets_outside=self.num_targets_outside,
            num_train_rows=len(self.rows),
            num_held_out_rows=len(held_out_rows),
            num_train_answers=len(self.features.keys) - num_held_out_answers,
            num_held_out_answers=num_held_out_answers,
            num_corpus_tokens=self.features.num_tokens,
            final_loss=self.last_loss,
            held_out=held_out if len(held_out_rows) else None,
        )


class _Window:
    """Sums over the steps since the last line of the log."""

    def __init__(self, num_heads: int) -> None:
        self.loss_sum, self.num_positions = 0.0, 0
        self.loss_sums = torch.zeros(num_heads, dtype=torch.float64)
        self.num_targets = torch.zeros(num_heads, dtype=torch.long)
        self.num_hits = torch.zeros(num_heads, dtype=torch.long)

    def add(self, loss: Medusa1Loss) -> None:
        self.loss_sum += float(loss.loss.detach()) * loss.num_positions
        self.num_positions += loss.num_positions
        self.loss_sums += loss.loss_sums
        self.num_targets += loss.num_targets
        self.num_hits += loss.num_hits

    def record(self, run: _Run, *, gradient_norm: float, elapsed_s: float) -> TrainingStep:
        """Return the line of the log for these steps, of which the last has just been taken."""
        return TrainingStep(
            step=run.step,
            num_steps=run.num_steps,
            vocabulary=run.vocabulary(run.step - 1),
            loss=self.loss_sum / max(self.num_positions, 1),
            head_losses=_rates(self.loss_sums, self.num_targets),
            head_hit_rates=_rates(self.num_hits, self.num_targets),
            learning_rate=run.recipe.learning_rate_at(run.step - 1, num_steps=run.num_steps),
            gradient_norm=gradient_norm,
            num_positions_seen=run.num_positions_seen,
            num_targets_outside=run.num_targets_outside,
            positions_per_s=self.num_positions / elapsed_s if elapsed_s > 0 else None,
        )


def _rates(totals: Tensor, counts: Tensor) -> tuple[float | None, ...]:
    return tuple(
        float(total) / int(count) if count else None for total, count in zip(totals, counts, strict=True)
    )


def _check_heads(heads: MedusaHeads, features: FeatureSet, recipe: Medusa1Settings) -> None:
    ours = (heads.num_heads, heads.num_layers, heads.architecture)
    theirs = (recipe.num_heads, recipe.num_layers, recipe.architecture)
    if ours != theirs or features.num_heads != heads.num_heads:
        raise UserError(
            found=f"heads {ours} and features for {features.num_heads} heads",
            need=f"number of heads, layers and unembedding {theirs}",
            where="the training recipe",
        )
