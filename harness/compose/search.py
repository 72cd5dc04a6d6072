"""Which tree makes a device fastest: the most tokens/step over what a step of its size costs there.

Two searches, compared on text that neither saw:

    independent   exact under independence: a dynamic programme over (levels left, nodes), the heads taken
                  to err independently
    joint         greedy on joint hits: at every size and depth the tree that the calibration trace prefers,
                  its decoding replayed

Both look at every depth limit, since a shallower tree of as many nodes spares heads, and price sizes with the
device's own curve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from harness.compose.families import most_nodes
from harness.compose.replay import ReplayIndex
from harness.compose.trees import MAX_RANK
from harness.errors import UserError
from harness.files import Frozen, canonical_sha256, write_json
from harness.records.sweep_cells import Method
from medusa_impl.tree import DraftTree, RankPath
from medusa_impl.tree_search import grow_by_joint_hits, marginal_accuracies

METHODS: tuple[Method, ...] = ("joint", "independent")
Floats = NDArray[np.float64]
Price = Callable[[int, int], float | None]
_EVERY_SIZE_UP_TO = 64  # then every fourth size: among larger trees the speed hardly changes


class CostChoice(Frozen):
    """The tree that a search chose for one device, and how it came to it.

    Units: `promised` is the tokens/step that the search itself believed in (its expectation for
    `independent`, the replay on the calibration trace for `joint`), `step_s` the price of a step,
    `num_candidates` how many trees were priced.
    """

    schema_version: Literal[1] = 1
    method: Method
    paths: tuple[RankPath, ...]
    promised: float
    step_s: float
    num_candidates: int
    num_unpriced: int

    def tree(self) -> DraftTree:
        """Return the validated tree."""
        return DraftTree.from_paths(self.paths)


@dataclass(frozen=True)
class Candidate:
    """A tree that a search offers at a size and a depth limit; built only when it is chosen.

    `rate` is the tokens/step that the search believes in.
    """

    num_nodes: int
    max_depth: int
    rate: float
    build: Callable[[], DraftTree]


class SearchSpace:
    """All candidates of both searches on one calibration trace.

    They are made once and priced for as many devices as wanted.
    """

    def __init__(
        self,
        calibration: ReplayIndex,
        *,
        max_nodes: int,
        num_heads: int | None = None,
        max_rank: int = MAX_RANK,
    ) -> None:
        trace = calibration.trace
        heads = trace.num_heads if num_heads is None else num_heads
        if max_nodes < 1 or not 0 <= heads <= trace.num_heads:
            found = f"at most {max_nodes} nodes and {heads} heads"
            raise UserError(
                found=found,
                need=f"1 node or more, and 0 to {trace.num_heads} heads, as were traced",
                where="the search",
            )
        vanilla = Candidate(num_nodes=1, max_depth=0, rate=1.0, build=DraftTree.root_only)
        self.max_nodes, self.num_heads, self.max_rank = max_nodes, heads, max_rank
        self.sizes = search_sizes(max_nodes)
        self._candidates: dict[Method, tuple[Candidate, ...]] = {
            "joint": (vanilla, *self._joint(calibration)),
            "independent": (vanilla, *self._independent(calibration)),
        }
        self.key = canonical_sha256(
            [hashlib.sha256(trace.ranks.tobytes()).hexdigest(), max_nodes, heads, max_rank]
        )

    def candidates(self, method: Method) -> tuple[Candidate, ...]:
        """Return a search's candidates, the root alone first."""
        return self._candidates[method]

    def choose(self, method: Method, price: Price) -> CostChoice:
        """Return the candidate with the most tokens a second; ties go to fewer nodes, then to fewer heads.

        `price(num_nodes, num_heads)` is a step's seconds, None where the device's curve does not reach; such
        sizes are left out.
        Raises: UserError if a price is not above 0, or no size has one.
        """
        offered, prices = self.candidates(method), dict[tuple[int, int], float | None]()
        best: tuple[float, int, int] | None = None
        chosen: tuple[Candidate, float] | None = None
        unpriced = 0
        for candidate in offered:
            size = (candidate.num_nodes, candidate.max_depth)
            if size not in prices:
                prices[size] = price(*size)
            step_s = prices[size]
            if step_s is None:
                unpriced += 1
                continue
            if not step_s > 0:
                raise UserError(
                    found=f"a price of {step_s} s for {size[0]} nodes",
                    need="a price above 0",
                    where="the search",
                )
            merit = (candidate.rate / step_s, -candidate.num_nodes, -candidate.max_depth)
            if best is None or merit > best:
                best, chosen = merit, (candidate, step_s)
        if chosen is None:
            raise UserError(
                found="no size with a price", need="a curve that covers at least one node", where="the search"
            )
        candidate, step_s = chosen
        return CostChoice(
            method=method,
            paths=candidate.build().paths,
            promised=candidate.rate,
            step_s=step_s,
            num_candidates=len(offered),
            num_unpriced=unpriced,
        )

    def _joint(self, calibration: ReplayIndex) -> list[Candidate]:
        found = []
        for depth in range(1, self.num_heads + 1):
            sizes = self._sizes_within(depth)
            grown = grow_by_joint_hits(
                calibration.trace.ranks,
                num_nodes=max(sizes, default=1),
                max_rank=self.max_rank,
                max_depth=depth,
            )
            for size in sizes:
                tree = grown.nested(size)
                if tree.depth == depth:  # else the same tree stands among the shallower ones
                    rate = calibration.replay(tree).tokens_per_step
                    found.append(
                        Candidate(
                            num_nodes=size, max_depth=depth, rate=rate, build=partial(grown.nested, size)
                        )
                    )
        return found

    def _independent(self, calibration: ReplayIndex) -> list[Candidate]:
        accuracy = marginal_accuracies(calibration.trace.ranks, max_rank=self.max_rank)
        found = []
        for depth in range(1, self.num_heads + 1):
            programme = IndependentProgramme(accuracy[:depth], max_nodes=self.max_nodes)
            for size in self._sizes_within(depth):
                rate = programme.value(size)
                found.append(
                    Candidate(num_nodes=size, max_depth=depth, rate=rate, build=partial(programme.tree, size))
                )
        return found

    def _sizes_within(self, depth: int) -> list[int]:
        room = most_nodes(depth, max_rank=self.max_rank)
        return [size for size in self.sizes if depth < size <= room]


class IndependentProgramme:
    """The best tree of every size where heads err independently: its value and its nodes, exactly.

    U_d(n), the best sum of chances in a subtree of n nodes whose root lies at depth d and counts 1, depends
    on d alone, since a chance is a product along the path. With a_r the accuracy of rank r in the head of
    depth d + 1,

        U_d(n) = 1 + F_0(n - 1),
        F_r(m) = max(F_{r+1}(m), max over j >= 1 of a_r U_{d+1}(j) + F_{r+1}(m - j)),

    and F after the last rank is 0 for m = 0 alone.
    Shapes: `accuracy` [D, R], row d the accuracies of the head that proposes depth d + 1; rows may be in any
    order of size.
    Paper: section 2.3.3, whose greedy growth finds the same values. Departs: a search over all trees, so that
    this is shown, not assumed.
    """

    def __init__(self, accuracy: ArrayLike, *, max_nodes: int) -> None:
        table = np.asarray(accuracy, dtype=np.float64)
        if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= 1)).all() or max_nodes < 1:
            found = f"accuracies of shape {table.shape} and at most {max_nodes} nodes"
            raise UserError(
                found=found,
                need="a table [heads, ranks] of numbers from 0 to 1, and at least one node",
                where="the search",
            )
        self._max_nodes = max_nodes
        below = np.full(max_nodes + 1, -np.inf)
        below[1] = 1.0  # a leaf
        # Deepest level last. [R, m]: nodes given to rank r where ranks r and later share m.
        self._taken: list[NDArray[np.int64]] = []
        for row in table[::-1]:
            below, taken = _level(row, below, max_nodes=max_nodes)
            self._taken.insert(0, taken)
        self._values = below

    def value(self, num_nodes: int) -> float:
        """Return the expected acceptance length of the best tree of `num_nodes` nodes.

        Raises: UserError where no tree has so many.
        """
        if not 1 <= num_nodes <= self._max_nodes or not np.isfinite(self._values[num_nodes]):
            raise UserError(
                found=f"a tree of {num_nodes} nodes",
                need=f"1 to {self._max_nodes} nodes that heads and ranks allow",
            )
        return float(self._values[num_nodes])

    def tree(self, num_nodes: int) -> DraftTree:
        """Return a best tree of `num_nodes` nodes."""
        self.value(num_nodes)
        paths: list[RankPath] = []
        stack: list[tuple[RankPath, int]] = [((), num_nodes)]
        while stack:
            path, left = stack.pop()
            paths.append(path)
            left -= 1
            for rank in range(self._taken[len(path)].shape[0] if left else 0):
                given = int(self._taken[len(path)][rank, left])
                if given:
                    stack.append(((*path, rank), given))
                    left -= given
        return DraftTree.from_paths(paths)


def _level(row: Floats, below: Floats, *, max_nodes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return U of one level from U of the level below, and how many nodes each rank was given."""
    shared = np.full(max_nodes, -np.inf)  # F_R: no rank is left to give nodes to
    shared[0] = 0.0
    taken = np.zeros((len(row), max_nodes), dtype=np.int64)
    sizes = np.flatnonzero(np.isfinite(below))
    sizes = sizes[sizes < max_nodes]
    for rank in range(len(row) - 1, -1, -1):
        best = shared.copy()
        for size in sizes.tolist():
            offered = row[rank] * below[size] + shared[: max_nodes - size]
            better = offered > best[size:]  # strictly: of equals the subtree of fewer nodes stays
            best[size:][better] = offered[better]
            taken[rank, size:][better] = size
        shared = best
    values = np.full(max_nodes + 1, -np.inf)
    values[1:] = 1.0 + shared
    return values, taken


def search_sizes(max_nodes: int) -> tuple[int, ...]:
    """Return the sizes that a search prices: every one up to 64, then every fourth, and the largest."""
    sizes = [
        *range(2, min(max_nodes, _EVERY_SIZE_UP_TO) + 1),
        *range(_EVERY_SIZE_UP_TO + 4, max_nodes + 1, 4),
    ]
    return tuple(sorted({*sizes, *([max_nodes] if max_nodes > 1 else [])}))


def cached_choices(
    space_key: str, *, curve_fingerprint: str, folder: Path | None, search: Callable[[], Sequence[CostChoice]]
) -> tuple[CostChoice, ...]:
    """Return what `search` finds, kept in `folder` by the fingerprints of search space and curve.

    Without a folder nothing is kept. A file that another version wrote or a kill cut short is searched anew.
    """
    path = (
        folder / f"{canonical_sha256([space_key, curve_fingerprint])[:24]}.json"
        if folder is not None
        else None
    )
    if path is not None and path.exists():
        try:
            return _CachedChoices.model_validate_json(path.read_bytes()).choices
        except (ValidationError, OSError):
            path.unlink(missing_ok=True)
    choices = tuple(search())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _CachedChoices(choices=choices))
    return choices


class _CachedChoices(Frozen):
    schema_version: Literal[1] = 1
    choices: tuple[CostChoice, ...]
