"""The measured curves that lie under a results folder, ready to be fitted and shown.

A latency record gives one curve a dtype, in the mode that decoding takes. A run timed its own steps as well:
where no latency record timed that shape on that device, these stand in.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import get_args

from harness.compose.devices import measured_curves
from harness.compose.prices.fitted import TimedCurve, TimedStep
from harness.errors import UserError
from harness.records.folder import kind_of
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits, StepCost
from harness.records.provenance import DeviceInfo
from harness.records.run import RunRecord
from harness.specs.hardware import Limits, load_hardware, match_device
from harness.specs.latency import DtypeName, HeadsForm
from harness.specs.shapes import load_shapes


def timed_curves(results: Path) -> tuple[TimedCurve, ...]:
    """Return the newest measured curve of each device, shape and dtype under a results folder.

    Never two of one kind: left out of a fit, a curve would be predicted from its twin.
    Raises: UserError for a record that is not as it was sealed.
    """
    found = list(_newest(_latency_curves(results)).values())
    known = {(curve.device, curve.shape) for curve in found}
    for record in newest_runs(results):
        curve = curve_of_run(record)
        if curve is not None and (curve.device, curve.shape) not in known:
            known.add((curve.device, curve.shape))
            found.append(curve)
    return tuple(found)


def older_curves(results: Path) -> tuple[TimedCurve, ...]:
    """Return the curves of latency records that a newer one of the same device, shape and dtype follows.

    They show what an earlier engine took, and no fit rests on them. They come in the order of their paths.
    Raises: UserError for a record that is not as it was sealed.
    """
    curves = _latency_curves(results)
    newest = _newest(curves).values()
    return tuple(curve for curve in curves if curve not in newest)


def _latency_curves(results: Path) -> tuple[TimedCurve, ...]:
    folders = sorted(manifest.parent for manifest in results.glob("latency/*/*/*/manifest.json"))
    return tuple(curve for folder in folders for curve in curves_of_latency(LatencyRecord.open(folder)))


def _newest(curves: Iterable[TimedCurve]) -> dict[tuple[str, str, str], TimedCurve]:
    """Return the newest curve of each device, shape and dtype; a record's name starts with its date."""
    newest: dict[tuple[str, str, str], TimedCurve] = {}
    for curve in curves:
        key = (curve.device, curve.shape, curve.dtype)
        if key not in newest or curve.source > newest[key].source:
            newest[key] = curve
    return newest


def newest_runs(results: Path) -> tuple[RunRecord, ...]:
    """Return the newest sealed run of every suite and machine, in the order of their paths.

    Raises: UserError for a run that is not as it was sealed.
    """
    newest: dict[tuple[str, str], Path] = {}
    for manifest in sorted(results.glob("*/*/*/manifest.json"), key=lambda path: path.parent.name):
        with contextlib.suppress(UserError):  # a folder of something else, or of a kind yet to come
            if kind_of(manifest.parent) == "suite":
                newest[manifest.parts[-4], manifest.parts[-3]] = manifest.parent
    return tuple(RunRecord.open(newest[key]) for key in sorted(newest))


def curves_of_latency(record: LatencyRecord) -> tuple[TimedCurve, ...]:
    """Return a latency record's curves, one a dtype; none in a dtype whose limits are not known."""
    facts, found = record.facts, list[TimedCurve]()
    heads = HeadsForm(
        num_heads=max(facts.num_heads, 1),
        num_layers=max(facts.num_head_layers, 1),
        architecture=facts.head_architecture,
    )
    for curve in measured_curves(record):
        label = curve.label
        limits = limits_of(label.device, label.dtype, measured=record.limits(label.dtype))
        if limits is None or label.mode is None:
            continue
        points = [
            point
            for point in record.points
            if (point.dtype, point.mode) == (label.dtype, label.mode) and point.backbone_s
        ]
        found.append(
            TimedCurve(
                source=record.folder.name,
                kind=record.environment.device.kind,
                device=label.device,
                shape=facts.name,
                sizes=facts.roofline_shape,
                heads=heads,
                dtype=label.dtype,
                mode=label.mode,
                limits=limits,
                steps=tuple(
                    TimedStep(
                        num_nodes=point.num_nodes,
                        num_heads=point.num_heads,
                        context_tokens=point.context_tokens,
                        batch=point.batch,
                        backbone_s=median(point.backbone_s),
                        heads_s=median(point.heads_s) if point.heads_s else None,
                        step_s=median(point.step_s) if point.step_s else None,
                    )
                    for point in points
                ),
            )
        )
    return tuple(found)


def curve_of_run(record: RunRecord) -> TimedCurve | None:
    """Return the steps that a run timed apart from its trials.

    None where it timed none, or where its model is no published shape, or its heads or limits are not known.
    """
    environment, shapes = record.environment, load_shapes()
    recipe = environment.heads_provenance.get("recipe", {})
    dtype: DtypeName | None = next((name for name in get_args(DtypeName) if name == environment.dtype), None)
    if environment.model_name not in shapes or not recipe or dtype is None:
        return None
    device = _device_of(environment.device)
    limits = limits_of(device, dtype, measured=record.device_limits)
    costs = (*(record.step_costs.costs if record.step_costs is not None else ()), *record.arm_steps)
    if limits is None or not costs:
        return None
    return TimedCurve(
        source=record.folder.name,
        kind=environment.device.kind,
        device=device,
        shape=environment.model_name,
        sizes=shapes[environment.model_name].roofline_shape,
        heads=HeadsForm.model_validate(
            {name: recipe[name] for name in HeadsForm.model_fields if name in recipe}
        ),
        dtype=dtype,
        mode=environment.engine,
        limits=limits,
        steps=_steps_of(costs),
    )


def limits_of(device: str, dtype: DtypeName, *, measured: DeviceLimits | None) -> Limits | None:
    """Return what a device can do in a dtype: its data sheet's figures, else what was measured.

    A device of `hardware.toml` takes its bandwidth from there in every dtype, so that attained shares are of
    the same figure as a prediction for another device; its throughput only in the dtypes that the sheet is
    of. None where neither tells.
    """
    sheet = load_hardware().get(device)
    if sheet is not None and dtype in sheet.dtypes:
        return sheet.limits
    if measured is None:
        return None
    bytes_per_s = measured.read_bandwidth_bytes_per_s if sheet is None else sheet.limits.bytes_per_s
    return Limits(bytes_per_s=bytes_per_s, flop_per_s=measured.matmul_flop_per_s)


def _steps_of(costs: Iterable[StepCost]) -> tuple[TimedStep, ...]:
    """Return the medians of each size, whichever arm it was."""
    backbone, whole = (defaultdict[tuple[int, int, int], list[float]](list) for _ in range(2))
    for cost in costs:
        sizes = (cost.num_nodes, cost.num_heads, cost.context_tokens)
        backbone[sizes] += cost.backbone_s
        whole[sizes] += cost.step_s
    return tuple(
        TimedStep(
            num_nodes=sizes[0],
            num_heads=sizes[1],
            context_tokens=sizes[2],
            batch=1,
            backbone_s=median(seconds),
            step_s=median(whole[sizes]) if whole[sizes] else None,
        )
        for sizes, seconds in sorted(backbone.items())
    )


def _device_of(device: DeviceInfo) -> str:
    return match_device(device.name) or device.name
