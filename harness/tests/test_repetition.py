"""No code stands twice, and no function is longer than a person holds."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from harness.tests.test_layers import ROOT, source_files

NUM_LINES, NUM_LINES_OF_A_FUNCTION = 6, 60


def sources() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in source_files()}


def code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Return the lines that do something, with their numbers: no blank, comment, import, docstring or head of
    a function, as pylint's check does.
    """
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(text.splitlines(), start=1):
        if number not in left_out and line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def repetitions(texts: Mapping[str, str]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Return, by pair of files, the lines where a run of code begins that stands in both."""
    places: dict[tuple[str, ...], list[tuple[str, int, int]]] = defaultdict(list)
    for name, text in sorted(texts.items()):
        lines = list(code_lines(text))
        for start in range(len(lines) - NUM_LINES + 1):
            run = tuple(line for _, line in lines[start : start + NUM_LINES])
            places[run].append((name, start, lines[start][0]))
    matches = {
        (a, start_a, b, start_b): (line_a, line_b)
        for alike in places.values()
        for a, start_a, line_a in alike
        for b, start_b, line_b in alike
        if a < b
    }
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (a, start_a, b, start_b), lines_of_both in matches.items():
        if (a, start_a - 1, b, start_b - 1) not in matches:  # else an earlier run goes on here
            found[a, b].append(lines_of_both)
    return found


def long_functions(texts: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Return file and name, line and length of each function that is too long."""
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > NUM_LINES_OF_A_FUNCTION:
                    yield f"{name} {node.name}", node.lineno, length


def test_no_run_of_lines_stands_in_two_files() -> None:
    told = [
        f"{a}:{line_a} and {b}:{line_b}"
        for (a, b), lines in repetitions(sources()).items()
        for line_a, line_b in lines
    ]
    assert told == []


def test_no_function_is_longer_than_a_person_holds() -> None:
    told = [f"{name}, line {line}: {length} lines" for name, line, length in long_functions(sources())]
    assert told == []


def lines_of(names: Iterable[str]) -> str:
    return "".join(f"{name} = 1\n" for name in names)


def test_a_repetition_is_found_where_it_begins_and_once() -> None:
    first = f'"""Docstring."""\nimport os\n\n{lines_of("abcdefgh")}'
    second = f"x = 2\n{lines_of('abc')}\n# a comment\n{lines_of('defgh')}"
    assert repetitions({"one": first, "two": second}) == {("one", "two"): [(4, 2)]}
    assert repetitions({"one": first, "two": lines_of("abcde")}) == {}
    assert repetitions({"one": first + first}) == {}  # within one file is the author's own affair


def test_a_long_function_is_found() -> None:
    def text(length: int) -> str:
        return "def f() -> None:\n" + "    a = 1\n" * (length - 1)

    limit = NUM_LINES_OF_A_FUNCTION
    assert list(long_functions({"one": text(limit + 1)})) == [("one f", 1, limit + 1)]
    assert list(long_functions({"one": text(limit)})) == []
