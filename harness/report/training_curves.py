"""A training's step log as one picture: losses and accuracies of every head, the backbone's term, weights, rates, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.report.ablation_curves import new_figure, save_figure
from medusa_impl.medusa2_trainer import JointStep, read_step_log

CURVES_FILE = "curves.png"
_MAX_RANK = 10

Lines = dict[str, Callable[[JointStep], float | None]]


def draw_step_log(log: Path, picture: Path) -> None:
    """Draw a log of steps and write a PNG.

    Raises: UserError without matplotlib, or for a log that cannot be read or is empty.
    """
    steps = read_step_log(log)
    if not steps:
        raise UserError(found="an empty step log", need="at least one step", where=log.name)
    save_figure(step_log_figure(steps), picture)


def step_log_figure(steps: Sequence[JointStep]) -> Any:
    """Return the picture as matplotlib's figure, nine panels; a quantity that a step lacks leaves a gap."""
    figure, panels = new_figure(rows=3, columns=3, title=f"{len(steps)} steps")
    for axes, (title, lines) in zip(panels.flat, step_panels(len(steps[0].head_losses)).items(), strict=True):
        for label, value in lines.items():
            points = [(step.step, number) for step in steps if (number := value(step)) is not None]
            if points:
                axes.plot([step for step, _ in points], [number for _, number in points], label=label, linewidth=1.0)
        axes.set_title(title, fontsize=10)
        if len(lines) > 1:
            axes.legend(fontsize=7)
    return figure


def step_panels(num_heads: int) -> dict[str, Lines]:
    """Return what each panel shows: its title, and its lines by label."""
    heads = range(num_heads)

    def loss(head: int) -> Callable[[JointStep], float | None]:
        return lambda step: step.head_losses[head]

    def accuracy(head: int, rank: int) -> Callable[[JointStep], float | None]:
        return lambda step: step.head_accuracies[head][rank - 1]

    return {
        "loss of each head, nats": {f"head {head + 1}": loss(head) for head in heads},
        "target is a head's first choice": {f"head {head + 1}": accuracy(head, 1) for head in heads},
        f"target among a head's {_MAX_RANK} best": {f"head {head + 1}": accuracy(head, _MAX_RANK) for head in heads},
        "the backbone's term, nats (KL, or loss on tokens)": {"backbone": lambda step: step.backbone_loss},
        "first choices of model and target agree": {"backbone": lambda step: step.agreement_rate},
        "lambda_0": {"lambda_0": lambda step: step.lambda_0},
        "learning rates": {"heads": lambda step: step.heads_learning_rate, "backbone": lambda step: step.backbone_learning_rate},
        "answer tokens/s": {"speed": lambda step: step.positions_per_s},
        "peak memory, MB": {"memory": lambda step: step.memory_bytes / 1e6},
    }
