"""The smoke suite from end to end, and what a run does besides decoding: heads' control, failures, budget,
provenance.
"""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import harness.paths
from harness.device.arms import ArmRunner, TimedSteps
from harness.device.engine import Engine, LoadedModel
from harness.device.prompts import suite_prompts
from harness.errors import ExitCode, UserError
from harness.files import file_sha256
from harness.judge.judgement import CheckStatus
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.measure.plan import make_plan
from harness.measure.probes import ArmSteps
from harness.measure.run import RunOptions, effective_suite
from harness.paths import shipped
from harness.records.run import RunRecord
from harness.report.run import render_report
from harness.specs.suite import FastestTree, FileTree, SearchedTree, SuiteSpec, load_suite
from harness.tests.judge.test_speed_checks import NAMES as SPEED_CHECKS
from harness.tests.tiny_suite import (
    CHAIN,
    FASTEST,
    SAMPLED,
    VANILLA,
    MicroRun,
    SmokeRun,
    command,
    micro_data,
    run,
    save_tiny_heads,
    smoke_suite,
    write_suite,
)
from medusa_impl.heads import MedusaHeads

SPEED = re.compile(r"speedup|tokens/s\b(?!tep)|overhead|\bms\b|GB/s|GFLOP", re.IGNORECASE)


def test_smoke_ends_well_and_says_so_in_one_json_line(smoke: SmokeRun) -> None:
    assert smoke.ran.code == ExitCode.OK
    last = json.loads(smoke.ran.out.splitlines()[-1])
    assert (
        last["suite"] == "smoke"
        and last["valid"] == {"texts": True, "speeds": None}
        and last["failed_checks"] == []
        and last["num_failures"] == 0
    )
    assert last["record"] == smoke.record.folder.name
    assert "Traceback" not in smoke.ran.err


def test_smoke_passes_every_check_or_says_why_not(smoke: SmokeRun) -> None:
    checks = {check.name: check for check in judge(smoke.record).checks}
    assert not [check for check in checks.values() if check.status is CheckStatus.FAILED]
    skipped = {name for name, check in checks.items() if check.status is CheckStatus.SKIPPED}
    assert skipped == {
        "repeats_agree",
        "timings_valid",
        "machine_quiet",
        "arms_interleaved",
        "bandwidth_sane",
        "within_limits",
        *SPEED_CHECKS,
    }
    assert all(checks[name].found for name in skipped)
    assert validate_record(smoke.record.folder) == ()


def test_smoke_prints_no_speed_of_its_own(smoke: SmokeRun) -> None:
    """What the paper claims, and the roofline's simulation of the paper's shapes, are no speeds of this
    suite.
    """
    assert smoke.ran.err and not SPEED.search(smoke.ran.err)
    assert not re.search(r'"(speedup|overhead|tokens_per_s)"', smoke.ran.out.splitlines()[-1])
    report = (smoke.record.folder / "report.md").read_text()
    own = report[report.index("## Arms") :]
    assert "tokens/step" in own
    told = [
        line
        for line in own.splitlines()
        if SPEED.search(line.replace("no speed is reported", "").replace("reports no speed", ""))
    ]
    assert told == []


def test_smoke_heads_beat_random_ones_by_far(smoke: SmokeRun) -> None:
    """The tiny model's text was once so chaotic that heads learnt nothing, and the run was invalid."""
    control = smoke.record.heads_control
    assert control is not None and control.num_positions > 200
    for trained, random in zip(control.trained_top1, control.random_top1, strict=True):
        assert trained > random
    assert control.trained_top1[0] > 1.5 * control.random_top1[0]


def test_smoke_accepts_drafts_in_every_medusa_arm(smoke: SmokeRun) -> None:
    for arm in ("chain", "cartesian", "typical", "rejection"):
        kept = [
            step for item in smoke.record.generations if item.trial.arm == arm for step in item.step_tokens
        ]
        assert max(kept) > 1, arm


def test_smoke_record_names_no_place_host_or_user(smoke: SmokeRun) -> None:
    texts = [
        path.read_text()
        for path in smoke.record.folder.iterdir()
        if path.suffix in (".json", ".jsonl", ".toml", ".md")
    ]
    assert len(texts) > 8
    private = [str(Path.home()), str(smoke.record.folder.parent)]
    # shorter ones occur by chance
    private += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    for text in texts:
        assert not [word for word in private if word in text]
        assert not re.search(r'["\s](/home|/root|/tmp|/Users|[A-Z]:\\)', text)


def test_smoke_warms_up_with_other_prompts_than_it_measures(smoke: SmokeRun) -> None:
    suite = smoke.record.suite
    arms = len(suite.arms)
    assert len(smoke.warmed_up) >= arms  # each arm at least once, and the heads' control
    trace = smoke.record.trace
    assert trace is not None
    measured = {prompt.prompt_ids for prompt in suite_prompts(suite, _no_tokenizer())}
    assert len(measured) == len(trace.prompts) and not measured & set(smoke.warmed_up)


def _no_tokenizer() -> LoadedModel:
    model = torch.nn.Module()
    return LoadedModel(model=model, tokenizer=None, name="", sha256="", eos_ids=frozenset(), assets={})  # type: ignore[arg-type]


def test_smoke_followed_its_plan(smoke: SmokeRun) -> None:
    suite = smoke.record.suite
    plan = make_plan(suite, [f"measured-{number}" for number in range(8)])
    assert [outcome.trial for outcome in smoke.record.outcomes] == [planned.trial for planned in plan]
    assert suite == smoke_suite()


def test_report_of_a_suite_name_needs_a_finished_record() -> None:
    assert command("report", "no_such_suite").error_line.startswith("error: found no record 'no_such_suite'")


def test_judging_again_changes_nothing(smoke: SmokeRun) -> None:
    before = (smoke.record.folder / "report.md").read_text()
    again = command("report", smoke.record.folder)
    assert again.code == ExitCode.OK
    assert again.out.splitlines()[-1] == smoke.ran.out.splitlines()[-1]
    assert (smoke.record.folder / "report.md").read_text() == before


def test_speeds_are_measured_where_the_suite_reports_them(heads_file: Path, tmp_path: Path) -> None:
    data = micro_data(
        heads_file, arms=[VANILLA, CHAIN], reports_speed=True, prompts={"source": "random", "limit": 2}
    )
    record = RunRecord(run(data, tmp_path))
    assert record.profile is not None and {row.arm for row in record.profile.rows} == {"vanilla", "chain"}
    assert record.step_costs is not None
    arms = [cost.arm for cost in record.step_costs.costs]
    assert arms.count("vanilla") == arms.count("chain") == 2  # once a block
    assert all(
        generation.prefill_s > 0 and min(generation.step_times_s) > 0 for generation in record.generations
    )
    assert validate_record(record.folder) == ()


def test_arm_that_raises_fails_alone(heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """It fails in the warm-up as well, which must not end the run."""
    begin = ArmRunner.begin

    def broken(runner: ArmRunner, prompt_ids: tuple[int, ...], **options: Any) -> TimedSteps:
        if runner.arm.name == "chain":
            raise RuntimeError("no kernel in /opt/secret/place/kernels.so")
        return begin(runner, prompt_ids, **options)

    monkeypatch.setattr(ArmRunner, "begin", broken)
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, reports_speed=True))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.INVALID_MEASUREMENT and "Traceback" not in ran.err
    last = json.loads(ran.out.splitlines()[-1])
    assert (
        last["num_failures"] == 4
        and last["valid"]["texts"] is False
        and "no_failures" in last["failed_checks"]
    )
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    record = RunRecord(folder)
    assert {failure.trial.arm for failure in record.failures} == {"chain"}
    assert len(record.generations) == 4 * 3
    for line in (folder / "generations.jsonl").read_text().splitlines():
        outcome = json.loads(line)
        if outcome["kind"] == "failure":
            assert (
                "step_times_s" not in outcome
                and "/opt" not in outcome["message"]
                and "kernels.so" in outcome["message"]
            )
    report = (folder / "report.md").read_text()
    assert "RuntimeError" in report and "INVALID" in report


def test_an_arm_whose_separate_step_raises_leaves_no_line_of_it(
    heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The steps before the one that failed would have stood there as if they were all."""
    time_one = ArmSteps.time_one

    def broken(steps: ArmSteps) -> None:
        if steps.runner.arm.name == "chain" and steps.num_timed == 1:
            raise RuntimeError("out of memory")
        time_one(steps)

    monkeypatch.setattr(ArmSteps, "time_one", broken)
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, reports_speed=True))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    named = {cost.arm for cost in RunRecord(folder).arm_steps}
    assert "vanilla" in named and "chain" not in named
    assert "no separate steps of chain: RuntimeError" in " ".join(ran.err.split())


def test_texts_that_end_before_a_separate_step_leave_no_line(heads_file: Path, tmp_path: Path) -> None:
    """The first steps warm up; the line of an arm without another one used to end the run."""
    data = micro_data(heads_file, reports_speed=True, max_new_tokens=2)
    record = RunRecord(run(data, tmp_path / "results"))
    assert not any(cost.prompt_key is not None for cost in record.arm_steps) and not record.failures


def test_heads_no_better_than_random_ones_are_never_timed(
    tiny: tuple[LoadedModel, Engine], tmp_path: Path
) -> None:
    """Heads whose unembedding is the LM head's negative propose the least likely token."""
    loaded, engine = tiny
    lm_head = engine.runner.backbone.lm_head
    heads = MedusaHeads(
        num_heads=4, num_layers=1, hidden_size=64, vocab_size=128, architecture="own", lm_head=lm_head
    )
    with torch.no_grad():
        for unembedding in heads.unembeddings:
            unembedding.get_parameter("weight").neg_()
    save_tiny_heads(tmp_path / "bad.safetensors", heads, backbone_sha256=loaded.sha256)
    suite = write_suite(tmp_path / "micro.toml", micro_data(tmp_path / "bad.safetensors"))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    assert ran.error_line.startswith("invalid measurement: heads_beat_random: found top-1 0.0")
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    assert {path.name for path in folder.iterdir()} == {
        "suite.toml",
        "environment.json",
        "device_limits.json",
        "heads_control.json",
    }


def test_outside_a_checkout_the_record_says_so_and_the_run_goes_on(
    heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.paths, "__file__", str(tmp_path / "site-packages" / "harness" / "paths.py"))
    (tmp_path / "site-packages" / "harness").mkdir(parents=True)
    folder = run(micro_data(heads_file), tmp_path / "results")
    record = RunRecord(folder)
    assert record.environment.commit is None and record.environment.dirty is None
    assert folder.name.endswith("-nocommit")
    judgement = judge(record)
    assert {check.name: check.status for check in judgement.checks}["provenance_agrees"] is CheckStatus.PASSED
    assert "outside a git checkout" in render_report(record, judgement)


def test_time_budget_ends_after_whole_prompts(heads_file: Path, tmp_path: Path) -> None:
    record = RunRecord(run(micro_data(heads_file), tmp_path, time_budget_s=1e-6))
    assert {outcome.trial.prompt_key for outcome in record.outcomes} == {"measured-0"}
    assert record.suite.prompts.limit == 1
    assert (
        record.manifest is not None
        and record.manifest.complete
        and record.manifest.num_planned == len(record.outcomes) == 4
    )
    assert validate_record(record.folder) == ()


def test_time_budget_keeps_whole_rounds(heads_file: Path, tmp_path: Path) -> None:
    """A run cut in its first of two rounds once counted the second as missing."""
    record = RunRecord(run(micro_data(heads_file, rounds=2), tmp_path, time_budget_s=1e-6))
    assert record.suite.rounds == 1
    assert record.manifest is not None and record.manifest.complete
    assert {check.name: check.status for check in judge(record).checks}[
        "trials_complete"
    ] is CheckStatus.PASSED


def test_rounds_repeat_greedy_texts(heads_file: Path, tmp_path: Path) -> None:
    data = micro_data(heads_file, arms=[VANILLA, CHAIN], rounds=2, prompts={"source": "random", "limit": 2})
    record = RunRecord(run(data, tmp_path))
    texts: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for generation in record.generations:
        texts.setdefault((generation.trial.arm, generation.trial.prompt_key), set()).add(generation.token_ids)
    assert len(record.generations) == 8 and all(len(found) == 1 for found in texts.values())


def test_limit_takes_the_first_prompts(micro: MicroRun, tmp_path: Path) -> None:
    record = RunRecord(run(micro.data, tmp_path, limit=2))
    assert record.suite.prompts.limit == 2
    wanted = {
        (one.trial.arm, one.trial.prompt_key, one.trial.seed): one.token_ids
        for one in micro.record.generations
    }
    assert {one.trial.prompt_key for one in record.generations} == {"measured-0", "measured-1"}
    for one in record.generations:
        assert one.token_ids == wanted[one.trial.arm, one.trial.prompt_key, one.trial.seed]


def test_absolute_paths_of_a_suite_are_cut_in_its_record(micro: MicroRun, heads_file: Path) -> None:
    assert Path(micro.data["heads"]["path"]).is_absolute()
    assert micro.record.suite.heads.path == heads_file.name


def test_tree_from_the_command_line_stands_in_for_searched_ones_only(
    heads_file: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "mine.json"
    tree.write_text("[[0], [1], [0, 0]]")
    data = micro_data(heads_file, arms=[VANILLA, CHAIN, FASTEST], prompts={"source": "random", "limit": 1})
    record = RunRecord(run(data, tmp_path / "results", tree_file=tree))
    assert [arm.name for arm in record.suite.arms] == ["vanilla", "chain", "mine"]
    assert record.trees["mine"].paths == ((), (0,), (1,), (0, 0))
    assert record.trees["mine"].origin == "file mine.json" and validate_record(record.folder) == ()
    assert record.trees["chain"].paths[-1] == (0, 0, 0, 0)
    with pytest.raises(UserError, match="no arm with a searched tree"):
        run(micro_data(heads_file, arms=[VANILLA, CHAIN]), tmp_path / "other", tree_file=tree)


def test_arms_that_one_tree_makes_the_same_become_one_named_after_the_file(tmp_path: Path) -> None:
    """`--tree` made four arms of the embedded suite the same, under the names of other trees."""
    tree = tmp_path / "My Tree.v2.json"
    tree.write_text("[[0], [1]]")
    suite = load_suite(shipped("embedded.toml"))
    changed = effective_suite(suite, RunOptions(results=tmp_path, tree_file=tree))
    arms = changed.arms
    own = [arm for arm in arms if isinstance(arm.tree, FileTree)]
    assert [arm.name for arm in own] == [
        "my_tree_v2",
        "my_tree_v2_tuned",
        "my_tree_v2_typical",
        "my_tree_v2_rejection",
    ]
    assert {arm.baseline for arm in own} == {"vanilla", "vanilla_tuned", "vanilla_sampled"}
    others = [arm for arm in suite.arms if not isinstance(arm.tree, SearchedTree | FastestTree)]
    assert [arm for arm in arms if arm not in own] == others
    assert SuiteSpec.model_validate(changed.model_dump()) == changed
    assert (suite.headline_arm, changed.headline_arm) == ("fastest", "my_tree_v2")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("chain.json", "chain_2"),
        ("...", "tree"),
        ("fastest.json", "fastest"),
        ("optimised_64.json", "optimised_64"),
    ],
)
def test_the_name_of_a_tree_never_takes_that_of_another_arm(file: str, expected: str, tmp_path: Path) -> None:
    """The headline arm goes on under its new name, and is the one with the file's tree."""
    suite = load_suite(shipped("embedded.toml"))
    (tmp_path / file).write_text("[[0]]")
    changed = effective_suite(suite, RunOptions(results=tmp_path, tree_file=tmp_path / file))
    own = [arm.name for arm in changed.arms if isinstance(arm.tree, FileTree)]
    assert own[0] == expected and len({arm.name for arm in changed.arms}) == len(changed.arms)
    assert changed.headline_arm == expected


@pytest.mark.parametrize("layout", ["pickled", "folder"])
def test_published_heads_decode_and_the_record_says_what_they_are(
    micro: MicroRun, heads_file: Path, tmp_path: Path, layout: str
) -> None:
    """Their door used to say "fetch or make it again"."""
    file = tmp_path / ("medusa_lm_head.pt" if layout == "pickled" else "model.safetensors")
    tensors = load_file(heads_file)
    if layout == "pickled":
        torch.save(tensors, file)
    else:
        save_file({f"medusa_head.{name}": tensor for name, tensor in tensors.items()}, file)
        (tmp_path / "config.json").write_text('{"medusa_num_heads": 2}')
    heads = {"path": str(file if layout == "pickled" else tmp_path)}
    record = RunRecord(run(micro_data(file, arms=[VANILLA, CHAIN], heads=heads), tmp_path / "results"))
    origin = record.environment.heads_provenance
    assert origin["training"] == "published heads, training unknown"
    assert origin["files"] == {file.name: file_sha256(file)} and origin["num_heads"] == 4
    assert origin["configured_num_heads"] == (None if layout == "pickled" else 2)
    assert record.environment.heads_sha256 == micro.record.environment.heads_sha256
    wanted = {
        (one.trial.arm, one.trial.prompt_key): (one.token_ids, one.step_tokens)
        for one in micro.record.generations
    }
    for one in record.generations:
        assert (one.token_ids, one.step_tokens) == wanted[one.trial.arm, one.trial.prompt_key]
    assert validate_record(record.folder) == ()
    assert "published heads, training unknown" in render_report(record, judge(record))


def test_fewer_heads_than_the_file_has_are_honoured(heads_file: Path, tmp_path: Path) -> None:
    arms = [VANILLA, {**CHAIN, "tree": {"kind": "chain", "depth": 2}}]
    data = micro_data(heads_file, arms=arms, heads={"path": str(heads_file), "num_heads": 2})
    record = RunRecord(run(data, tmp_path / "results"))
    assert record.heads_control is not None and len(record.heads_control.trained_top1) == 2
    assert record.trace is not None and record.trace.num_heads == 2
    data["arms"] = [VANILLA, {**CHAIN, "tree": {"kind": "chain", "depth": 3}}]
    with pytest.raises(UserError, match="a tree of depth 3; need at most 2, the number of heads"):
        run(data, tmp_path / "results")


def test_seeds_change_the_text_and_nothing_else_does(micro: MicroRun) -> None:
    sampled = {
        one.trial.seed: one
        for one in micro.record.generations
        if one.trial.arm == SAMPLED["name"] and one.trial.prompt_key == "measured-0"
    }
    assert sampled[1].token_ids != sampled[2].token_ids
    assert sampled[1].peak_memory_bytes


def test_suite_without_greedy_vanilla_is_refused_before_anything_runs(
    heads_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no greedy vanilla arm"):
        run(micro_data(heads_file, arms=[SAMPLED]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def local_model(tiny: tuple[LoadedModel, Engine], tmp_path: Path) -> Path:
    """The tiny model as a folder of the user's own, with a tokenizer whose words are numbers; unknown words
    are 0.
    """
    folder = tmp_path / "my-model"
    with tiny[1].runner.stock() as model:
        model.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def own_suite(local_model: Path, heads_file: Path, **changes: Any) -> dict[str, Any]:
    return {
        **micro_data(heads_file),
        "model": {"path": str(local_model)},
        "prompts": {"source": "mt_bench"},
        **changes,
    }


def test_own_model_and_own_prompts(
    local_model: Path, heads_file: Path, micro: MicroRun, tmp_path: Path
) -> None:
    """The same weights from a folder and the same prompts from a file give the texts of the tiny suite."""
    prompts = suite_prompts(micro.record.suite, _no_tokenizer())
    mine = tmp_path / "mine.jsonl"
    rows = [
        {"key": prompt.key, "category": "c", "prompt": " ".join(map(str, prompt.prompt_ids))}
        for prompt in prompts
    ]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = write_suite(tmp_path / "own.toml", own_suite(local_model, heads_file))
    ran = command("reproduce", suite, "--prompts", mine, "--limit", "3", "--results", tmp_path / "results")
    assert "Traceback" not in ran.err and ran.out.splitlines()[-1].startswith("{")
    (folder,) = (tmp_path / "results").glob("micro/*/*")
    record = RunRecord(folder)
    assert (record.suite.prompts.source, record.suite.prompts.path, record.suite.model.path) == (
        "file",
        "mine.jsonl",
        "my-model",
    )
    assert (
        record.environment.model_name == "my-model"
        and record.environment.backbone_sha256 == micro.record.environment.backbone_sha256
    )
    wanted = {one.trial: one.token_ids for one in micro.record.generations}
    assert len(record.generations) == 3 * 4
    assert all(wanted[one.trial] == one.token_ids and one.category == "c" for one in record.generations)
    assert validate_record(folder) == ()


def test_own_prompt_longer_than_the_models_positions(
    local_model: Path, heads_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("1 2 3\n" + "7 " * 250 + "\n")
    suite = write_suite(tmp_path / "own.toml", own_suite(local_model, heads_file))
    ran = command("reproduce", suite, "--prompts", mine, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR
    assert (
        "found a prompt of 250 tokens with a budget of 12 and a tree of depth 4; need at most 256 positions"
        in ran.error_line
    )
    assert "in prompt 'mine-1'" in ran.error_line and not (tmp_path / "results").exists()


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "folder"])
def test_own_model_that_does_not_load(
    damage: str, local_model: Path, heads_file: Path, tmp_path: Path
) -> None:
    if damage == "folder":
        shutil.rmtree(local_model)
    else:
        content = (local_model / damage).read_bytes()
        (local_model / damage).write_bytes(content[: len(content) // 2])
    (tmp_path / "mine.txt").write_text("1 2 3\n")
    suite = write_suite(tmp_path / "own.toml", own_suite(local_model, heads_file))
    ran = command("reproduce", suite, "--prompts", tmp_path / "mine.txt", "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and "my-model" in ran.error_line
