"""Planted sampled cells of sweeps: for each form on a sweep, its figure on either side of the bound.

`plant` returns the tokens/step and the mean log-likelihood of every setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.specs.sweep import SampledSetting
from harness.tests.judge.claims.planted.planting import Planting, number

BySetting = Callable[[SampledSetting], float]
TRENDS = {"typical": 0.3, "rejection": -0.3}  # tokens/step a unit of temperature, as the paper has them
RATE, LOG_LIKELIHOOD = 2.5, -1.0


def _of_temperature(rule: str) -> Callable[[Any, float], dict[str, BySetting]]:
    """Let one rule's tokens/step have that slope over temperature, and the other's its own."""

    def plant(form: Any, slope: float) -> dict[str, BySetting]:
        trends = {**TRENDS, rule: slope}
        return {"rate": lambda setting: RATE + trends.get(setting.rule, 0.0) * setting.temperature}

    return plant


def _of_threshold(form: Any, slope: float) -> dict[str, BySetting]:
    return {"rate": lambda setting: RATE + slope * (setting.epsilon or 0.0)}


def _of_typical(form: Any, times: float) -> dict[str, BySetting]:
    return {
        "rate": lambda setting: RATE * (times if setting.rule == "typical" else 1.0),
        "likelihood": lambda setting: LOG_LIKELIHOOD,
    }


def _likelier(form: Any, nats: float) -> dict[str, BySetting]:
    return {
        "rate": lambda setting: RATE * (1.1 if setting.rule == "typical" else 1.0),
        "likelihood": lambda setting: LOG_LIKELIHOOD + (nats if setting.rule == "typical" else 0.0),
    }


SWEEPS: dict[str, tuple[Planting, ...]] = {
    "temperature_trend": (
        Planting(
            figure="tokens/step of typical acceptance a unit of temperature",
            plant=_of_temperature("typical"),
            holds=number(0.2),
            fails=number(-0.2),
            differ=("typical",),
        ),
        Planting(
            figure="tokens/step of rejection a unit of temperature",
            plant=_of_temperature("rejection"),
            holds=number(-0.2),
            fails=number(0.2),
            differ=("rejection",),
        ),
    ),
    "threshold_trend": (
        Planting(
            figure="tokens/step a unit of epsilon",
            plant=_of_threshold,
            holds=number(-0.5),
            fails=number(0.5),
            differ=("typical",),
        ),
    ),
    "typical_beats_rejection": (
        Planting(
            figure="tokens/step of typical acceptance over those of rejection",
            plant=_of_typical,
            holds=lambda form: (1.03 * form.bound,),
            fails=lambda form: (0.97 * form.bound,),
            differ=("typical",),
        ),
        Planting(
            figure="nats a token by which typical acceptance's text is likelier than rejection's",
            plant=_likelier,
            holds=lambda form: (0.9 * form.margin, -0.9 * form.margin),
            fails=lambda form: (1.1 * form.margin, -1.1 * form.margin),
            differ=("typical",),
        ),
    ),
}
