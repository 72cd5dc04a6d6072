"""Which kinds of figures hold where a check fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.files import write_json
from harness.judge.history.valid import Holds, latency_holds, run_holds
from harness.judge.run import judge
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.run import RunRecord
from harness.records.trials import Failure
from harness.tests.fake_latency import write_fake_latency
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record


def held(record: RunRecord) -> tuple[bool, bool, bool, tuple[str, ...]]:
    found = run_holds(record, judge(record, claims=()))
    return found.texts, found.speeds, found.all_that_was_asked, found.why


def test_a_failed_check_takes_what_it_is_about(tmp_path: Path) -> None:
    def other_text(parts: FakeParts) -> None:
        parts.edit(lambda one: {"token_ids": (*one.token_ids[:-1], 499)}, arm="chain", limit=1)

    def failing(parts: FakeParts) -> None:
        first = parts.outcomes[0]
        parts.outcomes[0] = Failure(trial=first.trial, order=0, error_type="ValueError", message="made up")

    few: dict[str, Any] = {"rounds": 1, "num_prompts": 8}
    assert held(write_fake_record(tmp_path / "sound", **few)) == (True, True, True, ())
    slow = write_fake_record(tmp_path / "slow", step_s={"hf_greedy": STEP_S["hf_greedy"] / 2}, **few)
    texts, speeds, asked, why = held(slow)
    assert (texts, speeds, asked) == (True, False, False) and why == ("vanilla_against_generate",)
    assert held(write_fake_record(tmp_path / "text", spoil=other_text, **few))[:3] == (False, False, False)
    assert held(write_fake_record(tmp_path / "failed", spoil=failing, **few))[:3] == (False, False, False)
    silent = write_fake_record(tmp_path / "silent", reports_speed=False, **few)
    assert held(silent) == (True, False, True, ())


def test_a_latency_record_holds_where_nothing_beat_its_limits(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "a")
    assert latency_holds(record) == Holds(texts=True, speeds=True, asks_speeds=True)
    slow: dict[str, Any] = {
        "read_bandwidth_bytes_per_s": 1e12,
        "row_product_bytes_per_s": 1e12,
        "matmul_flop_per_s": 1e10,
    }
    write_json(record.folder / "device_limits.json", DeviceLimits(method="made up", **slow))
    found = latency_holds(LatencyRecord(record.folder))
    assert found == Holds(texts=True, speeds=False, asks_speeds=True, why=("within_limits",))
    assert not found.all_that_was_asked
