"""Arms on a tuned backbone, next to those on the original: each decodes, is traced and is checked with its
own model and heads.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import harness.device.engine
from harness.device.engine import Engine, LoadedModel, load_tuned_engine
from harness.device.prompts import Prompt
from harness.device.trace import Text, record_trace
from harness.errors import UserError
from harness.judge.checks import run_checks
from harness.judge.claims.evidence import Evidence
from harness.judge.claims.findings import NotTestable
from harness.judge.judgement import CheckStatus
from harness.judge.metrics import compare, original_baseline
from harness.judge.parity import parity_report
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.measure.run import _check_step_shapes
from harness.records.run import RunRecord
from harness.report.run import render_report
from harness.report.tables.run import arms_note, headline_arm
from harness.specs.recipe import JointRecipe
from harness.specs.suite import FastestTree, TinyModelSpec, parse_suite
from harness.tests.judge.test_speed_checks import NAMES as SPEED_CHECKS
from harness.tests.tiny_suite import CHAIN, QUIET, VANILLA, micro_data, run, smoke_suite
from harness.tests.tiny_training import recipe_data, write_corpus
from harness.training.joint import JointFiles, train_both

tiny_model = harness.device.engine._tiny_model
VANILLA_TUNED: dict[str, Any] = {**VANILLA, "name": "vanilla_tuned", "backbone": "tuned"}
MEDUSA2: dict[str, Any] = {**CHAIN, "name": "medusa2", "backbone": "tuned", "baseline": "vanilla_tuned"}
ARMS = [VANILLA, CHAIN, VANILLA_TUNED, MEDUSA2]


@pytest.fixture(scope="module")
def files(engine: Engine, heads_file: Path, tmp_path_factory: pytest.TempPathFactory) -> JointFiles:
    """An adapter that moves the tiny model well away from itself, and the heads trained with it."""
    folder = tmp_path_factory.mktemp("tuned")
    write_corpus(folder / "corpus.safetensors", engine)
    data = recipe_data(
        folder, backbone_learning_rate=0.05, heads_learning_rate=1e-4, warmup="none", lambda_0=1.0
    )
    spec = JointRecipe.model_validate({**data, "start_heads": str(heads_file)})
    return train_both(spec, work=folder / "work", target=folder / "out", console=QUIET)


def suite_data(files: JointFiles, heads_file: Path, **changes: Any) -> dict[str, Any]:
    tuned = {"adapter": str(files.adapter), "heads_path": str(files.heads)}
    return micro_data(heads_file, **{"arms": ARMS, "tuned": tuned, "reports_speed": True, **changes})


@pytest.fixture(scope="module")
def record(
    files: JointFiles, heads_file: Path, steady_checkout: None, tmp_path_factory: pytest.TempPathFactory
) -> RunRecord:
    return RunRecord(run(suite_data(files, heads_file), tmp_path_factory.mktemp("results")))


def texts(record: RunRecord, arm: str) -> dict[str, tuple[int, ...]]:
    return {one.trial.prompt_key: one.token_ids for one in record.generations if one.trial.arm == arm}


def test_each_backbone_decodes_its_own_text_and_medusa_repeats_it(record: RunRecord) -> None:
    assert texts(record, "vanilla") == texts(record, "chain") and texts(record, "vanilla_tuned") == texts(
        record, "medusa2"
    )
    assert texts(record, "vanilla") != texts(record, "vanilla_tuned"), (
        "the adapter must be in the arms that name it, and in no other"
    )
    kept = [step for one in record.generations if one.trial.arm == "medusa2" for step in one.step_tokens]
    assert max(kept) > 1


def test_every_check_looks_at_the_arms_own_backbone(record: RunRecord, tmp_path: Path) -> None:
    assert validate_record(record.folder) == ()
    found = {check.name: check for check in run_checks(record)}
    # whatever else this machine does, and limits measured on tiny blocks
    loose = {"machine_quiet", "bandwidth_sane", "within_limits", *SPEED_CHECKS}
    assert not [
        name for name, check in found.items() if check.status is CheckStatus.FAILED and name not in loose
    ]
    assert "tuned: " in found["heads_beat_random"].found and found["greedy_parity"].found.startswith(
        "8 of 8 identical"
    )
    tuned, traces = record.environment.tuned, {name: record.trace_of(name) for name in record.suite.backbones}
    assert tuned is not None and traces["tuned"] is not None and traces["original"] is not None
    assert (
        traces["tuned"].provenance.model_hash == tuned.backbone_sha256 != record.environment.backbone_sha256
    )
    assert traces["tuned"].provenance.heads_hash == tuned.heads_sha256 != record.environment.heads_sha256
    spoilt = tmp_path / "spoilt"
    shutil.copytree(record.folder, spoilt)
    shutil.copyfile(spoilt / "trace.npz", spoilt / "trace-tuned.npz")
    found = {check.name: check for check in run_checks(RunRecord(spoilt))}
    assert {name for name, check in found.items() if check.status is CheckStatus.FAILED} >= {
        "seal_intact",
        "provenance_agrees",
        "replay_equals_decode",
    }
    assert any(fault.startswith("trace-tuned.npz: found other tokens") for fault in validate_record(spoilt))
    (spoilt / "trace-tuned.npz").unlink()
    found = {check.name: check for check in run_checks(RunRecord(spoilt))}
    assert found["replay_equals_decode"].found == "no trace of the tuned backbone"


def test_the_report_says_which_model_is_which_and_compares_across(record: RunRecord) -> None:
    note, text = arms_note(record), render_report(record, judge(record))
    assert "`vanilla_tuned`, `medusa2`: on the *tuned* backbone" in note and note in text
    arm = record.suite.arm("medusa2")
    baseline = original_baseline(record, arm)
    assert baseline is not None and baseline.name == "vanilla"
    across = compare(record, "medusa2", baseline="vanilla")
    assert across is not None and f"{across.speedup.estimate:.2f}" in note and "times `vanilla`" in note
    judgement = judge(record)  # whose times a busy machine may disturb
    best = headline_arm(record.withholding(judgement.withheld), judgement)
    assert best is not None and best.arm == "chain", "the headline is of arms that repeat the original's text"
    assert "Heads of the tuned backbone:" in text and "| tuned backbone |" in text


def test_a_suite_without_a_tuned_backbone_says_nothing_of_one(micro_record: RunRecord) -> None:
    assert micro_record.environment.tuned is None and micro_record.suite.backbones == ("original",)
    assert "tuned" not in render_report(micro_record, judge(micro_record))


@pytest.fixture
def micro_record(micro: Any) -> RunRecord:
    found: RunRecord = micro.record
    return found


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"arms": [VANILLA, CHAIN]}, r"need each other"),
        ({"tuned": None}, r"need each other"),
        (
            {"arms": [*ARMS, {**MEDUSA2, "name": "crossed", "baseline": "vanilla"}]},
            r"'vanilla' decodes with another backbone",
        ),
        ({"model": {"asset": "smollm2-135m-instruct", "adapter": "some"}}, r"together with model.adapter"),
    ],
)
def test_suites_that_mix_the_backbones_are_refused(
    changes: dict[str, Any], found: str, files: JointFiles, heads_file: Path
) -> None:
    data = {
        key: value for key, value in suite_data(files, heads_file, **changes).items() if value is not None
    }
    with pytest.raises(UserError, match=found):
        parse_suite(tomli_w.dumps(data), where="mine.toml")


def test_a_searched_tree_needs_the_calibration_of_its_own_heads(
    files: JointFiles, heads_file: Path, tmp_path: Path
) -> None:
    arms = [VANILLA, CHAIN, VANILLA_TUNED, {**MEDUSA2, "tree": {"kind": "searched", "num_nodes": 4}}]
    with pytest.raises(UserError, match="calibration_trace"):
        run(suite_data(files, heads_file, arms=arms), tmp_path)
    with pytest.raises(UserError, match="no greedy vanilla arm on the tuned backbone"):
        sampled = {**VANILLA_TUNED, "temperature": 0.7, "seeds": [1]}
        medusa = {**MEDUSA2, "acceptance": {"rule": "rejection", "temperature": 0.7}, "seeds": [1]}
        run(suite_data(files, heads_file, arms=[VANILLA, CHAIN, sampled, medusa]), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_searched_tree_grows_on_the_calibration_of_its_own_heads(
    dtype: str, files: JointFiles, heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads' hash is that of their file in every precision, and rounding is measured on each backbone."""
    model = smoke_suite().model

    def stored(
        spec: TinyModelSpec, *, dtype: torch.dtype
    ) -> LoadedModel:  # hashed before the cast, as tensors on disk are
        whole = tiny_model(spec, dtype=torch.float32)
        model: Any = whole.model
        return replace(whole, model=model.to(dtype))

    monkeypatch.setattr(harness.device.engine, "_tiny_model", stored)
    suite = parse_suite(tomli_w.dumps(suite_data(files, heads_file)), where="the test")
    tuned = load_tuned_engine(suite, device=torch.device("cpu"), allow_hub=False, base_folder=None)
    assert tuned is not None
    prompts = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    texts = [
        Text(Prompt(f"t{index}", "random", ids), tuple(range(10 + index, 22 + index)), "budget")
        for index, ids in enumerate(prompts)
    ]
    record_trace(tuned, texts, max_new_tokens=12, extra={}).save(tmp_path / "calibration.npz")
    table = {
        "adapter": str(files.adapter),
        "heads_path": str(files.heads),
        "calibration_trace": str(tmp_path / "calibration.npz"),
    }
    arms = [VANILLA, CHAIN, VANILLA_TUNED, {**MEDUSA2, "tree": {"kind": "searched", "num_nodes": 4}}]
    data = suite_data(
        files,
        heads_file,
        arms=arms,
        tuned=table,
        model={**model.model_dump(mode="json", exclude_none=True), "dtype": dtype},
    )
    record = RunRecord(run(data, tmp_path / "results"))
    assert (record.folder / "calibration-tuned.npz").exists() and "calibration trace" in record.trees[
        "medusa2"
    ].origin
    assert (record.rounding_of("tuned") is not None) == (dtype == "bfloat16")
    loose = {"machine_quiet", "bandwidth_sane", "within_limits", *SPEED_CHECKS}
    assert not [
        check.name
        for check in run_checks(record)
        if check.status is CheckStatus.FAILED and check.name not in loose
    ]
    if dtype == "bfloat16":
        ours, theirs = (record.rounding_of(name) for name in ("tuned", "original"))
        assert ours is not None and theirs is not None and ours != theirs
        assert {arm for shift in ours.gaps for arm in shift.arms} == {"vanilla_tuned", "medusa2"}


def test_claims_about_a_frozen_backbone_leave_tuned_arms_out(record: RunRecord) -> None:
    spoilt = [
        one.model_copy(update={"token_ids": (*one.token_ids[:-1], one.token_ids[-1] + 1)})
        if one.trial.arm == "medusa2"
        else one
        for one in record.generations
    ]
    copy = RunRecord(record.folder)
    copy.__dict__["outcomes"] = tuple(spoilt)
    whole, other = ({one.claim_id: one for one in judge(found).verdicts} for found in (record, copy))
    assert parity_report(copy).num_identical < parity_report(record).num_identical
    assert whole == other and any("generations of 1 arms" in one.ours for one in whole.values())
    evidence = Evidence(record=record, arms=(), comparisons=(), parity=parity_report(record))
    with pytest.raises(NotTestable, match="medusa2 decodes with the tuned backbone"):
        evidence.tree("medusa2")


def test_heads_that_were_not_trained_with_the_adapter_are_refused(
    files: JointFiles, heads_file: Path, tmp_path: Path
) -> None:
    tuned = {"adapter": str(files.adapter), "heads_path": str(heads_file)}
    with pytest.raises(UserError, match="adapter"):
        run(suite_data(files, heads_file, tuned=tuned), tmp_path)


def test_a_fastest_tree_is_refused_where_a_tuned_step_reads_other_amounts(
    files: JointFiles, heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are timed are the original's; heads that read more would be sized by the wrong cost."""
    suite = parse_suite(tomli_w.dumps(suite_data(files, heads_file)), where="the test")
    fastest = FastestTree(kind="fastest", max_nodes=8)
    arms = tuple(
        arm.model_copy(update={"tree": fastest}) if arm.name == "medusa2" else arm for arm in suite.arms
    )
    tuned = load_tuned_engine(suite, device=torch.device("cpu"), allow_hub=False, base_folder=None)
    assert tuned is not None
    changed = suite.model_copy(update={"arms": arms})
    _check_step_shapes(changed, {"original": tuned, "tuned": tuned})
    other = load_tuned_engine(suite, device=torch.device("cpu"), allow_hub=False, base_folder=None)
    assert other is not None
    monkeypatch.setattr(type(other), "heads_bytes", property(lambda engine: 1 if engine is other else 2))
    with pytest.raises(UserError, match="its steps are the ones that are timed"):
        _check_step_shapes(changed, {"original": tuned, "tuned": other})
    _check_step_shapes(suite, {"original": tuned, "tuned": other})
