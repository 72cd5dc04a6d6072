"""The records that a training writes: one for each logged step, and one at its end.

This module needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from medusa_impl.errors import UserError
from medusa_impl.recipes import Frozen
from medusa_impl.text_files import read_lines

STEP_LOG = "steps.jsonl"


class TrainingStep(Frozen):
    """One line of the log of Medusa-1 training: means over the steps since the previous line.

    loss: Eq. 1 per position.
    head_losses, head_hit_rates: for each head, its mean loss and the share of its targets that are its first
    choice, over its own targets and within `vocabulary`.
    num_positions_seen, num_targets_outside: counted from the first step.

    Units: losses in nats.
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

    loss_sums and num_targets are given for each head. rank_hits[k][r] is the number of targets of head k + 1
    that have rank r = 0 .. 9. The rank of a token is the number of tokens with a greater logit, or with an
    equal logit and a lower id; decoding orders candidates in the same way.

    Units: loss_sums in nats.
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
        """Return, for each head, the share of targets that are among its 1, 2, .., 10 best tokens."""
        return tuple(
            tuple(sum(hits[: rank + 1]) / n if n else None for rank in range(len(hits)))
            for hits, n in zip(self.rank_hits, self.num_targets, strict=True)
        )


class TrainingFigures(Frozen):
    """The counts and results of a finished Medusa-1 training; `held_out` is None if nothing was held out."""

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
    """One step of joint training: means over its positions on all processes, and its settings.

    backbone_loss: the mean of L_LM; None if the backbone did not learn.
    agreement_rate: how often the backbone's first choice is the target, which is the teacher's first choice
    under self-distillation and else the token; None if the backbone did not learn.
    head_losses: each head's mean loss.
    head_accuracies: entry [k][r] is the share of head k + 1's targets among its r + 1 best tokens. Logits
    equal to the target's do not count against it. In bfloat16 many are equal, so these shares are a little
    too high.
    backbone_weight, lambda_0: the weights of L_LM and L1.
    gradient_norm: before clipping.
    memory_bytes: the peak since training began, of the GPU's allocator or of the process's resident set.

    Units: losses in nats.
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

    Raises: UserError for a file that cannot be read, or a line that is no step.
    """
    try:
        return tuple(JointStep.model_validate_json(line) for line in read_lines(path))
    except (OSError, ValueError) as error:
        raise UserError(
            found=f"an unreadable step log ({error})",
            need="one step a line",
            where=path.name,
        ) from error


class JointHeldOut(Frozen):
    """Sums of the losses of a jointly trained model over answers that were held out of its training.

    backbone_loss_sum: the KL from the original model, or the tokens' cross-entropy, whichever the recipe
    trains with; None for a frozen backbone.
    num_agreements: how often the backbone's first choice is the target; None for a frozen backbone.
    head_loss_sums, head_targets, rank_hits: for each head, within the vocabulary that it was trained with.

    Shapes: head_loss_sums and head_targets `[K]`, rank_hits `[K, 10]`.
    Units: losses in nats.
    """

    num_positions: int
    backbone_loss_sum: float | None
    num_agreements: int | None
    head_loss_sums: tuple[float, ...]
    head_targets: tuple[int, ...]
    rank_hits: tuple[tuple[int, ...], ...]


class JointFigures(Frozen):
    """The counts and results of a finished joint training; `held_out` is None if nothing was held out.

    backbone_sha256s: the hashes of a frozen backbone's tensors before and after the training. They show that
    the training has not changed it.
    """

    num_steps: int
    num_sequences: int
    num_answer_tokens: int
    num_positions_seen: int
    final_loss: float
    held_out: JointHeldOut | None
    backbone_sha256s: tuple[str, str] | None = None
