"""The step model's fitted values, and how far it was off where it was not fitted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.bounds import Amount, Count, Rate, Seconds
from harness.files import Frozen

PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
DeviceKind = Literal["cpu", "cuda"]


class EngineCosts(Frozen):
    """What the engine adds to the roofline on one kind of device; no field makes a step faster than it."""

    operator_s: Seconds = Field(
        description="seconds that each matrix product takes besides bytes and arithmetic: its launch, and "
        "the small kernels around it"
    )
    tree_layer_s: Seconds = Field(
        description="seconds that a layer takes in addition where a step has several nodes, for its mask"
    )
    product_share: PositiveShare = Field(
        description="share of the device's bandwidth that products with weights attain"
    )
    arithmetic_share: PositiveShare = Field(
        description="share of the device's matrix throughput that products with weights attain"
    )
    attention_share: PositiveShare = Field(
        description="share of the device's limits that attention attains for one node a row"
    )
    tree_attention_share: PositiveShare = Field(
        description="share of the device's limits that attention under a tree's mask attains"
    )
    vanilla_own_s: Seconds = Field(
        description="seconds of a vanilla step outside of the backbone: choice of the token, bookkeeping"
    )
    tree_own_s: Seconds = Field(
        description="seconds of a tree's step outside of backbone and heads: candidates, acceptance, "
        "compaction"
    )


class ErrorBand(Frozen):
    """Between which multiples of a prediction the measured values lay."""

    low: Amount = Field(description="lower bound of measured / predicted")
    high: Rate = Field(description="upper bound of measured / predicted")

    @model_validator(mode="after")
    def _in_order(self) -> ErrorBand:
        if self.low > self.high:
            raise ValueError(f"found a band from {self.low} to {self.high}, need the lower bound first")
        return self


class LeftOut(Frozen):
    """How far the model was off on one curve when it was fitted on all the others."""

    curve: str = Field(description="device, shape, dtype and mode of the curve")
    num_points: Count = Field(ge=1, description="times that were compared")
    median_ratio: Rate = Field(description="median of measured / predicted seconds of a step")
    roofline_ratio: Rate = Field(
        description="median of measured / roofline seconds of a step, the model without any fitted value"
    )
    seconds: ErrorBand = Field(description="bounds of 90 % of measured / predicted seconds of a step")
    overhead: ErrorBand | None = Field(
        description="bounds of 90 % of measured / predicted overhead: a step with a tree against a vanilla "
        "one; null where the curve has no such pair"
    )


class StepModel(Frozen):
    """A fit for one kind of device: its values, the curves it rests on, and its errors."""

    device_kind: DeviceKind = Field(description="cpu or cuda")
    costs: EngineCosts = Field(description="the values, fitted on all curves")
    curves: tuple[str, ...] = Field(description="the measured curves that the values were fitted on")
    sources: tuple[str, ...] = Field(description="folders of the records that the curves come from")
    left_out: tuple[LeftOut, ...] = Field(
        description="errors on each curve in turn, left out of the fit; empty with a single curve"
    )

    @property
    def seconds_band(self) -> ErrorBand | None:
        """Return the widest band of a step's seconds over the left-out curves; None with a single curve."""
        return _widest([one.seconds for one in self.left_out])

    @property
    def overhead_band(self) -> ErrorBand | None:
        """Return the widest band of an overhead over the left-out curves; None where none tells one."""
        return _widest([one.overhead for one in self.left_out if one.overhead is not None])


def _widest(bands: list[ErrorBand]) -> ErrorBand | None:
    if not bands:
        return None
    return ErrorBand(low=min(band.low for band in bands), high=max(band.high for band in bands))
