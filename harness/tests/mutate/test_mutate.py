"""`nox -s mutate`: every file that judges has tests that decide over its mutants, excuses are of lines that
are there, and the draw stays as it is where a file is edited elsewhere.

The mutants themselves need cosmic-ray, which the session installs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from harness.tests.forks import ROOT
from harness.tests.mutate import draw as drawing
from harness.tests.mutate import prover as proving
from harness.tests.mutate.covers import LEFT_OUT, TESTS, deciding_tests
from harness.tests.mutate.draw import NUM_MUTANTS, NUM_OF_EACH_FILE, Mutant, Place, is_wanted, source, targets
from harness.tests.mutate.prover import MAX_EQUIVALENT, reasons

needs_cosmic_ray = pytest.mark.skipif(
    importlib.util.find_spec("cosmic_ray") is None, reason="cosmic-ray is installed by nox -s mutate alone"
)


def test_every_file_that_judges_has_tests_that_are_there() -> None:
    assert set(TESTS) == set(targets())
    for file in targets():
        assert deciding_tests(file) and all((ROOT / test).is_file() for test in deciding_tests(file)), file
    texts = "".join(
        (ROOT / test).read_text(encoding="utf-8") for file in TESTS for test in deciding_tests(file)
    )
    assert [name for name in LEFT_OUT if f"{name}" not in texts] == []


def test_excuses_are_few_and_of_lines_that_are_there() -> None:
    found = reasons()
    assert len(found) <= MAX_EQUIVALENT
    assert len({(one.file, one.before, one.after) for one in found}) == len(found)
    for one in found:
        lines = [line.strip() for line in source(one.file).splitlines()]
        assert set(one.before.splitlines()) <= set(lines), one
        assert one.before != one.after and len(one.reason) > 20, one


@pytest.mark.parametrize(
    ("operator", "wanted"),
    [
        ("core/ReplaceBinaryOperator_Add_Sub", True),
        ("core/ReplaceBinaryOperator_BitAnd_BitOr", True),
        ("core/ReplaceBinaryOperator_Add_LShift", False),
        ("core/ReplaceComparisonOperator_Lt_LtE", True),
        ("core/ReplaceComparisonOperator_Is_IsNot", True),
        ("core/ReplaceComparisonOperator_Is_Eq", False),
        ("core/ReplaceComparisonOperator_IsNot_Lt", False),
        ("core/NumberReplacer", True),
    ],
)
def test_operators_that_no_output_can_show_are_left_out(operator: str, wanted: bool) -> None:
    assert is_wanted(operator) is wanted


SMALL = '''"""A file."""


def share(part: float | None, whole: float, *, scale: float = 1.0) -> float:
    return scale * (part or 0.0) / whole
'''


@needs_cosmic_ray
def test_annotations_and_bare_stars_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "source", lambda file: SMALL)
    found = list(filter(None, map(drawing.mutant, drawing.places("one.py"))))
    assert {one.before for one in found} == {
        "return scale * (part or 0.0) / whole",
        "def share(part: float | None, whole: float, *, scale: float = 1.0) -> float:",
    }
    heads = {one.after for one in found if one.before.startswith("def")}
    assert all("float | None" in head and ", *, scale" in head for head in heads)


@needs_cosmic_ray
def test_the_draw_is_the_same_each_time_and_another_for_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(text: str, seed: int) -> list[tuple[str, str]]:
        monkeypatch.setattr(drawing, "source", lambda file: text)
        found = drawing.draw(["one.py"], seed=seed, num=5, of_each=2)
        return [(one.before, one.after) for one in found]

    longer = SMALL.replace('"""A file."""', '"""A file."""\n\nMORE = True\n')
    first = drawn(SMALL, 0)
    assert len(first) == 5 and drawn(SMALL, 0) == first != drawn(SMALL, 1)
    kept = [one for one in drawn(longer, 0) if not one[0].startswith("MORE")]
    assert set(kept) <= set(first)


@needs_cosmic_ray
def test_the_whole_draw_has_so_many_mutants_and_some_of_each_file() -> None:
    some = ["harness/judge/totals.py", "harness/stats.py"]
    found = drawing.draw(some, seed=0, num=25, of_each=NUM_OF_EACH_FILE)
    assert len(found) == 25 < NUM_MUTANTS
    assert all(sum(one.file == file for one in found) >= NUM_OF_EACH_FILE for file in some)
    assert all(one.text != source(one.file) for one in found)


def test_a_places_key_does_not_hold_its_line() -> None:
    place = Place("one.py", "core/AddNot", 0, 3, 4, "share", "if part:")
    moved = Place("one.py", "core/AddNot", 5, 30, 4, "share", "if part:")
    other = Place("one.py", "core/AddNot", 0, 3, 4, "share", "if whole:")
    assert place.key(0) == moved.key(0) and place.key(0) not in (place.key(1), other.key(0))


def planted(old: str, new: str, *, occurrence: int) -> Mutant:
    """A mutant made by hand."""
    file = "harness/judge/claims/findings.py"
    text = source(file)
    assert old in text
    place = Place(file, "by hand", occurrence, 1, 0, "above", old)
    return Mutant(place, old, new, text.replace(old, new))


def test_killed_and_living_mutants_are_told_apart_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proving, "deciding_tests", lambda file: ("harness/tests/judge/known/test_intervals.py",)
    )
    monkeypatch.setattr(proving, "LIMIT_FACTOR", 4.0)
    monkeypatch.setattr(proving, "SHORTEST_LIMIT_S", 6.0)
    mutants = [
        planted("    if interval.low > bound:", "    if interval.low >= bound:", occurrence=0),
        planted(
            '"""Return whether an estimate lies above', '"""Say whether an estimate lies above', occurrence=1
        ),
        planted("_WORST_FIRST = (", "while True:\n    pass\n_WORST_FIRST = (", occurrence=2),
        planted("_WORST_FIRST = (", "raise OSError\n_WORST_FIRST = (", occurrence=3),
    ]
    prover = proving.Prover(tmp_path / "tree", tmp_path / "out", seed=0)
    try:
        first = list(prover.run(mutants))
        whole = (prover.tree / mutants[0].file).read_text(encoding="utf-8")
        monkeypatch.setattr(prover, "try_one", lambda mutant: pytest.fail("tried again"))
        assert list(prover.run(mutants)) == first
    finally:
        prover.close()
    assert whole == source(mutants[0].file)
    told = [after for _, after in first]
    assert [after.killed for after in told] == [True, False, True, True]
    assert "::test_above_and_below_say" in told[0].by and told[1].by == ""
    assert told[2].by == "the limit in time" and told[3].by.endswith("test_intervals.py")
    shown = proving.table(first, {mutants[1].name})
    assert shown.splitlines()[-1].split() == ["|", "all", "|", "4", "|", "3", "|", "1", "|", "0", "|"]
    assert proving.table(first, set()).splitlines()[-1].split()[-2] == "1"
