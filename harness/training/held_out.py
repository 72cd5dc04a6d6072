"""What heads, and the backbone that learnt with them, reach on text that they did not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sequences import SequenceDataset, TrainingSequence, collate
from medusa_impl.training_log import JointFigures, JointHeldOut, TrainingFigures


def print_figures(console: Console, figures: TrainingFigures) -> None:
    """Print held-out loss and top-1 per head."""
    if figures.held_out is None:
        return
    for head, (loss, accuracy) in enumerate(
        zip(figures.held_out.losses(), figures.held_out.top_accuracies(), strict=True), start=1
    ):
        first, tenth = (100 * (accuracy[rank] or 0) for rank in (0, -1))
        console.print(
            f"head {head}: held-out loss {loss or 0:.3f} nats, top-1 {first:.1f} %, top-10 {tenth:.1f} %"
        )


@torch.no_grad()
def evaluate_joint(model: MedusaTrainingModel, sequences: Sequence[TrainingSequence]) -> JointHeldOut | None:
    """Return the model's own losses on sequences that it did not train on, or None without sequences.

    Dropout is off.
    """
    if not sequences:
        return None
    learns = model.recipe.backbone != "frozen"
    data, training, totals = SequenceDataset(sequences), model.training, dict[str, Any]()
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(sequences), model.recipe.batch_sequences):
        rows = [
            data[index] for index in range(start, min(start + model.recipe.batch_sequences, len(sequences)))
        ]
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
        for name, value in model(**batch, backbone_weight=float(learns), heads_weight=1.0).items():
            totals[name] = totals[name] + value if name in totals else value
    model.train(training)
    return JointHeldOut(
        num_positions=int(totals["positions"]),
        backbone_loss_sum=float(totals["backbone_loss"]) if learns else None,
        num_agreements=int(totals["agreements"]) if learns else None,
        head_loss_sums=tuple(totals["head_losses"].tolist()),
        head_targets=tuple(totals["head_targets"].tolist()),
        rank_hits=tuple(tuple(row) for row in totals["head_ranks"].tolist()),
    )


def print_joint_figures(console: Console, figures: JointFigures, *, recipe: Medusa2Settings) -> None:
    """Print what the held-out text says of backbone and heads."""
    held_out = figures.held_out
    if held_out is None:
        return
    if held_out.backbone_loss_sum is not None and held_out.num_agreements is not None:
        name = "KL from the original" if recipe.target == "original" else "loss"
        mean, share = (
            held_out.backbone_loss_sum / held_out.num_positions,
            held_out.num_agreements / held_out.num_positions,
        )
        console.print(
            f"backbone: held-out {name} {mean:.4f} nats a token, first choice agrees at {100 * share:.1f} %"
        )
    if recipe.architecture == "shared":
        console.print(
            f"heads read the {recipe.heads_lm_head if recipe.backbone != 'frozen' else 'original'} LM "
            "head, here and when decoding"
        )
    for head, (hits, targets) in enumerate(
        zip(held_out.rank_hits, held_out.head_targets, strict=True), start=1
    ):
        if targets:
            console.print(
                f"head {head}: held-out top-1 {100 * hits[0] / targets:.1f} %, top-10 "
                f"{100 * sum(hits) / targets:.1f} %"
            )
