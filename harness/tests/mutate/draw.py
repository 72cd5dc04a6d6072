"""Mutants of the code that judges, and which of them are tried.

cosmic-ray makes them. A draw keeps those with the lowest hash of seed, file, function and changed line, so an
edit elsewhere in a file leaves the draw as it was. One place of a file gives a second mutant only where the
file has too few places.

Left out are mutants that no output can show:
- of annotations, which nobody evaluates;
- `==` for `is` and the other way round, of None, members of enumerations and short strings;
- that do not parse, or leave the syntax tree as it was, and `/` for the `*` of a function's parameters;
- of one family of operators for another (`a << b` for `a * b`): on floats all of them raise.
"""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from harness.tests.forks import ROOT

NUM_MUTANTS, NUM_OF_EACH_FILE = 400, 10
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
BITS = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
SAME_OF_NONE = {("Is", "Eq"), ("Eq", "Is"), ("IsNot", "NotEq"), ("NotEq", "IsNot")}
ORDERS = {"Lt", "LtE", "Gt", "GtE"}
Span = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """One change that cosmic-ray can make: its operator, where, and what stands there."""

    file: str
    operator: str
    occurrence: int
    line: int
    column: int
    function: str
    text: str

    def key(self, seed: int) -> str:
        """Return what the draw sorts by; the number of the line is no part of it."""
        parts = (str(seed), self.file, self.function, self.text, str(self.column), self.operator)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Mutant:
    """One change of one statement: the lines before and after it, and the file's text with it."""

    place: Place
    before: str
    after: str
    text: str

    @property
    def file(self) -> str:
        """Return the file that is changed."""
        return self.place.file

    @property
    def where(self) -> str:
        """Return file and line."""
        return f"{self.place.file}:{self.place.line}"

    @property
    def name(self) -> str:
        """Return what tells mutants apart in the log."""
        return f"{self.place.file} {self.place.operator} {self.place.occurrence}"


def targets() -> list[str]:
    """Return the files that are mutated: those that judge, intervals and replay."""
    judging = sorted((ROOT / "harness/judge").rglob("*.py"))
    files = [*judging, ROOT / "harness/stats.py", ROOT / "harness/compose/replay.py"]
    return [file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"]


def source(file: str) -> str:
    """Return the text of a file of the checkout."""
    return (ROOT / file).read_text(encoding="utf-8")


def places(file: str) -> Iterator[Place]:
    """Yield every place of a file and operator for it, but those whose mutants no output can show."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.ast.ast_query import ASTQuery
    from cosmic_ray.plugins import get_operator, operator_names

    text = source(file)
    lines, nodes = text.splitlines(), list(ast_nodes(get_ast(text)))
    unread = list(_annotations(ast.parse(text)))
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or not is_wanted(name):
            continue
        found = [(node, place) for node in nodes for place in operator().mutation_positions(node)]
        for occurrence, (node, (start, end)) in enumerate(found):
            if any(first <= start and end <= last for first, last in unread):
                continue
            function = ASTQuery(node).get_definition_name() or ""
            yield Place(file, name, occurrence, start[0], start[1], function, lines[start[0] - 1].strip())


def mutant(place: Place) -> Mutant | None:
    """Return the mutant of a place; None where it does not parse or says the same."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = source(place.file)
    changed = str(mutate_code(text, get_operator(place.operator)(), place.occurrence))
    try:
        parsed = ast.parse(changed)
    except SyntaxError:
        return None
    if ast.dump(parsed) == ast.dump(ast.parse(text)) or any(map(_has_a_slash, ast.walk(parsed))):
        return None
    return Mutant(place, *_changed_lines(text, changed), changed)


def is_wanted(operator: str) -> bool:
    """Return whether an operator of cosmic-ray makes mutants that an output might show."""
    kind, _, change = operator.partition("/")[2].partition("_")
    if kind == "ReplaceBinaryOperator":
        return any(set(change.split("_")) <= family for family in (ARITHMETIC, BITS))
    if kind == "ReplaceComparisonOperator":
        old, new = change.split("_")
        return (old, new) not in SAME_OF_NONE and not (old in ("Is", "IsNot") and new in ORDERS)
    return True


def draw(files: Sequence[str], *, seed: int, num: int, of_each: int) -> list[Mutant]:
    """Return `num` mutants, at least `of_each` of each file that has so many, in the order of the files."""
    ranked = {file: _each_spot_once_first(places(file), seed=seed) for file in files}
    drawn: list[Mutant] = []
    for firsts, others in ranked.values():
        drawn += islice(filter(None, map(mutant, chain(firsts, others))), of_each)
    known = {one.place for one in drawn}
    rest = [place for firsts, _ in ranked.values() for place in firsts if place not in known]
    rest.sort(key=lambda place: place.key(seed))
    drawn += islice(filter(None, map(mutant, rest)), max(0, num - len(drawn)))
    return sorted(drawn, key=lambda one: (one.file, one.place.line, one.place.column, one.place.operator))


def _each_spot_once_first(found: Iterable[Place], *, seed: int) -> tuple[list[Place], list[Place]]:
    """Return one place for each spot of the text, then the others of the same spots."""
    spots: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in sorted(found, key=lambda one: one.key(seed)):
        spots[place.line, place.column].append(place)
    firsts = [group[0] for group in spots.values()]
    return firsts, [place for group in spots.values() for place in group[1:]]


def _annotations(tree: ast.AST) -> Iterator[Span]:
    """Yield where the annotations of a file begin and end."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        for one in found:
            if one is not None and one.end_lineno is not None and one.end_col_offset is not None:
                yield (one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)


def _has_a_slash(node: ast.AST) -> bool:
    """Return whether a function has parameters before a `/`: cosmic-ray takes a `*` there for a product."""
    return isinstance(node, ast.arguments) and bool(node.posonlyargs)


def _changed_lines(before: str, after: str) -> tuple[str, str]:
    """Return the lines in which two texts differ, without indentation."""
    old, new = before.splitlines(), after.splitlines()
    same = next((i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
    tail = 0
    while tail < min(len(old), len(new)) - same - 1 and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    return tuple(  # type: ignore[return-value]
        "\n".join(line.strip() for line in lines[same : len(lines) - tail]) for lines in (old, new)
    )
