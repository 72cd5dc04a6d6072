"""A version's process, in this one: a text taken step by step is the text that its arm decodes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.gate.run import wanted_of
from harness.gate.sides import _exchange, started
from harness.measure.turns import Fault, Ready, Request, Step, Text, Worker, load, num_foreign
from harness.paths import code_folder, shipped
from harness.specs.gate import load_gate_spec

FILE = shipped("gate", "smoke.toml")
SPEC = load_gate_spec(FILE)


@pytest.fixture(scope="module")
def loaded() -> tuple[Worker, Ready]:
    return load(wanted_of(SPEC, FILE))


def taken(worker: Worker, *, prompt: int, arm: str, mark_every: int | None) -> tuple[list[Step], Text]:
    steps = [worker.answer(Request(do="begin", prompt=prompt, arm=arm, holds=True))]
    while True:
        last = steps[-1]
        assert isinstance(last, Step)
        if last.ended:
            break
        marked = mark_every is not None and len(steps) % mark_every == 0
        steps.append(worker.answer(Request(do="step", marked=marked)))
    text = worker.answer(Request(do="end"))
    assert isinstance(text, Text)
    return [step for step in steps if isinstance(step, Step)], text


@torch.inference_mode()
def test_a_text_step_by_step_is_the_text_of_its_arm_marked_or_not(loaded: tuple[Worker, Ready]) -> None:
    worker, _ = loaded
    for arm in ("vanilla", "tree"):
        for prompt in range(2):
            done = worker.runners[arm].generate(worker.prompts[prompt].prompt_ids, seed=None)
            digest = hashlib.sha256(json.dumps(list(done.token_ids)).encode()).hexdigest()
            for mark_every in (None, 3):
                steps, text = taken(worker, prompt=prompt, arm=arm, mark_every=mark_every)
                assert text.text_sha256 == digest
                assert tuple(step.num_tokens for step in steps[1:]) == done.step_tokens
                assert all(step.step_s > 0 for step in steps) and text.peak_memory_bytes > 10**7
                marked = [step for step in steps if step.parts_s]
                assert bool(marked) == (mark_every is not None)
                assert all("backbone" in step.parts_s for step in marked)
                assert all(sum(step.parts_s.values()) <= step.step_s for step in marked)


@torch.inference_mode()
def test_a_sampled_text_is_the_same_each_time_and_scored(loaded: tuple[Worker, Ready]) -> None:
    worker, _ = loaded
    first, again = (worker.answer(Request(do="score", prompt=0, arm="typical")) for _ in range(2))
    assert isinstance(first, Text) and isinstance(again, Text)
    assert first.text_sha256 == again.text_sha256 and first.step_tokens
    assert first.mean_log_likelihood == again.mean_log_likelihood
    assert first.mean_log_likelihood is not None and first.mean_log_likelihood < 0


def test_a_side_says_whose_code_it_runs_and_what_its_trees_promise(loaded: tuple[Worker, Ready]) -> None:
    _, ready = loaded
    assert Path(ready.code) == code_folder().parent and len(ready.prompt_keys) == SPEC.looks[-1]
    assert ready.replayed_tokens_per_step == {}, "this gate has no calibration trace"
    assert Ready.model_validate_json(ready.model_dump_json()) == ready


@pytest.mark.parametrize(
    ("others", "sides", "foreign"), [(None, 2, 0), (0, 2, 0), (1, 2, 0), (2, 2, 1), (1, 1, 1), (0, 1, 0)]
)
def test_the_other_side_is_no_foreign_process(others: int | None, sides: int, foreign: int) -> None:
    assert num_foreign(others, num_sides=sides) == foreign


def answering(text: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"print({text!r})" if text else "pass"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )


def test_a_fault_is_one_line_without_paths_and_so_is_silence() -> None:
    told = "ImportError: no name (/home/someone/clone/harness/device/arms.py)"
    fault = Fault(fault=told).model_dump_json()
    with answering(fault) as process, pytest.raises(UserError) as caught:
        _exchange(process, None, name="base")
    assert "found a base that does not run (ImportError" in str(caught.value)
    assert "/home/someone" not in str(caught.value) and "name another --base" in str(caught.value)
    with (
        answering("") as process,
        pytest.raises(UserError, match="found a head that ended without an answer"),
    ):
        _exchange(process, None, name="head")


def test_a_folder_without_this_project_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="found no checkout of this project as base"),
        started({"base": tmp_path, "head": tmp_path}, wanted_of(SPEC, FILE)),
    ):
        pass


def test_a_side_whose_gate_is_gone_ends_before_it_loads() -> None:
    """The gate may end before its side can ask to end with it."""
    wanted = wanted_of(SPEC, FILE).model_copy(update={"gate_pid": os.getppid()})
    code = (
        "import sys; from harness.measure.turns import Wanted, main; "
        "main(Wanted.model_validate_json(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, wanted.model_dump_json()], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
