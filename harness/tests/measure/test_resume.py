"""A run can be killed at any byte and resumed: same tokens, nothing done twice, what was cut marked, another
run refused.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest import MonkeyPatch

from harness.device.machine import git_state
from harness.errors import ExitCode, UserError
from harness.judge.validate.record import validate_record
from harness.measure.plan import PlannedTrial, make_plan
from harness.measure.trials import take_up
from harness.records.probes import StepCost
from harness.records.provenance import DeviceInfo
from harness.records.run import ARM_STEPS, RUN, RunRecord
from harness.records.store import Store
from harness.records.trials import Generation, TrialKey, read_outcomes
from harness.specs.suite import SuiteSpec
from harness.tests.tiny_suite import (
    CHAIN,
    VANILLA,
    MicroRun,
    command,
    micro_data,
    run,
    small_device_limits,
    small_device_limits_of_others,
    write_suite,
)
from harness.tests.tiny_text import DATED, save_text_model

ROOT = Path(__file__).resolve().parents[3]
SLOW_START_S = 240.0


def plan_of(record: RunRecord) -> tuple[PlannedTrial, ...]:
    keys = sorted({outcome.trial.prompt_key for outcome in record.outcomes})
    return make_plan(record.suite, keys)


def texts(record: RunRecord) -> dict[TrialKey, tuple[int, ...]]:
    return {generation.trial: generation.token_ids for generation in record.generations}


def killed_copy(record: RunRecord, folder: Path, *, num_bytes: int) -> Path:
    """A copy of a run as a kill would leave it after so many bytes of generations."""
    shutil.copytree(record.folder, folder)
    for late in ("manifest.json", "report.md", "trace.npz", "likelihoods.json"):
        (folder / late).unlink(missing_ok=True)
    with (folder / "generations.jsonl").open("r+b") as file:
        file.truncate(num_bytes)
    return folder


def size_of(record: RunRecord) -> int:
    return (record.folder / "generations.jsonl").stat().st_size


@pytest.mark.parametrize("share", [0.0, 0.13, 0.41, 0.77, 0.9999, 1.0])
def test_run_killed_at_any_byte_resumes_to_the_same_texts(
    micro: MicroRun, tmp_path: Path, share: float
) -> None:
    folder = killed_copy(micro.record, tmp_path / "run", num_bytes=int(share * size_of(micro.record)))
    before = read_outcomes(folder / "generations.jsonl", allow_torn_tail=True)
    assert run(micro.data, tmp_path / "unused", resume=folder) == folder
    record = RunRecord(folder)
    assert texts(record) == texts(micro.record)
    assert validate_record(folder) == ()
    record.check_seal()
    whole_blocks = len(before) // 4
    for number, outcome in enumerate(record.outcomes):
        assert isinstance(outcome, Generation)
        in_cut_block = 4 * whole_blocks <= number < len(before)
        assert outcome.timing_valid is not in_cut_block
        assert outcome.attempt == (
            1 if number >= len(before) and outcome.trial in {cut.trial for cut in before} else 0
        )
    assert len(record.outcomes) == 16 + len(before) % 4  # the cut block is repeated whole, nothing else is
    assert all(generation.timing_valid for generation in record.generations)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(min_value=0, max_value=1))
def test_every_cut_leaves_a_store_that_can_go_on(micro: MicroRun, tmp_path: Path, share: float) -> None:
    num_bytes = int(share * size_of(micro.record))
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    content = (micro.record.folder / "generations.jsonl").read_bytes()[:num_bytes]
    (folder / "generations.jsonl").write_bytes(content)
    (folder / "trees.jsonabc.tmp").write_text("half a fi")
    plan = plan_of(micro.record)
    finished, attempts = take_up(Store(folder, kind=RUN), plan)
    num_lines = content.count(b"\n")
    assert finished == set(range(num_lines // 4))
    assert attempts == {outcome.trial: 1 for outcome in micro.record.outcomes[:num_lines]}
    kept = read_outcomes(folder / "generations.jsonl")  # whole lines only
    assert [outcome.trial for outcome in kept] == [
        outcome.trial for outcome in micro.record.outcomes[:num_lines]
    ]
    assert [path.name for path in folder.iterdir()] == ["generations.jsonl"]


def test_half_a_character_is_no_obstacle(micro: MicroRun, tmp_path: Path) -> None:
    """A kill inside a character of two bytes once made the file unreadable."""
    first = micro.record.outcomes[0]
    trial = first.trial.model_copy(update={"prompt_key": "ключ"})
    line = first.model_copy(update={"trial": trial}).model_dump_json().encode()
    path = tmp_path / "generations.jsonl"
    cut = line.index("к".encode()) + 1
    path.write_bytes(first.model_dump_json().encode() + b"\n" + line[:cut])
    assert [outcome.trial for outcome in read_outcomes(path, allow_torn_tail=True)] == [first.trial]
    with pytest.raises(UserError, match="a truncated last line"):
        read_outcomes(path)


def test_torn_step_times_do_not_spoil_what_is_appended_to_them(tmp_path: Path) -> None:
    """Lines appended to a torn one once made the whole file unreadable at the end of the run."""
    store = Store(tmp_path, kind=RUN)
    cost = StepCost(arm="chain", num_nodes=5, num_heads=4, context_tokens=9, backbone_s=(0.1,), step_s=(0.2,))
    ARM_STEPS.append(tmp_path, cost)
    ARM_STEPS.append(tmp_path, cost)
    path = tmp_path / "arm_steps.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    take_up(store, [])
    ARM_STEPS.append(tmp_path, cost)
    assert ARM_STEPS.done(tmp_path) == (cost, cost)


def test_the_same_command_finds_its_unfinished_run(micro: MicroRun, tmp_path: Path) -> None:
    home = tmp_path / "micro" / micro.record.folder.parent.name
    folder = killed_copy(micro.record, home / micro.record.folder.name, num_bytes=size_of(micro.record) // 2)
    assert run(micro.data, tmp_path) == folder
    assert texts(RunRecord(folder)) == texts(micro.record)


def test_leftovers_of_another_version_do_not_stop_a_new_run(micro: MicroRun, tmp_path: Path) -> None:
    """The search for an unfinished run once failed on any folder that it could not read."""
    home = tmp_path / "micro" / micro.record.folder.parent.name
    folder = killed_copy(micro.record, home / "20990101T000000Z-older", num_bytes=10)
    (folder / "suite.toml").write_text("schema_version = 99\n")
    store = Store.open(tmp_path, kind=RUN, spec=micro.record.suite, provenance=micro.record.environment)
    assert store.folder != folder and store.folder.parent == home


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"commit": "f" * 40}, "commit"),
        ({"dirty": None}, "dirty"),
        ({"packages": {"torch": "0.1"}}, "packages"),
        ({"engine": "other"}, "engine"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"backbone_sha256": "0" * 64}, "backbone_sha256"),
        ({"heads_sha256": None}, "heads_sha256"),
        ({"prompts_sha256": "0" * 64}, "prompts_sha256"),
        (
            {"device": DeviceInfo(kind="cpu", name="another", num_cores=1, num_threads=1, memory_bytes=1)},
            "device",
        ),
    ],
)
def test_another_run_is_not_resumed(
    micro: MicroRun, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = killed_copy(micro.record, tmp_path / "run", num_bytes=0)
    environment = micro.record.environment.model_copy(update=changes)
    with pytest.raises(UserError, match=f"another {named}"):
        Store.open(tmp_path, kind=RUN, spec=micro.record.suite, provenance=environment, resume=folder)


def test_a_run_of_another_machine_is_told_apart_in_words(micro: MicroRun, tmp_path: Path) -> None:
    folder = killed_copy(micro.record, tmp_path / "run", num_bytes=0)
    environment = micro.record.environment
    here = environment.device
    details = {**here.details, "architecture": "pdp11", "driver": "1.0"}
    other = here.model_copy(update={"details": details, "num_threads": 99})
    with pytest.raises(UserError) as caught:
        Store.open(
            tmp_path,
            kind=RUN,
            spec=micro.record.suite,
            provenance=environment.model_copy(update={"device": other}),
            resume=folder,
        )
    assert str(caught.value) == (
        f"found another device (then against here: threads {here.num_threads} against 99; architecture "
        f"{here.details['architecture']} against pdp11; driver not told against 1.0); need the one that "
        "began the run; in run; to mend it: start a new run"
    )


def test_another_suite_or_a_finished_run_is_not_resumed(micro: MicroRun, tmp_path: Path) -> None:
    environment = micro.record.environment
    folder = killed_copy(micro.record, tmp_path / "run", num_bytes=0)
    other: SuiteSpec = micro.record.suite.model_copy(update={"max_new_tokens": 13})
    with pytest.raises(UserError, match="another suite"):
        Store.open(tmp_path, kind=RUN, spec=other, provenance=environment, resume=folder)
    told = shutil.copytree(micro.record.folder, tmp_path / "told")
    (told / "report.md").write_text("told")
    with pytest.raises(UserError, match="a finished run"):
        Store.open(tmp_path, kind=RUN, spec=micro.record.suite, provenance=environment, resume=told)
    with pytest.raises(UserError, match="no such folder"):
        Store.open(
            tmp_path, kind=RUN, spec=micro.record.suite, provenance=environment, resume=tmp_path / "nowhere"
        )


def test_a_tree_file_that_changed_is_not_resumed(heads_file: Path, tmp_path: Path) -> None:
    tree = tmp_path / "mine.json"
    tree.write_text("[[0], [1]]")
    arms = [VANILLA, {**CHAIN, "name": "mine", "tree": {"kind": "file", "path": str(tree)}}]
    data = micro_data(heads_file, arms=arms, prompts={"source": "random", "limit": 2})
    record = RunRecord(run(data, tmp_path / "results"))
    folder = killed_copy(record, tmp_path / "cut", num_bytes=size_of(record) // 2)
    tree.write_text("[[0], [2]]")
    with pytest.raises(UserError, match=r"another tree in mine\.json"):
        run(data, tmp_path / "results", resume=folder)


def start(suite: Path, results: Path) -> subprocess.Popen[str]:
    """Start a run that Ctrl-C reaches, also where these tests run in the background and inherit an ignored
    SIGINT.
    """
    small = small_device_limits_of_others(suite.parent)
    environment = {**os.environ, **small, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "harness", "reproduce", str(suite), "--results", str(results)]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, inherited)


def wait_for_outcomes(process: subprocess.Popen[str], results: Path, *, more_than: int) -> None:
    deadline = time.monotonic() + SLOW_START_S
    while time.monotonic() < deadline and process.poll() is None:
        for path in results.glob("micro/*/*/generations.jsonl"):
            if path.read_bytes().count(b"\n") > more_than:
                return
        time.sleep(0.002)
    raise AssertionError(f"no {more_than} outcomes: {process.communicate(timeout=30)}")


def test_ctrl_c_and_sigkill_lose_nothing(heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """One run, interrupted first, then killed, then finished: every text is that of a run left alone.

    Without git: a file saved meanwhile would make it another commit's run.
    """
    monkeypatch.setenv("PATH", "")
    # not the one that a fixture keeps steady
    monkeypatch.setattr("harness.device.machine.git_state", git_state)
    data = micro_data(heads_file, prompts={"source": "random", "limit": 14}, max_new_tokens=24)
    suite, results = write_suite(tmp_path / "micro.toml", data), tmp_path / "results"

    process = start(suite, results)
    wait_for_outcomes(process, results, more_than=5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SLOW_START_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in err and len([line for line in err.splitlines() if "interrupted" in line]) == 1
    (folder,) = results.glob("micro/*/*")
    interrupted = read_outcomes(folder / "generations.jsonl")
    assert len(interrupted) > 5 and not (folder / "manifest.json").exists()

    process = start(suite, results)
    wait_for_outcomes(process, results, more_than=len(interrupted) + 5)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SLOW_START_S)
    assert process.returncode == -signal.SIGKILL
    killed = read_outcomes(folder / "generations.jsonl", allow_torn_tail=True)
    assert [one.trial for one in killed[: len(interrupted)]] == [one.trial for one in interrupted]

    with small_device_limits():
        assert command("reproduce", suite, "--results", results).code == ExitCode.OK
    assert list(results.glob("micro/*/*")) == [folder]
    record = RunRecord(folder)
    assert [one.trial for one in record.outcomes[: len(killed)]] == [one.trial for one in killed]
    assert len(record.generations) == 56 and validate_record(folder) == ()
    alone = RunRecord(run({**data, "prompts": {"source": "random", "limit": 6}}, tmp_path / "alone"))
    finished = texts(record)
    assert all(finished[trial] == tokens for trial, tokens in texts(alone).items())


def test_a_resume_after_midnight_goes_on(steady_checkout: None, tmp_path: Path) -> None:
    """A chat template that asks for the date made other prompts on another day, and so another run."""
    model = save_text_model(tmp_path / "model", template=DATED)
    (tmp_path / "mine.txt").write_text("Name three rivers\n", encoding="utf-8")
    data = micro_data(tmp_path / "none", arms=[VANILLA], prompts={"source": "file", "path": "mine.txt"})
    file = write_suite(
        tmp_path / "mine.toml", {**data, "model": {"path": model.name}, "heads": {}, "warmup_prompts": 0}
    )
    words = ("reproduce", file, "--results", tmp_path / "results")
    with patch.object(Store, "seal", side_effect=KeyboardInterrupt):
        assert command(*words).code == ExitCode.INTERRUPTED
    with patch("harness.assets.chat.date", SimpleNamespace(today=lambda: date.today() + timedelta(days=1))):
        assert command(*words).code == ExitCode.OK
    (folder,) = (tmp_path / "results" / "micro").glob("*/*")
    assert RunRecord(folder).environment.chat_date in (date.today(), date.today() - timedelta(days=1))


def test_a_failure_after_a_used_up_time_budget_loses_nothing(
    heads_file: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The suite was rewritten before the seal: after a failure there no command found the run again."""
    data = micro_data(heads_file)

    def full(*args: object, **counts: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "seal", full)
        with pytest.raises(OSError, match="no room"):
            run(data, tmp_path, time_budget_s=1e-6)
    (folder,) = tmp_path.glob("micro/*/*")
    before = RunRecord(folder)
    measured = before.outcomes
    assert len(measured) == 4 and (before.suite.prompts.limit, before.asked.prompts.limit) == (1, 4)
    assert run(data, tmp_path) == folder
    record = RunRecord.open(folder)
    assert record.outcomes[:4] == measured and len(record.outcomes) == 16
    assert validate_record(folder) == () and not (folder / "asked.toml").exists()


def test_a_shortened_run_is_sealed_with_what_was_asked_for(heads_file: Path, tmp_path: Path) -> None:
    folder = run(micro_data(heads_file), tmp_path, time_budget_s=1e-6)
    record = RunRecord.open(folder)
    assert (record.suite.prompts.limit, record.asked.prompts.limit) == (1, 4)
    assert validate_record(folder) == ()
    (folder / "asked.toml").write_text((folder / "asked.toml").read_text().replace('"micro"', '"other"'))
    assert any("found another suite than suite.toml" in fault for fault in validate_record(folder))


def test_a_run_killed_between_seal_and_report_gets_its_report(micro: MicroRun, tmp_path: Path) -> None:
    """The same command once began a new run."""
    folder = tmp_path / "micro" / micro.record.folder.parent.name / micro.record.folder.name
    shutil.copytree(micro.record.folder, folder)
    (folder / "report.md").unlink(missing_ok=True)
    suite = write_suite(tmp_path / "micro.toml", micro.data)
    assert command("reproduce", suite, "--results", tmp_path).out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "report.md").read_text().startswith("# ")
