"""Measured step times beside predicted ones, and how far off the prediction is."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from pydantic import Field

from harness.errors import UserError
from harness.files import Frozen


class Prediction(Frozen):
    """One measured time and what the roofline predicts for it; the roofline is a lower bound, so `ratio` is seldom below 1."""

    measured_s: float = Field(gt=0, allow_inf_nan=False)
    predicted_s: float = Field(gt=0, allow_inf_nan=False)

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_s / self.predicted_s

    @property
    def error(self) -> float:
        """The prediction's relative error, negative where the device is slower than predicted."""
        return self.predicted_s / self.measured_s - 1


class PredictionError(Frozen):
    """How far predictions are off: absolute relative errors, as shares of the measured time.

    `median_ratio` is measured over predicted: what a prediction has to be multiplied by to be right half of the time.
    """

    num_points: int = Field(ge=1)
    median_error: float = Field(ge=0)
    worst_error: float = Field(ge=0)
    median_ratio: float = Field(gt=0)


def prediction_error(pairs: Iterable[Prediction]) -> PredictionError:
    """Return the median and the worst error of several predictions.

    Raises: UserError for none.
    """
    points = tuple(pairs)
    if not points:
        raise UserError(found="no prediction", need="at least one measured time beside its prediction")
    errors = [abs(point.error) for point in points]
    return PredictionError(
        num_points=len(points),
        median_error=median(errors),
        worst_error=max(errors),
        median_ratio=median(point.ratio for point in points),
    )
