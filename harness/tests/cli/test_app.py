"""The command line: help, documented commands, dry runs, and options that change a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pytest import MonkeyPatch

import harness.measure.run
from harness.cli.app import app, code_version
from harness.cli.options import command_line
from harness.errors import ExitCode
from harness.paths import shipped
from harness.records.run import RunRecord
from harness.records.trace import Trace
from harness.tests.tiny_suite import (
    CHAIN,
    FASTEST,
    VANILLA,
    MicroRun,
    SmokeRun,
    command,
    micro_data,
    write_suite,
)
from medusa_impl.tree import DraftTree

ROOT = Path(__file__).resolve().parents[3]
APPLICATION: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(APPLICATION.commands)


def documented_commands() -> set[str]:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"medusa-repro ([a-z][a-z-]+)", text))
    row = next(line for line in text.splitlines() if line.startswith("| `medusa-repro assets`"))
    return named | set(re.findall(r"`([a-z-]+)`", row.split("|")[1]))


def test_every_command_of_the_readme_exists_and_every_command_is_in_the_readme() -> None:
    assert documented_commands() == set(COMMANDS)


def test_every_option_of_the_readme_exists() -> None:
    text = re.sub(r"`accelerate launch [^`]*`", "", (ROOT / "README.md").read_text())  # another program's
    options = {
        option
        for command in (APPLICATION, *COMMANDS.values())
        for parameter in command.params
        for option in parameter.opts
    }
    assert (
        {"--dry-run", "--limit", "--time-budget", "--from-scratch"}
        <= set(re.findall(r"--[a-z]+(?:-[a-z]+)*", text))
        <= options | {"--help"}
    )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_tells_what_a_command_does(name: str) -> None:
    ran = command(name, "--help")
    assert ran.code == ExitCode.OK
    shown = " ".join(ran.out.split())
    assert COMMANDS[name].help.split(".")[0].split("`")[0].strip()[:40] in shown
    for parameter in COMMANDS[name].params:
        assert parameter.name in ("help", "hub") or getattr(parameter, "help", None), (
            f"{name} {parameter.name} has no help"
        )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_ends_with_an_example_that_the_command_takes(name: str) -> None:
    ran = command(name, "--help")
    (example,) = re.findall(r"Example: (.*?)\s*$", " ".join(ran.out.split()))
    program, verb, *words = shlex.split(example)
    assert (program, verb) == ("medusa-repro", name)
    COMMANDS[name].make_context(name, list(words))


def test_a_checkout_says_its_version_and_code_elsewhere_that_of_the_environment(tmp_path: Path) -> None:
    """An environment can hold another version than the checkout that runs; a folder around the code can be
    another project's.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ran = command("--version")
    assert (ran.code, ran.out) == (ExitCode.OK, f"medusa-repro {version}\n")

    installed = metadata.version("medusa-repro")
    assert code_version(tmp_path / "harness") == installed
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "9.9"\n')
    assert code_version(tmp_path / "harness") == installed
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "medusa-repro"\nversion = "9.9"\n')
    assert code_version(tmp_path / "harness") == "9.9"


def test_code_that_was_copied_says_that_its_version_is_unknown(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.app.DISTRIBUTION", "medusa-repro-that-nobody-installed")
    assert code_version(tmp_path / "harness") == "of unknown version"


def test_files_named_by_the_map_of_the_harness_exist() -> None:
    text = (ROOT / "harness" / "README.md").read_text()
    names = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|toml))?)`", text))
    assert len(names) > 15
    assert [
        name for name in sorted(names) if not any((base / name).exists() for base in (ROOT, ROOT / "harness"))
    ] == []


def test_files_named_by_the_readme_exist() -> None:
    links = re.findall(
        r"\]\(((?:suites|harness|medusa_impl|results)/[^)#]*)\)", (ROOT / "README.md").read_text()
    )
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize(
    "words", [("no-such-command",), ("reproduce", "--no-such-option"), ("reproduce", "smoke", "--limit", "0")]
)
def test_wrong_usage_is_a_user_error(words: tuple[str, ...]) -> None:
    ran = command(*words)
    assert ran.code == ExitCode.USER_ERROR and "Traceback" not in ran.err and ran.err


def test_dry_run_runs_nothing(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a dry run loaded a model")

    monkeypatch.setattr(harness.measure.run, "load_model", never)
    ran = command("reproduce", "smoke", "--dry-run", "--results", tmp_path / "results", "--limit", "5")
    assert ran.code == ExitCode.OK
    assert "no record of this model yet: minutes unknown" in ran.out
    row = next(line for line in ran.out.splitlines() if "rejection" in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == [
        "rejection",
        "medusa",
        "chain",
        "2",
        "10",
        "?",
    ]
    assert "5 prompts" in ran.out and not (tmp_path / "results").exists()


def test_dry_run_takes_its_minutes_from_a_record_of_this_machine(smoke: SmokeRun, tmp_path: Path) -> None:
    results = smoke.record.folder.parents[2]
    # newer, and of a version that this one cannot read
    broken = smoke.record.folder.parent / "20990101T000000Z-broken"
    shutil.copytree(smoke.record.folder, broken)
    (broken / "suite.toml").write_text("schema_version = 99\n")
    try:
        ran = command("reproduce", "smoke", "--dry-run", "--results", results)
    finally:
        shutil.rmtree(broken)
    assert f"from record {smoke.record.folder.name}" in " ".join(ran.out.split())
    row = next(line for line in ran.out.splitlines() if "hf_greedy" in line)
    assert re.fullmatch(r"\d+\.\d", row.strip("│┃ ").split("│")[-1].strip())


@pytest.mark.parametrize(
    ("suite", "options", "num_prompts"),
    [("embedded", (), 16), ("embedded_full", (), 80), ("embedded", ("--limit", "300"), 16)],
)
def test_dry_run_counts_the_prompts_that_there_are(
    suite: str, options: tuple[str, ...], num_prompts: int, tmp_path: Path
) -> None:
    ran = command("reproduce", suite, "--dry-run", "--results", tmp_path, *options)
    assert f"{num_prompts} prompts" in ran.out


def test_dry_run_counts_own_prompts(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\ntwo\n\nthree\n")
    ran = command(
        "reproduce", "embedded", "--dry-run", "--results", tmp_path, "--prompts", tmp_path / "mine.txt"
    )
    assert "3 prompts" in ran.out


def test_record_holds_the_command_without_folders(monkeypatch: MonkeyPatch) -> None:
    words = [
        "medusa-repro",
        "reproduce",
        "suites/my.toml",
        "--results=/home/someone/out",
        "--tree",
        "/srv/x/tree.json",
        "--limit",
        "3",
    ]
    monkeypatch.setattr("sys.argv", words)
    assert command_line() == "medusa-repro reproduce my.toml --results=out --tree tree.json --limit 3"


def test_own_claims_file_is_judged_instead_of_the_papers(smoke: SmokeRun, tmp_path: Path) -> None:
    text = (shipped("claims.toml")).read_text()
    head, *claims = text.split("[[claims]]")
    mine = tmp_path / "mine.toml"
    mine.write_text(head + "[[claims]]" + next(claim for claim in claims if 'id = "A6"' in claim))
    record = tmp_path / "record"
    shutil.copytree(smoke.record.folder, record)
    ran = command("report", record, "--claims", mine)
    assert ran.code == ExitCode.OK
    assert sum(json.loads(ran.out.splitlines()[-1])["verdicts"].values()) == 1
    assert "A6" in ran.out


def test_readme_option_writes_between_the_markers(smoke: SmokeRun, tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("Title\n<!-- begin:results -->\n<!-- end:results -->\nrest\n")
    ran = command("report", smoke.record.folder, "--readme", page)
    assert ran.code == ExitCode.OK and json.loads(ran.out.splitlines()[-1])["valid"]["texts"]
    assert smoke.record.folder.name in page.read_text() and page.read_text().endswith("rest\n")


def test_validate_export_and_schemas(micro: MicroRun, tmp_path: Path) -> None:
    ran = command("validate", micro.record.folder)
    assert ran.code == ExitCode.OK
    assert json.loads(ran.out) == {"record": micro.record.folder.name, "valid": True, "num_faults": 0}
    assert command("export", micro.record.folder, tmp_path / "table.csv", "--steps").code == ExitCode.OK
    assert (tmp_path / "table.csv").read_text().startswith("record,suite,")
    assert command("schemas", tmp_path / "schemas").code == ExitCode.OK
    assert (tmp_path / "schemas" / "generation.schema.json").exists()


def test_trace_then_search_then_run_its_tree(heads_file: Path, tmp_path: Path) -> None:
    """The way of an engineer: record a trace, grow a tree on it, decode with that tree, and get the steps
    that replay promised.
    """
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, arms=[VANILLA, CHAIN, FASTEST]))
    traced = command("trace", suite, tmp_path / "trace.npz", "--limit", "3")
    assert traced.code == ExitCode.OK
    assert json.loads(traced.out.splitlines()[-1]) == {"trace": "trace.npz", "prompts": 3, "positions": 36}
    searched = command(
        "search-tree",
        tmp_path / "trace.npz",
        "--num-nodes",
        "6",
        "--out",
        tmp_path / "tree.json",
        "--values",
        "marginals",
    )
    assert searched.code == ExitCode.OK
    tree = DraftTree.from_json(tmp_path / "tree.json")
    assert tree.num_nodes == 6 and DraftTree.from_json(searched.out.splitlines()[-1]) == tree
    ran = command(
        "reproduce",
        suite,
        "--tree",
        tmp_path / "tree.json",
        "--limit",
        "3",
        "--results",
        tmp_path / "results",
    )
    assert ran.code == ExitCode.OK
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    record = RunRecord(folder)
    assert record.trees["tree"].tree() == tree and record.trace is not None
    before = Trace.load(tmp_path / "trace.npz")
    for mine, theirs in zip(before.prompts, record.trace.prompts, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist() and mine.ranks.tolist() == theirs.ranks.tolist()


def test_doctor_and_assets_list_without_a_network(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDUSA_REPRO_CACHE", str(tmp_path / "not" / "there"))
    assert "threads" in command("doctor").out
    assert "smollm2-135m-instruct" in command("assets").out
