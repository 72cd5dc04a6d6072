"""The loop over blocks and looks, on versions and a machine whose right answers are known."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import harness.gate.run
from harness.errors import ExitCode, UserError
from harness.gate.calibrate import check_margins
from harness.gate.repeat import GateOptions
from harness.gate.run import (
    Taken,
    _checked,
    _record,
    past_turns,
    run_calibration,
    take_looks,
)
from harness.gate.sides import Spent, first_at
from harness.gate.worktree import Base
from harness.judge.gate.timed import quiet_turns
from harness.paths import CACHE_VARIABLE
from harness.records.gate.record import Calibration, GateRecord, Turn
from harness.safe_text import SafeConsole
from harness.specs.gate import GateSpec
from harness.tests.fake_gate import side, spec_of, turns_of

SPEC = spec_of((4, 8))
SIDES: Any = {
    name: SimpleNamespace(ready=SimpleNamespace(prompt_keys=tuple(f"prompt-{i}" for i in range(8))))
    for name in ("base", "head")
}
COMMIT = "a" * 40
QUIET = SafeConsole(file=io.StringIO())


def take(
    monkeypatch: pytest.MonkeyPatch,
    *,
    others: Callable[[int], float] = lambda block: 0.0,
    seconds: float = 60.0,
    **options: Any,
) -> Taken:
    """Take a gate's looks over blocks as `turns_of` makes them; `others` is by the number of the block."""

    def take_block(
        sides: object, spec: GateSpec, *, number: int, prompt: int, scores: bool
    ) -> tuple[Turn, ...]:
        time.sleep(0.001)
        return tuple(
            turn.model_copy(
                update={"block": number, "prompt_key": f"prompt-{prompt}", "others_share": others(number)}
            )
            for turn in turns_of(spec, num_blocks=1, seed=number, **options)
        )

    monkeypatch.setattr(harness.gate.run, "take_block", take_block)
    return take_looks(SIDES, SPEC, past=(), deadline=time.monotonic() + seconds, console=QUIET, stops=True)


def record_of(taken: Taken, **sides: Any) -> GateRecord:
    return _record(
        SPEC,
        taken,
        {"base": side(), "head": side(**sides)},
        past=(),
        notes=[],
        base_from=Base("a" * 40, "merge base with main"),
        options=GateOptions(command="medusa-repro gate"),
        started_utc="2026-11-27T20:00:00Z",
        elapsed_s=1.0,
    )


def test_it_stops_at_the_first_look_that_decides_all(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(monkeypatch)
    assert taken.looks == [4] and len(taken.tried) == 4
    record = record_of(taken)
    assert record.exit_code == ExitCode.OK and {one.outcome for one in record.findings} == {"equivalent"}
    noisy = take(monkeypatch, factor=lambda arm, block: 1.0, noise=0.5)
    assert noisy.looks == [4, 8], "what is open goes on"


def test_a_slower_head_is_a_regression_that_names_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(monkeypatch, factor=lambda arm, block: 1.1, slower_part="heads")
    record = record_of(taken)
    assert record.exit_code == ExitCode.GATE_REGRESSION
    assert record.slowed is not None and (record.slowed.arm, record.slowed.part) == ("tree", "heads")
    assert record.repeat == f"nox -s gate -- --base {'a' * 40}"


def test_a_disturbed_block_is_kept_and_its_prompt_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(monkeypatch, others=lambda number: 0.9 if number in (1, 4) else 0.0)
    assert taken.tried == [f"prompt-{i}" for i in (0, 1, 2, 3, 1, 1)]
    record = record_of(taken)
    assert record.disturbed_blocks == (1, 4) and record.looks_taken == (4,)
    assert len({turn.block for turn in record.turns}) == 6 and record.exit_code == ExitCode.OK


def test_a_machine_that_is_never_quiet_loses_its_times_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = take(monkeypatch, others=lambda number: 0.9, seconds=0.2)
    record = record_of(taken)
    assert record.looks_taken == () and record.exit_code == ExitCode.INVALID_MEASUREMENT
    outcomes = {one.name: one.outcome for one in record.findings}
    assert outcomes["step_s/tree"] == outcomes["speedup/tree"] == "withheld"
    assert record.parts == () and record.slowed is None
    assert outcomes["tokens_per_step/tree"] == outcomes["parity/tree"] == "equivalent"
    assert any("times are withheld: 0 quiet blocks, need 4" in note for note in record.notes)
    lost = record_of(taken, replayed_tokens_per_step={"tree": 1.98})
    assert lost.exit_code == ExitCode.GATE_REGRESSION, "counts stay valid"


def test_another_process_on_the_gpu_disturbs_and_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(monkeypatch)
    taken.turns = [turn.model_copy(update={"num_foreign": int(turn.block < 2)}) for turn in taken.turns]
    record = record_of(taken)
    assert record.disturbed_blocks == (0, 1)
    assert any("another process used the GPU in 2 blocks" in note for note in record.notes)


def test_a_gate_that_runs_out_of_time_after_a_look_judges_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five quiet blocks at the end of the time: a look of its own, with the error up to there."""
    taken = take(monkeypatch, others=lambda number: 0.9 if number > 4 else 0.0, seconds=0.5, noise=0.5)
    assert taken.looks == [4, 5]


def test_a_stored_record_serves_with_its_quiet_blocks_on_its_own_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = record_of(take(monkeypatch, others=lambda number: 0.9 if number == 1 else 0.0))
    past = past_turns(stored, side(), SPEC)
    assert {turn.side for turn in past} == {"base"}
    assert {turn.block for turn in quiet_turns(past, SPEC)} == {0, 2, 3, 4}, "texts are judged of all"
    other = side().device.model_copy(update={"name": "Another processor"})
    with pytest.raises(UserError, match=r"found a baseline of another device \(A processor, 2 cores\)"):
        past_turns(stored, side(device=other), SPEC)
    for what, changes in (("engine", {"mode": "eager"}), ("dtype", {"dtype": "bfloat16"})):
        with pytest.raises(UserError, match=f"found a baseline of another {what}"):
            past_turns(stored, side(**changes), SPEC)
    with pytest.raises(UserError, match="found a baseline of another model"):
        past_turns(stored, side(backbone_sha256="other"), SPEC)
    with pytest.raises(UserError, match="found a baseline of another gate"):
        past_turns(stored, side(), SPEC.model_copy(update={"max_new_tokens": 24}))
    with pytest.raises(UserError, match="found a baseline without a head"):
        past_turns(stored.model_copy(update={"sides": {"base": side()}}), side(), SPEC)
    with pytest.raises(UserError, match="found a baseline of other prompts"):
        past_turns(stored, side(prompts_sha256="other"), SPEC)


def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **head: Any) -> list[str]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return _checked(SPEC, SIDES, {"base": side(), "head": side(**head)})


def test_what_differs_besides_the_code_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("same commit" in note for note in checked(tmp_path, monkeypatch))
    notes = checked(tmp_path, monkeypatch, dirty=True, mode="eager", backbone_sha256="c", commit="b" * 40)
    for words in ("measured as it is", "engine is packed, the head's eager", "different weights"):
        assert any(words in note for note in notes), words
    assert not any("same commit" in note for note in notes)
    with pytest.raises(UserError, match="found other prompts in the base"):
        checked(tmp_path, monkeypatch, prompts_sha256="other")
    few: Any = {"head": SimpleNamespace(ready=SimpleNamespace(prompt_keys=("a",)))}
    with pytest.raises(UserError, match="found 1 prompts in the head; need 8"):
        _checked(SPEC, few, {"base": side(), "head": side()})


def calibrated_at(monkeypatch: pytest.MonkeyPatch, *, noise: float, others: float = 0.0) -> Calibration:
    """Calibrate a runner on which a step's time scatters by so much."""
    numbers = itertools.count()

    def take_block(
        sides: object, spec: GateSpec, *, number: int, prompt: int, scores: bool
    ) -> tuple[Turn, ...]:
        time.sleep(0.001)
        named = {"block": number, "prompt_key": f"prompt-{prompt}", "others_share": others}
        turns = turns_of(spec, num_blocks=1, seed=next(numbers), noise=noise)
        return tuple(turn.model_copy(update=named) for turn in turns)

    @contextlib.contextmanager
    def started(folders: dict[str, Path], wanted: object) -> Iterator[Any]:
        assert set(folders) == {"base", "head"} and len(set(folders.values())) == 1, "one version, twice"
        yield {
            name: SimpleNamespace(ready=one.ready, info=side(commit=COMMIT)) for name, one in SIDES.items()
        }

    monkeypatch.setattr(harness.gate.run, "take_block", take_block)
    monkeypatch.setattr(harness.gate.run, "started", started)
    spec = SPEC.model_copy(update={"minutes": 0.01})
    options = GateOptions(command="medusa-repro gate --calibrate --minutes 0.01", runs=3, minutes=0.01)
    calibration, records = run_calibration(
        spec, spec_file=Path("gate.toml"), num_runs=3, options=options, console=QUIET
    )
    assert {one.repeat for one in records} == {"nox -s gate -- --calibrate --minutes 0.01"}
    assert len(records) == 3 and all(one.exit_code == ExitCode.OK or noise > 0.01 for one in records)
    return calibration


def test_a_calibration_says_how_much_a_change_of_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, noisy = (calibrated_at(monkeypatch, noise=noise) for noise in (0.002, 0.1))
    assert (quiet.num_runs, quiet.num_blocks, quiet.commit) == (3, 24, COMMIT)
    name = "step_s/tree"
    assert 0 < quiet.floors[name].floor < 0.005 < 0.02 < noisy.floors[name].floor
    assert quiet.floors[name].sees < 0.05, "the slowdown that the gate must see"
    check_margins(SPEC, quiet)
    with pytest.raises(UserError, match="the noise floor of this runner"):
        check_margins(SPEC, noisy)


def test_a_runner_that_others_use_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="found 0 quiet blocks; need 4 for a calibration"):
        calibrated_at(monkeypatch, noise=0.002, others=0.9)


def test_the_versions_take_the_first_step_of_a_pair_in_turn() -> None:
    assert [first_at(step)[0] for step in range(4)] == ["base", "head", "base", "head"]
    assert all(set(first_at(step)) == {"base", "head"} for step in range(4))


def test_the_share_of_others_leaves_out_what_is_our_own() -> None:
    before = Spent(clock_s=10.0, busy_s=100.0, own_s=5.0)
    cores = psutil.cpu_count() or 1
    assert before.others_share(Spent(12.0, 100.0 + 1.5 * cores, 5.0 + 0.5 * cores)) == pytest.approx(0.5)
    assert before.others_share(Spent(12.0, 100.0, 6.0)) == 0, "clocks of coarse ticks"
    assert before.others_share(before) == 0, "no time between"
    now = Spent.until_now([psutil.Process()])
    assert now.clock_s > 0 and now.busy_s > now.own_s > 0
