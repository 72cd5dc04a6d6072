"""The picture of a training: one panel a quantity of the log, one line a head."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.report.figures.training import draw_step_log, step_log_figure, step_panels
from medusa_impl.training_log import JointStep


def logged(step: int, *, learns: bool) -> JointStep:
    accuracies = tuple((0.1 * step, *([0.1 * step + 0.2] * 9)) for _ in range(2))
    return JointStep(
        step=step,
        num_steps=4,
        loss=3.0,
        backbone_loss=0.01 * step if learns else None,
        agreement_rate=0.9 if learns else None,
        head_losses=(3.0 / step, None if step == 1 else 4.0 / step),
        head_accuracies=accuracies,
        backbone_weight=float(learns),
        lambda_0=0.1 * step,
        heads_learning_rate=1e-3 * step,
        backbone_learning_rate=1e-4 * step,
        num_positions=10,
        positions_per_s=100.0 + step,
        memory_bytes=step * 10**6,
    )


STEPS = tuple(logged(step, learns=step > 2) for step in (1, 2, 3, 4))


def test_every_quantity_of_the_log_has_its_panel() -> None:
    pytest.importorskip("matplotlib", reason="pictures need medusa-repro[plots]")
    drawn = {axes.get_title(): axes.get_lines() for axes in step_log_figure(STEPS).axes}
    assert list(drawn) == list(step_panels(2)) and len(drawn) == 9

    def points(title: str, line: int = 0) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in zip(*drawn[title][line].get_data(), strict=True)]

    assert points("loss of each head, nats") == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    assert points("loss of each head, nats", 1) == [(2, 2.0), (3, 4 / 3), (4, 1.0)], (
        "a step without a target leaves a gap"
    )
    assert points("the backbone's term, nats (KL, or loss on tokens)") == [(3, 0.03), (4, 0.04)], (
        "it begins where the backbone learns"
    )
    assert points("target is a head's first choice")[3] == pytest.approx((4, 0.4))
    assert points("target among a head's 10 best")[3] == pytest.approx((4, 0.6))
    assert points("learning rates", 1)[0] == (1, 1e-4) and points("peak memory, MB")[1] == (2, 2.0)
    assert points("answer tokens/s")[0] == (1, 101.0) and points("first choices of model and target agree")[
        0
    ] == (3, 0.9)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text("")
    with pytest.raises(UserError, match="an empty step log"):
        draw_step_log(tmp_path / "steps.jsonl", tmp_path / "curves.png")
