"""In what two records were made differently, each thing under its name and group."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.history.provenance import Difference, differences, origin_of, settings_of
from harness.judge.history.texts import differing_inputs
from harness.records.opened import open_record
from harness.records.provenance import TunedOrigin
from harness.records.run import RunRecord
from harness.tests.fake_latency import write_fake_latency
from harness.tests.fake_record import FakeParts, write_fake_record

FIXTURES = Path(__file__).resolve().parents[2] / "records" / "fixtures" / "v1"


def write(folder: Path, **changes: object) -> RunRecord:
    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(update=changes)

    return write_fake_record(folder, spoil=spoil, rounds=1, num_prompts=8)


def test_each_difference_has_its_group_and_both_values(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    device = a.environment.device.model_copy(update={"num_threads": 1, "details": {"model": "17"}})
    b = write(
        tmp_path / "b",
        commit=None,
        dirty=None,
        packages={"torch": "2.14.0", "transformers": "5.23.0", "numpy": "2.4.6"},
        device=device,
        variables={},
        engine="packed",
        heads_sha256="e" * 64,
        started_utc="2024-01-19T11:55:00Z",
    )
    found = {one.name: one for one in differences(a, b)}
    assert found == {
        "commit": Difference("code", "commit", a.environment.commit, None),
        "dirty": Difference("code", "dirty", "False", None),
        "packages.torch": Difference("code", "packages.torch", "2.13.0", "2.14.0"),
        "packages.numpy": Difference("code", "packages.numpy", None, "2.4.6"),
        "device.num_threads": Difference("machine", "device.num_threads", "2", "1"),
        "device.details.model": Difference("machine", "device.details.model", None, "17"),
        "variables.OMP_NUM_THREADS": Difference("machine", "variables.OMP_NUM_THREADS", "2", None),
        "engine": Difference("model", "engine", "eager", "packed"),
        "heads_sha256": Difference("model", "heads_sha256", "c" * 64, "e" * 64),
    }
    groups = [one.group for one in differences(a, b)]
    assert groups == sorted(groups, key=("code", "machine", "model", "settings", "trees").index)


def test_settings_trees_and_bandwidths_are_named(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.suite_text = parts.suite_text.replace("depth = 5", "depth = 4").replace(
            "rounds = 1", "rounds = 2"
        )
        parts.trees["chain"] = parts.trees["cartesian"]
        limits = parts.device_limits
        assert limits is not None
        parts.device_limits = limits.model_copy(update={"read_bandwidth_bytes_per_s": 50e9})

    a = write(tmp_path / "a")
    b = write_fake_record(tmp_path / "b", spoil=spoil, rounds=1, num_prompts=8)
    found = {one.name: (one.group, one.a, one.b) for one in differences(a, b)}
    assert found["rounds"] == ("settings", "1", "2")
    assert found["arms.chain.tree.depth"] == ("settings", "5", "4")
    assert found["measured read bandwidth"] == ("machine", "33.8 GB/s", "50 GB/s")
    assert found["tree of chain"][0] == "trees" and found["tree of chain"][1] == (
        f"{a.trees['chain'].tree().fingerprint}, 6 nodes"
    )
    assert len(found) == 4
    assert differences(a, a) == ()


def test_records_of_every_kind_say_where_they_come_from(tmp_path: Path) -> None:
    for kind in ("suite", "latency", "sweep", "ablation", "gpu", "gate"):
        record = open_record(FIXTURES / kind)
        assert differences(record, record) == ()
        assert origin_of(record).started_utc and settings_of(record).model_dump()
    latency = write_fake_latency(tmp_path / "l")
    assert origin_of(latency).commit == latency.environment.commit


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        (40e9, 40.3e9, None),
        (40e9, 40.5e9, ("40 GB/s", "40.5 GB/s")),
        (40.5e9, 40e9, ("40.5 GB/s", "40 GB/s")),
        (40e9, None, ("40 GB/s", None)),
        (None, 40e9, (None, "40 GB/s")),
        (None, None, None),
    ],
)
def test_bandwidths_are_told_where_they_differ_by_more_than_their_noise(
    tmp_path: Path, mine: float | None, theirs: float | None, told: tuple[str | None, str | None] | None
) -> None:
    def write_with(name: str, rate: float | None) -> RunRecord:
        def spoil(parts: FakeParts) -> None:
            limits = parts.device_limits
            assert limits is not None
            changed = {"read_bandwidth_bytes_per_s": rate}
            parts.device_limits = None if rate is None else limits.model_copy(update=changed)

        return write_fake_record(tmp_path / name, spoil=spoil, rounds=1, num_prompts=8)

    found = differences(write_with("a", mine), write_with("b", theirs))
    assert [(one.a, one.b) for one in found] == ([] if told is None else [told])


def test_a_table_that_one_side_lacks_is_one_name(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.suite_text += "\n[disturbance]\nmax_repeats = 1\n"

    a, b = write(tmp_path / "a"), write_fake_record(tmp_path / "b", spoil=spoil, rounds=1, num_prompts=8)
    for one, other in ((a, b), (b, a)):
        assert [found.name for found in differences(one, other)] == ["disturbance"]


def test_an_arm_on_the_original_minds_no_tuned_backbone(tmp_path: Path) -> None:
    def tuned(digit: str) -> TunedOrigin:
        digest = digit * 64
        return TunedOrigin(
            backbone_sha256=digest,
            adapter_sha256=digest,
            heads_sha256=digest,
            weight_bytes=1,
            packed_bytes=0,
            heads_bytes=1,
        )

    a, b = (write(tmp_path / digit, tuned=tuned(digit)) for digit in "ab")
    assert differing_inputs(a, b, "chain") == () == differing_inputs(a, b, "vanilla")
