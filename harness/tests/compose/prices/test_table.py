"""The table of devices: measured curves as they are, predictions with bands, and what a wide band hides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.compose.devices import PredictedCurve
from harness.compose.plan import model_inputs
from harness.compose.prices.fitted import step_models
from harness.compose.prices.measured import (
    curve_of_run,
    curves_of_latency,
    limits_of,
    newest_runs,
    older_curves,
    timed_curves,
)
from harness.compose.prices.table import (
    PAPER_HEADS,
    PAPER_SHAPES,
    Banded,
    at_least_one,
    banded,
    divided,
    measured_rows,
    predicted_rows,
    tells,
)
from harness.records.latency import LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.step_model import ErrorBand
from harness.records.store import hashes
from harness.specs.hardware import load_hardware
from harness.specs.latency import HeadsForm
from harness.specs.shapes import load_shapes
from harness.tests.compose.prices.planted import PLANTED, curve, known_error
from harness.tests.fake_latency import (
    BANDWIDTH_BYTES_PER_S,
    SHAPE,
    backbone_s,
    heads_s,
    step_s,
    write_fake_latency,
)

RESULTS = Path(__file__).resolve().parents[4] / "results"
MEASURED = DeviceLimits(read_bandwidth_bytes_per_s=3e12, matmul_flop_per_s=5e13, method="made up")


@pytest.mark.parametrize(
    ("low", "high", "is_told"),
    [
        (1.1, 2.0, True),
        (0.5, 0.9, True),
        (0.9, 1.1, False),
        (1.0, 2.0, False),
        (0.5, 1.0, False),
        (None, None, False),
    ],
)
def test_a_speedup_is_told_on_one_side_of_1(low: float | None, high: float | None, is_told: bool) -> None:
    assert tells(Banded(1.05, low=low, high=high)) is is_told


def test_bands_are_multiples_of_the_prediction() -> None:
    assert banded(10.0, ErrorBand(low=0.5, high=3.0)) == Banded(10.0, low=5.0, high=30.0)
    assert banded(10.0, None) == Banded(10.0)
    assert divided(3.0, Banded(1.5, low=1.0, high=2.0)) == Banded(2.0, low=1.5, high=3.0)
    assert divided(3.0, Banded(1.5, low=0.0, high=2.0)) == divided(3.0, Banded(1.5)) == Banded(2.0)
    assert at_least_one(Banded(1.2, low=0.8, high=2.0)) == Banded(1.2, low=1.0, high=2.0)
    assert at_least_one(Banded(1.2)) == Banded(1.2)


def test_predictions_carry_the_models_error() -> None:
    rows = predicted_rows(known_error(seconds=(0.8, 1.5), overhead=(0.9, 1.4)))
    (one,) = [row for row in rows if (row.device, row.shape) == ("a100-80gb-pcie", "vicuna-7b-v1.5")]
    device = PredictedCurve(
        one.device,
        load_hardware()[one.device],
        load_shapes()[one.shape],
        dtype="float16",
        heads=PAPER_HEADS,
        model=known_error(seconds=(0.8, 1.5), overhead=None),
    )
    at = {"context_tokens": 1024, "batch": 1}
    vanilla_s, tree_s = (device.body_seconds(num_nodes=size, **at) for size in (1, 64))
    own_s = device.heads_seconds(num_heads=5, batch=1)
    assert vanilla_s is not None and tree_s is not None and own_s is not None
    assert one.vanilla_s == Banded(vanilla_s, low=0.8 * vanilla_s, high=1.5 * vanilla_s)
    overhead = (tree_s + own_s) / vanilla_s
    assert one.overhead.value == pytest.approx(overhead) and one.overhead.high == pytest.approx(
        1.4 * overhead
    )
    assert one.tokens_per_step == 3.47  # Table 1, Vicuna-7B
    assert one.is_shown and one.speedup.value == pytest.approx(3.47 / overhead)
    assert one.speedup.low == pytest.approx(3.47 / (1.4 * overhead))
    step_s = tree_s + own_s
    assert one.tokens_per_s.value == pytest.approx(3.47 / step_s)
    assert (one.tokens_per_s.low, one.tokens_per_s.high) == pytest.approx(
        (3.47 / step_s / 1.5, 3.47 / step_s / 0.8)
    )


def test_a_wide_band_hides_the_speed() -> None:
    assert all(row.is_shown for row in predicted_rows(known_error(seconds=(0.8, 1.5), overhead=(0.9, 1.1))))
    assert not any(
        row.is_shown for row in predicted_rows(known_error(seconds=(0.8, 1.5), overhead=(0.9, 9.0)))
    )
    assert not any(row.is_shown for row in predicted_rows(known_error(seconds=(0.8, 1.5), overhead=None)))
    unknown = known_error(seconds=(0.8, 1.5), overhead=None).model_copy(update={"left_out": ()})
    rows = predicted_rows(unknown)
    assert rows and not any(row.is_shown for row in rows)
    assert rows[0].tokens_per_s.low is None


def test_every_paper_model_stands_on_every_device_that_holds_it() -> None:
    rows = predicted_rows(known_error(seconds=(0.8, 1.5), overhead=(0.9, 1.1)))
    assert {row.shape for row in rows} == set(PAPER_SHAPES)
    devices = {shape: {row.device for row in rows if row.shape == shape} for shape in PAPER_SHAPES}
    assert devices["vicuna-33b-v1.3"] < devices["vicuna-13b-v1.5"] < devices["vicuna-7b-v1.5"]
    assert "t4" not in devices["vicuna-7b-v1.5"]  # 16 GB
    measured = [curve("vicuna-7b-v1.5", device="l4"), curve("vicuna-13b-v1.5", device="a40", dtype="float32")]
    fewer = predicted_rows(known_error(seconds=(0.8, 1.5), overhead=(0.9, 1.1)), measured=measured)
    assert {(row.device, row.shape) for row in rows} - {(row.device, row.shape) for row in fewer} == {
        ("l4", "vicuna-7b-v1.5")
    }


def test_measured_rows_are_the_curves_own() -> None:
    gpu, cpu = curve("vicuna-7b-v1.5"), curve(SHAPE, kind="cpu", device="some CPU")
    older = curve("vicuna-7b-v1.5", slower=2.0)
    rows = measured_rows([cpu, gpu], older=[older])
    assert [(row.curve.kind, row.is_older) for row in rows] == [
        ("cuda", False),
        ("cuda", True),
        ("cpu", False),
    ]
    times = gpu.times(PLANTED)
    vanilla_s = times.step_seconds(num_nodes=1, num_heads=0, context_tokens=128)
    assert rows[0].context_tokens == 128  # nearer to 1,024 than 4,096 is
    assert rows[0].vanilla_s == pytest.approx(vanilla_s) and rows[1].vanilla_s == pytest.approx(2 * vanilla_s)
    tree_s = times.step_seconds(num_nodes=64, num_heads=5, context_tokens=128)
    assert rows[0].overheads[64] == pytest.approx(tree_s / vanilla_s)
    assert set(rows[0].overheads) == {16, 64}


def test_a_curve_without_a_whole_vanilla_step_has_no_row() -> None:
    made = curve("vicuna-7b-v1.5")
    bare = replace(made, steps=tuple(replace(step, step_s=None) for step in made.steps))
    assert measured_rows([bare]) == []


def test_a_latency_record_as_a_curve(tmp_path: Path) -> None:
    write_fake_latency(tmp_path / "latency" / "fake" / "m" / "20240112T120000Z-01234567")
    (found,) = timed_curves(tmp_path)
    assert (found.device, found.shape, found.dtype, found.mode) == ("made-up CPU", SHAPE, "float32", "packed")
    assert found.limits.bytes_per_s == BANDWIDTH_BYTES_PER_S
    (step,) = [one for one in found.steps if (one.num_nodes, one.context_tokens) == (64, 1024)]
    assert step.backbone_s == pytest.approx(backbone_s(64, context_tokens=1024))
    assert step.heads_s == pytest.approx(heads_s(5))
    assert step.step_s == pytest.approx(step_s(64, 5, context_tokens=1024))


def test_older_records_are_shown_and_not_fitted(tmp_path: Path) -> None:
    for number, spec in ((1, "fake"), (3, "fake"), (2, "later")):
        write_fake_latency(tmp_path / "latency" / spec / "m" / f"2024011{number}T120000Z-01234567")
    assert [one.source for one in timed_curves(tmp_path)] == ["20240113T120000Z-01234567"]
    older = [one.source for one in older_curves(tmp_path)]
    assert older == ["20240111T120000Z-01234567", "20240112T120000Z-01234567"]


def test_limits_are_the_sheets_where_there_is_one() -> None:
    sheet = load_hardware()["h200-sxm"].limits
    assert limits_of("h200-sxm", "bfloat16", measured=MEASURED) == sheet
    other = limits_of("h200-sxm", "float32", measured=MEASURED)
    assert other is not None and (other.bytes_per_s, other.flop_per_s) == (sheet.bytes_per_s, 5e13)
    unknown = limits_of("some CPU", "float32", measured=MEASURED)
    assert unknown is not None and (unknown.bytes_per_s, unknown.flop_per_s) == (3e12, 5e13)
    assert limits_of("some CPU", "float32", measured=None) is None


def test_a_run_stands_in_where_no_latency_record_timed_its_model() -> None:
    """The committed H200 has a latency record of the 7B shape, and a run of the embedded model."""
    curves = timed_curves(RESULTS)
    (run,) = [one for one in curves if (one.device, one.shape) == ("h200-sxm", SHAPE)]
    assert run.source in {record.folder.name for record in newest_runs(RESULTS)}
    assert run.heads == HeadsForm(num_heads=5, num_layers=1, architecture="shared")
    assert any(step.step_s and step.num_nodes == 1 for step in run.steps)


def test_a_run_of_another_machine_of_one_name_has_a_curve_of_its_own() -> None:
    """The step of 42 ms once stood for a machine that takes 18: its run counted as one of the other."""
    of_name = [one for one in timed_curves(RESULTS) if (one.device, one.shape) == ("AMD EPYC", SHAPE)]
    whole = {one.which_machine: one for one in of_name if one.dtype == "float32"}
    assert set(whole) == {"reads 34.3 GB/s", "reads 77.1 GB/s"}
    assert whole["reads 77.1 GB/s"].source == "20261125T202908Z-e4ce6458"
    vanilla_s = {row.curve.which_machine: row.vanilla_s for row in measured_rows(whole.values())}
    assert vanilla_s["reads 34.3 GB/s"] > 2 * vanilla_s["reads 77.1 GB/s"]
    assert whole["reads 77.1 GB/s"].name == f"AMD EPYC (reads 77.1 GB/s), {SHAPE}, float32, packed"
    assert [one.which_machine for one in of_name if one.dtype == "bfloat16"] == [""]
    assert all(
        not one.which_machine
        for one in (*timed_curves(RESULTS), *older_curves(RESULTS))
        if one.kind == "cuda"
    )
    # of two runs that one folder of older records holds, each is the newest of its machine
    assert [one.folder.name[:8] for one in newest_runs(RESULTS) if one.folder.parts[-3] == "embedded"] == [
        "20261123",
        "20261125",
        "20261127",
    ]


def with_machine(folder: Path, *, gb_per_s: float, **details: str) -> None:
    """Write a latency record of a machine that says this of itself and reads at so many GB/s."""
    write_fake_latency(folder)
    environment = json.loads((folder / "environment.json").read_text())
    environment["device"]["details"] = details
    limits = json.loads((folder / "device_limits.json").read_text())
    limits["read_bandwidth_bytes_per_s"] = 1e9 * gb_per_s
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "device_limits.json").write_text(json.dumps(limits))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": hashes(folder)}))


def test_a_newer_record_follows_one_of_the_same_machine_alone(tmp_path: Path) -> None:
    home = tmp_path / "latency" / "fake"
    told = {"family": "25", "model": "17", "stepping": "1"}
    with_machine(home / "m" / "20240111T120000Z-00000001", gb_per_s=34)
    with_machine(home / "m" / "20240112T120000Z-00000002", gb_per_s=40)
    with_machine(home / "m" / "20240113T120000Z-00000003", gb_per_s=77)
    with_machine(home / "n" / "20240114T120000Z-00000004", gb_per_s=77, **told)
    with_machine(home / "o" / "20240115T120000Z-00000005", gb_per_s=77, **(told | {"stepping": "2"}))
    newest = {one.source[-1]: one.which_machine for one in timed_curves(tmp_path)}
    older = {one.source[-1]: one.which_machine for one in older_curves(tmp_path)}
    assert set(newest) == {"2", "4", "5"} and set(older) == {
        "1",
        "3",
    }  # 3 may be 4 or 5: its bandwidth is theirs
    assert newest["2"] == "reads 40.0 GB/s" and older == {"1": "reads 34.0 GB/s", "3": "reads 77.0 GB/s"}
    assert newest["4"].startswith("cpu-made-up-f25m17s1-2c-") and newest["5"].startswith(
        "cpu-made-up-f25m17s2-2c-"
    )


def test_a_run_of_no_published_shape_gives_no_curve(tmp_path: Path) -> None:
    (record,) = [one for one in newest_runs(RESULTS) if "cuda" in one.folder.parent.name]
    assert curve_of_run(record) is not None
    record.environment.__dict__["model_name"] = "somebody's model"
    assert curve_of_run(record) is None


def test_costs_without_a_model_are_the_rooflines() -> None:
    """So a sweep without measured curves is priced as before, and its predictions tell nothing."""
    plain = PredictedCurve(
        "a40", load_hardware()["a40"], load_shapes()[SHAPE], dtype="float16", heads=HeadsForm()
    )
    assert plain.model is None and plain.label.source == "roofline on hardware.toml"


def test_a_fitted_curve_is_slower_than_the_roofline_and_has_its_own_name() -> None:
    made: dict[str, Any] = {"dtype": "float16", "heads": HeadsForm()}
    plain = PredictedCurve("a40", load_hardware()["a40"], load_shapes()[SHAPE], **made)
    fitted = PredictedCurve(
        "a40",
        load_hardware()["a40"],
        load_shapes()[SHAPE],
        **made,
        model=known_error(seconds=(1, 1), overhead=(1, 1)),
    )
    for size in (1, 64):
        at = {"num_nodes": size, "context_tokens": 512, "batch": 2}
        slow, fast = fitted.body_seconds(**at), plain.body_seconds(**at)
        assert slow is not None and fast is not None and slow > fast
        backbone_only_s = fitted.backbone_seconds(**at)
        own_s = PLANTED.vanilla_own_s if size == 1 else PLANTED.tree_own_s
        assert backbone_only_s is not None and slow == pytest.approx(backbone_only_s + own_s)
    assert plain.heads_seconds(num_heads=3, batch=1) != fitted.heads_seconds(num_heads=3, batch=1)
    assert plain.label.fingerprint != fitted.label.fingerprint and "step model of 2" in fitted.label.source
    assert fitted.body_seconds(num_nodes=1, context_tokens=8000, batch=4096) is None


def test_curves_of_a_record_name_their_source(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "latency" / "fake" / "m" / "20240112T120000Z-01234567")
    (found,) = curves_of_latency(LatencyRecord.open(record.folder))
    assert found.name == f"made-up CPU, {SHAPE}, float32, packed"


def test_records_of_a_fit_are_inputs_of_the_sweep() -> None:
    """So that a sweep which goes on from other records than its predictions were made from is refused."""
    model = step_models(timed_curves(RESULTS))["cuda"]
    inputs = model_inputs(model, RESULTS)
    assert {name.rsplit(" ", 1)[-1] for name in inputs} == set(model.sources)
    assert {name.split(" ")[0] for name in inputs} == {"run", "latency"}
    assert all(path.is_file() and path.name == "manifest.json" for path in inputs.values())
