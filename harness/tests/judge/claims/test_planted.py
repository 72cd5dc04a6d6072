"""Each form of the shipped registry on its planted records: one that it must pass and one that it must fail.

The two differ in nothing but what the form's bound is about. A form without planted records fails here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.compose.plan import SweepPlan
from harness.judge.claims.ablation import judge_training
from harness.judge.claims.evidence import Evidence
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.claims.run import judge_transfer
from harness.judge.claims.sweep import sweep_verdicts
from harness.judge.judgement import VerdictKind
from harness.judge.metrics import comparisons
from harness.judge.parity import parity_report
from harness.records.ablation import AblationRecord, ArmResult
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord
from harness.specs.claims import ClaimsFile, ClaimSpec, load_registry
from harness.specs.forms.claims import SweepForm, TransferForm
from harness.specs.forms.training import TrainingForm
from harness.tests.fake_ablation import write_fake_ablation
from harness.tests.fake_record import write_fake_record
from harness.tests.fake_sweep import made_up_plan, sampled_cells, write_sweep
from harness.tests.judge.claims.planted.figures import FIGURES
from harness.tests.judge.claims.planted.planting import Planting, RunPlanting
from harness.tests.judge.claims.planted.runs import RUNS
from harness.tests.judge.claims.planted.sweeps import SWEEPS
from harness.tests.judge.claims.planted.trainings import TRAININGS
from harness.tests.judge.claims.test_literal import CASES as LITERAL_CASES

YES, NO, CANNOT = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED, VerdictKind.NOT_DECIDABLE
ROLES = {"optimised": "optimised_64", "fastest": "optimised_64"}  # the names of the made-up suite
REGISTRY = load_registry(roles=ROLES)


def figures(form: Any, planting: Planting) -> list[tuple[float, VerdictKind]]:
    sides = ((planting.holds, YES), (planting.fails, NO), (planting.cannot, CANNOT))
    return [(figure, kind) for side, kind in sides for figure in side(form)]


def run_forms(registry: ClaimsFile) -> dict[str, TransferForm]:
    found: dict[str, TransferForm] = {}
    for claim in registry.claims:
        for form in (claim.transfer, *claim.also):
            if form is not None and form not in found.values():
                found[f"{claim.id}-{form.test}-{len(found)}"] = form
    return found


def training_forms(registry: ClaimsFile) -> dict[str, TrainingForm]:
    found: dict[str, TrainingForm] = {}
    for claim in registry.claims:
        if (form := claim.training) is not None and form not in found.values():
            found[f"{claim.id}-{form.test}"] = form
    return found


def sweep_forms(registry: ClaimsFile) -> dict[str, SweepForm]:
    return {f"{claim.id}-{claim.sweep.test}": claim.sweep for claim in registry.claims if claim.sweep}


def planted(forms: dict[str, Any], table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(form, planting, id=f"{name}-{place}")
        for name, form in forms.items()
        for place, planting in enumerate(table.get(form.test, ()))
        if planting.where(form)
    ]


def run_evidence(form: Any, planting: RunPlanting, figure: float, folder: Path) -> Evidence:
    options: dict[str, Any] = {"rounds": 1, "num_prompts": planting.num_prompts}
    record = write_fake_record(
        folder / "record", spoil=lambda parts: planting.plant(form, figure, parts), **options
    )
    calibration = None
    if planting.calibrate is not None:
        other = write_fake_record(folder / "other", spoil=planting.calibrate, seed=1, **options)
        calibration = other.trace
    return Evidence(
        record=record,
        arms=(),
        comparisons=comparisons(record),
        parity=parity_report(record),
        calibration=calibration,
    )


def run_differences(one: RunRecord, other: RunRecord) -> set[str]:
    """Return names of all that differs between two records."""
    found = set()
    for first, second in zip(one.generations, other.generations, strict=True):
        if first != second:
            found.add(f"generations of {first.trial.arm}")
    assert one.trace is not None and other.trace is not None
    for mine, theirs in zip(one.trace.prompts, other.trace.prompts, strict=True):
        for name in ("key", "category", "tokens", "ended_by", "ranks", "gaps", "nll"):
            if not _same(getattr(mine, name), getattr(theirs, name)):
                found.add(f"trace {name}")
    found |= {f"tree of {arm}" for arm in one.trees if one.trees[arm] != other.trees[arm]}
    assert one.step_costs is not None and other.step_costs is not None
    for cost, their in zip(one.step_costs.costs, other.step_costs.costs, strict=True):
        if cost != their:
            found.add("bare steps" if cost.arm is None else f"steps of {cost.arm}")
    known = ("generations.jsonl", "trace.npz", "trees.json", "step_costs.json", "manifest.json")
    return found | other_files(one.folder, other.folder, known=known)


def other_files(one: Path, other: Path, *, known: Sequence[str]) -> set[str]:
    """Return the names of files that differ between two folders, but for those that are compared apart."""
    return {
        path.name
        for path in one.iterdir()
        if path.name not in known and path.read_bytes() != (other / path.name).read_bytes()
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(one == other)


@pytest.mark.parametrize(("form", "planting"), planted(run_forms(REGISTRY), RUNS))
def test_a_run_on_either_side_of_the_bound(form: Any, planting: RunPlanting, tmp_path: Path) -> None:
    records = []
    for place, (figure, kind) in enumerate(figures(form, planting)):
        evidence = run_evidence(form, planting, figure, tmp_path / str(place))
        finding = judge_transfer(form, evidence=evidence)
        assert finding.kind is kind, f"{planting.figure} {figure:g}: {finding}"
        records.append(evidence.record)
    assert len(records) > 1
    for one, other in itertools.pairwise(records):
        assert run_differences(one, other) == planting.may_differ(form)


def training_differences(one: AblationRecord, other: AblationRecord) -> set[str]:
    """Return names of all that differs between two ablations: fields of arms, and files."""
    found = {
        f"{name} of {first.arm}"
        for first, second in zip(one.results, other.results, strict=True)
        for name in ArmResult.model_fields
        if getattr(first, name) != getattr(second, name)
    }
    names = other_files(one.folder, other.folder, known=("arms.jsonl", "manifest.json"))
    return found | {name.removesuffix(".npz").rstrip("0123456789").rstrip("-") for name in names}


@pytest.mark.parametrize(("form", "planting"), planted(training_forms(REGISTRY), TRAININGS))
def test_a_training_on_either_side_of_the_bound(form: Any, planting: Planting, tmp_path: Path) -> None:
    records = []
    for place, (figure, kind) in enumerate(figures(form, planting)):
        record = write_fake_ablation(tmp_path / str(place), **planting.plant(form, figure))
        finding = judge_training(form, record)
        assert finding.kind is kind, f"{planting.figure} {figure:g}: {finding}"
        records.append(record)
    assert training_differences(*records) == planting.may_differ(form)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    return made_up_plan(tmp_path_factory.mktemp("sweep"), predicted=None)


def sweep_differences(one: SweepRecord, other: SweepRecord) -> set[str]:
    """Return the rules whose cells differ, and the names of other files that do."""
    found = {
        first.setting.rule
        for first, second in zip(one.sampled, other.sampled, strict=True)
        if first != second
    }
    return found | other_files(one.folder, other.folder, known=("cells.jsonl", "manifest.json"))


@pytest.mark.parametrize(("form", "planting"), planted(sweep_forms(REGISTRY), SWEEPS))
def test_a_sweep_on_either_side_of_the_bound(
    form: Any, planting: Planting, plan: SweepPlan, tmp_path: Path
) -> None:
    claims = [claim for claim in REGISTRY.claims if claim.sweep == form]
    records = []
    for place, (figure, kind) in enumerate(figures(form, planting)):
        cells = sampled_cells(plan.spec, tree=1, **planting.plant(form, figure))
        record = write_sweep(tmp_path / str(place), plan, extra=cells)
        (verdict, *_) = sweep_verdicts(record, claims=claims)
        assert verdict.kind is kind, f"{planting.figure} {figure:g}: {verdict}"
        records.append(record)
    for one, other in itertools.pairwise(records):
        assert sweep_differences(one, other) == planting.may_differ(form)


PAPER_CLAIMS = [claim for claim in REGISTRY.claims if claim.paper_only is not None]


@pytest.mark.parametrize(
    ("claim", "planting"),
    [
        pytest.param(claim, planting, id=f"{claim.id}-{place}")
        for claim in PAPER_CLAIMS
        for place, planting in enumerate(FIGURES.get(claim.paper_only.test if claim.paper_only else "", ()))
    ],
)
def test_the_papers_figures_on_either_side_of_the_bound(claim: ClaimSpec, planting: Planting) -> None:
    registries = []
    for figure, kind in figures(claim.paper_only, planting):
        registry = {one.id: one for one in REGISTRY.claims}
        planting.plant(claim.paper_only, figure, registry, claim.id)
        judged = registry[claim.id]
        assert judged.paper_only is not None
        finding = judge_paper_only(judged, judged.paper_only, figures=Figures(registry))
        assert finding.kind is kind, f"{planting.figure} {figure:g}: {finding}"
        registries.append(registry)
    for one, other in itertools.pairwise(registries):
        differ = {claim_id for claim_id in one if one[claim_id] != other[claim_id]}
        assert differ == planting.may_differ(claim.paper_only, claim=claim.id)


def test_every_form_has_planted_records() -> None:
    """A form added later fails here until it has a record that it must pass and one that it must fail."""
    paper = {claim.id: claim.paper_only for claim in PAPER_CLAIMS}
    asked: tuple[tuple[Mapping[str, Any], Mapping[str, Sequence[Planting]]], ...] = (
        (run_forms(REGISTRY), RUNS),
        (training_forms(REGISTRY), TRAININGS),
        (sweep_forms(REGISTRY), SWEEPS),
        (paper, FIGURES),
    )
    for forms, table in asked:
        unplanted = [
            name
            for name, form in forms.items()
            if not any(
                one.where(form) and one.holds(form) and one.fails(form) for one in table.get(form.test, ())
            )
        ]
        assert unplanted == []
        assert set(table) == {form.test for form in forms.values()}


def test_every_kind_of_literal_figure_has_planted_records() -> None:
    """The records themselves are those of `test_literal.py`."""
    measures = {claim.id: claim.measures for claim in REGISTRY.claims}

    def kinds(claim_ids: Iterable[str]) -> set[tuple[str, ...]]:
        found = {measure for claim_id in claim_ids for measure in measures[claim_id]}
        return {(one.metric, one.stated, one.clock if one.metric == "speedup" else "") for one in found}

    for kind in (YES, NO):
        assert kinds(case[0] for case in LITERAL_CASES if case[1] is kind) == kinds(measures)
