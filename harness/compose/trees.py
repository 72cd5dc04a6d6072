"""From a suite's tree specifications to trees, with where each came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.compose.replay import ReplayIndex
from harness.errors import UserError
from harness.paths import resolve_path
from harness.records.probes import StepCost
from harness.records.run import ArmTree
from harness.records.trace import Trace
from harness.specs.suite import (
    ArmSpec,
    BackboneName,
    CartesianTree,
    ChainTree,
    FastestTree,
    FileTree,
    SearchedTree,
    SuiteSpec,
)
from medusa_impl.tree import DraftTree, largest_cartesian
from medusa_impl.tree_search import (
    GrownTree,
    best_size_for_cost,
    grow_by_joint_hits,
    grow_by_marginals,
    marginal_accuracies,
)

MAX_RANK = 32  # the search considers each head's 32 best tokens
_SEARCH_SIZES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256)


def grow(
    trace: Trace,
    *,
    num_nodes: int,
    values: str,
    num_heads: int | None = None,
    max_rank: int = MAX_RANK,
    max_depth: int | None = None,
) -> GrownTree:
    """Grow a tree on a calibration trace, by head accuracies or by joint hits.

    `values` is `marginals`, which adds up products of the heads' accuracies, as the paper does, or `joint`,
    how often all of a path was right. Without `num_heads` all heads are used.
    """
    ranks = trace.ranks[:, :num_heads]
    if values == "marginals":
        accuracies = marginal_accuracies(ranks, max_rank=max_rank)
        return grow_by_marginals(accuracies, num_nodes=num_nodes, max_depth=max_depth)
    return grow_by_joint_hits(ranks, num_nodes=num_nodes, max_rank=max_rank, max_depth=max_depth)


def best_widths(calibration: ReplayIndex, *, max_nodes: int, num_heads: int) -> tuple[int, ...]:
    """Return the widths of the Cartesian tree with the most tokens/step on the calibration trace.

    It has at most `max_nodes` nodes.
    """
    return largest_cartesian(
        num_heads,
        max_nodes,
        value=lambda widths: calibration.replay(DraftTree.cartesian(widths)).tokens_per_step,
    )


def fastest_tree(
    trace: Trace, *, costs: tuple[StepCost, ...], max_nodes: int, num_heads: int
) -> tuple[DraftTree, str]:
    """Return the nested tree with the most calibrated tokens a second here, and how it was chosen."""
    grown = grow(trace, num_nodes=max_nodes, values="joint", num_heads=num_heads)
    index = ReplayIndex(trace)
    measured = sorted(
        (cost.num_nodes, float(np.median(cost.step_s))) for cost in costs if cost.arm is None and cost.step_s
    )
    if not measured:
        raise UserError(
            found="no step times of this machine",
            need="step costs measured before the trees are chosen",
            where="the run",
        )
    nodes, seconds = zip(*measured, strict=True)
    # Between the timed sizes only: np.interp would hold the end's time for larger trees and flatter them.
    sizes = [size for size in _SEARCH_SIZES if nodes[0] <= size <= min(max_nodes, nodes[-1])]
    choice = best_size_for_cost(
        grown,
        lambda tree: index.replay(tree).tokens_per_step,
        cost=lambda size: float(np.interp(size, nodes, seconds)),
        sizes=sizes,
    )
    return (
        choice.best.tree,
        f"joint hits of the calibration trace, size chosen from {len(sizes)} by this machine's step times",
    )


def resolve_trees(
    arms: Sequence[ArmSpec],
    *,
    calibration: Trace | None,
    costs: tuple[StepCost, ...],
    num_heads: int,
    base_folder: Path | None,
    backbone: BackboneName = "original",
) -> dict[str, ArmTree]:
    """Return the tree of every Medusa arm on one backbone; calibration trace and heads are that one's.

    Raises: UserError where a searched tree has no calibration trace, or a tree is deeper than the heads.
    """
    resolved: dict[str, ArmTree] = {}
    index = ReplayIndex(calibration) if calibration is not None else None
    for arm in arms:
        if arm.tree is None or arm.backbone != backbone:
            continue
        heads = min(num_heads, arm.num_heads or num_heads)
        tree, origin = _resolve(arm, calibration, costs=costs, num_heads=heads, base_folder=base_folder)
        _check_depth(tree, arm, num_heads=heads)
        predicted = index.replay(tree).tokens_per_step if index is not None else None
        resolved[arm.name] = ArmTree(paths=tree.paths, origin=origin, predicted_tokens_per_step=predicted)
    return resolved


def check_fixed_trees(
    suite: SuiteSpec,
    *,
    num_heads: int,
    vocab_size: int,
    base_folder: Path | None,
    has_calibration: bool,
    backbone: BackboneName = "original",
) -> None:
    """Refuse a tree or a search that cannot work, before anything is measured.

    A tree is refused where it is no tree, is deeper than its heads or names ranks beyond the vocabulary, a
    search where it has no calibration trace.
    """
    for arm in suite.arms:
        if (
            arm.tree is None
            or arm.backbone != backbone
            or (has_calibration and isinstance(arm.tree, SearchedTree | FastestTree))
        ):
            continue
        heads = min(num_heads, arm.num_heads or num_heads)
        tree, _ = _resolve(arm, None, costs=(), num_heads=heads, base_folder=base_folder)
        _check_depth(tree, arm, num_heads=heads)
        tree.check_fits(num_heads=heads, vocab_size=vocab_size)


def _check_depth(tree: DraftTree, arm: ArmSpec, *, num_heads: int) -> None:
    """Refuse a tree that is deeper than its heads."""
    if tree.depth > num_heads:
        raise UserError(
            found=f"a tree of depth {tree.depth}",
            need=f"at most {num_heads}, the number of heads",
            where=f"arm {arm.name!r}",
            do="prune it",
        )


def _resolve(
    arm: ArmSpec,
    calibration: Trace | None,
    *,
    costs: tuple[StepCost, ...],
    num_heads: int,
    base_folder: Path | None,
) -> tuple[DraftTree, str]:
    """Return an arm's tree and where it came from."""
    spec = arm.tree
    if isinstance(spec, ChainTree):
        return DraftTree.chain(spec.depth), f"chain of {spec.depth}"
    if isinstance(spec, CartesianTree):
        if spec.widths is not None:
            return DraftTree.cartesian(spec.widths), f"Cartesian, widths {list(spec.widths)}"
        assert spec.max_nodes is not None
        if calibration is None:
            widths = largest_cartesian(num_heads, spec.max_nodes)
            return DraftTree.cartesian(
                widths
            ), f"Cartesian, widths {list(widths)}: the most nodes, at most {spec.max_nodes}"
        widths = best_widths(ReplayIndex(calibration), max_nodes=spec.max_nodes, num_heads=num_heads)
        return DraftTree.cartesian(
            widths
        ), f"Cartesian, widths {list(widths)}: best on calibration, <= {spec.max_nodes} nodes"
    if isinstance(spec, FileTree):
        return DraftTree.from_json(
            resolve_path(spec.path, base_folder=base_folder)
        ), f"file {Path(spec.path).name}"
    if calibration is None:
        raise UserError(
            found=f"tree kind {spec.kind!r}" if spec else "no tree",
            need="a calibration_trace",
            where=f"arm {arm.name!r}",
        )
    if isinstance(spec, SearchedTree):
        tree = grow(calibration, num_nodes=spec.num_nodes, values=spec.values, num_heads=num_heads).tree
        return tree, f"{spec.values} growth on the calibration trace"
    assert isinstance(spec, FastestTree)
    return fastest_tree(calibration, costs=costs, max_nodes=spec.max_nodes, num_heads=num_heads)
