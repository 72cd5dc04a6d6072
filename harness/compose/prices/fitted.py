"""The step model fitted on measured curves, and judged on each curve in turn that was left out.

    minimise over costs:   sum over curves of  mean(ln(predicted / measured)^2) / TOLERANCE^2
                         + (ln product_share / PRIOR_SPREAD)^2  + ln(each other share)^2

The mean makes every curve count alike, however many points it has. The last line is what is believed before
anything is measured: that products come near the bandwidth. It is needed because a large model's vanilla step
alone cannot tell time that goes with its bytes from time that goes with its launches; where curves of several
sizes tell them apart, it hardly matters. A share that no curve depends on stays 1, the roofline's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from harness.compose.prices.kernels import ROOFLINE, KernelTimes
from harness.errors import UserError
from harness.records.machines.comparable import MeasuredMachine
from harness.records.step_model import DeviceKind, EngineCosts, ErrorBand, LeftOut, StepModel
from harness.specs.hardware import Limits
from harness.specs.latency import DtypeName, HeadsForm
from harness.specs.shapes import ModelShape

Floats = NDArray[np.float64]

TOLERANCE = 0.05  # mean error, in the logarithm, that weighs as much as a share one spread off
PRIOR_SPREAD = 0.2  # of ln(product_share): products attain 0.8 of the bandwidth or more in two cases of three
SMALLEST_SHARE = 0.01
LONGEST_S = 1.0  # of a launch or of a step's own code: far above any that was seen
BAND = (0.05, 0.95)  # quantiles of measured / predicted that bound a band
_SHARES = ("product_share", "arithmetic_share", "attention_share", "tree_attention_share")
_TIMES = ("operator_s", "tree_layer_s", "vanilla_own_s", "tree_own_s")
# Where the search starts, and the size of its first steps.
_START = {"operator_s": 1e-5, "tree_layer_s": 1e-5, "vanilla_own_s": 1e-4, "tree_own_s": 1e-3}
_START_SHARE, _SHARE_STEP = 0.9, 0.5
_MOST_TRIES = 500
_DIGITS, _SHORTEST_S = 3, 1e-9


@dataclass(frozen=True)
class TimedStep:
    """The medians of one size; None where that part was not timed.

    Units: seconds.
    """

    num_nodes: int
    num_heads: int
    context_tokens: int
    batch: int
    backbone_s: float
    heads_s: float | None = None
    step_s: float | None = None


@dataclass(frozen=True)
class TimedCurve:
    """Measured steps of one shape on one device in one dtype and mode, with that device's limits.

    `which_machine` tells machines of one name apart in words; it is empty where a name stands for one.
    """

    source: str
    kind: DeviceKind
    device: str
    shape: str
    sizes: ModelShape
    heads: HeadsForm
    dtype: DtypeName
    mode: str
    limits: Limits
    steps: tuple[TimedStep, ...]
    machine: MeasuredMachine | None = None
    which_machine: str = ""

    @property
    def machine_name(self) -> str:
        """Return the device's name, and which machine of that name it is where there are several."""
        return f"{self.device} ({self.which_machine})" if self.which_machine else self.device

    @property
    def name(self) -> str:
        """Return the curve in a few words."""
        return f"{self.machine_name}, {self.shape}, {self.dtype}, {self.mode}"

    def times(self, costs: EngineCosts) -> KernelTimes:
        """Return the model's times of this curve's shape on its device."""
        return KernelTimes(self.sizes, self.limits, costs=costs, heads=self.heads, dtype=self.dtype)

    def errors(self, costs: EngineCosts) -> Floats:
        """Return ln(predicted / measured) of every time that was measured: backbones, heads, whole steps."""
        times, found = self.times(costs), list[float]()
        for step in self.steps:
            at = {"context_tokens": step.context_tokens, "batch": step.batch}
            backbone_s = times.backbone_seconds(num_nodes=step.num_nodes, **at)
            heads_s = times.heads_seconds(num_heads=step.num_heads, batch=step.batch)
            found.append(math.log(backbone_s / step.backbone_s))
            if step.heads_s and step.num_heads:
                found.append(math.log(heads_s / step.heads_s))
            if step.step_s:
                whole_s = backbone_s + heads_s + times.own_seconds(num_nodes=step.num_nodes)
                found.append(math.log(whole_s / step.step_s))
        return np.array(found)

    def compared(self, costs: EngineCosts) -> dict[TimedStep, tuple[float, float]]:
        """Return measured and predicted seconds of every step.

        A whole step is compared where one was timed, else the backbone's pass.
        """
        times, pairs = self.times(costs), dict[TimedStep, tuple[float, float]]()
        for step in self.steps:
            at = {"context_tokens": step.context_tokens, "batch": step.batch}
            if step.step_s is not None:
                predicted_s = times.step_seconds(num_nodes=step.num_nodes, num_heads=step.num_heads, **at)
                pairs[step] = (step.step_s, predicted_s)
            else:
                predicted_s = times.backbone_seconds(num_nodes=step.num_nodes, **at)
                pairs[step] = (step.backbone_s, predicted_s)
        return pairs


def fit(curves: Sequence[TimedCurve]) -> EngineCosts:
    """Return the costs that explain the curves best.

    Raises: UserError for no curve, or curves of different kinds of devices.
    """
    if len({curve.kind for curve in curves}) != 1:
        kinds = " and ".join(sorted({curve.kind for curve in curves})) or "no curve"
        raise UserError(found=kinds, need="curves of one kind of device", where="the step model's fit")

    def residuals(values: Floats) -> Floats:
        costs = _costs_of(values)
        parts = [curve.errors(costs) for curve in curves]
        beliefs = np.log(values[: len(_SHARES)]) / np.array([PRIOR_SPREAD, 1.0, 1.0, 1.0])
        return np.concatenate([*(part / math.sqrt(len(part)) / TOLERANCE for part in parts), beliefs])

    start = np.array([*(_START_SHARE for _ in _SHARES), *(_START[name] for name in _TIMES)])
    scale = np.array([*(_SHARE_STEP for _ in _SHARES), *(_START[name] for name in _TIMES)])
    lower = np.array([*(SMALLEST_SHARE for _ in _SHARES), *(0.0 for _ in _TIMES)])
    upper = np.array([*(1.0 for _ in _SHARES), *(LONGEST_S for _ in _TIMES)])
    found = least_squares(residuals, start, bounds=(lower, upper), x_scale=scale, max_nfev=_MOST_TRIES)
    return _costs_of(_rounded(np.clip(found.x, lower, upper)))


def _rounded(values: Floats) -> Floats:
    """Return values to three digits, times to a nanosecond at most: what another machine's fit gives too."""
    rounded = [float(f"{value:.{_DIGITS - 1}e}") for value in values.tolist()]
    return np.array([value if value >= _SHORTEST_S else 0.0 for value in rounded])


def _costs_of(values: Floats) -> EngineCosts:
    return EngineCosts(**dict(zip((*_SHARES, *_TIMES), values.tolist(), strict=True)))


def left_out(curve: TimedCurve, costs: EngineCosts) -> LeftOut:
    """Return how far costs that were fitted without a curve are off on it."""
    pairs = curve.compared(costs)
    vanilla = {(step.context_tokens, step.batch): pair for step, pair in pairs.items() if step.num_nodes == 1}
    ratios, lower = (
        [measured_s / predicted_s for measured_s, predicted_s in found.values()]
        for found in (pairs, curve.compared(ROOFLINE))
    )
    overheads = [
        (measured_s / base[0]) / (predicted_s / base[1])
        for step, (measured_s, predicted_s) in pairs.items()
        if step.num_nodes > 1 and step.step_s and (base := vanilla.get((step.context_tokens, step.batch)))
    ]
    return LeftOut(
        curve=curve.name,
        num_points=len(ratios),
        median_ratio=median(ratios),
        roofline_ratio=median(lower),
        seconds=_band(ratios),
        overhead=_band(overheads) if overheads else None,
    )


def _band(ratios: Sequence[float]) -> ErrorBand:
    low, high = np.quantile(ratios, BAND).tolist()
    return ErrorBand(low=low, high=high)


def fitted_model(curves: Sequence[TimedCurve]) -> StepModel:
    """Return the fit on all curves of one kind of device, and its error on each curve that it has not seen.

    Raises: UserError as `fit` does.
    """
    costs = fit(curves)
    others = [(curve, [one for one in curves if one is not curve]) for curve in curves]
    return StepModel(
        device_kind=curves[0].kind,
        costs=costs,
        curves=tuple(curve.name for curve in curves),
        sources=tuple(dict.fromkeys(curve.source for curve in curves)),
        left_out=tuple(left_out(curve, fit(rest)) for curve, rest in others if rest),
    )


def step_models(curves: Iterable[TimedCurve]) -> dict[DeviceKind, StepModel]:
    """Return one model for each kind of device that was measured."""
    by_kind = sorted(curves, key=lambda curve: curve.kind)
    return {kind: fitted_model(tuple(same)) for kind, same in groupby(by_kind, key=lambda curve: curve.kind)}
