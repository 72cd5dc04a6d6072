"""Medusa-1: training the heads on the frozen backbone's states.

Paper: Section 2.2.1 and Appendix B. Nothing here runs the backbone: it reads a `FeatureSet` and the LM head's
weight.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Recipe, steps_per_epoch
from medusa_impl.training.features import FeatureSet
from medusa_impl.training.losses import (
    DEFAULT_LOGITS_BYTES,
    Medusa1Loss,
    TokenSubset,
    head_weights,
    medusa1_loss,
)
from medusa_impl.training_log import HeadEvaluation, TrainingFigures, TrainingStep

STATE_SCHEMA_VERSION = 1
NUM_TOP_RANKS = 10
_STATE_FILE, _LOG_FILE = "training-state.pt", "training-log.jsonl"


def epoch_order(num_rows: int, *, epoch: int, seed: int) -> Tensor:
    """Return the order of an epoch, a function of seed and epoch alone, so that a resumed run sees what an
    unbroken one sees.

    Shapes: `[num_rows]`, a permutation.
    """
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train_medusa1(
    features: FeatureSet,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    *,
    recipe: Medusa1Recipe,
    checkpoint_dir: Path,
    resume: bool = True,
    on_step: Callable[[TrainingStep], None] | None = None,
    log_every_steps: int = 10,
    save_every_steps: int = 100,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingFigures:
    """Train the heads in place and return what the run saw; the backbone's LM head is read only.

    State (heads, optimiser, counts) is kept in `checkpoint_dir` by rename every `save_every_steps`; with
    `resume`, a run that was cut off goes on from there and yields the same heads. `training-log.jsonl` beside
    it gets one `TrainingStep` a line.
    Shapes: lm_head_weight `[V, H]`.
    Raises: UserError if the kept state is of another recipe or other features, if heads and recipe differ, or
    if a loss or a gradient is not finite (the last good state stays on disk).
    Paper: Section 2.2.1, Eq. 1.
    """
    _check_heads(heads, features, recipe)
    run = _Run(features, heads, lm_head_weight, recipe=recipe, folder=checkpoint_dir)
    if resume:
        run.restore()
    run.trim_log()
    window, started = _Window(heads.num_heads), clock()
    while run.step < run.num_steps:
        loss, gradient_norm = run.take_step()
        window.add(loss)
        last = run.step == run.num_steps
        if (
            run.step % log_every_steps == 0
            or last
            or run.vocabulary(run.step) != run.vocabulary(run.step - 1)
        ):
            now = clock()
            record = window.record(run, gradient_norm=gradient_norm, elapsed_s=now - started)
            run.log(record)
            window, started = _Window(heads.num_heads), now
            if on_step is not None:
                on_step(record)
        if run.step % save_every_steps == 0 or last:
            run.save()
    return run.figures()


@torch.no_grad()
def evaluate_heads(
    features: FeatureSet,
    rows: Tensor,
    *,
    heads: MedusaHeads,
    lm_head_weight: Tensor,
    max_logits_bytes: int = 64 * 2**20,
) -> HeadEvaluation:
    """Return losses and rank counts of the heads over the given rows, full vocabulary, float32.

    Shapes: rows `[R]` row numbers of the features; lm_head_weight `[V, H]` (unused by `own` unembeddings).
    """
    loss_sums = [0.0] * heads.num_heads
    num_targets = [0] * heads.num_heads
    rank_hits = torch.zeros(heads.num_heads, NUM_TOP_RANKS, dtype=torch.long)
    chunk_rows = max(1, max_logits_bytes // (4 * heads.vocab_size))
    token_ids = torch.arange(heads.vocab_size)
    for part in torch.split(rows, chunk_rows):
        head_states = heads.states(features.states[part].float())
        for head in range(heads.num_heads):
            targets = features.targets[part, head].long()
            kept = targets >= 0
            weight = lm_head_weight if heads.architecture == "shared" else heads.unembeddings[head].weight
            logits = linear(head_states[kept, head], weight.float())  # type: ignore[arg-type]
            chosen = targets[kept, None]
            target_logits = logits.gather(1, chosen)
            loss_sums[head] += float(
                (torch.logsumexp(logits, 1, keepdim=True) - target_logits).double().sum()
            )
            ranks = ((logits > target_logits) | ((logits == target_logits) & (token_ids < chosen))).sum(1)
            rank_hits[head] += torch.bincount(ranks.clamp_max(NUM_TOP_RANKS), minlength=NUM_TOP_RANKS + 1)[
                :NUM_TOP_RANKS
            ]
            num_targets[head] += int(kept.sum())
    return HeadEvaluation(
        loss_sums=tuple(loss_sums),
        num_targets=tuple(num_targets),
        rank_hits=tuple(tuple(row) for row in rank_hits.tolist()),
    )


class _Run:
    """The mutable state of one training run."""

    def __init__(
        self,
        features: FeatureSet,
        heads: MedusaHeads,
        lm_head_weight: Tensor,
        *,
        recipe: Medusa1Recipe,
        folder: Path,
    ) -> None:
        self.features, self.heads, self.recipe, self.folder = features, heads, recipe, folder
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
        dtype = torch.bfloat16 if recipe.matmul_dtype == "bfloat16" else torch.float32
        self._weights = {"full": self.full_weight.to(dtype)}
        if self.subset is not None:
            self._weights["subset"] = self.full_weight[self.subset.token_ids].to(dtype)
        self.optimizer = torch.optim.AdamW(
            heads.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.step = self.num_positions_seen = self.num_targets_outside = 0
        self.last_loss = math.nan
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
        return "subset" if step < self.num_subset_steps else "full"

    def take_step(self) -> tuple[Medusa1Loss, float]:
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(self.step, num_steps=self.num_steps)
        self.optimizer.step()
        self.step += 1
        self.num_positions_seen += loss.num_positions
        self.num_targets_outside += loss.num_outside
        return loss, gradient_norm

    def _batch(self) -> Tensor:
        size = self.recipe.batch_positions
        epoch, index = divmod(self.step, steps_per_epoch(len(self.rows), batch_positions=size))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.rows), epoch=epoch, seed=self.recipe.seed)
        return self.rows[self._order[index * size : (index + 1) * size]]

    def save(self) -> None:
        state = {
            **self._identity,
            "step": self.step,
            "num_positions_seen": self.num_positions_seen,
            "num_targets_outside": self.num_targets_outside,
            "last_loss": self.last_loss,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / (_STATE_FILE + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / _STATE_FILE)

    def restore(self) -> None:
        path = self.folder / _STATE_FILE
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
                do="remove it to start afresh",
            ) from error
        for key, ours in self._identity.items():
            if identity[key] != ours:
                raise UserError(
                    found=f"a training state with another {key.replace('_', ' ')}",
                    need="the one of this run",
                    where=path.name,
                    do="resume with the recipe and corpus that it began with, or remove it to start afresh",
                )
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.last_loss = int(state["step"]), float(state["last_loss"])
        self.num_positions_seen, self.num_targets_outside = (
            int(state["num_positions_seen"]),
            int(state["num_targets_outside"]),
        )

    def trim_log(self) -> None:
        """Drop the log's lines behind the restored step, a torn last line included."""
        path = self.folder / _LOG_FILE
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        path.write_text("".join(kept))

    def log(self, record: TrainingStep) -> None:
        with (self.folder / _LOG_FILE).open("a") as file:
            file.write(record.model_dump_json() + "\n")

    def figures(self) -> TrainingFigures:
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
    """Sums since the last line of the log."""

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


def _check_heads(heads: MedusaHeads, features: FeatureSet, recipe: Medusa1Recipe) -> None:
    ours = (heads.num_heads, heads.num_layers, heads.architecture)
    theirs = (recipe.num_heads, recipe.num_layers, recipe.architecture)
    if ours != theirs or features.num_heads != heads.num_heads:
        raise UserError(
            found=f"heads {ours} and features for {features.num_heads} heads",
            need=f"number of heads, layers and unembedding {theirs}",
            where="the training recipe",
        )
