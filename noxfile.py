"""Entry points of the project; every session runs one command in one shared environment.

nox would make an environment per session, and torch alone is 1.7 GB, so the sessions use none of nox's own
and call the Python of `.nox/shared` instead. It is installed once per content of pyproject.toml and the
constraints file.

Environment:
    MEDUSA_REPRO_CONSTRAINTS: another pip constraints file than constraints.txt; empty for none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).resolve().parent
SHARED, OLDEST = ROOT / ".nox" / "shared", ROOT / ".nox" / "oldest"
PYPROJECT = ROOT / "pyproject.toml"


def shared_python(session: nox.Session, *, for_readers: bool = False) -> str:
    """Return the Python of the shared environment, made or brought up to date first where its stamp does not
    match.

    Those who read results alone get what measures, judges and reports; the first session of those who work on
    the code adds linters, types and tests.
    """
    python = SHARED / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = os.environ.get("MEDUSA_REPRO_CONSTRAINTS", str(ROOT / "constraints.txt"))
    if constraints and not Path(constraints).is_file():
        session.error(
            f"found no file {constraints}; need MEDUSA_REPRO_CONSTRAINTS to name a constraints file, or to "
            "be empty for none"
        )
    inputs = [
        PYPROJECT.read_bytes(),
        Path(constraints).read_bytes() if constraints else b"",
        sys.version.encode(),
        str(ROOT).encode(),
    ]
    fingerprint = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    stamp = SHARED / "installed.sha256"
    enough = {f"all {fingerprint}", *([f"reader {fingerprint}"] if for_readers else [])}
    if stamp.is_file() and stamp.read_text() in enough:
        return str(python)

    stamp.unlink(missing_ok=True)  # an install that is cut short leaves no stamp
    extras, wanted = ("plots", ()) if for_readers else ("gpu,history,plots,ray", ("lint", "types", "tests"))
    groups = nox.project.dependency_groups(nox.project.load_toml(PYPROJECT), *wanted)
    pinned = ["--constraint", constraints] if constraints else []
    session.run(
        sys.executable, "-m", "virtualenv", "--quiet", "--python", sys.executable, str(SHARED), external=True
    )
    session.run(
        str(python),
        "-m",
        "pip",
        "install",
        *pinned,
        "--editable",
        f"{ROOT}[{extras}]",
        *groups,
        external=True,
    )
    stamp.write_text(f"{'reader' if for_readers else 'all'} {fingerprint}")
    return str(python)


# What another version of transformers could change: counts of `generate`, cache, masks, loading, and how
# several processes resume a training.
OLDEST_TESTS = (
    "harness/tests/device/test_arms.py",
    "harness/tests/device/loading",
    "harness/tests/device/test_random_model.py",
    "harness/tests/device/test_trace.py",
    "medusa_impl/tests/engine/test_backbone.py",
    "medusa_impl/tests/engine/test_families.py",
    "medusa_impl/tests/engine/test_kv_cache.py",
    "medusa_impl/tests/engine/test_recorded_step.py",
    "medusa_impl/tests/engine/test_runner.py",
    "medusa_impl/tests/test_decode.py",
    "medusa_impl/tests/training/test_trainer.py::test_two_processes_take_the_steps_of_one",
)


def oldest_transformers() -> str:
    """Return the oldest version of transformers that pyproject.toml allows."""
    wanted = map(Requirement, nox.project.load_toml(PYPROJECT)["project"]["dependencies"])
    (bounds,) = (one.specifier for one in wanted if one.name == "transformers")
    (oldest,) = (bound.version for bound in bounds if bound.operator == ">=")
    return oldest


def oldest_python(session: nox.Session) -> str:
    """Return the Python of an environment of its own with the oldest transformers, made where it is missing.

    It lies over the shared environment and finds there what it lacks: PyTorch above all, the same as in all
    other tests. Only transformers and what that version needs otherwise are installed.
    """
    shared, version = shared_python(session), oldest_transformers()
    python = OLDEST / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inputs = f"{(SHARED / 'installed.sha256').read_text()} {version}"
    stamp = OLDEST / "installed.txt"
    if stamp.is_file() and stamp.read_text() == inputs:
        return str(python)
    session.run(
        sys.executable,
        "-m",
        "virtualenv",
        "--clear",
        "--quiet",
        "--python",
        sys.executable,
        str(OLDEST),
        external=True,
    )
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folders = [
        str(session.run(each, "-c", where, silent=True, external=True)).strip()
        for each in (shared, str(python))
    ]
    below = f"import site; site.addsitedir({folders[0]!r})\n"  # its packages, and its own .pth files
    (Path(folders[1]) / "zz_shared.pth").write_text(below)
    session.run(str(python), "-m", "pip", "install", "--quiet", f"transformers=={version}", external=True)
    found = "import transformers; print(transformers.__version__)"
    if not str(session.run(str(python), "-c", found, silent=True, external=True)).startswith(version):
        session.error(f"found another transformers than {version} in {OLDEST}; need that one")
    stamp.write_text(inputs)
    return str(python)


def run_module(session: nox.Session, module: str, *args: str, for_readers: bool = False) -> None:
    """Run `python -m module args`, then what the user wrote after `--`, in the shared environment."""
    python = shared_python(session, for_readers=for_readers)
    session.run(python, "-m", module, *args, *session.posargs, external=True)


# Both read what they bring with them and ask no network.
WORKFLOW_SCHEMA = "vendor.github-workflows"
ZIZMOR = ("--offline", "--no-progress", "--quiet", "--persona", "auditor")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting, and the workflows: their form, and what an intruder could use."""
    python = shared_python(session)
    session.run(python, "-m", "ruff", "check", external=True)
    session.run(python, "-m", "ruff", "format", "--check", external=True)
    workflows = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    session.run(
        python, "-m", "check_jsonschema", "--builtin-schema", WORKFLOW_SCHEMA, *workflows, external=True
    )
    session.run(str(Path(python).with_name("zizmor")), *ZIZMOR, *workflows, external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    run_module(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, a file on one core at a time; benchmarks run once, untimed."""
    workers = str(min(os.cpu_count() or 1, 4))
    python, words = (
        shared_python(session),
        ("--benchmark-disable", "--numprocesses", workers, "--dist", "loadfile"),
    )
    session.run(python, "-m", "pytest", *words, *session.posargs, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """Run the tests of what depends on transformers with the oldest version that pyproject.toml allows."""
    python = oldest_python(session)
    session.run(python, "-m", "pytest", "--benchmark-disable", *OLDEST_TESTS, *session.posargs, external=True)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it into an environment of its own, and run it there."""
    run_module(session, "pytest", "--wheel", "harness/tests/test_wheel.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Time the project's own code (pytest-benchmark, whose options follow --).

    `-- --benchmark-storage=FOLDER --benchmark-save=NAME` saves; `-- --benchmark-storage=FOLDER
    --benchmark-compare=0001` compares.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/tests/**/test_bench_*.py"))
    run_module(session, "pytest", "--benchmark-only", *files)


@nox.session
def smoke(session: nox.Session) -> None:
    """Decode, check and report on a tiny random model; prints no speed."""
    run_module(session, "harness", "reproduce", "smoke")


@nox.session
def gpu(session: nox.Session) -> None:
    """Accept a GPU machine in under five minutes; --only, --minutes, --device cpu and others follow --."""
    run_module(session, "harness", "gpu")


@nox.session
def gate(session: nox.Session) -> None:
    """Is this checkout worse than the merge base with main? --base REV, --calibrate and others follow --."""
    run_module(session, "harness", "gate")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Alter files in ten ways and run the commands that read them; --limit, --kind and others follow --."""
    run_module(session, "harness.tests.fuzz")


@nox.session
def kill(session: nox.Session) -> None:
    """Kill commands where they write and anywhere, and run them again; --limit and --job follow --."""
    run_module(session, "harness.tests.kill")


@nox.session
def noise(session: nox.Session) -> None:
    """Run a suite next to a neighbour that takes a core; --bursts, --steady and others follow --."""
    run_module(session, "harness.tests.noise")


@nox.session
def mutate(session: nox.Session) -> None:
    """Change the code that judges in 400 places, one at a time; a test has to notice. --file follows --."""
    python = shared_python(session)
    constraints = os.environ.get("MEDUSA_REPRO_CONSTRAINTS", str(ROOT / "constraints.txt"))
    pinned = ["--constraint", constraints] if constraints else []
    wanted = nox.project.dependency_groups(nox.project.load_toml(PYPROJECT), "mutate")
    session.run(python, "-m", "pip", "install", "--quiet", *pinned, *wanted, external=True)
    run_module(session, "harness.tests.mutate")


@nox.session
def reproduce(session: nox.Session) -> None:
    """Fetch, measure, judge and report: the embedded suite, or the one named after --."""
    run_module(session, "harness", "reproduce", for_readers=True)


@nox.session
def results(session: nox.Session) -> None:
    """Make all that comes from the records again: pages, tables; --check and --take FOLDER follow --."""
    run_module(session, "harness", "results")


PAGES = ("README.md", "results")  # what the records give, and all that a results pull request may change
COMMITTER = (
    "-c",
    "user.name=github-actions[bot]",
    "-c",
    "user.email=41898282+github-actions[bot]@users.noreply.github.com",
)
CREDENTIALS = ("-c", "credential.helper=", "-c", "credential.helper=!gh auth git-credential")


def git(session: nox.Session, *args: str) -> str:
    """Run git in the checkout and return what it answers; what it remarks goes to the log."""
    answer = session.run("git", "-C", str(ROOT), *args, silent=True, stderr=None, external=True)
    return str(answer).strip()


@nox.session
def results_pull_request(session: nox.Session) -> None:
    """Propose the README.md and results/ of a folder, named after --, by a branch and a pull request.

    The one job that may write runs it, so it needs git and gh, and neither installs nor imports the packages.
    Where nothing differs, or the same was proposed before, it ends without one.
    """
    if len(session.posargs) != 1 or not (folder := Path(session.posargs[0])).is_dir():
        session.error("found no folder; need one with README.md and results/; name it after --")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or path.relative_to(folder).parts[0] not in PAGES:
            session.error(f"found {path.relative_to(folder)}; need files of {' and '.join(PAGES)} alone")
    for path in paths:
        target = ROOT / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    git(session, "add", "--", *PAGES)
    if not git(session, "diff", "--cached", "--name-only"):
        session.log("nothing to propose: these pages are committed")
        return
    branch = f"results-{git(session, 'write-tree')[:12]}"  # one content, one branch
    title = "Bring the tables of results up to date"
    is_pushed = bool(git(session, *CREDENTIALS, "ls-remote", "origin", f"refs/heads/{branch}"))
    # A branch alone is no proposal: a run before may have been refused its pull request.
    asks = ("gh", "pr", "list", "--head", branch, "--state", "all", "--json", "number", "--jq", ".[].number")
    if is_pushed and str(session.run(*asks, silent=True, stderr=None, external=True)).strip():
        session.log(f"nothing to propose: {branch} holds the same")
        return
    if not is_pushed:
        git(session, *COMMITTER, "commit", "--message", title)
        git(session, *CREDENTIALS, "push", "origin", f"HEAD:refs/heads/{branch}")
    body = (
        "Records of GPU runners, and the pages that they give. Drop older records of the same device first."
    )
    session.run("gh", "pr", "create", "--head", branch, "--title", title, "--body", body, external=True)


@nox.session
def report(session: nox.Session) -> None:
    """Write the report of the record or suite named after -- again; measures nothing."""
    run_module(session, "harness", "report")
