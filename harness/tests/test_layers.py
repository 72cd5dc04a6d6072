"""Who may import whom: every import of every file, those inside functions too, against one table of
packages.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GROUND = (
    "harness.bounds",
    "harness.errors",
    "harness.files",
    "harness.paths",
    "harness.safe_text",
    "harness.versions",
)
METHOD = ("medusa_impl",)
PURE_METHOD = (
    "medusa_impl.errors",
    "medusa_impl.tree",
    "medusa_impl.tree_search",
    "medusa_impl.tree_text",
    "medusa_impl.text_files",
    "medusa_impl.recipes",
    "medusa_impl.training_log",
)
TOP = (
    "acceptance",
    "decode",
    "errors",
    "heads",
    "recipes",
    "stream",
    "stream_rows",
    "text_files",
    "training_log",
    "tree",
    "tree_buffers",
    "tree_search",
    "tree_text",
    "waiting",
)
TOP_OF_METHOD = tuple(f"medusa_impl.{name}" for name in TOP)

# What a package may import besides itself; all may import `medusa_impl.errors`. What is not listed is
# forbidden.
ALLOWED: dict[str, tuple[str, ...]] = {
    "harness.errors": (),
    "harness.bounds": (),
    "harness.safe_text": (),
    "harness.files": GROUND,
    "harness.paths": GROUND,
    "harness.versions": GROUND,
    "harness.specs": (*GROUND, "medusa_impl.recipes"),
    "harness.stats": (*GROUND, "harness.specs"),
    "harness.assets": (*GROUND, "harness.specs"),
    "harness.records": (*GROUND, "harness.specs", "harness.stats", "medusa_impl.tree"),
    "harness.compose": (
        *GROUND,
        "harness.specs",
        "harness.stats",
        "harness.records",
        "medusa_impl.tree",
        "medusa_impl.tree_search",
    ),
    "harness.judge": (
        *GROUND,
        "harness.specs",
        "harness.stats",
        "harness.records",
        "harness.compose",
        "medusa_impl.tree",
        "medusa_impl.tree_search",
    ),
    "harness.report": (
        *GROUND,
        "harness.specs",
        "harness.stats",
        "harness.records",
        "harness.compose",
        "harness.judge",
        "medusa_impl.tree",
        "medusa_impl.training_log",
    ),
    "harness.device": (*GROUND, "harness.specs", "harness.assets", "harness.records", *METHOD),
    "harness.training": (
        *GROUND,
        "harness.specs",
        "harness.assets",
        "harness.records",
        "harness.device",
        *METHOD,
    ),
    "harness.measure": (
        *GROUND,
        "harness.specs",
        "harness.stats",
        "harness.assets",
        "harness.records",
        "harness.compose",
        "harness.device",
        "harness.training",
        *METHOD,
    ),
    "harness.gate": (
        *GROUND,
        "harness.specs",
        "harness.stats",
        "harness.records",
        "harness.compose",
        "harness.judge",
        "harness.measure",
    ),
    "harness.cli": ("harness", *METHOD),
    "harness.__main__": ("harness.cli",),
    **dict.fromkeys(TOP_OF_METHOD, TOP_OF_METHOD),
    "medusa_impl.decode": (*TOP_OF_METHOD, "medusa_impl.engine"),
    "medusa_impl.stream": (*TOP_OF_METHOD, "medusa_impl.engine"),
    "medusa_impl.engine": (
        "medusa_impl.heads",
        "medusa_impl.tree",
        "medusa_impl.tree_buffers",
        "medusa_impl.acceptance",
    ),
    "medusa_impl.checkpoints": (
        "medusa_impl.heads",
        "medusa_impl.recipes",
        "medusa_impl.text_files",
        "medusa_impl.training_log",
    ),
    "medusa_impl.training": (*TOP_OF_METHOD, "medusa_impl.engine", "medusa_impl.checkpoints"),
}
FOR_ALL = ("medusa_impl.errors",)
# of the harness: no torch while they are imported
PURE = (
    "specs",
    "stats",
    "assets",
    "records",
    "compose",
    "judge",
    "report",
)
HEAVY = ("torch", "transformers")


@dataclass(frozen=True)
class Import:
    """One imported name: in which file and line, and whether it happens when the file itself is imported."""

    importer: str
    path: Path
    line: int
    name: str
    at_top: bool

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.line} imports {self.name}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def source_files() -> list[Path]:
    return [
        path
        for package in ("harness", "medusa_impl")
        for path in sorted((ROOT / package).rglob("*.py"))
        if "tests" not in path.parts
    ]


def imports_of(path: Path, text: str | None = None) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8") if text is None else text)
    at_top = {
        id(node)
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef)
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield Import(module_of(path), path, getattr(node, "lineno", 0), name, id(node) in at_top)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def package_of(module: str) -> str | None:
    """Return the row of the table that a module falls under; the packages' own `__init__.py` hold nothing and
    have none.
    """
    return max((package for package in ALLOWED if within(module, (package,))), key=len, default=None)


def faults(found: Import) -> list[str]:
    row = package_of(found.importer)
    if row is None:
        return (
            []
            if found.importer in ("harness", "medusa_impl") and found.name.startswith("__future__")
            else [f"{found.where}; no row for it"]
        )
    told = []
    if within(found.name, ("harness", "medusa_impl")) and not within(
        found.name, (row, *ALLOWED[row], *FOR_ALL)
    ):
        told.append(f"{found.where}, which {row} may not")
    is_pure = within(found.importer, tuple(f"harness.{name}" for name in PURE) + PURE_METHOD)
    if found.at_top and is_pure and within(found.name, HEAVY):
        told.append(f"{found.where} when it is imported itself")
    if found.name.split(".")[0] == "pytest" or ".tests." in found.name:
        told.append(f"{found.where}, which belongs to tests")
    return told


def test_every_import_is_allowed() -> None:
    told = [fault for path in source_files() for found in imports_of(path) for fault in faults(found)]
    assert told == []


def test_every_row_of_the_table_is_there() -> None:
    modules = {module_of(path) for path in source_files()}
    assert [row for row in ALLOWED if not any(within(module, (row,)) for module in modules)] == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("harness/judge/metrics.py", "from harness.report.formatting import percent"),
        ("harness/device/engine.py", "from harness.judge.run import judge"),
        ("harness/measure/run.py", "from harness.judge.run import judge"),
        ("harness/records/run.py", "from harness.compose.replay import replay"),
        ("harness/specs/suite.py", "from harness.assets.fetch import fetch_asset"),
        ("harness/report/run.py", "import torch"),
        ("harness/compose/curve.py", "import torch.nn.functional"),
        ("medusa_impl/tree.py", "from torch import Tensor"),
        ("medusa_impl/decode.py", "from medusa_impl.checkpoints.heads import load_heads"),
        ("medusa_impl/engine/runner.py", "from medusa_impl.decode import decode_medusa"),
        ("medusa_impl/heads.py", "from harness.files import Frozen"),
        ("harness/specs/suite.py", "import harness.tests.tiny_suite"),
        ("harness/gate/run.py", "from harness.device.engine import load_engine"),
        ("harness/gate/run.py", "from harness.report.run import render_report"),
    ],
)
@pytest.mark.parametrize("inside", ["at the top", "in a function"])
def test_a_planted_import_is_found(importer: str, line: str, inside: str) -> None:
    """The test of before knew its modules by hand and looked one way: the first two of these passed it."""
    path = ROOT / importer
    planted = f"{line}\n" if inside == "at the top" else f"def planted() -> None:\n    {line}\n"
    told = [fault for found in imports_of(path, planted) for fault in faults(found)]
    may_load_late = "torch" in line and inside == "in a function"
    assert bool(told) != may_load_late
    assert all(
        fault.startswith(f"{importer}:{1 if inside == 'at the top' else 2} imports ") for fault in told
    )


def test_the_pure_packages_load_without_torch() -> None:
    names = [module_of(path) for path in source_files()]
    pure = [
        name
        for name in names
        if within(name, (*tuple(f"harness.{one}" for one in PURE), *GROUND, *PURE_METHOD))
    ]
    imports = f"import importlib, sys\nfor name in {pure!r}: importlib.import_module(name)\n"
    code = imports + f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert len(pure) > 60 and done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path", [path for path in source_files() if path.parts[-2] != "tests"], ids=module_of
)
def test_the_method_reads_no_clock_but_for_progress(path: Path) -> None:
    """Only the trainers' log knows the time, and takes the clock as an argument."""
    if module_of(path).startswith("medusa_impl"):
        assert all(found.name != "time" for found in imports_of(path)) or path.stem in ("medusa1", "trainer")


NUM_MODULES, NUM_LINES = 14, 400


def test_no_folder_and_no_file_grows_past_what_a_person_holds() -> None:
    """Twelve modules a folder is the aim; two more leave room until somebody splits it. The list of checks
    may be long.
    """
    counts: dict[str, int] = {}
    for path in source_files():
        folder = path.parent.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" and folder != "harness/cli":
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > NUM_MODULES} == {}
    lines = {module_of(path): path.read_text(encoding="utf-8").count("\n") for path in source_files()}
    assert {
        name: count for name, count in lines.items() if count > NUM_LINES and name != "harness.judge.checks"
    } == {}
