"""What the workflows of this project must hold, over what a schema and zizmor can see.

Each rule is a function from workflows to faults, one line each. Conditions are evaluated, not compared as
text: whether a job runs for the commit of a fork is asked by giving its `if` such an event.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

INSTALL = "python3 -m pip install --constraint constraints.txt nox"
PUBLISHES = "nox -s results_pull_request"
WRITES = {"contents": "write", "pull-requests": "write"}
TRIGGERS = {"pull_request", "push", "workflow_dispatch", "schedule"}
# a branch of this repository that was asked for, the commit that was labelled, or that of the event
MEASURED = (
    "${{ inputs.head && format('refs/heads/{0}', inputs.head) "
    "|| github.event.pull_request.head.sha || github.sha }}"
)
_SESSION = re.compile(r"nox -s (\w+)(?: -- (.+))?")
_PIN = re.compile(r"uses: (actions/[\w-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$")
_SECRET = re.compile(r"\bsecrets\b|github\.token|GITHUB_TOKEN|toJSON\(github\)")
_NAME = re.compile(r"\b(?:github|inputs|vars|needs)(?:\.[\w-]+)+")


@dataclass(frozen=True)
class Workflow:
    """One file: its name, text and content."""

    name: str
    text: str
    data: Mapping[str, Any]

    @property
    def jobs(self) -> dict[str, Any]:
        """Return its jobs by name."""
        return dict(self.data["jobs"])

    @property
    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each step with the name of its job."""
        return ((name, step) for name, job in self.jobs.items() for step in job["steps"])


def parse(name: str, text: str) -> Workflow:
    """Return a workflow; YAML 1.2, in which `on` is a word and no truth value."""
    return Workflow(name, text, YAML(typ="safe", pure=True).load(text))


def read_workflows(folder: Path) -> list[Workflow]:
    """Return every workflow of a folder, of either ending."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yml", ".yaml"))
    return [parse(path.name, path.read_text(encoding="utf-8")) for path in files]


def sessions_of(noxfile: Path) -> set[str]:
    """Return the names of the sessions that a noxfile defines."""
    tree = ast.parse(noxfile.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(one).startswith("nox.session") for one in node.decorator_list)
    }


def run_lines(workflows: Sequence[Workflow]) -> Iterator[tuple[str, str]]:
    """Yield every line of every `run:`, with the workflow that holds it."""
    for one in workflows:
        for _, step in one.steps:
            for line in str(step.get("run", "")).splitlines():
                yield one.name, line


def faults(
    workflows: Sequence[Workflow], *, sessions: set[str], options: Mapping[str, set[str]]
) -> list[str]:
    """Return what breaks a rule; `options` holds the options of each session that passes words on."""
    found = [
        f"{name}: {fault}"
        for name, line in run_lines(workflows)
        if (fault := run_fault(line, sessions=sessions, options=options)) is not None
    ]
    for one in workflows:
        each = (*_trigger_faults(one), *_form_faults(one), *_pin_faults(one), *_checkout_faults(one))
        found += [f"{one.name}: {fault}" for fault in (*each, *_fork_faults(one), *_secret_faults(one))]
    return found + _permission_faults(workflows)


def run_fault(line: str, *, sessions: set[str], options: Mapping[str, set[str]]) -> str | None:
    """Return what is wrong with a line of `run:`, or None for an install line or a session of the noxfile."""
    if line == INSTALL:
        return None
    match = _SESSION.fullmatch(line)
    if match is None or "${{" in line:
        return f"neither the install line nor one session: {line}"
    if match[1] not in sessions:
        return f"no session {match[1]} in the noxfile: {line}"
    unknown = set(re.findall(r"--[a-z-]+", match[2] or "")) - options.get(match[1], set())
    return f"{match[1]} has no option {', '.join(sorted(unknown))}: {line}" if unknown else None


def _trigger_faults(one: Workflow) -> Iterator[str]:
    wrong = set(one.data["on"]) - TRIGGERS
    if wrong:
        yield f"triggers {', '.join(sorted(wrong))}"


def _form_faults(one: Workflow) -> Iterator[str]:
    if "concurrency" not in one.data:
        yield "no concurrency group"
    for name, job in one.jobs.items():
        if "timeout-minutes" not in job:
            yield f"job {name} has no time limit"
        uses = [str(step.get("uses", "")) for step in job["steps"]]
        if not any(each.startswith("actions/setup-python@") for each in uses):  # not all let pip install
            yield f"job {name} runs with whatever Python its machine has"


def _pin_faults(one: Workflow) -> Iterator[str]:
    """Yield each action that is no action of GitHub's own at a full hash with its version after it."""
    for line in one.text.splitlines():
        if "uses:" in line and _PIN.search(line) is None:
            yield f"action without hash and version: {line.strip()}"


def pins(workflows: Sequence[Workflow]) -> dict[str, set[tuple[str, str]]]:
    """Return the hashes and versions of each action; one of each where all is well."""
    found: dict[str, set[tuple[str, str]]] = {}
    for one in workflows:
        for line in one.text.splitlines():
            if (match := _PIN.search(line)) is not None:
                found.setdefault(match[1], set()).add((match[2], match[3]))
    return found


def _checkout_faults(one: Workflow) -> Iterator[str]:
    for name, step in one.steps:
        if str(step.get("uses", "")).startswith("actions/checkout@"):
            if step.get("with", {}).get("persist-credentials") is not False:
                yield f"job {name} leaves credentials in the checkout"
            ref = step.get("with", {}).get("ref")
            if ref not in (None, MEASURED):
                yield f"job {name} checks out {ref}"
            if _is_self_hosted(one.jobs[name]) and "pull_request" in one.data["on"] and ref != MEASURED:
                yield f"job {name} checks out another commit than the labelled one"


def _is_self_hosted(job: Mapping[str, Any]) -> bool:
    """Return whether a job could run on a machine that is not GitHub's."""
    return re.fullmatch(r"ubuntu-\d\d\.\d\d", str(job["runs-on"])) is None


REPOSITORY = "owner/medusa-repro"


def label_event(
    *,
    label: str = "gate",
    repository: str = REPOSITORY,
    sender: str = "maintainer",
    maintainers: str | None = '["maintainer"]',
) -> dict[str, Any]:
    """Return what a job's condition sees after somebody labelled a pull request."""
    return {
        "github.event_name": "pull_request",
        "github.repository": REPOSITORY,
        "github.event.label.name": label,
        "github.event.pull_request.head.repo.full_name": repository,
        "github.event.sender.login": sender,
        "vars.GATE_MAINTAINERS": maintainers,
    }


# Labelled pull requests that must not reach a machine of the maintainers.
UNTRUSTED = {
    "a fork, labelled by a maintainer": label_event(repository="stranger/medusa-repro"),
    "a fork, labelled by a stranger": label_event(repository="stranger/medusa-repro", sender="stranger"),
    "a fork, whose repository is gone": label_event(repository=""),
    "labelled by somebody else": label_event(sender="triage"),
    "another label": label_event(label="documentation"),
    "no maintainers listed": label_event(maintainers=None),
}


def runs_for(condition: str | None, event: Mapping[str, Any]) -> bool:
    """Return whether a job with this condition runs for an event; without one every job runs.

    A name that the event lacks is empty, as on GitHub.
    """
    return condition is None or bool(value_of(condition, event))


def value_of(expression: str, event: Mapping[str, Any]) -> Any:
    """Return the value of an expression of a workflow for an event; a name that it lacks is empty."""
    text = expression.strip().removeprefix("${{").removesuffix("}}")
    text = _NAME.sub(lambda match: f"value({match[0]!r})", text)
    text = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or "))
    known = {
        "__builtins__": {},
        "value": lambda name: event.get(name) or "",
        "contains": lambda where, what: what in where,
        "fromJSON": json.loads,
        "cancelled": lambda: False,
    }
    return eval(" ".join(text.split()), known)


def _fork_faults(one: Workflow) -> Iterator[str]:
    """Yield each job on a machine of the maintainers that an untrusted pull request would reach."""
    if "pull_request" not in one.data["on"]:
        return  # nothing else that is allowed starts on a fork's commit
    for name, job in one.jobs.items():
        if not _is_self_hosted(job):
            continue
        if one.data["on"]["pull_request"] != {"types": ["labeled"]}:
            yield f"job {name} on a self-hosted runner starts at more than a label"
        for what, event in UNTRUSTED.items():
            if runs_for(job.get("if"), event):
                yield f"job {name} on a self-hosted runner starts for: {what}"


def _secret_faults(one: Workflow) -> Iterator[str]:
    """Yield each secret outside of the one step that opens the results pull request."""
    allowed = 0
    for name, step in one.steps:
        held = _SECRET.findall(json.dumps(step))
        if not held:
            continue
        lines = [str(each["run"]) for each in one.jobs[name]["steps"] if "run" in each]
        is_it = str(step.get("run", "")).startswith(PUBLISHES) and lines[:-1] == [INSTALL]
        checks_out = [
            each.get("with", {}) for each in one.jobs[name]["steps"] if "checkout@" in str(each.get("uses"))
        ]
        if not is_it or any("ref" in each for each in checks_out) or "pull_request" in one.data["on"]:
            yield f"job {name} runs code next to a secret"
        else:
            allowed += len(held)
    if len(_SECRET.findall(one.text)) > allowed:
        yield "a secret outside of the step that opens the pull request"


def _permission_faults(workflows: Sequence[Workflow]) -> list[str]:
    found, writers = [], []
    for one in workflows:
        if one.data.get("permissions") != {"contents": "read"}:
            found.append(f"{one.name}: permissions are not contents: read alone")
        writers += [(one, name, job) for name, job in one.jobs.items() if "permissions" in job]
    for one, name, job in writers:
        publishes = any(str(step.get("run", "")).startswith(PUBLISHES) for step in job["steps"])
        if dict(job["permissions"]) != WRITES or not publishes or _is_self_hosted(job):
            found.append(f"{one.name}: job {name} has permissions of its own")
    if len(writers) > 1:
        found.append(f"{len(writers)} jobs with permissions of their own; one may have them")
    return found
