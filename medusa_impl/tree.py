"""The draft tree as data: every node is a path of ranks, checked before any device sees it.

The tree {(), (0), (1), (0,0), (0,1), (1,0), (0,0,0)}, as `draw` prints it (rank, then node index):

    root  #0
    |- 0  #1
    |  |- 0  #3
    |  |  `- 0  #6
    |  `- 1  #4
    `- 1  #2
       `- 0  #5

Node #4 is the path (0, 1): the best token of head 1, then the second-best token of head 2. The root is the
token that the backbone itself has chosen; no head proposes it. Nodes are numbered by depth, then by path.
So a parent comes before its children, the children of a node have consecutive indices, and siblings follow
the order of their ranks.

This module needs neither torch nor numpy.

Paper: Section 2.1.2, tree attention; Section 2.3.3, sparse trees.
"""

from __future__ import annotations

import hashlib
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from medusa_impl.errors import UserError
from medusa_impl.tree_text import paths_to_json, read_paths

RankPath = tuple[int, ...]

# Guards against trees that would exhaust memory. One verification uses a few hundred nodes at the most, and
# no heads reach deeper than a few levels.
MAX_NODES, MAX_DEPTH = 65_536, 256
_ROOT: RankPath = ()


def _order(path: RankPath) -> tuple[int, RankPath]:
    return len(path), path


@dataclass(frozen=True)
class DraftTree:
    """The candidates that one verification scores, as rank paths in canonical order with the root `()` first.

    Units: `num_nodes` counts the root; `depth` counts draft levels, 0 for the root alone.
    Raises: UserError if the paths are not a tree in canonical order (`from_paths` sorts and adds the root).
    Paper: Section 2.1.2, and Section 2.3.3 for sparse trees.
    Departs: the released code numbers candidates as 10 * head + rank, so that rank 10 of one head is taken
    for rank 0 of the next. Here a path stays a tuple, and no two paths can be confused.
    """

    paths: tuple[RankPath, ...]

    def __post_init__(self) -> None:
        _check(self.paths)

    @classmethod
    def root_only(cls) -> DraftTree:
        """Return the tree of vanilla decoding: one token a step, nothing drafted."""
        return cls(paths=(_ROOT,))

    @classmethod
    def chain(cls, depth: int) -> DraftTree:
        """Return a tree without branches: the best token of each of the first `depth` heads."""
        if not 0 <= depth <= MAX_DEPTH:  # before so many widths are written down
            raise UserError(found=f"a chain of depth {depth}", need=f"0 to {MAX_DEPTH}")
        return cls.cartesian((1,) * depth)

    @classmethod
    def cartesian(cls, widths: Sequence[int]) -> DraftTree:
        """Return the tree in which every combination of the heads' best tokens is a candidate.

        Every node of depth k - 1 has the `widths[k - 1]` best tokens of head k as children.

        Raises: UserError on a width below 1, on more than MAX_NODES nodes or more than MAX_DEPTH levels.
        Paper: Section 2.1.2, where `widths[k - 1]` is s_k.
        """
        if len(widths) > MAX_DEPTH:
            raise UserError(found=f"{len(widths)} widths", need=f"at most {MAX_DEPTH}", do="drop some levels")
        for level, width in enumerate(widths, start=1):
            if _as_int(width) is None or width < 1:
                raise UserError(
                    found=f"width {width!r} at depth {level}",
                    need="a whole number of at least 1",
                    do="drop the level",
                )
        if (num_nodes := cartesian_num_nodes(widths)) > MAX_NODES:
            raise UserError(
                found=f"widths {tuple(widths)} = {num_nodes} nodes",
                need=f"at most {MAX_NODES}",
                do="lower a width",
            )
        # `product` counts its last factor fastest, which is the canonical order within a level.
        levels = (product(*(range(width) for width in widths[:depth])) for depth in range(len(widths) + 1))
        return cls(paths=tuple(path for level in levels for path in level))

    @classmethod
    def from_paths(cls, paths: Iterable[Iterable[int]], *, where: str | None = None) -> DraftTree:
        """Return the tree of these rank paths, which may be in any order, with or without the root.

        Raises: UserError if there is no path, or if a path occurs twice, lacks its parent, or holds a rank
        that is negative or not an integer. The message names the path.
        """
        nodes = [_as_path(path, where=where) for path in paths]
        if not nodes:
            raise UserError(
                found="no path",
                need="at least one rank path",
                where=where,
                do="use root_only() or [[]] for the root alone",
            )
        if _ROOT not in nodes:
            nodes.append(_ROOT)
        nodes.sort(key=_order)
        _check(nodes, where=where)
        return cls(paths=tuple(nodes))

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> DraftTree:
        """Return the tree of a JSON file, or of the text itself.

        The text is what `to_json` writes, a plain JSON list of lists, or a Python list of tuples, as the
        authors publish their trees. A file may hold it with its name: `name = [(0,), (0, 0), ..]`.

        Raises: UserError on anything else, on an unknown key or version, and as `from_paths` does.
        """
        paths, where = read_paths(text_or_path)
        if isinstance(paths, str) or not isinstance(paths, Iterable):
            raise UserError(found=f"paths = {reprlib.repr(paths)}", need="a list of rank paths", where=where)
        return cls.from_paths(paths, where=where)

    def to_json(self, *, provenance: Mapping[str, Any] | None = None) -> str:
        """Return the tree as one line of canonical JSON.

        The root is left out, as in published trees, unless it is the only node.
        """
        return paths_to_json(self.paths[1:] or (_ROOT,), provenance=provenance)

    @cached_property
    def fingerprint(self) -> str:
        """Return the first twelve digits of the SHA-256 of the canonical JSON, a short name of the tree."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def num_nodes(self) -> int:
        """Return the number of tokens that one verification scores, the root included."""
        return len(self.paths)

    @property
    def is_chain(self) -> bool:
        """Return whether no node has more than one child; the root alone is a chain, too."""
        return self.num_nodes == self.depth + 1

    @property
    def depth(self) -> int:
        """Return the number of draft heads in use; 0 for the root alone."""
        # In canonical order the last path is one of the longest.
        return len(self.paths[-1])

    @cached_property
    def index(self) -> Mapping[RankPath, int]:
        """Return the node index of every path."""
        return {path: node for node, path in enumerate(self.paths)}

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Return the node index of every node's parent; -1 for the root."""
        return (-1, *(self.index[path[:-1]] for path in self.paths[1:]))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Return every node's distance from the root."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Return every node's rank in the head of its depth; 0 for the root, which no head proposes."""
        return tuple(path[-1] if path else 0 for path in self.paths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Return the node indices of every node's children, best rank first."""
        lists: list[list[int]] = [[] for _ in self.paths]
        for node, parent in enumerate(self.parents[1:], start=1):
            lists[parent].append(node)
        return tuple(tuple(nodes) for nodes in lists)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Return the nodes without children, in order of their index."""
        return tuple(node for node, children in enumerate(self.children) if not children)

    @cached_property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """Return for every leaf the node indices of its path, from the root to the leaf."""
        return tuple(
            tuple(self.index[self.paths[leaf][:depth]] for depth in range(self.depths[leaf] + 1))
            for leaf in self.leaves
        )

    @cached_property
    def num_ranks(self) -> tuple[int, ...]:
        """Return for depth 1, 2, .. how many of that head's best tokens the tree needs.

        This is one more than the greatest rank at that depth.
        """
        needed = [0] * self.depth
        for path in self.paths[1:]:
            needed[len(path) - 1] = max(needed[len(path) - 1], path[-1] + 1)
        return tuple(needed)

    def pruned(self, max_depth: int) -> DraftTree:
        """Return the nodes down to `max_depth`: the part of the tree that so many heads can fill."""
        if max_depth < 0:
            raise UserError(found=f"depth {max_depth}", need="0 or more")
        return (
            self
            if max_depth >= self.depth
            else DraftTree(paths=tuple(path for path in self.paths if len(path) <= max_depth))
        )

    def check_fits(self, *, num_heads: int, vocab_size: int) -> None:
        """Refuse a tree that these heads cannot fill.

        Raises: UserError if the tree is deeper than there are heads, or asks a head for more tokens than the
        vocabulary has. The message names the first such node.
        """
        for path in self.paths:
            if len(path) > num_heads:
                raise UserError(
                    found=f"node {path} at depth {len(path)}",
                    need=f"a tree of depth {num_heads} or less: there are {num_heads} draft heads",
                    where=f"tree {self.fingerprint}",
                    do="take a shallower tree or train more heads",
                )
            if path and path[-1] >= vocab_size:
                raise UserError(
                    found=f"rank {path[-1]} in node {path}",
                    need=f"a rank below the vocabulary size {vocab_size}",
                    where=f"tree {self.fingerprint}",
                    do="take a narrower tree",
                )

    def draw(self) -> str:
        """Return a drawing of the tree in ASCII, one node a line: its rank, then its index."""
        lines = ["root  #0"]
        # An explicit stack, because a long chain would exceed Python's recursion limit.
        stack = [(child, "") for child in reversed(self.children[0])]
        while stack:
            node, indent = stack.pop()
            is_last = node == self.children[self.parents[node]][-1]
            lines.append(f"{indent}{'`-' if is_last else '|-'} {self.ranks[node]}  #{node}")
            deeper = indent + ("   " if is_last else "|  ")
            stack.extend((child, deeper) for child in reversed(self.children[node]))
        return "\n".join(lines)


def cartesian_num_nodes(widths: Iterable[int]) -> int:
    """Return how many nodes the Cartesian tree of these widths has: 1 + s_1 + s_1 s_2 + ..

    The root is counted.

    Paper: Section 2.1.2, whose sum leaves the root out.
    """
    total = level = 1
    for width in widths:
        level *= width
        total += level
    return total


def largest_cartesian(
    num_heads: int, max_nodes: int, *, value: Callable[[tuple[int, ...]], float] | None = None
) -> tuple[int, ...]:
    """Return the widths of the best Cartesian tree of at most `max_nodes` nodes, root included.

    The search compares all non-increasing widths of length 0 to `num_heads` that fit: later heads are less
    accurate, and deserve no more branches than earlier ones. Where `value` is given, for instance the tokens
    per step in a replay, the greatest `value(widths)` wins. Ties go to the most nodes, then to the deepest
    tree, then to the narrowest first level.

    Raises: UserError if `max_nodes` is below 1 or `num_heads` below 0.
    """
    if max_nodes < 1 or num_heads < 0:
        raise UserError(
            found=f"{num_heads} heads and at most {max_nodes} nodes",
            need="0 heads or more and at least the root",
        )

    def merit(widths: tuple[int, ...]) -> tuple[float, int, int, tuple[int, ...]]:
        worth = 0.0 if value is None else value(widths)
        return worth, cartesian_num_nodes(widths), len(widths), tuple(-width for width in widths)

    return max(_non_increasing_widths(num_heads, max_nodes), key=merit)


def _non_increasing_widths(num_heads: int, max_nodes: int) -> Iterator[tuple[int, ...]]:
    # Each entry: widths, number of nodes of the last level, number of nodes in all.
    stack: list[tuple[tuple[int, ...], int, int]] = [((), 1, 1)]
    while stack:
        widths, level, total = stack.pop()
        yield widths
        if len(widths) < num_heads:
            # One more level of width w adds `level * w` nodes.
            widest = (max_nodes - total) // level
            widest = min(widest, widths[-1]) if widths else widest
            stack.extend(
                ((*widths, width), level * width, total + level * width) for width in range(1, widest + 1)
            )


def _check(paths: Sequence[RankPath], *, where: str | None = None) -> None:
    if not paths or paths[0] != _ROOT:
        raise UserError(
            found="paths without the root first", need="the root () first", where=where, do="use from_paths"
        )
    seen = {_ROOT}
    last = _order(_ROOT)
    for path in paths[1:]:
        if path in seen:
            raise UserError(
                found=f"node {path} twice", need="every node once", where=where, do="remove the duplicate"
            )
        # Not isinstance: True is an int, and would be written to JSON as `true`.
        if any(type(rank) is not int or rank < 0 for rank in path):
            raise UserError(found=f"node {path}", need="ranks that are whole numbers from 0 up", where=where)
        if path[:-1] not in seen:
            found = f"node {path} without its parent {path[:-1]}"
            raise UserError(found=found, need="every ancestor in the tree", where=where, do="add it")
        if (order := _order(path)) < last:
            raise UserError(
                found=f"node {path} out of order",
                need="order by depth, then path",
                where=where,
                do="use from_paths",
            )
        seen.add(path)
        last = order


def _as_int(rank: object) -> int | None:
    """Return a whole number of any type (also numpy's) as an `int`, or None for anything else."""
    if isinstance(rank, bool):
        return None
    try:
        return operator.index(rank)  # type: ignore[arg-type]  # what is not a number raises
    except TypeError:
        return None


def _as_path(path: object, *, where: str | None) -> RankPath:
    if isinstance(path, str) or not isinstance(path, Iterable):
        raise UserError(
            found=f"{reprlib.repr(path)} in the list of paths",
            need="a list of ranks, such as [0, 1]",
            where=where,
        )
    given = tuple(path)
    if len(given) > MAX_DEPTH:
        raise UserError(found=f"a path of {len(given)} ranks", need=f"at most {MAX_DEPTH}", where=where)
    ranks = tuple(rank for item in given if (rank := _as_int(item)) is not None and rank >= 0)
    if len(ranks) != len(given):
        need = "ranks that are whole numbers from 0 up"
        raise UserError(found=f"node {reprlib.repr(given)}", need=need, where=where)
    return ranks
