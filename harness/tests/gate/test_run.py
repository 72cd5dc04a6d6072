"""The comparison of two versions' engines: turns, verdicts, a slowdown planted into a copy of the code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.errors import ExitCode
from harness.gate.run import (
    Compared,
    TurnTaken,
    compare,
    differing_texts,
    disturbed_share,
    exit_code,
    order_of,
    outcome_of,
    take_turns,
    undecided,
)
from harness.measure.turns import Request, Turn, _Spent
from harness.paths import code_folder, shipped
from harness.stats import Interval

ROOT = code_folder().parent
NODES = (1, 8, 64)
SLOWED = """

_steps = ArmRunner.steps


def _slow_steps(runner, *arguments, **options):
    import time

    for step in _steps(runner, *arguments, **options):
        time.sleep(0.004)
        yield step


ArmRunner.steps = _slow_steps
"""


def turns(
    factor: float, *, noise: float = 0.0, other_text: int | None = None, others: float = 0.0
) -> list[TurnTaken]:
    """Eight prompts on a machine that slows down by a third; the head takes `factor` times as long.

    In every fourth turn other processes use a share of the cores.
    """
    taken: list[TurnTaken] = []

    def ask(side: str, request: Request) -> Turn:
        drift = 1 + len(taken) / (3 * 4 * 8 * len(NODES))
        own = 1 + noise * (-1) ** request.prompt if side == "head" else 1.0
        step_s = request.num_nodes * drift * own * (factor if side == "head" else 1.0)
        differs = side == "head" and request.prompt == other_text
        nothing = TurnTaken(step_s=(), text_sha256="", others_share=0.0, side="base", prompt=0, num_nodes=1)
        taken.append(nothing)
        text = "b" if differs else "a"
        steps = (step_s, step_s, step_s, 100 * step_s)
        return Turn(step_s=steps, text_sha256=text, others_share=others if len(taken) % 4 == 0 else 0.0)

    return list(take_turns(ask, nodes=NODES, num_prompts=8))


def test_turns_are_base_head_head_base_and_the_next_prompt_begins_with_the_other() -> None:
    assert order_of(0) == ("base", "head", "head", "base")
    assert order_of(1) == ("head", "base", "base", "head")
    taken = turns(1.0)
    assert len(taken) == 8 * 3 * 4
    assert [turn.side for turn in taken[:4]] == list(order_of(0)) and taken[0].num_nodes == 1
    assert [turn.side for turn in taken[12:16]] == list(order_of(1)) and taken[4].num_nodes == 8


@pytest.mark.parametrize(
    ("factor", "noise", "outcome"),
    [
        (1.0, 0.0, "not slower"),
        (0.9, 0.02, "not slower"),
        (1.1, 0.02, "slower"),
        (1.02, 0.2, "inconclusive"),
    ],
)
def test_a_slowdown_is_seen_through_a_drift_that_is_larger(factor: float, noise: float, outcome: str) -> None:
    compared = compare(turns(factor, noise=noise), margin=0.01)
    assert [one.num_nodes for one in compared] == list(NODES)
    for one in compared:
        assert one.ratio.estimate == pytest.approx(factor, rel=0.01) and one.outcome == outcome


def test_a_side_that_lacks_a_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="found 1 turns of base on prompt 7, need 2"):
        compare([turn for turn in turns(1.0) if turn != turns(1.0)[-2]], margin=0.01)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (1.011, 1.2, "slower"),
        (1.01, 1.2, "inconclusive"),
        (0.9, 1.01, "not slower"),
        (0.9, 1.011, "inconclusive"),
        (float("-inf"), float("inf"), "inconclusive"),
    ],
)
def test_what_an_interval_says(low: float, high: float, outcome: str) -> None:
    ratio = Interval(estimate=1.0, low=low, high=high, level=0.95, num_prompts=8)
    assert outcome_of(ratio, margin=0.01) == outcome


def test_exit_codes_say_slower_first_then_that_nothing_can_be_said() -> None:
    ratio = Interval(estimate=1.0, low=0.9, high=1.1, level=0.95, num_prompts=8)
    slower, fine, open_ = (
        Compared(1, ratio, "slower"),
        Compared(8, ratio, "not slower"),
        Compared(64, ratio, "inconclusive"),
    )
    assert exit_code([fine, fine], num_differing=0) == ExitCode.OK
    assert exit_code([fine, open_, slower], num_differing=3) == ExitCode.GATE_REGRESSION
    assert exit_code([fine, open_], num_differing=0) == ExitCode.INVALID_MEASUREMENT
    assert exit_code([fine, fine], num_differing=1) == ExitCode.INVALID_MEASUREMENT


def test_on_a_busy_machine_nothing_is_said() -> None:
    """On a loaded machine the same engine once seemed 1.15 [1.01, 1.30] times as slow as itself."""
    assert disturbed_share(turns(1.0), others=0.1) == 0
    assert disturbed_share(turns(1.0, others=0.3), others=0.1) == 0.25
    assert disturbed_share(turns(1.0, others=0.3), others=0.3) == 0
    compared = undecided(compare(turns(1.1), margin=0.01))
    assert {one.outcome for one in compared} == {"inconclusive"}
    assert exit_code(compared, num_differing=0) == ExitCode.INVALID_MEASUREMENT


def test_the_share_of_others_leaves_out_what_is_our_own() -> None:
    before = _Spent(clock_s=10.0, busy_s=100.0, own_s=5.0)
    cores = psutil.cpu_count() or 1
    assert before.others_share(_Spent(12.0, 100.0 + 1.5 * cores, 5.0 + 0.5 * cores)) == pytest.approx(0.5)
    assert before.others_share(_Spent(12.0, 100.0, 6.0)) == 0, "clocks of coarse ticks"
    now = _Spent.until_now()
    assert now.clock_s > 0 and now.busy_s > now.own_s > 0


def test_texts_that_differ_are_counted_by_prompt_and_size() -> None:
    assert differing_texts(turns(1.0)) == 0
    assert differing_texts(turns(1.0, other_text=3)) == len(NODES)


def gate(base: Path, head: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness.gate.run", base, head, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_slowdown_planted_into_a_copy_of_the_code_is_found(tmp_path: Path) -> None:
    """4 ms more a step, in the code of the copy alone: so each side runs its own code."""
    copy = tmp_path / "head"
    for package in ("harness", "medusa_impl", "suites"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    arms = copy / "harness" / "device" / "arms.py"
    arms.write_text(arms.read_text(encoding="utf-8") + SLOWED, encoding="utf-8")
    words = ("--suite", shipped("smoke.toml"), "--tokens", "6", "--nodes", "1,8", "--others", "1")
    done = gate(ROOT, copy, *words, "--out", tmp_path / "turns.json")
    assert done.returncode == ExitCode.GATE_REGRESSION, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["num_prompts"] == 8 and last["texts_differ"] == 0
    assert {nodes: found["outcome"] for nodes, found in last["nodes"].items()} == {
        "1": "slower",
        "8": "slower",
    }
    assert len(json.loads((tmp_path / "turns.json").read_text())["turns"]) == 8 * 2 * 4


def test_a_folder_that_is_no_checkout_and_too_few_prompts_are_one_line(tmp_path: Path) -> None:
    done = gate(ROOT, tmp_path, "--suite", shipped("smoke.toml"))
    assert done.returncode == ExitCode.USER_ERROR
    assert (
        "error: found no checkout of this project as head" in done.stderr and "Traceback" not in done.stderr
    )
    done = gate(ROOT, ROOT, "--suite", shipped("smoke.toml"), "--prompts", "7")
    assert done.returncode == ExitCode.USER_ERROR
    assert "error: found 7 prompts; need at least 8" in done.stderr
