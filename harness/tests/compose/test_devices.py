"""Curves of devices: measured ones are the record's, predicted ones the roofline's; the quoted figures are
the registry's.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from harness.compose.curve import MeasuredCurve
from harness.compose.devices import (
    PredictedCurve,
    find_curves,
    find_latency_records,
    measured_curves,
    roofline_error,
)
from harness.compose.roofline import heads_seconds, step_seconds
from harness.errors import UserError
from harness.judge.latency import prediction_of
from harness.records.latency import LatencyRecord
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.hardware import load_hardware
from harness.specs.latency import HeadsForm
from harness.specs.quoted import load_quoted
from harness.specs.shapes import load_shapes
from harness.tests.fake_latency import SHAPE, backbone_s, heads_s, step_s, write_fake_latency

HEADS = HeadsForm(num_heads=5, architecture="own")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("results")
    for number in (1, 2):
        write_fake_latency(home / "latency" / "fake" / "some-machine" / f"2024011{number}T120000Z-01234567")
    return home


@pytest.fixture(scope="module")
def record(results: Path) -> LatencyRecord:
    return find_latency_records(results)[0]


@pytest.fixture(scope="module")
def curve(record: LatencyRecord) -> MeasuredCurve:
    (found,) = measured_curves(record)
    return found


def predicted(key: str = "a100-80gb-pcie", shape: str = "vicuna-7b-v1.5", **changes: Any) -> PredictedCurve:
    options: dict[str, Any] = {"dtype": "float16", "heads": HEADS, **changes}
    return PredictedCurve(key, load_hardware()[key], load_shapes()[shape], **options)


def test_the_newest_sealed_record_of_each_machine(
    results: Path, record: LatencyRecord, tmp_path: Path
) -> None:
    assert [one.folder.name for one in find_latency_records(results)] == ["20240112T120000Z-01234567"]
    assert find_latency_records(tmp_path) == ()
    write_fake_latency(tmp_path / "latency" / "fake" / "m" / "20240119T120000Z-01234567")
    (tmp_path / "latency" / "fake" / "m" / "20240119T120000Z-01234567" / "manifest.json").unlink()
    assert find_latency_records(tmp_path) == ()
    with pytest.raises(UserError, match="no latency record 'other'"):
        find_latency_records(results, names=("other",))


def test_measured_times_are_the_records(curve: MeasuredCurve) -> None:
    assert curve.contexts == (256, 1024)
    for nodes, heads, context in ((1, 0, 256), (8, 5, 1024), (36, 5, 640)):
        body = curve.body_seconds(num_nodes=nodes, context_tokens=context, batch=1)
        own = curve.heads_seconds(num_heads=heads, batch=1)
        slack = 0.002 * (context - 256) / 768 if context == 640 else 0.0
        place = context if context != 640 else 256
        assert body is not None and own is not None
        assert body + own == pytest.approx(step_s(nodes, heads, context_tokens=place) + slack)
        assert own == pytest.approx(heads_s(heads))
    backbone = curve.backbone_seconds(num_nodes=8, context_tokens=256, batch=1)
    assert backbone == pytest.approx(backbone_s(8))


def test_beyond_what_was_measured_there_is_no_answer(curve: MeasuredCurve) -> None:
    assert curve.body_seconds(num_nodes=96, context_tokens=256, batch=1) is None
    assert curve.body_seconds(num_nodes=8, context_tokens=2048, batch=1) is None
    assert curve.body_seconds(num_nodes=8, context_tokens=256, batch=4) is None
    assert curve.heads_seconds(num_heads=6, batch=1) is None
    assert curve.backbone_seconds(num_nodes=96, context_tokens=256, batch=1) is None


def test_the_mode_is_that_of_decoding(record: LatencyRecord, curve: MeasuredCurve) -> None:
    assert curve.label.mode == "packed"  # what `auto` took
    assert (
        curve.label.device == "made-up CPU" and curve.label.shape == SHAPE and curve.label.kind == "measured"
    )
    assert curve.label.weights_sha256 == "b" * 64
    assert measured_curves(record, dtypes=("bfloat16",)) == ()
    eager = MeasuredCurve(record, dtype="float32", mode="eager")
    assert eager.label.fingerprint != curve.label.fingerprint


def test_an_altered_record_gives_no_curve(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "record")
    (record.folder / "device_limits.json").write_text("{}")
    with pytest.raises(UserError, match=r"need .*; in device_limits"):
        measured_curves(LatencyRecord.open(record.folder))
    with pytest.raises(UserError, match=r"need .*; in device_limits"):
        find_curves(str(record.folder), results=tmp_path, shape=None, dtype=None, heads=HEADS)


def test_predicted_times_are_the_rooflines() -> None:
    curve, shape, limits = (
        predicted(),
        load_shapes()["vicuna-7b-v1.5"].roofline_shape,
        load_hardware()["a100-80gb-pcie"].limits,
    )
    body = curve.body_seconds(num_nodes=64, context_tokens=1000, batch=2)
    assert body == step_seconds(shape, limits, num_nodes=64, context_tokens=1064, batch=2)
    own = curve.heads_seconds(num_heads=3, batch=2)
    assert own == heads_seconds(shape, limits, num_heads=3, architecture="own", batch=2)
    assert curve.heads_seconds(num_heads=0, batch=1) == 0.0
    assert curve.label.kind == "predicted" and curve.label.mode is None


@pytest.mark.parametrize("num_nodes", [1, 64, 256])
def test_lines_between_the_predicted_lengths_are_close(num_nodes: int) -> None:
    """Half a percent, as the curve promises, amid the widest gap between two of its lengths and amid a narrow
    one.
    """
    curve = predicted("t4", SHAPE)
    lengths = [length for length in curve.contexts if length >= 32]
    for low, high in pairwise(lengths):
        at = (low + high) // 2
        seconds = [
            curve.body_seconds(num_nodes=num_nodes, context_tokens=one, batch=1) for one in (low, at, high)
        ]
        below, amid, above = (one if one is not None else 0.0 for one in seconds)
        line = below + (above - below) * (at - low) / (high - low)
        assert line == pytest.approx(amid, rel=5e-3)


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "found"),
    [
        ("t4", SHAPE, "bfloat16", "bfloat16 on t4"),
        ("a40", SHAPE, "float32", "float32 on a40"),
        ("t4", "vicuna-13b-v1.5", "float16", "which needs 2"),
    ],
)
def test_predictions_that_cannot_be_made(key: str, shape: str, dtype: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        predicted(key, shape, dtype=dtype)


def test_a_batch_that_does_not_fit_has_no_time() -> None:
    curve = predicted("rtx-4090")
    assert curve.body_seconds(num_nodes=1, context_tokens=512, batch=1) is not None
    assert curve.body_seconds(num_nodes=1, context_tokens=4096, batch=16) is None


def test_fingerprints_follow_every_figure() -> None:
    same = {predicted().label.fingerprint for _ in range(2)}
    others = {
        predicted("a40").label.fingerprint,
        predicted(shape="vicuna-13b-v1.5").label.fingerprint,
        predicted(dtype="bfloat16").label.fingerprint,
        predicted(heads=HeadsForm(num_heads=4)).label.fingerprint,
    }
    assert len(same) == 1 and len(others) == 4 and not same & others


def test_a_device_by_any_of_its_names(results: Path) -> None:
    def kinds(name: str, **changes: Any) -> list[tuple[str, str]]:
        options: dict[str, Any] = {
            "results": results,
            "shape": SHAPE,
            "dtype": None,
            "heads": HEADS,
            **changes,
        }
        return [(curve.label.device, curve.label.kind) for curve in find_curves(name, **options)]

    assert kinds("a40") == kinds("NVIDIA A40") == [("a40", "predicted")]
    assert kinds("some-machine") == kinds("made-up CPU") == [("made-up CPU", "measured")]
    (folder,) = (results / "latency").glob("*/*/20240112*")
    assert kinds(str(folder)) == [("made-up CPU", "measured")]
    assert kinds(str(folder), shape=None) == [("made-up CPU", "measured")]
    assert kinds("a40", shape=None) == [("a40", "predicted")]
    assert kinds("a40", dtype="bfloat16") == [("a40", "predicted")]
    for name, changes, found in (
        ("abacus", {}, "device 'abacus'"),
        ("a40", {"shape": "abacus"}, "shape 'abacus'"),
        ("some-machine", {"dtype": "bfloat16"}, "dtype 'bfloat16'"),
        (str(folder), {"shape": "llama-3-8b"}, "shape 'llama-3-8b'"),
    ):
        with pytest.raises(UserError, match=found):
            kinds(name, **changes)


def test_the_error_is_that_of_the_points_that_decoding_uses(record: LatencyRecord) -> None:
    error = roofline_error([record])
    assert error is not None
    points = [point for point in record.points if point.mode == "packed"]
    made = [found for point in points if (found := prediction_of(record, point)) is not None]
    assert error.seconds.num_points == len(made)
    assert error.seconds.worst_error == pytest.approx(max(abs(one.error) for one in made))
    assert error.devices == ("made-up CPU",) and error.limits == ("measured",)
    assert error.step_cost is not None and error.step_cost.num_points == sum(
        point.num_nodes > 1 for point in points
    )
    assert roofline_error([]) is None


def test_quoted_figures_are_those_of_the_registry() -> None:
    claims = {claim.id: claim for claim in load_claims()}
    rows = load_quoted()
    assert {row.device_key for row in rows} >= {"a100-80gb-pcie", "a40", "a6000", "rtx-3090"}
    assert any(row.device and row.device.startswith("H100") for row in rows)
    for row in rows:
        known = set().union(*(_numbers(claims[claim_id]) for claim_id in row.claims))
        figures = [
            row.tokens_per_step,
            row.overhead,
            row.speedup,
            row.tokens_per_s,
            row.read_bandwidth_gb_per_s,
            row.dense_fp16_tflop_per_s,
        ]
        given = [figure for figure in figures if figure is not None]
        assert given and set(given) <= known, (row.claims, given, known)
        assert row.device_key is None or row.device_key in load_hardware()


def _numbers(claim: ClaimSpec) -> set[float]:
    value = claim.value
    if isinstance(value, dict):
        return {float(part) for part in value.values() if isinstance(part, int | float)}
    return {float(value)} if isinstance(value, int | float) else set()


def test_a_quoted_file_with_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "quoted.toml"
    path.write_text("schema_version = 1\nsurprise = 2\n")
    with pytest.raises(UserError, match="quoted"):
        load_quoted(path)
    with pytest.raises(UserError, match=r"no readable file .* need a file of quoted figures"):
        load_quoted(tmp_path / "none.toml")
