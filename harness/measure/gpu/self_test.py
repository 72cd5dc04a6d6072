"""The tests of a checkout as a part: which files are run, and what their report says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from harness.errors import UserError
from harness.files import read_text
from harness.paths import without_paths
from harness.records.gpu.parts import TestCounts
from harness.specs.gpu import TestsPart

_MOST_NAMES = 20  # of failed tests that a record keeps


def test_files(part: TestsPart, *, checkout: Path) -> tuple[str, ...]:
    """Return the files of a part, from the checkout's folder: those that it names, else users of its marker.

    To collect all tests would import packages that a machine which only measures need not have.
    Raises: UserError where there are none, as in an installed package.
    """
    if part.files:
        found = [str(name) for name in part.files if (checkout / name).is_file()]
    else:
        found = [
            path.relative_to(checkout).as_posix()
            for path in sorted(checkout.glob("*/tests/**/test_*.py"))
            if f"pytest.mark.{part.marker}" in read_text(path)
        ]
    if not found:
        raise UserError(
            found="no tests",
            need="a checkout, which has them; an installed package has none",
            where="the folder of the code",
            do="run this in a checkout, or leave the part out with --skip tests",
        )
    return tuple(found)


test_files.__test__ = False  # type: ignore[attr-defined]


def pytest_words(part: TestsPart, files: Sequence[str], *, report: Path) -> list[str]:
    """Return the command of a part's tests; their counts go into a file."""
    chosen = ["-m", part.marker] if part.marker is not None else []
    return ["pytest", "-q", "-p", "no:cacheprovider", *chosen, f"--junitxml={report}", *files]


def read_counts(report: Path) -> TestCounts | None:
    """Return what a report of pytest counts; None where there is none, since pytest was killed.

    The sums are pytest's: a test that was interrupted stands among the cases, and looks like one that passed.
    """
    try:
        (suite,) = ElementTree.parse(report).iter("testsuite")
        total, *others = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        return None
    names = [
        without_paths(f"{case.get('classname')}.{case.get('name')}")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    num_failures, num_errors, num_skipped = others
    return TestCounts(
        num_passed=total - sum(others),
        num_failed=num_failures + num_errors,
        num_skipped=num_skipped,
        failed=tuple(names[:_MOST_NAMES]),
    )
