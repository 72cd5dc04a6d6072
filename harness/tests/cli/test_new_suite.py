"""`new-suite`: what suites/README.md says of a model of one's own, followed by the letter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.paths import shipped
from harness.specs.suite import load_suite
from harness.tests.tiny_suite import command
from harness.tests.tiny_text import DATED, save_text_model

HEADING = "## A model, prompts of your own"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout with a model in it, whose chat template asks for the date."""
    folder = tmp_path_factory.mktemp("home [mine]")  # rich takes brackets for markup
    save_text_model(folder / "my-model", template=DATED)
    return folder


def documented() -> list[list[str]]:
    """Return the commands that the README gives, word by word."""
    section = shipped("README.md").read_text(encoding="utf-8").split(HEADING)[1]
    block = re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)[0]
    return [shlex.split(line)[1:] for line in block.strip().split("\n")]


def test_the_readme_followed_by_the_letter_makes_a_valid_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    (home / "mine.txt").write_text("Name three rivers\n\nTell me a story\n", encoding="utf-8")
    monkeypatch.setattr("harness.cli.reproduce.default_results", lambda: Path("results"))
    made, ran = (
        command(*("my-model" if word == "FOLDER" else word for word in words)) for words in documented()
    )
    assert made.code == ExitCode.OK, made.err
    assert "medusa-repro reproduce mine.toml" in made.err
    told = json.loads(ran.out.split("\n")[-2])
    assert told["valid"]["texts"], "its times may be disturbed: other programs may run while tests do"
    (folder,) = (home / "results").glob("*/*/*")
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", environment["chat_date"]), "the day is kept in the record"
    assert load_suite(folder / "suite.toml").model.path == "my-model"


def test_a_new_suite_has_what_fits_and_no_more(home: Path, tmp_path: Path) -> None:
    bare, drafts, traced = (tmp_path / f"{name}.toml" for name in ("bare", "drafts", "traced"))
    heads = tmp_path / "trained" / "heads.safetensors"
    heads.parent.mkdir()
    heads.touch()
    assert command("new-suite", "--model", home / "my-model", "--out", bare).code == ExitCode.OK
    assert command("new-suite", "--model", home / "my-model", "--heads", heads, "--out", drafts).code == 0
    (heads.parent / "calibration.npz").touch()
    assert command("new-suite", "--model", home / "my-model", "--heads", heads, "--out", traced).code == 0
    without, with_heads, with_trace = map(load_suite, (bare, drafts, traced))
    assert without.heads.absent and not without.drafts and without.tuned is None
    assert [arm.name for arm in without.arms] == ["vanilla", "hf_greedy", "hf_prompt_lookup"]
    assert with_heads.heads.path == "trained/heads.safetensors" and with_heads.calibration_trace is None
    assert [arm.name for arm in with_heads.arms if arm.tree is not None] == ["cartesian"]
    assert [arm.name for arm in with_trace.arms if arm.tree is not None] == [
        "cartesian",
        "optimised",
        "fastest",
    ]
    assert with_trace.calibration_trace == "trained/calibration.npz"
    assert with_trace.model.path == str(home / "my-model"), "absolute, for it does not lie below the file"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--model", "nosuch"), "found no readable file"),
        (("--model", "no[/red]such"), "found no readable file"),
        (("--model", "{home}/my-model", "--heads", "no[x]such"), "found no file 'no[x]such'"),
        (("--model", "{home}/my-model", "--out", "{there}"), "that is there already"),
    ],
)
def test_a_new_suite_that_cannot_be_written(
    words: tuple[str, ...], found: str, home: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there [1].toml"
    there.write_text("kept", encoding="utf-8")
    ran = command("new-suite", *(word.format(home=home, there=there) for word in words))
    assert ran.code == ExitCode.USER_ERROR and found in ran.error_line
    assert there.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize("positions", [-5, 1, True, None, "many"])
def test_a_configuration_that_gives_no_number_of_positions_is_no_defect(
    positions: object, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "my-model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    changed = json.dumps({**config, "max_position_embeddings": positions})
    (tmp_path / "model" / "config.json").write_text(changed, encoding="utf-8")
    ran = command("new-suite", "--model", tmp_path / "model", "--out", tmp_path / "mine.toml")
    assert ran.code == ExitCode.OK and load_suite(tmp_path / "mine.toml").max_new_tokens == 96


@pytest.mark.parametrize("name", ["plain", "two\nlines.toml"])
def test_a_name_that_no_command_takes_is_refused(name: str, home: Path, tmp_path: Path) -> None:
    ran = command("new-suite", "--model", home / "my-model", "--out", tmp_path / name)
    assert ran.code == ExitCode.USER_ERROR and "need a name that ends in .toml" in ran.error_line
    assert not list(tmp_path.iterdir())
