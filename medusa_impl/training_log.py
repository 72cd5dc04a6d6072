"""What a training writes down while it runs and at its end. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from medusa_impl.errors import UserError
from medusa_impl.recipes import Frozen

STEP_LOG = "steps.jsonl"


class TrainingStep(Frozen):
    """One line of the training log: means since the line before.

    loss is Eq. 1 per position; head_losses (nats) and head_hit_rates are per head over its own targets,
    within `vocabulary`; num_positions_seen and num_targets_outside count from the first step.
    """

    step: int
    num_steps: int
    vocabulary: Literal["subset", "full"]
    loss: float
    head_losses: tuple[float | None, ...]
    head_hit_rates: tuple[float | None, ...]
    learning_rate: float
    gradient_norm: float
    num_positions_seen: int
    num_targets_outside: int
    positions_per_s: float | None


class HeadEvaluation(Frozen):
    """How well the heads predict text, over the full vocabulary in float32.

    loss_sums (nats) and num_targets are per head; rank_hits[k][r] counts the targets of head k + 1 at rank r
    = 0..9, where the rank of a token is the number of tokens with a greater logit, or an equal one and a
    lower id.
    """

    loss_sums: tuple[float, ...]
    num_targets: tuple[int, ...]
    rank_hits: tuple[tuple[int, ...], ...]

    def losses(self) -> tuple[float | None, ...]:
        """Return each head's mean loss in nats."""
        return tuple(
            total / n if n else None for total, n in zip(self.loss_sums, self.num_targets, strict=True)
        )

    def top_accuracies(self) -> tuple[tuple[float | None, ...], ...]:
        """Return, per head, the share of targets among its 1, 2, .., 10 best tokens."""
        return tuple(
            tuple(sum(hits[: rank + 1]) / n if n else None for rank in range(len(hits)))
            for hits, n in zip(self.rank_hits, self.num_targets, strict=True)
        )


class TrainingFigures(Frozen):
    """What a finished training run saw and reached; `held_out` is None where nothing was held out."""

    num_steps: int
    num_subset_steps: int
    subset_size: int | None
    num_positions_seen: int
    num_targets_outside: int
    num_train_rows: int
    num_held_out_rows: int
    num_train_answers: int
    num_held_out_answers: int
    num_corpus_tokens: int
    final_loss: float
    held_out: HeadEvaluation | None


class JointStep(Frozen):
    """One line of the step log: sums over the step's positions on all processes, and the settings that it ran
    under.

    `backbone_loss` is the mean nats of L_LM and `agreement_rate` how often the first choices of model and
    target agree (under self-distillation with the teacher's, else with the token), both None where the
    backbone did not learn; head_losses are mean nats; head_accuracies[k][r] is the share of head k + 1's
    targets among its r + 1 best. Equal logits count for the target, and under bfloat16 many are equal: these
    shares run a little high. Learning rates are those that the optimiser held, gradient_norm is that before
    clipping; memory_bytes is the peak since training began: of the GPU's allocator, or of the process's
    resident set.
    """

    step: int
    num_steps: int
    loss: float
    backbone_loss: float | None
    agreement_rate: float | None
    head_losses: tuple[float | None, ...]
    head_accuracies: tuple[tuple[float | None, ...], ...]
    backbone_weight: float
    lambda_0: float
    heads_learning_rate: float
    backbone_learning_rate: float
    gradient_norm: float | None = None
    num_positions: int
    positions_per_s: float | None
    memory_bytes: int


def read_step_log(path: Path) -> tuple[JointStep, ...]:
    """Return the steps of a log.

    Raises: UserError for a line that is none.
    """
    try:
        return tuple(JointStep.model_validate_json(line) for line in path.read_text().splitlines())
    except (OSError, ValueError) as error:
        raise UserError(
            found=f"an unreadable step log ({error})", need="one step a line", where=path.name
        ) from error


class JointHeldOut(BaseModel):
    """What a jointly trained model does on answers that training never saw, by its own loss: sums, nats.

    backbone_loss_sum is the KL from the original or the tokens' cross-entropy, as the recipe's target; None
    for a frozen backbone.
    Shapes: head_loss_sums and head_targets `[K]`, rank_hits `[K, 10]`, within the vocabulary that the heads
    were trained in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_positions: int
    backbone_loss_sum: float | None
    num_agreements: int | None
    head_loss_sums: tuple[float, ...]
    head_targets: tuple[int, ...]
    rank_hits: tuple[tuple[int, ...], ...]


class JointFigures(BaseModel):
    """What a finished joint training saw and reached; `held_out` is None where nothing was held out.

    `backbone_sha256s` are the hashes of a frozen backbone's tensors in memory before and behind the training:
    one and the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_steps: int
    num_sequences: int
    num_answer_tokens: int
    num_positions_seen: int
    final_loss: float
    held_out: JointHeldOut | None
    backbone_sha256s: tuple[str, str] | None = None
