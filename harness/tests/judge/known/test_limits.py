"""Was anything faster than its limit: shares worked out by hand, on both sides of every bound."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from harness.files import write_json
from harness.judge.checks import run_checks
from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.judge.limits import (
    CACHED_BYTES,
    LimitShare,
    bytes_in_cache,
    latency_shares,
    latency_within_limits,
    limits_outcome,
    run_shares,
)
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.provenance import Environment
from harness.records.run import RunRecord
from harness.tests.fake_latency import backbone_s, fake_environment, fake_facts, write_fake_latency
from harness.tests.fake_record import (
    BACKBONE_ONE_NODE_S,
    STEP_S,
    WEIGHT_BYTES,
    FakeParts,
    node_cost,
    write_fake_record,
)

PASSED, FAILED, SKIPPED = CheckStatus.PASSED, CheckStatus.FAILED, CheckStatus.SKIPPED


def limits_of(read: float = 1.0, product: float = 1.0, row: float | None = 1.0) -> DeviceLimits:
    return DeviceLimits(
        read_bandwidth_bytes_per_s=read,
        matmul_flop_per_s=product,
        row_product_bytes_per_s=row,
        method="made up",
    )


@pytest.mark.parametrize(
    ("shares", "row", "status", "found"),
    [
        ((), 1.0, PASSED, "reading in products of one row at 1.00"),
        ((), 1.1, PASSED, "reading in products of one row at 1.10"),
        ((), 1.11, FAILED, "reading in products of one row at 1.11"),
        ((0.2, 1.1), 0.5, PASSED, "it at 1.10"),
        ((1.11, 0.2), 0.5, FAILED, "it at 1.11"),
    ],
)
def test_nothing_is_faster_than_its_limit(
    shares: tuple[float, ...], row: float, status: CheckStatus, found: str
) -> None:
    outcome = limits_outcome("within_limits", [limits_of(row=row)], [LimitShare("it", one) for one in shares])
    assert (outcome.name, outcome.status) == ("within_limits", status)
    assert outcome.found == f"{found} of the measured limit, the highest share"
    assert outcome.need == "at most 1.1 of it"


def test_an_older_probe_is_not_held_to_it_and_says_so() -> None:
    """Its 512 MiB and 1536-square products were slower than an H200 is; a step beat them."""
    outcome = limits_outcome("within_limits", [limits_of(), limits_of(row=None)], [LimitShare("it", 9.0)])
    assert outcome.status is SKIPPED and outcome.found.startswith("limits under-measured")
    nothing = limits_outcome("within_limits", [], [LimitShare("it", 9.0)])
    assert (nothing.status, nothing.found) == (SKIPPED, "no limits were measured")


def test_an_upgraded_record_of_version_1_is_an_older_probes(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path, num_prompts=4)
    text = '{"schema_version": 1, "read_bandwidth_bytes_per_s": 2.0, "matmul_flop_per_s": 3.0, "method": "x"}'
    (tmp_path / "device_limits.json").write_text(text)
    limits = RunRecord(record.folder).device_limits
    assert limits is not None and limits.are_under_measured and limits.row_product_bytes_per_s is None
    assert (limits.read_bandwidth_bytes_per_s, limits.matmul_flop_per_s) == (2.0, 3.0)


def on(environment: Environment, kind: str, **changes: object) -> Environment:
    device = environment.device.model_copy(update={"kind": kind})
    return environment.model_copy(update={"device": device, **changes})


def run_with(
    folder: Path, limits: DeviceLimits | None, *, kind: str = "cuda", **changes: object
) -> RunRecord:
    """Write a run; on a GPU, since a CPU's caches may hold its weights."""

    def spoil(parts: FakeParts) -> None:
        parts.device_limits = limits
        parts.environment = on(parts.environment, kind, **changes)

    return write_fake_record(folder, spoil=spoil, num_prompts=4, jitter=0)


def checked(record: RunRecord) -> CheckOutcome:
    return next(outcome for outcome in run_checks(record) if outcome.name == "within_limits")


def test_a_runs_shares_are_reading_and_products_over_the_time(tmp_path: Path) -> None:
    read, product = 50e9, 2e12
    found = {one.what: one.share for one in run_shares(run_with(tmp_path, limits_of(read, product)))}
    assert found["reading of vanilla"] == pytest.approx(WEIGHT_BYTES / read / STEP_S["vanilla"], rel=1e-6)
    assert found["reading of hf_greedy"] == pytest.approx(WEIGHT_BYTES / read / STEP_S["hf_greedy"], rel=1e-6)
    taken_s = BACKBONE_ONE_NODE_S * node_cost(64)
    assert found["reading over 64 nodes"] == pytest.approx(WEIGHT_BYTES / read / taken_s, rel=0.1)
    flop = 2 * WEIGHT_BYTES / 4 * 64
    assert found["products over 64 nodes"] == pytest.approx(flop / product / taken_s, rel=0.1)


def test_half_precision_has_twice_the_numbers_in_its_bytes(tmp_path: Path) -> None:
    def products(dtype: str) -> float:
        record = run_with(tmp_path / dtype, limits_of(1e12, 1e12), dtype=dtype)
        return next(one.share for one in run_shares(record) if one.what == "products over 64 nodes")

    assert products("bfloat16") == pytest.approx(2 * products("float32"))


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        (limits_of(1e12, 1e14), PASSED),
        (limits_of(1e9, 1e14, 1e9), FAILED),  # every step read faster
        (limits_of(1e12, 1e9), FAILED),  # every step multiplied faster
        (limits_of(1e12, 1e14, 1.2e12), FAILED),  # one row read faster than plain reading
        (limits_of(1e9, 1e9, None), SKIPPED),
        (None, SKIPPED),
    ],
)
def test_a_run_faster_than_a_limit_fails(
    tmp_path: Path, limits: DeviceLimits | None, status: CheckStatus
) -> None:
    assert checked(run_with(tmp_path, limits)).status is status


@pytest.mark.parametrize(
    ("kind", "num_bytes", "reads"),
    [
        ("cpu", CACHED_BYTES["cpu"], True),
        ("cpu", CACHED_BYTES["cpu"] - 1, False),
        ("cuda", CACHED_BYTES["cuda"], True),
        ("cuda", CACHED_BYTES["cuda"] - 1, False),
        ("cpu", 269_060_352, False),  # SmolLM2-135M in bfloat16, less than some servers' caches
    ],
)
def test_weights_that_a_cache_may_hold_are_not_read_from_memory(
    tmp_path: Path, kind: str, num_bytes: int, reads: bool
) -> None:
    """A small model out of a large cache was once called faster than its device."""
    record = run_with(tmp_path, limits_of(1.0, 1e17), kind=kind, weight_bytes=num_bytes)
    assert any(one.what.startswith("reading") for one in run_shares(record)) is reads
    assert any(one.what.startswith("products") for one in run_shares(record))


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, CACHED_BYTES["cpu"]),
        ({"cache level 1": "32K", "cache level 3": "32768K", "stepping": "1"}, 2 * 32 * 2**20),
        ({"cache level 3": "32M"}, 2 * 32 * 2**20),
        ({"cache level 3": "491520K"}, 2 * 480 * 2**20),
        ({"cache level 3": "2G"}, CACHED_BYTES["cpu"]),
        ({"cache level 3": "unknown"}, CACHED_BYTES["cpu"]),
    ],
)
def test_a_processor_that_tells_its_cache_is_held_to_twice_that(
    details: dict[str, str], expected: int
) -> None:
    device = fake_environment().device.model_copy(update={"details": details})
    assert bytes_in_cache(device) == expected


def latency_with(folder: Path, limits: DeviceLimits) -> LatencyRecord:
    record = write_fake_latency(folder)
    write_json(folder / "device_limits.json", limits)
    write_json(folder / "environment.json", on(record.environment, "cuda"))
    return LatencyRecord(record.folder)


def test_a_latency_records_shares_are_reading_and_products_over_the_time(tmp_path: Path) -> None:
    read, product = 1e12, 1e13
    record = latency_with(tmp_path / "run", limits_of(read, product))
    found = {one.what: one.share for one in latency_shares(record)}
    facts, taken_s = fake_facts(), backbone_s(16, batch=2)
    where = "float32 packed over 16 nodes after 256 tokens, batch 2"
    flop = 2 * facts.step_parameters * 16 * 2
    assert found[f"products of {where}"] == pytest.approx(flop / product / taken_s)
    least_s = (facts.step_bytes("float32") + facts.cache_bytes(2 * 256, dtype="float32")) / read
    assert found[f"reading of {where}"] == pytest.approx(least_s / taken_s)
    assert found["reading of float32 eager"] == pytest.approx(12.0 * facts.step_bytes("float32") / read)


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        (limits_of(1e12, 1e14), PASSED),
        (limits_of(1e9, 1e14, 1e9), FAILED),
        (limits_of(1e12, 1e9), FAILED),
        (limits_of(1e9, 1e9, None), SKIPPED),
    ],
)
def test_a_latency_record_faster_than_a_limit_fails(
    tmp_path: Path, limits: DeviceLimits, status: CheckStatus
) -> None:
    """A roofline of such limits once predicted 78.5 ms for a step that took 33.7, and nothing said so."""
    outcome = latency_within_limits(latency_with(tmp_path / "run", limits))
    assert (outcome.name, outcome.status) == ("within_limits", status)


def test_steps_of_a_tuned_backbone_read_its_own_weights(tmp_path: Path) -> None:
    record = run_with(tmp_path, limits_of(1e12, 1e12))
    arms = tuple(
        one.model_copy(update={"backbone": "tuned"}) if one.name == "chain" else one
        for one in record.suite.arms
    )
    stand_in = SimpleNamespace(
        suite=record.suite.model_copy(update={"arms": arms}),
        generations=record.generations,
        reports_speed=True,
        is_timed=record.is_timed,
        device_limits=record.device_limits,
        step_costs=record.step_costs,
        environment=SimpleNamespace(
            dtype="float32",
            device=record.environment.device,
            weight_bytes=WEIGHT_BYTES,
            tuned=SimpleNamespace(weight_bytes=3 * WEIGHT_BYTES),
        ),
    )
    plain = {one.what: one.share for one in run_shares(record)}
    tuned = {one.what: one.share for one in run_shares(cast(RunRecord, stand_in))}
    assert tuned["reading of chain"] == pytest.approx(3 * plain["reading of chain"])
    assert tuned["reading of vanilla"] == pytest.approx(plain["reading of vanilla"])


@pytest.mark.parametrize(("more", "reads"), [(0, True), (1, False)])
def test_a_latency_records_cached_weights_are_not_read_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, reads: bool
) -> None:
    num_bytes = fake_facts().step_bytes("float32")
    monkeypatch.setattr("harness.judge.limits.CACHED_BYTES", {"cuda": num_bytes + more})
    told = [one.what for one in latency_shares(latency_with(tmp_path / "run", limits_of()))]
    assert any(what.startswith("reading of float32 packed over") for what in told) is reads
    assert ("reading of float32 packed" in told) is reads
    assert any(what.startswith("products") for what in told)


def test_points_that_were_skipped_and_dtypes_without_limits_have_no_share(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "run", skipped={64: "no memory"})
    assert not any("over 64 nodes" in one.what for one in latency_shares(record))
    (record.folder / "device_limits.json").unlink()
    bare = LatencyRecord(record.folder)
    assert list(latency_shares(bare)) == [] and latency_within_limits(bare).status is SKIPPED


def test_a_step_of_no_time_is_left_to_other_checks(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.device_limits = limits_of(1e12, 1e14)
        parts.environment = on(parts.environment, "cuda")
        parts.edit(lambda row: {"step_times_s": (0.0,) * row.num_steps}, arm="vanilla")

    told = {one.what for one in run_shares(write_fake_record(tmp_path, spoil=spoil, num_prompts=4))}
    assert "reading of vanilla" not in told and "reading of chain" in told


@pytest.mark.parametrize(("more", "reads"), [(0, True), (1, False)])
def test_a_runs_cached_weights_are_not_read_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, reads: bool
) -> None:
    assert CACHED_BYTES == {"cpu": 1_073_741_824, "cuda": 268_435_456}
    monkeypatch.setattr("harness.judge.limits.CACHED_BYTES", {"cuda": WEIGHT_BYTES + more})
    told = [one.what for one in run_shares(run_with(tmp_path, limits_of(1e12, 1e12)))]
    assert ("reading of vanilla" in told) is reads and ("reading over 1 nodes" in told) is reads
    assert "products over 1 nodes" in told
