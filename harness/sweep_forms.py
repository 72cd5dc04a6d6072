"""The forms in which a claim can be judged on the record of a sweep, as validated data; each bound carries its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.files import Frozen

Margin = Annotated[float, Field(gt=0, lt=1)]


class _SweepForm(Frozen):
    """What every form carries: why its bounds, margins and settings are what they are."""

    reason: str = Field(min_length=1)


class ThresholdTrendForm(_SweepForm):
    """Over at least `min_epsilons` thresholds, delta their square root, tokens/step falls and likelihood rises: both slopes beyond 0."""

    test: Literal["threshold_trend"]
    temperature: float = Field(gt=0)
    min_epsilons: int = Field(ge=3)


class TypicalBeatsRejectionForm(_SweepForm):
    """Typical acceptance yields more than `bound` times rejection's tokens/step at one temperature, and its text is no less likely.

    Likelihoods are means a token under the original backbone, in nats; less by at most `margin` counts as no less.
    """

    test: Literal["typical_beats_rejection"]
    temperature: float = Field(gt=0)
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0)
    bound: float
    margin: Margin


class TemperatureTrendForm(_SweepForm):
    """Over at least `min_temperatures` tokens/step of typical acceptance rises and that of rejection falls: both slopes beyond 0."""

    test: Literal["temperature_trend"]
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0)
    min_temperatures: int = Field(ge=3)


SweepForm = Annotated[ThresholdTrendForm | TypicalBeatsRejectionForm | TemperatureTrendForm, Field(discriminator="test")]
