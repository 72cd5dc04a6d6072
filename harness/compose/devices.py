"""What a step costs on a device: measured by a latency record, or predicted by the step model.

Both answer one question, `seconds(num_nodes, num_heads, context_tokens, batch)`, and say what they are. A
prediction carries the error that its model showed on curves that it was not fitted on; figures that others
published are kept apart from both, in `specs/quoted.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Literal, Protocol

from harness.compose.curve import MeasuredCurve, step_cost_of
from harness.compose.prices.kernels import KernelTimes
from harness.compose.prices.redrawn import Floats
from harness.compose.roofline import (
    Prediction,
    heads_seconds,
    measured_limits,
    predict,
    prediction_error,
    step_seconds,
)
from harness.errors import UserError
from harness.files import canonical_sha256
from harness.records.latency import DTYPE_BYTES, LatencyPoint, LatencyRecord, facts_of_shape
from harness.records.step_model import StepModel
from harness.records.sweep import RooflineError
from harness.records.sweep_cells import CurveLabel
from harness.specs.hardware import DeviceSpec, Limits, load_hardware, match_device
from harness.specs.latency import DtypeName, HeadsForm, ModeName, PointKey
from harness.specs.shapes import ShapeSpec, load_shapes

# Each length is 4/3 or 3/2 of the one before: lines between them stay close to the roofline.
_PREDICTED_CONTEXTS = tuple(
    sorted({*(2**power for power in range(18)), *(3 * 2**power for power in range(16))})
)
DEFAULT_SHAPE = "smollm2-135m-instruct"  # of the embedded model
_MEMORY_SHARE = 0.9  # of a device's memory that weights, cache and logits may fill


class StepTimes(Protocol):
    """A device's curve, measured or predicted.

    `contexts` are the lengths between which times are linear. At a length outside of them the nearest one is
    taken, and the report says so. `step_redrawn` holds the whole steps that other rounds of timing would have
    given; `num_rounds` and it are None where no timing shows its own error.
    """

    @property
    def label(self) -> CurveLabel: ...
    @property
    def contexts(self) -> tuple[int, ...]: ...
    @property
    def num_rounds(self) -> int | None: ...
    def step_redrawn(
        self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int
    ) -> Floats | None: ...
    def body_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None: ...
    def heads_seconds(self, *, num_heads: int, batch: int) -> float | None: ...
    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None: ...


class PredictedCurve:
    """The predicted curve of one device and shape: the step model's on the device's data sheet.

    Without a `model` it is the roofline alone, a lower bound whose error is not known: without launches,
    softmax, candidates and acceptance. Its answers are None where weights, cache and logits do not fit into
    the device's memory.
    Raises: UserError for a dtype that the device has no published throughput for, or a shape that does not
    fit at all.
    """

    def __init__(
        self,
        key: str,
        device: DeviceSpec,
        shape: ShapeSpec,
        *,
        dtype: DtypeName,
        heads: HeadsForm,
        model: StepModel | None = None,
    ) -> None:
        if dtype not in device.dtypes:
            raise UserError(
                found=f"{dtype} on {key}",
                need=f"{' or '.join(device.dtypes)}: no other throughput is published there",
                where="the prediction",
            )
        self._device, self._shape, self._heads, self._dtype = device, shape, heads, dtype
        self.model = model
        self._times = (
            KernelTimes(shape.roofline_shape, device.limits, costs=model.costs, heads=heads, dtype=dtype)
            if model is not None
            else None
        )
        self._facts = facts_of_shape(shape, heads=heads, random_weights=True)
        self._label = CurveLabel(
            device=key,
            shape=shape.name,
            dtype=dtype,
            mode=None,
            kind="predicted",
            source="roofline on hardware.toml"
            if model is None
            else f"step model of {len(model.curves)} measured curves on hardware.toml",
            fingerprint=canonical_sha256(
                [
                    device.model_dump(mode="json"),
                    shape.model_dump(mode="json"),
                    heads.model_dump(mode="json"),
                    dtype,
                    *([model.model_dump(mode="json")] if model is not None else []),
                ]
            )[:16],
        )
        if not self._fits(num_nodes=1, context_tokens=1, batch=1):
            needed = self._needed_bytes(num_nodes=1, context_tokens=1, batch=1) / 1e9
            raise UserError(
                found=f"{shape.name} in {dtype}, which needs {needed:.0f} GB",
                need=f"at most {_MEMORY_SHARE:g} of the {device.memory_gb} GB of {key}",
                where="the prediction",
            )

    @property
    def label(self) -> CurveLabel:
        """Return what the curve is of."""
        return self._label

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Return a grid so fine that lines between its points stay within half a percent of the roofline."""
        limit = self._shape.max_positions
        return (*(context for context in _PREDICTED_CONTEXTS if context < limit), limit)

    @property
    def num_rounds(self) -> None:
        """Return None: the error of a prediction is its model's band."""
        return None

    def step_redrawn(self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int) -> None:
        """Return None, as `num_rounds`."""
        return None

    def body_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None:
        """Return a whole step less its heads; the roofline has nothing but the backbone there."""
        backbone_s = self.backbone_seconds(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch)
        if backbone_s is None or self._times is None:
            return backbone_s
        return backbone_s + self._times.own_seconds(num_nodes=num_nodes)

    def heads_seconds(self, *, num_heads: int, batch: int) -> float | None:
        """Return the time of the heads."""
        if self._times is not None:
            return self._times.heads_seconds(num_heads=num_heads, batch=batch)
        form = self._heads
        return heads_seconds(
            self._shape.roofline_shape,
            self._device.limits,
            num_heads=num_heads,
            num_layers=form.num_layers,
            architecture=form.architecture,
            batch=batch,
            dtype_bytes=DTYPE_BYTES[self._dtype],
        )

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int) -> float | None:
        """Return the backbone's step over `num_nodes` after `context_tokens` kept ones."""
        if not self._fits(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch):
            return None
        if self._times is not None:
            return self._times.backbone_seconds(
                num_nodes=num_nodes, context_tokens=context_tokens, batch=batch
            )
        return step_seconds(
            self._shape.roofline_shape,
            self._device.limits,
            num_nodes=num_nodes,
            context_tokens=context_tokens + num_nodes,
            batch=batch,
            dtype_bytes=DTYPE_BYTES[self._dtype],
        )

    def _fits(self, *, num_nodes: int, context_tokens: int, batch: int) -> bool:
        needed = self._needed_bytes(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch)
        return needed <= _MEMORY_SHARE * self._device.memory_gb * 1e9

    def _needed_bytes(self, *, num_nodes: int, context_tokens: int, batch: int) -> int:
        key = PointKey(
            dtype=self._dtype,
            mode="eager",
            num_nodes=num_nodes,
            num_heads=self._heads.num_heads,
            context_tokens=context_tokens,
            batch=batch,
        )
        return self._facts.needed_bytes(key, packs=False)


def find_latency_records(
    results: Path, *, names: Sequence[str] | Literal["all"] = "all"
) -> tuple[LatencyRecord, ...]:
    """Return the newest sealed latency record of each spec and machine under a results folder.

    They come in the order of their paths. Records that others disturbed are passed over.
    Raises: UserError for a name of which there is no sealed record, or a record that was altered.
    """
    newest: dict[tuple[str, str], Path] = {}
    for manifest in sorted(results.glob("latency/*/*/*/manifest.json"), key=lambda path: path.parent.name):
        spec, machine = manifest.parts[-4], manifest.parts[-3]
        if (names == "all" or spec in names) and LatencyRecord.open(manifest.parent).is_quiet:
            newest[spec, machine] = manifest.parent
    missing = [] if names == "all" else [name for name in names if name not in {spec for spec, _ in newest}]
    if missing:
        need = "a sealed record of that spec under results/latency, taken while others left the machine alone"
        raise UserError(
            found=f"no latency record {missing[0]!r}",
            need=need,
            where="measured.records",
            do="run medusa-repro latency",
        )
    return tuple(LatencyRecord.open(newest[key]) for key in sorted(newest))


def measured_curves(record: LatencyRecord, *, dtypes: Sequence[str] = ()) -> tuple[MeasuredCurve, ...]:
    """Return a record's curves, one a dtype, in the mode that decoding takes there.

    `dtypes` narrows them down.
    Raises: UserError for a record that others disturbed, by the rule of its spec.
    """
    if not record.is_quiet:
        raise UserError(
            found="times taken while others used the machine",
            need="a record that the rule of its spec calls quiet",
            where=record.folder.name,
            do="run medusa-repro latency again with nothing else running",
        )
    timed = dict.fromkeys((point.dtype, point.mode) for point in record.points if point.step_s)
    curves = []
    for dtype in dict.fromkeys(dtype for dtype, _ in timed):
        if not dtypes or dtype in dtypes:
            curves.append(
                MeasuredCurve(
                    record, dtype=dtype, mode=_decoding_mode(record, dtype=dtype, timed=tuple(timed))
                )
            )
    return tuple(curves)


def _decoding_mode(
    record: LatencyRecord, *, dtype: DtypeName, timed: Iterable[tuple[DtypeName, ModeName]]
) -> ModeName:
    """Return the mode that `auto` took, else the one with the quickest vanilla step.

    The second holds where the record does not say what `auto` took, or did not time it.
    """
    modes = [mode for other, mode in timed if other == dtype]
    auto = record.modes.auto.get(dtype) if record.modes is not None else None
    if auto in modes:
        return auto

    def vanilla_s(mode: ModeName) -> float:
        times = [
            s
            for point in record.points
            if (point.dtype, point.mode, point.num_nodes) == (dtype, mode, 1)
            for s in point.step_s
        ]
        return median(times) if times else float("inf")

    return min(modes, key=vanilla_s)


def find_curves(
    name: str,
    *,
    results: Path,
    shape: str | None,
    dtype: str | None,
    heads: HeadsForm,
    model: StepModel | None = None,
) -> tuple[StepTimes, ...]:
    """Return the curves that a name on the command line means.

    It is a device of `hardware.toml` by key or driver's name, or a latency record by its folder or by the
    folder of its machine under results/latency. A device's measured curves of the shape come first, then its
    prediction. Without a shape, a record gives the curves that it has, and a device those of `DEFAULT_SHAPE`.
    `model` is what predictions take; without it they are the roofline's.
    Raises: UserError where nothing has that name, or not for that shape or dtype.
    """
    if Path(name).is_dir() and (Path(name) / "manifest.json").exists():
        return _wanted(measured_curves(LatencyRecord.open(Path(name))), shape=shape, dtype=dtype)
    devices, shapes = load_hardware(), load_shapes()
    key = name if name in devices else match_device(name, devices)
    found: list[StepTimes] = []
    for record in find_latency_records(results):
        for curve in measured_curves(record):
            if record.folder.parent.name == name or (
                curve.label.device in (key, name) and curve.label.shape == (shape or DEFAULT_SHAPE)
            ):
                found.append(curve)
    if key is not None:
        published = shape or DEFAULT_SHAPE
        if published not in shapes:
            raise UserError(
                found=f"shape {shape!r}", need=f"one of {sorted(shapes)}", where="the command line"
            )
        predicted: DtypeName = "bfloat16" if dtype == "bfloat16" else "float16"
        found.append(
            PredictedCurve(key, devices[key], shapes[published], dtype=predicted, heads=heads, model=model)
        )
    if not found:
        need = f"one of {sorted(devices)}, or a machine or record under results/latency"
        raise UserError(found=f"device {name!r}", need=need, where="the command line")
    return _wanted(found, shape=shape, dtype=dtype)


def _wanted(curves: Sequence[StepTimes], *, shape: str | None, dtype: str | None) -> tuple[StepTimes, ...]:
    wanted = tuple(curves)
    for key, value in (("shape", shape), ("dtype", dtype)):
        known = sorted({str(getattr(curve.label, key)) for curve in wanted})
        wanted = tuple(curve for curve in wanted if value is None or getattr(curve.label, key) == value)
        if not wanted:
            raise UserError(found=f"{key} {value!r}", need=f"one of {known}", where="the command line")
    return wanted


def roofline_error(records: Iterable[LatencyRecord]) -> RooflineError | None:
    """Return the roofline's error over all points of the modes that decoding takes.

    A device of `hardware.toml` is predicted from its data sheet in half precision, as unmeasured devices are;
    any other from the limits measured in the record itself. None where no record can tell.
    """
    seconds, costs, devices, sources = (
        list[Prediction](),
        list[Prediction](),
        list[str](),
        list[Literal["measured", "data sheet"]](),
    )
    sheets = load_hardware()
    for record in records:
        for curve in measured_curves(record):
            label = curve.label
            limits, source = _limits_of(record, label, sheets)
            points = [
                p for p in record.points if (p.dtype, p.mode) == (label.dtype, label.mode) and p.backbone_s
            ]
            if limits is None or not points:
                continue
            made = {point.key: predict(record, point, limits) for point in points}
            seconds += made.values()
            costs += _step_costs(points, made)
            if label.device not in devices:
                devices.append(label.device)
                sources.append(source)
    if not seconds:
        return None
    return RooflineError(
        devices=tuple(devices),
        limits=tuple(sources),
        seconds=prediction_error(seconds),
        step_cost=prediction_error(costs) if costs else None,
    )


def _limits_of(
    record: LatencyRecord, label: CurveLabel, sheets: Mapping[str, DeviceSpec]
) -> tuple[Limits | None, Literal["measured", "data sheet"]]:
    """Return what to predict a device from, and where that comes from."""
    if label.device in sheets and label.dtype in sheets[label.device].dtypes:
        return sheets[label.device].limits, "data sheet"
    return measured_limits(record, label.dtype), "measured"


def _step_costs(points: Sequence[LatencyPoint], made: Mapping[PointKey, Prediction]) -> list[Prediction]:
    """Return measured and predicted step costs of the points of several nodes.

    Points whose group has no vanilla point are left out.
    """
    vanilla = {point.group: made[point.key].predicted_s for point in points if point.num_nodes == 1}
    found = []
    for point in points:
        measured = (
            step_cost_of(points, num_nodes=point.num_nodes, like=point) if point.num_nodes > 1 else None
        )
        if measured is not None:
            found.append(
                Prediction(
                    measured_s=measured, predicted_s=made[point.key].predicted_s / vanilla[point.group]
                )
            )
    return found
