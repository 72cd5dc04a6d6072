"""What a run measures before its first trial: the device, the heads, step costs, rounding, and its trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from harness.compose.trees import resolve_trees
from harness.device.limits import measure_device_limits
from harness.device.trace import Text
from harness.errors import InvalidMeasurement, UserError
from harness.files import write_json
from harness.measure import probes
from harness.measure.rounding import measure_rounding
from harness.measure.session import Session
from harness.measure.trials import control_texts
from harness.paths import resolve_path
from harness.records.folder import file_of
from harness.records.probes import StepCost, StepCosts
from harness.records.run import (
    CALIBRATION_FILE,
    HEADS_CONTROL_FILE,
    ROUNDING_FILE,
    ArmTree,
    ArmTrees,
    RunRecord,
)
from harness.records.trace import Trace
from harness.specs.suite import BackboneName, FileTree, SuiteSpec
from medusa_impl.tree import DraftTree

Texts = Mapping[BackboneName, Sequence[Text]]


def prepare(
    session: Session, calibrations: Mapping[BackboneName, Trace | None], *, base_folder: Path | None
) -> dict[str, ArmTree]:
    """Return the arms' trees, with all that is measured before the trials written; a resume reads them back.

    Raises: InvalidMeasurement where the heads do not beat random ones.
    """
    folder, suite, engine = session.store.folder, session.suite, session.engine
    if (folder / "trees.json").exists():
        session.console.print(f"resuming {folder.name}")
        trees = RunRecord(folder).trees
        _check_same_files(suite, trees, base_folder=base_folder)
        return trees
    for backbone, calibration in calibrations.items():
        if calibration is not None:
            calibration.save(folder / file_of(CALIBRATION_FILE, backbone))
    session.console.print("measuring the device, the draft heads against random ones, and step costs")
    limits = measure_device_limits(session.device, engine.runner.backbone.dtype, clock=session.clock)
    write_json(folder / "device_limits.json", limits)
    texts = {backbone: control_texts(session, one) for backbone, one in session.engines.items()}
    _control_heads(session, texts)
    costs = probes.measure_step_costs(
        engine,
        suite.probes.step_nodes,
        context_tokens=suite.probes.step_context_tokens,
        repeats=suite.probes.step_repeats,
        clock=session.clock,
    )
    write_json(folder / "step_costs.json", StepCosts(costs=costs))
    trees = _choose_trees(session, calibrations, costs=costs, base_folder=base_folder)
    if engine.runner.backbone.dtype != torch.float32:
        _measure_rounding(session, texts, trees)
    # last of all: a resume takes it as a sign that the rest is there
    write_json(folder / "trees.json", ArmTrees(trees=trees))
    return trees


def _control_heads(session: Session, texts: Texts) -> None:
    """Write how the heads compare with random ones, and refuse to time any that do not beat them.

    Heads that no arm drafts with are not compared.
    """
    if not session.suite.drafts:
        return
    for backbone, engine in session.engines.items():
        control = probes.control_heads(engine, texts[backbone])
        write_json(session.store.folder / file_of(HEADS_CONTROL_FILE, backbone), control)
        if control.trained_top1[0] <= control.random_top1[0]:
            raise InvalidMeasurement(
                f"heads_beat_random: found top-1 {control.trained_top1[0]:.3f} of head 1 of the {backbone} "
                f"backbone on {control.num_positions} positions, need more than the "
                f"{control.random_top1[0]:.3f} of randomly weighted heads; nothing was timed"
            )


def _choose_trees(
    session: Session,
    calibrations: Mapping[BackboneName, Trace | None],
    *,
    costs: tuple[StepCost, ...],
    base_folder: Path | None,
) -> dict[str, ArmTree]:
    """Return the tree of every Medusa arm, in the order of the arms."""
    found: dict[str, ArmTree] = {}
    for backbone, engine in session.engines.items():
        found |= resolve_trees(
            session.suite.arms,
            calibration=calibrations[backbone],
            costs=costs,
            num_heads=engine.heads.num_heads,
            base_folder=base_folder,
            backbone=backbone,
        )
    return {arm.name: found[arm.name] for arm in session.suite.arms if arm.name in found}


def _measure_rounding(session: Session, texts: Texts, trees: Mapping[str, ArmTree]) -> None:
    """Write how far this precision's rounding moves logits, for each backbone."""
    session.console.print("measuring this precision's rounding")
    for backbone, engine in session.engines.items():
        own = [arm for arm in session.suite.arms if arm.backbone == backbone]
        own_trees = {arm.name: trees[arm.name].tree() for arm in own if arm.name in trees}
        write_json(
            session.store.folder / file_of(ROUNDING_FILE, backbone),
            measure_rounding(engine, texts[backbone], arms=own, trees=own_trees),
        )


def _check_same_files(suite: SuiteSpec, trees: Mapping[str, ArmTree], *, base_folder: Path | None) -> None:
    """Refuse to go on with a tree file that has changed since the run began."""
    for arm in suite.arms:
        if (
            isinstance(arm.tree, FileTree)
            and DraftTree.from_json(resolve_path(arm.tree.path, base_folder=base_folder))
            != trees[arm.name].tree()
        ):
            raise UserError(
                found=f"another tree in {Path(arm.tree.path).name}",
                need="the one that began the run",
                where=f"arm {arm.name!r}",
                do="restore it, or give the new tree another name",
            )
