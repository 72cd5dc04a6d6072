"""A sweep made ready: its trees, curves and heads, before anything is composed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from harness.compose.composer import Composer, KnotPrices, shared_knots, step_contexts
from harness.compose.curve import MeasuredCurve
from harness.compose.devices import (
    PredictedCurve,
    StepTimes,
    find_latency_records,
    measured_curves,
    roofline_error,
)
from harness.compose.families import resolve_families
from harness.compose.prices.fitted import step_models
from harness.compose.prices.measured import timed_curves
from harness.compose.replay import ReplayIndex
from harness.compose.search import METHODS, CostChoice, Price, SearchSpace, cached_choices
from harness.compose.trees import grow
from harness.errors import UserError
from harness.paths import resolve_path
from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import not_comparable
from harness.records.opened import open_trace
from harness.records.step_model import StepModel
from harness.records.sweep import CHOSEN, JOINT, RooflineError, SweepTree, SweepTrees, TreeRate
from harness.records.sweep_cells import Context, CurveLabel, FailedCell, composed_key
from harness.specs.hardware import HARDWARE_FILE, load_hardware
from harness.specs.shapes import SHAPES_FILE, load_shapes
from harness.specs.sweep import SweepSpec
from medusa_impl.tree import DraftTree


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """A sweep made ready: trees, curves, and the trees that the searches chose for each composed cell."""

    spec: SweepSpec
    composer: Composer
    calibration: ReplayIndex
    curves: tuple[StepTimes, ...]
    trees: tuple[SweepTree, ...]
    choices: Mapping[str, tuple[CostChoice, ...]]
    refused: tuple[FailedCell, ...]
    error: RooflineError | None
    model: StepModel | None = None
    run_tree: DraftTree | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def drafts(self) -> tuple[DraftTree, ...]:
        """Return the trees themselves, in the order of `trees`."""
        return tuple(sweep_tree.tree() for sweep_tree in self.trees)

    @cached_property
    def indices(self) -> Mapping[DraftTree, int]:
        """Return the index of each tree in `trees`."""
        return {tree: index for index, tree in enumerate(self.drafts)}

    @property
    def cells(self) -> tuple[tuple[StepTimes, Context, int], ...]:
        """Return the composed cells: curves, contexts, batches."""
        return tuple(
            (curve, context, batch)
            for curve in self.curves
            for context in self.spec.contexts
            for batch in self.spec.batches
        )


def plan_sweep(
    spec: SweepSpec, *, base_folder: Path | None, results: Path, cache: Path | None = None
) -> SweepPlan:
    """Load traces and curves, resolve every tree, and let the searches choose each cell's own.

    `cache` keeps what the searches found.
    Raises: UserError for what is missing or does not belong together.
    """
    trace_file, calibration_file = (
        resolve_path(name, base_folder=base_folder) for name in (spec.trace, spec.calibration_trace)
    )
    trace, calibration = open_trace(trace_file), ReplayIndex(open_trace(calibration_file))
    calibration.trace.require_same(
        backbone_sha256=trace.provenance.model_hash,
        heads_sha256=trace.provenance.heads_hash,
        where="calibration_trace",
    )
    records = find_latency_records(results, names=spec.measured.records) if spec.measured is not None else ()
    timed = timed_curves(results) if spec.predicted is not None else ()
    model = step_models(timed).get("cuda")  # every device of hardware.toml is a GPU
    curves, refused = gather_curves(spec, records, model=model)
    if not curves:
        raise UserError(
            found="no curve",
            need="a latency record, or devices to predict",
            where="the sweep",
            do="run medusa-repro latency",
        )
    known = sorted({*load_shapes(), *(curve.label.shape for curve in curves)})
    if spec.shape not in known:
        raise UserError(
            found=f"shape {spec.shape!r}", need=f"one of {known}, published or measured", where="the sweep"
        )
    lengths = step_contexts(ReplayIndex(trace).replay(DraftTree.root_only()))
    composer = Composer(trace, knots=shared_knots(curves, lengths), interval=spec.interval)
    trees = resolve_families(spec.trees, calibration=calibration, num_heads=spec.num_heads)
    run_tree = sampled_tree(spec, calibration)
    choices = choose_trees(spec, composer, calibration, curves, cache=cache)
    return SweepPlan(
        spec=spec,
        composer=composer,
        calibration=calibration,
        curves=curves,
        trees=with_chosen(trees, choices, also=run_tree),
        run_tree=run_tree,
        choices=choices,
        refused=refused,
        error=roofline_error(records),
        model=model,
        inputs={
            "trace": trace_file,
            "calibration_trace": calibration_file,
            "hardware.toml": HARDWARE_FILE,
            "shapes.toml": SHAPES_FILE,
            **{f"latency record {record.folder.name}": record.folder / "manifest.json" for record in records},
            **(model_inputs(model, results) if model is not None else {}),
        },
    )


def model_inputs(model: StepModel, results: Path) -> dict[str, Path]:
    """Return the manifest of every record that a step model was fitted on, by its name as an input."""
    latency = {path.parent.name: path for path in results.glob("latency/*/*/*/manifest.json")}
    runs = {path.parent.name: path for path in results.glob("*/*/*/manifest.json")}
    return {
        **{f"run {name}": runs[name] for name in model.sources if name in runs},
        **{f"latency record {name}": latency[name] for name in model.sources if name in latency},
    }


def gather_curves(
    spec: SweepSpec, records: Sequence[LatencyRecord], *, model: StepModel | None = None
) -> tuple[tuple[StepTimes, ...], tuple[FailedCell, ...]]:
    """Return every curve of a sweep, measured ones first, and what could not be predicted.

    Measured ones of machines that share no more than a name say which they are of. Predictions take the step
    model, or without one the roofline. Each that cannot be made is a failed cell.
    """
    dtypes = spec.measured.dtypes if spec.measured is not None else ()
    measured = [curve for record in records for curve in measured_curves(record, dtypes=dtypes)]
    curves: list[StepTimes] = [_told_apart(curve, among=measured) for curve in measured]
    refused: list[FailedCell] = []
    wanted, devices, shapes = spec.predicted, load_hardware(), load_shapes()
    if wanted is None:
        return tuple(curves), ()
    keys = tuple(devices) if wanted.devices == "all" else wanted.devices
    for kind, names, known in (("device", keys, devices), ("shape", wanted.shapes, shapes)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(found=f"{kind} {unknown[0]!r}", need=f"one of {sorted(known)}", where="predicted")
    for key, name, dtype in (
        (key, name, dtype) for name in wanted.shapes for key in keys for dtype in wanted.dtypes
    ):
        try:
            curves.append(
                PredictedCurve(key, devices[key], shapes[name], dtype=dtype, heads=wanted.heads, model=model)
            )
        except UserError as error:
            words = f"{key}, {name}, {dtype} (predicted)"
            refused.append(
                FailedCell(key=f"curve {words}", words=words, error_type="UserError", message=str(error))
            )
    return tuple(curves), tuple(refused)


def _told_apart(curve: MeasuredCurve, *, among: Iterable[MeasuredCurve]) -> MeasuredCurve:
    """Return a curve that says which machine of its device's name it is of, where another timed the same."""

    def is_another(other: CurveLabel) -> bool:
        if mine is None or other.machine is None or what(other) != what(curve.label):
            return False
        return not_comparable(mine, other.machine) is not None

    def what(label: CurveLabel) -> tuple[str, str, str]:
        return label.device, label.shape, label.dtype

    mine = curve.label.machine
    is_alone = mine is None or not any(is_another(other.label) for other in among)
    return curve if is_alone or mine is None else curve.of_which_machine(mine.which)


def choose_trees(
    spec: SweepSpec,
    composer: Composer,
    calibration: ReplayIndex,
    curves: Sequence[StepTimes],
    *,
    cache: Path | None,
) -> dict[str, tuple[CostChoice, ...]]:
    """Return what both searches choose for every composed cell.

    Steps are priced at the mean context of the calibration text's vanilla steps.
    """
    space = SearchSpace(calibration, max_nodes=spec.search.max_nodes, num_heads=max(spec.num_heads))
    usual = float(np.mean(step_contexts(calibration.replay(DraftTree.root_only()))))
    choices: dict[str, tuple[CostChoice, ...]] = {}
    for curve in curves:
        for context in spec.contexts:
            for batch in _searched_batches(spec, curve):
                price = KnotPrices(curve, knots=composer.knots, context=context, batch=batch).price_at(usual)
                if price(1, 0) is None:
                    continue  # the cell itself says that its curve does not reach
                # The key names all that a price depends on: another curve or text is searched anew.
                choices[composed_key(curve.label, context=context, batch=batch)] = cached_choices(
                    space.key,
                    curve_fingerprint=f"{curve.label.fingerprint} {context} {batch} {usual:.3f} "
                    f"{composer.knots.tolist()}",
                    folder=cache,
                    search=partial(search_both, space, price),
                )
    return choices


def _searched_batches(spec: SweepSpec, curve: StepTimes) -> list[int]:
    """Return at which batches trees are searched: the cells', and on measured curves the schedule's."""
    more = spec.break_even_batches if curve.label.kind == "measured" else ()
    return sorted({*spec.batches, *more})


def search_both(space: SearchSpace, price: Price) -> list[CostChoice]:
    """Return what both searches choose at a price, the one on joint hits first."""
    return [space.choose(method, price) for method in METHODS]


def sampled_tree(spec: SweepSpec, calibration: ReplayIndex) -> DraftTree | None:
    """Return the tree that the run settings share, grown on joint hits; None where nothing is sampled."""
    if spec.sampled is None:
        return None
    return grow(
        calibration.trace, num_nodes=spec.sampled.tree_nodes, values="joint", num_heads=max(spec.num_heads)
    ).tree


def with_chosen(
    trees: Sequence[SweepTree], choices: Mapping[str, Sequence[CostChoice]], *, also: DraftTree | None = None
) -> tuple[SweepTree, ...]:
    """Return the trees and after them those that searches chose, each tree once.

    The root alone is always among them, and so is `also`.
    """
    found = {sweep_tree.tree(): sweep_tree for sweep_tree in trees}
    if also is not None and also not in found:
        found[also] = SweepTree(paths=also.paths, num_heads=also.depth, families=(JOINT,))
    chosen = [choice.tree() for cell in choices.values() for choice in cell]
    for tree in (DraftTree.root_only(), *chosen):
        before = found.get(tree)
        if before is None:
            found[tree] = SweepTree(paths=tree.paths, num_heads=tree.depth, families=(CHOSEN,))
        elif CHOSEN not in before.families:
            found[tree] = before.model_copy(update={"families": (*before.families, CHOSEN)})
    return tuple(found.values())


def tree_rates(plan: SweepPlan) -> SweepTrees:
    """Return the plan's trees with their tokens/step on both traces.

    On the trace itself they have intervals.
    """
    rates = [
        TreeRate(batch=batch, tree=index, tokens_per_step=plan.composer.tokens_per_step(tree, batch=batch))
        for batch in sorted({1, *plan.spec.batches})
        for index, tree in enumerate(plan.drafts)
    ]
    calibrated = tuple(plan.calibration.replay(tree).tokens_per_step for tree in plan.drafts)
    return SweepTrees(trees=plan.trees, calibrated=calibrated, rates=tuple(rates))
