"""A path in a data file means the same from every working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.device.prompts import benchmark_prompts
from harness.errors import UserError
from harness.files import DataPath
from harness.paths import resolve_path, shipped
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
