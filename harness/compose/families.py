"""The trees of a sweep: families resolved on the calibration trace, each tree once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from harness.compose.replay import ReplayIndex
from harness.compose.trees import MAX_RANK, best_widths, grow
from harness.errors import UserError
from harness.records.sweep import CARTESIAN, CHAIN, DENSE, JOINT, MARGINALS, SweepTree
from harness.specs.sweep import CartesianTrees, ChainTrees, GrownTrees, RandomDenseTrees, TreeFamily
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import random_dense


def resolve_families(
    families: Sequence[TreeFamily], *, calibration: ReplayIndex, num_heads: Sequence[int]
) -> tuple[SweepTree, ...]:
    """Return the trees of all families, each once, with the fewest heads that allow it.

    Each family is resolved for each number of heads.
    Raises: UserError where more heads are asked for than were traced, or where a family has no tree for any
    number of heads.
    """
    traced = calibration.trace.num_heads
    if max(num_heads) > traced:
        raise UserError(
            found=f"num_heads {max(num_heads)}",
            need=f"at most {traced}, the heads of the calibration trace",
            where="the sweep",
        )
    found: dict[DraftTree, SweepTree] = {}
    for family in families:
        num_before = len(found)
        for heads in sorted(set(num_heads)):
            for tree, name in _trees_of(family, calibration, num_heads=heads):
                before = found.get(tree)
                if before is None:
                    found[tree] = SweepTree(paths=tree.paths, num_heads=heads, families=(name,))
                elif name not in before.families:
                    found[tree] = before.model_copy(update={"families": (*before.families, name)})
        if len(found) == num_before and not any(_trees_of(family, calibration, num_heads=max(num_heads))):
            raise UserError(
                found=f"no tree of kind {family.kind!r}",
                need=f"one that fits {max(num_heads)} heads",
                where="the sweep",
            )
    return tuple(found.values())


def _trees_of(
    family: TreeFamily, calibration: ReplayIndex, *, num_heads: int
) -> Iterator[tuple[DraftTree, str]]:
    """Yield a family's trees of at most `num_heads` levels."""
    if isinstance(family, ChainTrees):
        yield from ((DraftTree.chain(depth), CHAIN) for depth in family.depths if depth <= num_heads)
    elif isinstance(family, CartesianTrees):
        yield from (
            (DraftTree.cartesian(widths), CARTESIAN) for widths in family.widths if len(widths) <= num_heads
        )
        yield from (
            (
                DraftTree.cartesian(best_widths(calibration, max_nodes=size, num_heads=num_heads)),
                CARTESIAN,
            )
            for size in family.max_nodes
        )
    elif isinstance(family, RandomDenseTrees):
        for size in family.num_nodes:
            rng = np.random.default_rng((family.seed, size, num_heads))
            yield from (
                (random_dense(size, num_heads=num_heads, rng=rng), DENSE) for _ in range(family.draws)
            )
    else:
        yield from _grown(family, calibration, num_heads=num_heads)


def _grown(
    family: GrownTrees, calibration: ReplayIndex, *, num_heads: int
) -> Iterator[tuple[DraftTree, str]]:
    """Yield a family's grown trees of the sizes that so many heads allow."""
    room = most_nodes(num_heads)
    sizes = [size for size in family.num_nodes if size <= room]
    for values in family.values if sizes else ():
        grown = grow(calibration.trace, num_nodes=max(sizes), values=values, num_heads=num_heads)
        yield from ((grown.nested(size), MARGINALS if values == "marginals" else JOINT) for size in sizes)


def most_nodes(num_heads: int, *, max_rank: int = MAX_RANK) -> int:
    """Return how many nodes a tree of `num_heads` levels can have at `max_rank` tokens a head."""
    return int(sum(max_rank**level for level in range(num_heads + 1)))
