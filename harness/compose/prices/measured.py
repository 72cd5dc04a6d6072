"""The measured curves that lie under a results folder, ready to be fitted and shown.

A latency record gives one curve a dtype, in the mode that decoding takes. A run timed its own steps as well:
where no latency record timed that shape on that machine, these stand in.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import get_args

from harness.compose.devices import measured_curves
from harness.compose.prices.fitted import TimedCurve, TimedStep
from harness.errors import UserError
from harness.records.folder import RecordKind, kind_of
from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import MeasuredMachine, not_comparable
from harness.records.opened import machine_of
from harness.records.probes import DeviceLimits, StepCost
from harness.records.provenance import DeviceInfo
from harness.records.run import RunRecord
from harness.specs.hardware import Limits, load_hardware, match_device
from harness.specs.latency import DtypeName, HeadsForm
from harness.specs.shapes import load_shapes


def timed_curves(results: Path) -> tuple[TimedCurve, ...]:
    """Return the newest measured curve of each machine, shape and dtype under a results folder.

    Machines of one name are one where `not_comparable` finds nothing between them. Never two curves of one:
    left out of a fit, a curve would be predicted from its twin.
    Raises: UserError for a record that is not as it was sealed.
    """
    return _newest_and_older(results)[0]


def older_curves(results: Path) -> tuple[TimedCurve, ...]:
    """Return the curves of latency records that a newer one of the same machine, shape and dtype follows.

    They show what an earlier engine took, and no fit rests on them. They come in the order of their paths.
    Raises: UserError for a record that is not as it was sealed.
    """
    return _newest_and_older(results)[1]


def _newest_and_older(results: Path) -> tuple[tuple[TimedCurve, ...], tuple[TimedCurve, ...]]:
    """Return the curves that stand for their machines, and those of latency records that a newer one follows.

    Where one name stands for several machines that timed a shape, each of their curves says which it is of.
    """
    folders = sorted(manifest.parent for manifest in results.glob("latency/*/*/*/manifest.json"))
    curves = [curve for folder in folders for curve in curves_of_latency(LatencyRecord.open(folder))]
    newest: list[TimedCurve] = []
    for curve in sorted(curves, key=lambda one: one.source, reverse=True):  # a name starts with its date
        if not any(curve.dtype == other.dtype and _are_of_one_machine(curve, other) for other in newest):
            newest.append(curve)
    older = [curve for curve in curves if not any(curve is one for one in newest)]
    newest = [curve for curve in curves if any(curve is one for one in newest)]
    for record in newest_runs(results):
        of_run = curve_of_run(record)
        if of_run is not None and not any(_are_of_one_machine(of_run, other) for other in newest):
            newest.append(of_run)
    shown = [*newest, *older]
    return tuple(_told_apart(one, among=shown) for one in newest), tuple(
        _told_apart(one, among=shown) for one in older
    )


def _are_of_one_machine(one: TimedCurve, other: TimedCurve) -> bool:
    """Return whether two curves are of one shape on one machine."""
    return _share_a_name(one, other) and _apart(one, other) is None


def _share_a_name(one: TimedCurve, other: TimedCurve) -> bool:
    return (one.device, one.shape) == (other.device, other.shape)


def _apart(one: TimedCurve, other: TimedCurve) -> str | None:
    if one.machine is None or other.machine is None:
        return None
    return not_comparable(one.machine, other.machine)


def _told_apart(curve: TimedCurve, *, among: Iterable[TimedCurve]) -> TimedCurve:
    """Return a curve that says which machine of its name it is of, where another timed the same there."""
    others = (one for one in among if one.dtype == curve.dtype and _share_a_name(curve, one))
    if curve.machine is None or not any(_apart(curve, one) for one in others):
        return curve
    return replace(curve, which_machine=curve.machine.which)


def newest_runs(results: Path) -> tuple[RunRecord, ...]:
    """Return the newest sealed run of every suite and machine, in the order of their paths.

    Runs with too few quiet blocks, whose times are not used, are passed over.

    A folder of older records may hold several machines: each has its newest.
    Raises: UserError for a run that is not as it was sealed.
    """
    kept: dict[Path, list[RunRecord]] = {}
    for manifest in sorted(results.glob("*/*/*/manifest.json"), reverse=True):
        if _kind(manifest.parent) != "suite":
            continue
        of_machine = kept.setdefault(manifest.parent.parent, [])
        record = RunRecord.open(manifest.parent)
        is_other = all(not_comparable(machine_of(record), machine_of(one)) for one in of_machine)
        if is_other and len(record.quiet_prompts) >= record.num_quiet_needed:
            of_machine.append(record)
    return tuple(sorted((one for found in kept.values() for one in found), key=lambda one: one.folder))


def _kind(folder: Path) -> RecordKind | None:
    """Return a record's kind; None for a folder of something else, or of a kind yet to come."""
    with contextlib.suppress(UserError):
        return kind_of(folder)
    return None


def curves_of_latency(record: LatencyRecord) -> tuple[TimedCurve, ...]:
    """Return a latency record's curves, one a dtype; none in a dtype whose limits are not known.

    A record that others disturbed has none.
    """
    if not record.is_quiet:
        return ()
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
                machine=MeasuredMachine.of(record.environment.device, [record.limits(label.dtype)]),
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
    quiet = (one for one in record.arm_steps if one.is_quiet(record.suite.disturbance))
    costs = (*(record.step_costs.costs if record.step_costs is not None else ()), *quiet)
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
        machine=machine_of(record),
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
