"""The workflows: every line that they run is a session that works here, and no rule of trust is broken.

Each rule is seen to fail: a fault is planted into a workflow of this project, and the lint or the rule must
tell of it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from harness.cli.app import app
from harness.tests.workflow_rules import (
    UNTRUSTED,
    Workflow,
    faults,
    label_event,
    parse,
    pins,
    read_workflows,
    run_fault,
    run_lines,
    runs_for,
    sessions_of,
    value_of,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = read_workflows(FOLDER)
SESSIONS = sessions_of(ROOT / "noxfile.py")
APPLICATION: Any = typer.main.get_command(app)
OPTIONS = {
    name: {option for parameter in each.params for option in parameter.opts}
    for name, each in APPLICATION.commands.items()
}
PLANTED = {
    "a trigger with the rights of this repository": (
        "gate.yml",
        "  pull_request:\n",
        "  pull_request_target:\n",
    ),
    "an action at a tag": ("checks.yml", r"checkout@\w+ # v6.0.2", "checkout@v6"),
    "an action of others": ("checks.yml", r"actions/checkout@", "somebody/checkout@"),
    "credentials left": ("gate.yml", "persist-credentials: false", "persist-credentials: true"),
    "a token next to the labelled commit": (
        "gate.yml",
        r"run: nox -s gate ",
        "env:\n          GH_TOKEN: ${{ secrets.PUBLISH }}\n        run: nox -s gate ",
    ),
    "a token for a whole workflow": ("gate.yml", "env:\n", "env:\n  GH_TOKEN: ${{ github.token }}\n"),
    "a token in the job that makes the pages": (
        "results.yml",
        "run: nox -s results ",
        "env:\n          GH_TOKEN: ${{ github.token }}\n        run: nox -s results ",
    ),
    "the labelled commit where the token is": (
        "results.yml",
        r"persist-credentials: false\n      - uses: actions/download-artifact@(\w+ # v8.0.1\n"
        r"        with:\n          name: pages)",
        "persist-credentials: false\n"
        "          ref: ${{ github.event.pull_request.head.sha || github.sha }}\n"
        "      - uses: actions/download-artifact@\\1",
    ),
    "more than the install line where the token is": (
        "results.yml",
        "run: nox -s results_pull_request",
        "run: nox -s tests\n      - run: nox -s results_pull_request",
    ),
    "write permission for all": ("gate.yml", "contents: read", "contents: write"),
    "write permission for another job": (
        "checks.yml",
        "    timeout-minutes: 60\n",
        "    timeout-minutes: 60\n    permissions:\n      contents: write\n",
    ),
    "a fork's commit on a self-hosted runner": (
        "gate.yml",
        r"      && github.event.pull_request.head.repo.full_name == github.repository\n",
        "",
    ),
    "anybody's label": (
        "gate.yml",
        r"== github.repository\n      && contains.*login\)\)",
        "== github.repository)",
    ),
    "any label": (
        "gate.yml",
        r"github.event.label.name == 'gate'\n      && github.event.pull",
        "github.event.pull",
    ),
    "each push after the label": ("gate.yml", r"types: \[labeled\]", "types: [labeled, synchronize]"),
    "the newest commit instead of the labelled one": (
        "gate.yml",
        r"ref: >-\n +\${{ inputs.head .*\n.*}}\n",
        "ref: ${{ github.head_ref }}\n",
    ),
    "any commit that is asked for": (
        "gate.yml",
        r"format\('refs/heads/\{0\}', inputs.head\)",
        "inputs.head",
    ),
    "a check of pull requests on a self-hosted runner": (
        "checks.yml",
        "runs-on: ubuntu-24.04",
        "runs-on: [self-hosted]",
    ),
    "an event's text in a command": (
        "checks.yml",
        "nox -s lint",
        "nox -s lint -- ${{ github.event.pull_request.title }}",
    ),
    "a command that is no session": ("checks.yml", "nox -s lint", "ruff check"),
    "two commands in a line": ("checks.yml", "nox -s lint", "nox -s lint; nox -s types"),
    "a session that is not there": ("checks.yml", "nox -s lint", "nox -s lints"),
    "an option that is not there": ("checks.yml", "results -- --check", "results -- --chek"),
    "any Python": ("results.yml", r"      - uses: actions/setup-python@.*\n        with:\n.*\n", ""),
    "no time limit": ("gate.yml", r"    timeout-minutes: 60\n", ""),
    "no concurrency group": ("checks.yml", r"concurrency:\n  group: .*\n  cancel-in-progress: true\n", ""),
}
# Of these the tools of `nox -s lint` tell by themselves.
SEEN_BY_LINT = (
    "a trigger with the rights of this repository",
    "an action at a tag",
    "credentials left",
    "a token next to the labelled commit",
    "write permission for all",
    "a check of pull requests on a self-hosted runner",
    "an event's text in a command",
    "no concurrency group",
)


def planted(name: str) -> list[Workflow]:
    """Return the workflows with one fault in them."""
    file, pattern, new = PLANTED[name]
    changed = []
    for one in WORKFLOWS:
        text, times = re.subn(pattern, new, one.text, count=1) if one.name == file else (one.text, 1)
        assert times == 1, f"{file} no longer holds {pattern}"
        changed.append(parse(one.name, text))
    return changed


def found_in(workflows: list[Workflow]) -> list[str]:
    return faults(workflows, sessions=SESSIONS, options=OPTIONS)


def test_the_workflows_break_no_rule() -> None:
    assert found_in(WORKFLOWS) == []


LINES = sorted({line for _, line in run_lines(WORKFLOWS)})


@pytest.mark.parametrize("line", LINES)
def test_each_line_that_runs_is_the_install_line_or_a_session_that_is_there(line: str) -> None:
    assert run_fault(line, sessions=SESSIONS, options=OPTIONS) is None


def test_there_is_something_to_look_at() -> None:
    assert {one.name for one in WORKFLOWS} == {"checks.yml", "gate.yml", "results.yml"}
    lines = {line for _, line in run_lines(WORKFLOWS)}
    assert {f"nox -s {name}" for name in ("lint", "types", "tests", "tests_oldest", "smoke", "wheel")} < lines
    assert all(len(found) == 1 for found in pins(WORKFLOWS).values()) and len(pins(WORKFLOWS)) == 4


def test_checks_runs_what_the_script_of_a_clean_clone_runs() -> None:
    words = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("--sessions ")[1].split()
    lines = [line for name, line in run_lines(WORKFLOWS) if name == "checks.yml"]
    assert [line.removeprefix("nox -s ") for line in lines if line.count(" ") == 2] == words


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    assert set(found_in(planted(name))) - set(found_in(WORKFLOWS))


@pytest.mark.parametrize(("base", "words"), [("", []), ("v0.2.0", ["--base", "v0.2.0"])])
def test_the_gate_is_given_a_base_only_where_one_was_named(base: str, words: list[str]) -> None:
    """An empty one is the gate's own choice, the merge base with main, and no revision of no name."""
    (line,) = {line for _, line in run_lines(WORKFLOWS) if "BASE" in line}
    script = f'nox() {{ printf "%s\\n" "$@"; }}; {line}'
    environment = {"BASE": base, "RUNNER_TEMP": "a folder"}
    said = subprocess.check_output(["bash", "-euc", script], env=environment, text=True).splitlines()
    assert said == ["-s", "gate", "--", *words, "--results", "a folder/gate"]


def test_a_labelled_commit_of_this_repository_is_measured() -> None:
    """Else the rules on forks would hold for a job that never runs."""
    (gate,) = (one for one in WORKFLOWS if one.name == "gate.yml")
    assert runs_for(gate.jobs["gpu"]["if"], label_event())
    assert not runs_for(gate.jobs["gpu"]["if"], {"github.event_name": "push"})
    assert runs_for(gate.jobs["gpu"]["if"], {"github.event_name": "workflow_dispatch"})
    assert not any(runs_for(gate.jobs["gpu"]["if"], event) for event in UNTRUSTED.values())


@pytest.mark.parametrize(
    ("variable", "devices"),
    [(None, []), ("", []), ("[]", []), ('["A100"]', ["A100"]), ('["H100", "L4"]', ["H100", "L4"])],
)
def test_what_starts_by_the_clock_goes_to_the_named_devices_alone(
    variable: str | None, devices: list[str]
) -> None:
    """A device without a runner kept a job in the queue for a day, every night."""
    for name, job in (("gate.yml", "gpu"), ("results.yml", "measure")):
        (one,) = (each for each in WORKFLOWS if each.name == name)
        event: dict[str, Any] = {
            "github.event_name": "schedule",
            "github.ref": "refs/heads/main",
            "vars.SCHEDULED_DEVICES": variable,
            "vars.GPU_DEVICES": '["GH200"]',
        }
        assert runs_for(one.jobs[job]["if"], event) == bool(devices)
        matrix = one.jobs[job]["strategy"]["matrix"]["device"]
        if devices:
            assert value_of(matrix, event) == devices
        asked = {**event, "github.event_name": "workflow_dispatch"}
        assert runs_for(one.jobs[job]["if"], asked) and value_of(matrix, asked) == ["GH200"]
        assert value_of(matrix, {**asked, "inputs.devices": '["L4"]'}) == ["L4"]
        assert value_of(matrix, {**asked, "vars.GPU_DEVICES": None}) == ["A100", "H100", "L4"]
    labelled = {**label_event(), "vars.SCHEDULED_DEVICES": variable, "vars.GPU_DEVICES": '["GH200"]'}
    (gate,) = (each for each in WORKFLOWS if each.name == "gate.yml")
    assert runs_for(gate.jobs["gpu"]["if"], labelled)
    assert value_of(gate.jobs["gpu"]["strategy"]["matrix"]["device"], labelled) == ["GH200"]


def test_a_fork_gets_the_gate_on_a_machine_of_github() -> None:
    (gate,) = (one for one in WORKFLOWS if one.name == "gate.yml")
    assert runs_for(gate.jobs["cpu"]["if"], UNTRUSTED["a fork, labelled by a maintainer"])
    assert not runs_for(gate.jobs["cpu"]["if"], UNTRUSTED["another label"])


def test_results_come_from_main_and_end_in_a_proposal() -> None:
    (results,) = (one for one in WORKFLOWS if one.name == "results.yml")
    assert runs_for(results.jobs["measure"]["if"], {"github.ref": "refs/heads/main"})
    assert not runs_for(results.jobs["measure"]["if"], {"github.ref": "refs/heads/feature"})
    after = results.jobs["pages"]["if"], results.jobs["propose"]["if"]
    assert runs_for(after[0], {"needs.measure.result": "failure"})
    assert not runs_for(after[0], {"needs.measure.result": "skipped"})
    assert not runs_for(after[1], {"needs.pages.result": "failure"})


def test_variables_and_runner_labels_are_told_of() -> None:
    """A maintainer who sets none of them gets a gate that nobody can start by a label."""
    section = (ROOT / "harness" / "README.md").read_text(encoding="utf-8").split("## Workflows")[1]
    named = {name for one in WORKFLOWS for name in re.findall(r"vars\.(\w+)", one.text)}
    assert named == {
        "GPU_DEVICES",
        "SCHEDULED_DEVICES",
        "GATE_MAINTAINERS",
        "GATE_BASE",
        "PIP_EXTRA_INDEX_URL",
    }
    assert all(f"`{name}`" in section for name in named)
    for label in ("self-hosted", "gpu", "A100", "H100", "L4", "gate", *(one.name for one in WORKFLOWS)):
        assert f"`{label}`" in section or f"`{label}:" in section or f"`{label}`:" in section, label


def test_the_lint_session_runs_both_tools() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (session,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == "lint")
    names = {one.id for one in ast.walk(session) if isinstance(one, ast.Name)}
    assert {"WORKFLOW_SCHEMA", "ZIZMOR"} <= names


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the two commands of `nox -s lint` that look at workflows, as the noxfile gives them."""
    settings: dict[str, Any] = {}
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for name in ("WORKFLOW_SCHEMA", "ZIZMOR"):
        exec(next(line for line in source.splitlines() if line.startswith(f"{name} = ")), settings)
    files = sorted(map(str, folder.glob("*.yml")))
    schema = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        settings["WORKFLOW_SCHEMA"],
        *files,
    ]
    form = subprocess.run(schema, capture_output=True, text=True)
    if form.returncode:
        return form
    zizmor = str(Path(sys.executable).with_name("zizmor"))
    return subprocess.run([zizmor, *settings["ZIZMOR"], *files], capture_output=True, text=True)


def write(workflows: list[Workflow], folder: Path) -> Path:
    """Write workflows where zizmor takes them for workflows."""
    home = folder / ".github" / "workflows"
    home.mkdir(parents=True)
    for one in workflows:
        (home / one.name).write_text(one.text, encoding="utf-8")
    return home


def test_the_lint_passes_on_the_workflows_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    ran = lint(write(WORKFLOWS, tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", SEEN_BY_LINT)
def test_the_lint_finds_a_planted_fault(name: str, tmp_path: Path) -> None:
    assert lint(write(planted(name), tmp_path)).returncode != 0


def test_the_lint_finds_a_key_that_no_workflow_has(tmp_path: Path) -> None:
    home = write(WORKFLOWS, tmp_path)
    file = home / "checks.yml"
    file.write_text(
        file.read_text(encoding="utf-8").replace("timeout-minutes: 60", "timeout: 60"), encoding="utf-8"
    )
    ran = lint(home)
    assert ran.returncode != 0 and "schema" in (ran.stdout + ran.stderr).lower()
