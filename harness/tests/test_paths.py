"""A path in a data file means the same from every working directory.

The filter that keeps the names of users and machines out of records.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from harness.device.prompts import benchmark_prompts
from harness.errors import UserError
from harness.files import DataPath
from harness.paths import holds_absolute_path, resolve_path, shipped, without_paths
from harness.specs.recipe import load_recipe
from harness.specs.suite import PromptSpec

RECIPE = """\
schema_version = 1
kind = "recipe"
name = "mine"
description = "-"
packed_corpus = "embedded/corpus.safetensors"
[model]
path = "model"
[corpus]
num_tokens = 10
prompts_file = "mine.txt"
[recipe]
"""


def test_paths_go_from_the_data_file_and_never_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        (folder / "embedded").mkdir(parents=True)
        (folder / "mine.txt").write_text(folder.name, encoding="utf-8")
    (elsewhere / "only.txt").touch()
    monkeypatch.chdir(elsewhere)
    assert resolve_path("mine.txt", base_folder=home) == home / "mine.txt"
    assert resolve_path(str(elsewhere / "only.txt"), base_folder=home) == elsewhere / "only.txt"
    assert resolve_path("smoke.toml", base_folder=home) == shipped("smoke.toml")
    assert resolve_path("embedded", base_folder=home) == home / "embedded", "before the shipped data"
    for missing, base in (("only.txt", home), ("only.txt", None), ("nul\0", home)):
        with pytest.raises(UserError, match="no file"):
            resolve_path(missing, base_folder=base)
    prompts = PromptSpec(source="file", path=DataPath("mine.txt"))
    (prompt,) = benchmark_prompts(prompts, base_folder=home, allow_hub=False)
    assert prompt.turns == ("home",)


def test_a_recipe_names_its_files_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a recipe's model, corpus and prompts were looked for in the working directory."""
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.txt").write_text("hi", encoding="utf-8")
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir("/")
    spec = load_recipe(tmp_path / "mine.toml")
    assert spec.model.path == str(tmp_path / "model")
    assert spec.corpus is not None and spec.corpus.prompts_file == str(tmp_path / "mine.txt")
    assert spec.packed_corpus == str(shipped("embedded", "corpus.safetensors"))


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("file:///home/jane/x", ".../x"),
        ("file:/home/jane/x", ".../x"),
        ("file://host/share/x", ".../x"),
        ("git+file:///home/jane/repo", ".../repo"),
        ("see file:///home/jane%20doe/m/x.bin now", "see .../x.bin now"),
        ("HF_HOME:/home/jane/cache", "HF_HOME:.../cache"),
        ("PATH=/home/jane/bin:/opt/tools/bin", "PATH=.../bin:.../bin"),
        ("/home/john doe/models/x is missing", ".../x is missing"),
        ("'/home/john doe/models/my model.bin'", "'.../my model.bin'"),
        ("/home/o'brien/m", ".../m"),
        ("(/home/jane/a b/c)", "(.../c)"),
        ("copy /a/b to /c/d", "copy .../b to .../d"),
        (r"C:\Users\Jane Doe\m\x", ".../x"),
        ("C:/Users/Jane/x", ".../x"),
        (r"\\server\share\x", ".../x"),
        ("/home/jane", "..."),
        ("/Users/jane", "..."),
        (r"C:\Users\Jane", "..."),
    ],
)
def test_a_path_after_a_scheme_or_a_colon_or_with_blanks_is_cut(text: str, cut: str) -> None:
    assert holds_absolute_path(text)
    assert without_paths(text) == cut


@pytest.mark.parametrize(
    "text",
    [
        "https://host.org/home/x",
        "s3://bucket/a/b",
        "read 10 GB/s, 5 GFLOP/s (size 4096/8192)",
        "ratio a:b",
        "../a/b and ./a/b",
        "1/2 /3",
    ],
)
def test_addresses_and_quotients_stay(text: str) -> None:
    assert not holds_absolute_path(text)
    assert without_paths(text) == text


@pytest.mark.parametrize("piece", ["/a ", "a ", "/a b", "~/", "C:\\a ", "file:", "//", "a'"])
def test_a_long_text_takes_no_time(piece: str) -> None:
    start = time.process_time()
    without_paths(piece * 5000)
    assert time.process_time() - start < 2.0
