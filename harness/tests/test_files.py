"""Text is read and written in one way: UTF-8, no byte-order mark, lines that end at newlines alone.

Files that are written: whole or not at all, and for whom the user's umask lets read them.
"""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from harness.errors import UserError
from harness.files import lines_of, read_lines, read_text, write_bytes, write_text
from harness.report.figures.canvas import new_figure, save_figure
from harness.specs.suite import load_suite
from harness.tests.fake_sweep import made_up_trace
from harness.tests.test_layers import ROOT
from medusa_impl.checkpoints.tensors import write_by_rename
from medusa_impl.text_files import read_lines as method_lines
from medusa_impl.tree import DraftTree

BOM = b"\xef\xbb\xbf"
ODD = "a\u2028b\u2029c\x85d\x0ce"  # what splitlines takes for ends of lines


class Row(BaseModel):
    """A line of a record."""

    word: str


def test_text_is_utf8_in_a_locale_that_is_not(tmp_path: Path) -> None:
    """Regression: templates and suites were read in the locale's encoding, and READMEs written in it."""
    (tmp_path / "in.jinja").write_bytes("«é»: \u2028".encode())
    program = (
        "import sys, pathlib; from harness.files import read_text, write_text; "
        "from medusa_impl.text_files import read_lines; "
        "write_text(pathlib.Path('out'), read_text(pathlib.Path('in.jinja'))); "
        "assert len(read_lines(pathlib.Path('in.jinja'))) == 1"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, **ascii_only},
        check=True,
        timeout=60,
    )
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in.jinja").read_bytes()


def test_a_byte_order_mark_is_dropped_everywhere(tmp_path: Path) -> None:
    smoke = ROOT / "suites" / "smoke.toml"
    for name, content in (
        ("suite.toml", smoke.read_bytes()),
        ("tree.json", b"[[0], [0, 0]]"),
        ("rows.jsonl", b'{"word": "one"}\n'),
        ("text", b"hi"),
    ):
        (tmp_path / name).write_bytes(BOM + content)
    assert load_suite(tmp_path / "suite.toml") == load_suite(smoke)
    assert DraftTree.from_json(tmp_path / "tree.json").num_nodes == 3
    rows = read_lines(tmp_path / "rows.jsonl", Row.model_validate_json, holds="a row")
    assert rows == (Row(word="one"),)
    assert read_text(tmp_path / "text") == "hi" and method_lines(tmp_path / "text") == ["hi"]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    write_text(path, f"{ODD}\nlast\n")
    assert lines_of(read_text(path)) == method_lines(path) == [ODD, "last"]
    path.write_bytes(f"{ODD}\r\nlast".encode())
    assert lines_of(read_text(path)) == method_lines(path) == [ODD, "last"]
    assert lines_of("") == []


@pytest.mark.parametrize(
    ("content", "found"), [(b"\xff\xfe\x00", "not UTF-8"), (None, "No such file or directory")]
)
def test_what_is_no_text_is_refused_in_one_line(content: bytes | None, found: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=found):
        read_text(tmp_path / "text")


def test_no_source_file_reads_text_in_another_way() -> None:
    """PLW1514 sees only calls whose type it can infer; this sees them all."""
    found = []
    for package in ("harness", "medusa_impl", "suites"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "tests" not in path.parts:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
                found += [f"{path.name}:{call.lineno}" for call in calls if _reads_otherwise(call)]
    assert found == []


def _reads_otherwise(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute):
        return isinstance(call.func, ast.Name) and call.func.id == "open"
    name, owner = call.func.attr, call.func.value
    if name == "splitlines":  # of messages, whose first line is wanted, it may be used
        return not (
            isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "str"
        )
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if (
        name == "open"
        and not any("b" in str(mode) for mode in modes)
        and ast.unparse(owner) not in ("Store", "archive", "os", "kind")
        and not ast.unparse(owner).endswith(("Record", "GateFolder"))
    ):
        return all(keyword.arg != "encoding" for keyword in call.keywords)
    return name in ("read_text", "write_text") and all(keyword.arg != "encoding" for keyword in call.keywords)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "record.json": lambda path: write_bytes(path, b"{}"),
    "trace.npz": lambda path: made_up_trace(seed=1).save(path),
    "heads.safetensors": lambda path: write_by_rename(
        path, lambda part: save_file({"weight": torch.zeros(2)}, part)
    ),
    "picture.svg": lambda path: save_figure(new_figure(width=1, height=1), path, dpi=72),
}


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_written_with_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    """Records were once readable for their owner alone, so that nobody else could validate a shared one."""
    WRITERS[name](tmp_path / name)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
