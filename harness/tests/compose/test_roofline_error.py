"""How far predictions are off, by hand."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from harness.compose.roofline import Prediction, prediction_error
from harness.errors import UserError


def test_error_is_a_share_of_the_measured_time() -> None:
    slower = Prediction(measured_s=4.0, predicted_s=3.0)
    assert slower.ratio == pytest.approx(4 / 3)
    assert slower.error == -0.25
    assert Prediction(measured_s=4.0, predicted_s=5.0).error == 0.25


def test_median_and_worst_take_both_directions() -> None:
    pairs = [Prediction(measured_s=10.0, predicted_s=predicted_s) for predicted_s in (9.0, 12.0, 4.0, 10.0)]
    error = prediction_error(iter(pairs))
    assert error.num_points == 4
    assert error.median_error == pytest.approx((0.1 + 0.2) / 2)
    assert error.worst_error == pytest.approx(0.6)
    assert error.median_ratio == pytest.approx((10 / 9 + 1) / 2)


def test_a_perfect_prediction_has_no_error() -> None:
    error = prediction_error([Prediction(measured_s=0.5, predicted_s=0.5)])
    assert (error.median_error, error.worst_error, error.median_ratio) == (0.0, 0.0, 1.0)


def test_no_prediction_has_no_error_to_state() -> None:
    with pytest.raises(UserError, match="no prediction"):
        prediction_error([])


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_time_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        Prediction(measured_s=value, predicted_s=1.0)
    with pytest.raises(ValidationError):
        Prediction(measured_s=1.0, predicted_s=value)
