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


def shared_python(session: nox.Session) -> str:
    """Return the Python of the shared environment, made or brought up to date first where its stamp does not
    match.
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
    if stamp.is_file() and stamp.read_text() == fingerprint:
        return str(python)

    stamp.unlink(missing_ok=True)  # an install that is cut short leaves no stamp
    groups = nox.project.dependency_groups(nox.project.load_toml(PYPROJECT), "lint", "types", "tests")
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
        f"{ROOT}[gpu,plots,ray]",
        *groups,
        external=True,
    )
    stamp.write_text(fingerprint)
    return str(python)


# What another version of transformers could change: counts of `generate`, cache, masks, loading.
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


def run_module(session: nox.Session, module: str, *args: str) -> None:
    """Run `python -m module args`, then what the user wrote after `--`, in the shared environment."""
    session.run(shared_python(session), "-m", module, *args, *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    python = shared_python(session)
    session.run(python, "-m", "ruff", "check", external=True)
    session.run(python, "-m", "ruff", "format", "--check", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    run_module(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; benchmarks run once, untimed."""
    run_module(session, "pytest", "--benchmark-disable")


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
    run_module(session, "harness", "reproduce")


@nox.session
def report(session: nox.Session) -> None:
    """Write the report of the record or suite named after -- again; measures nothing."""
    run_module(session, "harness", "report")
