"""A training's step log as one picture, and the curves of an ablation's arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.errors import UserError
from harness.records.ablation import AblationRecord, StepPoint
from harness.report.figures.canvas import new_figure, save_figure
from medusa_impl.training_log import JointStep, read_step_log

CURVES_FILE = "curves.png"
_MAX_RANK = 10
_DPI = 110

Lines = dict[str, Callable[[JointStep], float | None]]

_PANELS: tuple[tuple[str, Callable[[StepPoint], float | None]], ...] = (
    ("loss of head 1, nats", lambda step: step.head_losses[0]),
    ("loss of the last head, nats", lambda step: step.head_losses[-1]),
    ("the backbone's term, nats (KL, or loss on tokens)", lambda step: step.backbone_loss),
    ("lambda_0", lambda step: step.lambda_0),
)


def draw_step_log(log: Path, picture: Path) -> None:
    """Draw a log of steps and write a PNG.

    Raises: UserError without matplotlib, or for a log that cannot be read or is empty.
    """
    steps = read_step_log(log)
    if not steps:
        raise UserError(found="an empty step log", need="at least one step", where=log.name)
    save_figure(step_log_figure(steps), picture, dpi=_DPI)


def step_log_figure(steps: Sequence[JointStep]) -> Any:
    """Return the picture as matplotlib's figure, nine panels; a quantity that a step lacks leaves a gap."""
    figure, panels = _panels(rows=3, columns=3, title=f"{len(steps)} steps")
    for axes, (title, lines) in zip(panels.flat, step_panels(len(steps[0].head_losses)).items(), strict=True):
        for label, value in lines.items():
            points = [(step.step, number) for step in steps if (number := value(step)) is not None]
            if points:
                axes.plot(
                    [step for step, _ in points], [number for _, number in points], label=label, linewidth=1.0
                )
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
        f"target among a head's {_MAX_RANK} best": {
            f"head {head + 1}": accuracy(head, _MAX_RANK) for head in heads
        },
        "the backbone's term, nats (KL, or loss on tokens)": {"backbone": lambda step: step.backbone_loss},
        "first choices of model and target agree": {"backbone": lambda step: step.agreement_rate},
        "lambda_0": {"lambda_0": lambda step: step.lambda_0},
        "learning rates": {
            "heads": lambda step: step.heads_learning_rate,
            "backbone": lambda step: step.backbone_learning_rate,
        },
        "answer tokens/s": {"speed": lambda step: step.positions_per_s},
        "peak memory, MB": {"memory": lambda step: step.memory_bytes / 1e6},
    }


def draw_curves(record: AblationRecord, path: Path) -> None:
    """Draw the curves of every arm, seeds averaged step by step, and write a PNG.

    Raises: UserError without matplotlib, or where no arm has a step log.
    """
    save_figure(curves_figure(record), path, dpi=_DPI)


def curves_figure(record: AblationRecord) -> Any:
    """Return the picture as matplotlib's figure; an arm has one colour in all panels.

    Raises: UserError as `draw_curves` does.
    """
    logs = {
        arm.name: [log for result in record.of(arm.name) if (log := record.steps(result))]
        for arm in record.spec.arms
    }
    if not any(logs.values()):
        raise UserError(found="no step log", need="at least one trained arm", where=record.folder.name)
    title = (
        f"{record.spec.name}: {record.spec.answer_tokens:,} answer tokens an arm, mean of "
        f"{len(record.spec.seeds)} seeds"
    )
    figure, panels = _panels(rows=2, columns=2, title=title)
    for axes, (title, value) in zip(panels.flat, _PANELS, strict=True):
        for number, (arm, runs) in enumerate(logs.items()):
            points = curve(runs, value)
            if points:
                axes.plot(
                    [step for step, _ in points],
                    [mean for _, mean in points],
                    label=arm,
                    linewidth=1.2,
                    color=f"C{number}",
                )
        axes.set_title(title, fontsize=10)
    panels.flat[0].legend(fontsize=8)
    return figure


def _panels(*, rows: int, columns: int, title: str) -> tuple[Any, Any]:
    """Return matplotlib's figure and its grid of axes, steps along the bottom of each.

    Raises: UserError without matplotlib.
    """
    figure = new_figure(width=5.5 * columns, height=3.5 * rows)
    from matplotlib.ticker import MaxNLocator

    panels: Any = figure.subplots(rows, columns)
    for axes in panels.flat:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    return figure, panels


def curve(
    runs: Sequence[Sequence[StepPoint]], value: Callable[[StepPoint], float | None]
) -> list[tuple[int, float]]:
    """Return a quantity by step, averaged over the seeds that have it there."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for step in run:
            if (number := value(step)) is not None:
                found.setdefault(step.step, []).append(number)
    return [(step, fmean(numbers)) for step, numbers in sorted(found.items())]
