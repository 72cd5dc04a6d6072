"""Gates drawn from recorded step times: few alarms of one version against itself, a slower step found.

The fast form of `python -m harness.gate.simulate`, which draws 10,000 gates of each kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from harness.gate.simulate import (
    PLANTED,
    changes_of,
    committed_runs,
    counted,
    draw,
    line_of,
    main,
    recorded_noise,
    simulate,
    window_changes,
)
from harness.judge.gate.looks import kept
from harness.judge.gate.timed import Change, judge_timed
from harness.paths import code_folder, shipped
from harness.records.gate.record import Finding
from harness.records.run import RunRecord
from harness.specs.gate import GateSpec, load_gate_spec

SPEC = load_gate_spec(shipped("gate", "gate.toml"))
RESULTS = code_folder().parent / "results"
RUNS = [folder for folder in committed_runs(RESULTS) if folder.parts[-3] == "embedded"]


def machine(folder: Path) -> str:
    return "-".join(folder.parts[-2:])


def test_the_noise_is_that_of_several_machines() -> None:
    devices = {RunRecord.open(folder).environment.device.kind for folder in RUNS}
    assert len(RUNS) >= 3 and devices == {"cpu", "cuda"}


@pytest.mark.parametrize("folder", RUNS, ids=machine)
def test_the_gate_keeps_its_word_on_the_noise_of_a_machine(folder: Path) -> None:
    """1,000 gates of each kind: at most 10 alarms of one version against itself, 950 of a slower step."""
    noise = recorded_noise(RunRecord.open(folder), SPEC)
    itself = counted(noise, SPEC, runs=1000, slower=PLANTED["itself"])
    assert itself.alarms <= 10 and itself.blind <= 10, line_of(itself)
    for name in ("every step 5 % slower", "steps with a tree 5 % slower"):
        slower = counted(noise, SPEC, runs=1000, slower=PLANTED[name])
        assert slower.alarms >= 950, f"{name}: {line_of(slower)}"


def test_a_faster_head_and_a_slowdown_within_the_margin_are_no_alarm() -> None:
    noise = recorded_noise(RunRecord.open(RUNS[0]), SPEC)
    for slower in ({"vanilla": -0.05, "tree": -0.05}, {"vanilla": 0.01, "tree": 0.01}):
        assert counted(noise, SPEC, runs=500, slower=slower).alarms <= 5


def test_processes_that_differ_all_along_raise_more_alarms() -> None:
    """What no number of blocks averages away: 2 % between two processes of one code is too much."""
    noise = recorded_noise(RunRecord.open(RUNS[0]), SPEC)
    assert counted(noise, SPEC, runs=500, slower={}, between=0.02).alarms > 25


def test_one_seed_draws_the_same_gates_and_another_seed_others() -> None:
    noise = recorded_noise(RunRecord.open(RUNS[0]), SPEC)
    first, same, other = (
        draw(noise, runs=5, blocks=8, rng=np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)


@pytest.mark.parametrize("slower", [0.0, 0.02, 0.05])
def test_all_gates_at_once_decide_as_the_gate_does(slower: float) -> None:
    """Thirty gates, judged one by one with the gate's own functions."""
    noise = recorded_noise(RunRecord.open(RUNS[0]), SPEC)
    vanilla, tree = draw(noise, runs=30, blocks=SPEC.looks[-1], rng=np.random.default_rng(6))
    changes = changes_of(vanilla, tree + np.log1p(slower), SPEC)
    ended = simulate(changes, SPEC)
    for run in range(30):
        found: dict[str, Finding] = {}
        before = 0
        for look in SPEC.looks:
            columns = tuple(
                Change(quantity, arm, row[run, :look], row[run, :look], row[run, :look])
                for (quantity, arm), row in changes.items()
            )
            found = kept(found, judge_timed(columns, SPEC, num_blocks=look, judged_at=before))
            before = look
            if all(one.outcome != "inconclusive" for one in found.values()):
                break
        assert ended.blocks[run] == before
        assert ended.worse[run] == any(one.outcome == "worse" for one in found.values())


def test_steps_are_dealt_out_in_turn_so_that_a_drift_is_no_change() -> None:
    """Each step takes 1 % longer than the one before; two texts one after the other would differ by a third.

    With an even number between marked steps one version would begin more of the others' pairs, and seem 0.5 %
    slower: so it was once, and such a gate is refused.
    """
    steady = 1.01 ** np.arange(60)
    rows = window_changes(steady, num_pairs=25, mark_every=5)
    assert rows.shape == (11, 2) and np.abs(rows[:, 0]).max() < 1e-9
    assert np.abs(window_changes(steady, num_pairs=24, mark_every=4)[:, 0]).min() > 0.004
    with pytest.raises(ValidationError, match="mark_every 4, need an odd number"):
        GateSpec.model_validate({**SPEC.model_dump(), "mark_every": 4})
    assert window_changes([1.0] * 15, num_pairs=24, mark_every=5).shape == (0, 2)
    assert window_changes([1.0] * 16, num_pairs=24, mark_every=5).shape == (1, 2)


def test_the_command_prints_counts_with_their_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RUNS[0]), "--runs", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PLANTED) + 1 and "itself: 0 of 50 alarms, 0.00 % [0.00, 7.11]" in lines[0]
