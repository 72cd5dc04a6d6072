"""Imports run downward only: the method knows nothing of the harness, and everything after a record needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Everything that runs after a record is on disk, and what it stands on.
PURE = (
    "medusa_impl.errors",
    "medusa_impl.tree",
    "medusa_impl.tree_search",
    "harness.specs.suite",
    "harness.paths",
    "harness.records.run",
    "harness.files",
    "harness.judge.judgement",
    "harness.compose.replay",
    "harness.compose.roofline",
    "harness.specs.hardware",
    "harness.specs.shapes",
    "harness.compose.roofline",
    "harness.records.step_profile",
    "harness.records.training_profile",
    "harness.compose.composer",
    "harness.specs.sweep",
    "harness.compose.families",
    "harness.records.sweep",
    "harness.judge.sweep",
    "harness.specs.claim_forms",
    "harness.judge.claims.sweep",
    "harness.compose.search",
    "harness.compose.devices",
    "harness.specs.quoted",
    "harness.stats",
    "harness.compose.appendix_g",
    "harness.cli.trees",
    "harness.report.sweep",
    "harness.report.sweep_figures",
    "harness.report.latency",
    "harness.compose.curve",
    "harness.specs.latency",
    "harness.report.profiles",
    "harness.stats",
    "harness.judge.metrics",
    "harness.judge.checks",
    "harness.judge.parity",
    "harness.judge.claims.verdicts",
    "harness.judge.claims.ablation",
    "harness.records.ablation",
    "harness.judge.ablation",
    "harness.specs.ablation",
    "harness.judge.run",
    "harness.records.export",
    "harness.judge.validate",
    "harness.assets.prompts",
    "harness.assets.catalogue",
    "harness.report.ablation",
    "harness.report.training_curves",
    "harness.report.run",
    "harness.report.readme",
    "harness.report.run",
)
# Who touches the device, the clock or the disk on the way to a record; no pure module may import one of them.
DEVICE = {
    "harness.measure.ablation.run",
    "harness.measure.ablation.bench",
    "harness.measure.ablation.arm",
    "harness.records.store",
    "harness.device.arms",
    "harness.device.clock",
    "harness.training.conversations",
    "harness.training.corpus",
    "harness.training.workers",
    "harness.device.doctor",
    "harness.device.engine",
    "harness.device.machine",
    "harness.training.joint",
    "harness.device.locks",
    "harness.measure.probes",
    "harness.measure.ablation.backbone_change",
    "harness.device.random_model",
    "harness.measure.step_profile",
    "harness.measure.latency.run",
    "harness.measure.sweep.cluster",
    "harness.measure.sweep.run",
    "harness.measure.sweep.cells",
    "harness.measure.latency.modes",
    "harness.measure.latency.engine",
    "harness.device.trace",
    "harness.measure.rounding",
    "harness.measure.run",
    "harness.device.prompts",
    "harness.training.tiny_heads",
    "harness.measure.trace",
    "harness.measure.training_profile",
    "harness.training.heads",
    "harness.specs.recipe",
    "harness.measure.watch",
}


def modules(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", modules("medusa_impl"), ids=lambda path: path.stem)
def test_the_method_imports_nothing_of_the_harness(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in ("harness", "suites", "pytest")}


@pytest.mark.parametrize("path", modules("medusa_impl"), ids=lambda path: path.stem)
def test_the_method_reads_no_clock_but_for_progress(path: Path) -> None:
    """Only the trainer's log knows the time, and takes the clock as an argument."""
    assert "time" not in imported(path) or path.stem in ("training", "medusa2_trainer")


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_no_device_module(name: str) -> None:
    path = ROOT / Path(*name.split(".")).with_suffix(".py")
    assert not imported(path) & DEVICE


def test_pure_half_runs_without_torch() -> None:
    imports = f"import importlib, sys\nfor name in {PURE!r}: importlib.import_module(name)\n"
    code = imports + "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_every_harness_module_is_in_one_layer() -> None:
    """A new module has to be placed: a device module by name, or it must not import torch at its top."""
    for path in modules("harness"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name not in DEVICE:
            assert "torch" not in {found.split(".")[0] for found in top_level_imports(path)}, name


def top_level_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found
