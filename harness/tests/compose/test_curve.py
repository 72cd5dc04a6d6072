"""Latency specs, records and curves: known answers, refusals, raw times kept raw, tables that say what the
record says.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from harness.compose.curve import LatencyCurve, curve_of, step_cost_of
from harness.errors import UserError
from harness.files import write_json
from harness.judge.latency import batch_points, mode_rows, prediction_of, read_share
from harness.judge.schemas import json_schemas
from harness.judge.validate.record import validate_record
from harness.paths import holds_absolute_path
from harness.records.latency import POINTS_FILE, LatencyPoint, LatencyRecord, break_even, read_points
from harness.records.probes import DeviceLimits
from harness.report.latency import latency_headline, print_latency, render_latency_report
from harness.report.readme import latency_block, shown_record, update_readme
from harness.report.tables.latency import render_timing
from harness.specs.latency import (
    LatencySpec,
    ModeName,
    PointKey,
    load_latency_spec,
    overridden,
    parse_latency_spec,
)
from harness.specs.shapes import load_shapes
from harness.specs.suite import IntervalSpec
from harness.tests.fake_latency import (
    BANDWIDTH_BYTES_PER_S,
    BATCH_SPEEDUPS,
    SHAPE,
    backbone_s,
    fake_batches,
    fake_facts,
    heads_s,
    spec_data,
    step_s,
    write_fake_latency,
)
from harness.tests.readme_blocks import shows

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted(path.parent for path in (ROOT / "results" / "latency").glob("*/*/*/manifest.json"))
PAGE = (
    "# Title\n\n<!-- begin:results -->\nold\n<!-- end:results -->\n\n<!-- begin:modes -->\nold\n"
    "<!-- end:modes -->\n\nRest.\n"
)


def spec_of(**changes: Any) -> LatencySpec:
    return parse_latency_spec(tomli_w.dumps(spec_data(**changes)), where="the test")


def point(num_nodes: int, seconds: float, **changes: Any) -> LatencyPoint:
    sizes: dict[str, Any] = {"num_heads": 0, "context_tokens": 256, "batch": 1, **changes}
    times = {"backbone_s": (seconds,), "step_s": (seconds,) if num_nodes == 1 or sizes["num_heads"] else ()}
    return LatencyPoint(dtype="float32", mode="eager", num_nodes=num_nodes, **{**times, **sizes})


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LatencyRecord:
    return write_fake_latency(tmp_path_factory.mktemp("repo") / "results" / "some-run")


def test_pure_modules_need_no_torch() -> None:
    names = (
        "harness.specs.latency",
        "harness.compose.curve",
        "harness.report.latency",
        "harness.report.readme",
        "harness.judge.validate",
    )
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' "
        "in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


def test_grids_are_united_and_every_point_comes_once() -> None:
    keys = spec_of().points("float32", ("eager", "packed"))
    assert len(set(keys)) == len(keys) == 2 * (2 * 3 + 2) + 2
    packed = [key for key in keys if key.mode == "packed"]
    at_256 = [(key.num_nodes, key.num_heads) for key in packed if (key.context_tokens, key.batch) == (256, 1)]
    assert at_256 == [(1, 0), (8, 0), (8, 1), (8, 5), (64, 5)]
    assert [key.group for key in keys] == sorted(
        (key.group for key in keys), key=lambda group: (group[1], group[3], group[2])
    )


def test_heads_are_as_many_as_a_tree_has_levels() -> None:
    grid = {"num_nodes": [1, 2, 4, 6, 9], "num_heads": [5], "context_tokens": [8]}
    assert [key.num_heads for key in spec_of(grids=[grid]).points("float32", ("eager",))] == [0, 1, 3, 5, 5]


def test_a_grid_may_be_for_one_dtype_only() -> None:
    grids = [{**spec_data()["grids"][0], "dtypes": ["float32"]}, {"num_nodes": [4], "context_tokens": [256]}]
    spec = spec_of(grids=grids, dtypes=["float32", "bfloat16"])
    assert [key.num_nodes for key in spec.points("bfloat16", ("eager",))] == [4]
    assert len(spec.points("float32", ("eager",))) == 7


@pytest.mark.parametrize("name", ["embedded", "cpu", "gpu"])
def test_shipped_specs_load_and_time_what_their_tables_read(name: str) -> None:
    spec = load_latency_spec(ROOT / "suites" / "latency" / f"{name}.toml")
    assert spec.modes_table is not None and spec.modes != "auto"
    for dtype in spec.dtypes:
        keys = spec.points(dtype, spec.modes)
        modes = {key.mode for key in keys}
        assert modes and (dtype != spec.dtypes[0] or modes == set(spec.modes))
        for mode in modes:
            timed = {
                key.num_nodes
                for key in keys
                if key.group == (dtype, mode, spec.modes_table.context_tokens, 1)
            }
            assert set(spec.modes_table.sizes) <= timed
    assert spec.shape is None or spec.shape in load_shapes()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"shape": SHAPE}, "exactly one of model, shape"),
        ({"model": {}, "shape": SHAPE}, "exactly one of asset"),
        ({"grids": []}, "grids"),
        ({"grids": [{"num_nodes": [0], "context_tokens": [8]}]}, "greater than or equal to 1"),
        ({"modes": ["fast"]}, "modes"),
        ({"memory_share": 1.5}, "memory_share"),
        (
            {
                "heads": {"num_heads": 2},
                "batch_table": {"tree": {"kind": "chain", "depth": 1}, "max_new_tokens": 4},
            },
            "needs heads.path",
        ),
        (
            {"batch_table": {"tree": {"kind": "fastest", "max_nodes": 8}, "max_new_tokens": 4}},
            "needs a calibration_trace",
        ),
        (
            {
                "batch_table": {
                    "tree": {"kind": "chain", "depth": 1},
                    "max_new_tokens": 4,
                    "batches": [2, 4],
                    "num_prompts": 6,
                }
            },
            "divide num_prompts",
        ),
        (
            {"batch_table": {"tree": {"kind": "chain", "depth": 1}, "max_new_tokens": 4, "batches": [2, 3]}},
            "must divide num_prompts",
        ),
        ({"modes_tabel": {}}, "modes_tabel"),
    ],
)
def test_faulty_specs_are_refused_by_name(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        spec_of(**changes)


def test_a_shape_has_neither_real_heads_nor_real_texts() -> None:
    plain: dict[str, Any] = {"model": None, "batch_table": None, "shape": SHAPE}
    for changes, found in (
        ({}, "random weights"),
        ({"heads": {"num_heads": 3}, "prompts": {"source": "random"}}, "ask for 5 heads"),
    ):
        with pytest.raises(UserError, match=found):
            spec_of(**plain, **changes)


def test_words_of_the_command_line_replace_sizes_of_every_grid() -> None:
    spec = overridden(spec_of(), num_nodes="1, 4", batch="3", modes="compiled", dtypes="bfloat16")
    keys = spec.points("bfloat16", ("compiled",))
    assert {key.num_nodes for key in keys} == {1, 4} and {key.batch for key in keys} == {3}
    assert spec.dtypes == ("bfloat16",) and spec.modes == ("compiled",) and spec.name == "fake"
    with pytest.raises(UserError, match="in the command line"):
        overridden(spec_of(), num_nodes="1,two")


def test_another_shape_leaves_what_belongs_to_the_old_model(tmp_path: Path) -> None:
    spec = overridden(spec_of(), shape="vicuna-13b-v1.5")
    assert (spec.shape, spec.model, spec.heads.path, spec.batch_table) == (
        "vicuna-13b-v1.5",
        None,
        None,
        None,
    )
    assert spec.prompts.source == "random" and spec.name == "fake_vicuna_13b_v1_5"
    (tmp_path / "My-Model").mkdir()
    mine = overridden(spec_of(), shape=str(tmp_path / "My-Model"))
    assert (
        mine.model is not None
        and mine.model.path == str(tmp_path / "My-Model")
        and mine.name == "fake_my_model"
    )
    assert mine.prompts.source == "mt_bench"


def test_modes_are_those_of_the_runner() -> None:
    from medusa_impl.engine.runner import Mode

    assert set(get_args(ModeName)) == set(get_args(Mode))


def test_needed_memory_is_weights_copies_cache_and_logits() -> None:
    facts = (
        fake_facts()
        .model_copy(
            update={
                "num_layers": 2,
                "hidden_size": 4,
                "num_key_value_heads": 1,
                "head_size": 3,
                "vocab_size": 10,
                "num_heads": 2,
            }
        )
        .model_copy(
            update={
                "num_parameters": 1000,
                "step_parameters": 900,
                "num_head_layers": 1,
                "head_architecture": "own",
            }
        )
    )
    heads = 2 * (4 * 4 + 4 + 4 * 10)
    key = PointKey(dtype="bfloat16", mode="eager", num_nodes=3, num_heads=2, context_tokens=7, batch=5)
    cache, logits = 2 * 2 * 1 * 3 * 5 * (7 + 3) * 2, 5 * (3 + 2) * 10
    assert facts.needed_bytes(key, packs=False) == 2 * (1000 + heads) + cache + logits * (2 + 4)
    assert facts.needed_bytes(key, packs=True) - facts.needed_bytes(key, packs=False) == 2 * (900 + heads)
    assert facts.model_copy(update={"head_architecture": "shared"}).head_parameters == 2 * (4 * 4 + 4)


def test_facts_of_a_shape_are_its_own() -> None:
    shape, facts = load_shapes()[SHAPE], fake_facts()
    assert facts.roofline_shape == shape.roofline_shape
    assert (
        facts.step_bytes("bfloat16") == shape.step_weight_bytes(2)
        and facts.num_parameters == shape.num_parameters
    )
    assert facts.cache_bytes(7, dtype="float32") == shape.cache_bytes(7, batch=1, dtype_bytes=4)


def test_curve_gives_medians_where_measured_and_lines_between(record: LatencyRecord) -> None:
    curve = curve_of(record, dtype="float32", mode="packed")
    for nodes, heads in ((1, 0), (8, 5), (64, 5), (8, 0), (20, 5), (40, 3)):
        assert curve.seconds(num_nodes=nodes, num_heads=heads, context_tokens=256) == pytest.approx(
            step_s(nodes, heads)
        )
        assert curve.backbone_seconds(num_nodes=nodes, context_tokens=256) == pytest.approx(backbone_s(nodes))
    halfway = curve.seconds(num_nodes=8, num_heads=5, context_tokens=640)
    assert halfway == pytest.approx((step_s(8, 5) + step_s(8, 5, context_tokens=1024)) / 2)
    assert curve.heads_seconds(num_heads=4) == pytest.approx(heads_s(4))
    assert curve.step_cost(num_nodes=64, context_tokens=256) == pytest.approx(backbone_s(64) / backbone_s(1))
    assert curve.largest_correction == 0


def test_curve_takes_what_incomplete_grids_can_answer(record: LatencyRecord) -> None:
    """Batch 2 has 1 and 16 nodes only, batch 1 also 8 and 64: a size is answered where its neighbours on
    either side are.
    """
    curve = curve_of(record, dtype="float32", mode="eager")
    assert curve.backbone_seconds(num_nodes=8, context_tokens=256, batch=2) == pytest.approx(
        backbone_s(8, batch=2)
    )
    with pytest.raises(UserError, match="nothing is extrapolated"):
        curve.backbone_seconds(num_nodes=64, context_tokens=256, batch=2)
    with pytest.raises(UserError, match="nothing is extrapolated"):
        curve.heads_seconds(num_heads=5, batch=2)  # batch 2 has two heads at most


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"num_nodes": 65}, "nodes 65"),
        ({"context_tokens": 255}, "context tokens 255"),
        ({"context_tokens": 1025}, "context tokens 1025"),
        ({"batch": 3}, "batch 3"),
        ({"num_heads": 6}, "heads 6"),
    ],
)
def test_curve_refuses_to_extrapolate(record: LatencyRecord, sizes: dict[str, int], found: str) -> None:
    asked = {"num_nodes": 8, "num_heads": 5, "context_tokens": 256, "batch": 1, **sizes}
    with pytest.raises(UserError, match=found):
        curve_of(record, dtype="float32", mode="packed").seconds(**asked)


def test_the_page_says_how_points_were_timed() -> None:
    older = point(1, 0.01, backbone_s=(0.01,) * 9)
    assert render_timing([]) == ""
    assert render_timing([older]) == (
        "1 point. Sizes after one context take turns, in 3 rounds. Every step comes after the same context."
    )
    told = older.model_copy(update={"times_a_round": (6, 3), "timing": "decoding"})
    words = render_timing([told, told.model_copy(update={"skipped": "no room"})])
    assert words.startswith(
        "1 point. Sizes after one context take turns, in 2 rounds. One node is timed before"
    )
    assert "over a growing text" in words and "the same context" not in words
    assert "in 2 to 3 rounds. A visit's" in render_timing([told, older])


def test_curve_of_nothing_is_refused(record: LatencyRecord) -> None:
    with pytest.raises(UserError, match="no measured point"):
        curve_of(record, dtype="float16", mode="packed")


def test_more_nodes_are_never_cheaper_on_the_curve_and_stay_raw_in_the_record(tmp_path: Path) -> None:
    """16 nodes measured slower than 32 become their mean on the curve; the files keep what the clock said."""
    noisy = [point(1, 1.0), point(16, 4.0), point(32, 2.0), point(64, 5.0)]
    curve = LatencyCurve(noisy)
    assert [curve.backbone_seconds(num_nodes=nodes, context_tokens=256) for nodes in (1, 16, 32, 64)] == [
        1,
        3,
        3,
        5,
    ]
    assert curve.backbone_seconds(num_nodes=48, context_tokens=256) == 4
    assert curve.largest_correction == 0.5
    path = tmp_path / POINTS_FILE
    path.write_text("".join(made.model_dump_json() + "\n" for made in noisy))
    assert read_points(path) == tuple(noisy) and [made.backbone_s for made in read_points(path)] == [
        (1,),
        (4,),
        (2,),
        (5,),
    ]
    assert step_cost_of(noisy, num_nodes=16, like=noisy[0]) == 4.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(min_value=1e-6, max_value=1.0), min_size=2, max_size=8))
def test_curve_is_monotone_and_keeps_the_mean(times: list[float]) -> None:
    curve = LatencyCurve([point(2**number, seconds) for number, seconds in enumerate(times)])
    smooth = [curve.backbone_seconds(num_nodes=2**number, context_tokens=256) for number in range(len(times))]
    assert all(later >= earlier for earlier, later in itertools.pairwise(smooth))
    assert math.fsum(smooth) == pytest.approx(math.fsum(times))


def test_skipped_points_are_no_data(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "run", skipped={64: "ran out of memory: made up"})
    assert validate_record(record.folder) == ()
    with pytest.raises(UserError, match="nodes 20"):
        curve_of(record, dtype="float32", mode="packed").seconds(
            num_nodes=20, num_heads=5, context_tokens=256
        )
    text = render_latency_report(record)
    assert text.count("ran out of memory: made up") == 4 and "## Skipped" in text
    assert latency_headline(record)["num_skipped"] == 4


def test_a_device_faster_than_its_limit_is_told(tmp_path: Path) -> None:
    """An H200 took 33.7 ms for a step that its own limits put at 78.5, and no page said so."""
    record = write_fake_latency(tmp_path / "run")
    read_s = fake_facts().step_bytes("float32") / BANDWIDTH_BYTES_PER_S
    assert read_s > backbone_s(1)  # so the made-up limits are too low
    curves = [one for one in render_latency_report(record).split("\n## ") if one.startswith("Step times:")]
    assert len(curves) == 2 and all("**Limits under-measured**" in one for one in curves)
    limits = DeviceLimits(
        read_bandwidth_bytes_per_s=1e12,
        matmul_flop_per_s=1e14,
        row_product_bytes_per_s=1e12,
        method="made up",
    )
    for name in ("device_limits.json", "device_limits_bfloat16.json"):
        write_json(record.folder / name, limits)
    assert "under-measured" not in render_latency_report(LatencyRecord(record.folder))


def test_table_of_modes_has_known_answers(record: LatencyRecord) -> None:
    rows = {row.mode: row for row in mode_rows(record)}
    assert list(rows) == ["hf_generate", "eager", "packed"]
    for mode, rate in (("hf_generate", 10.0), ("eager", 12.0), ("packed", 20.0)):
        assert rows[mode].tokens_per_s.estimate == pytest.approx(rate)
        assert rows[mode].over_stock.estimate == pytest.approx(rate / 10)
        share = fake_facts().step_bytes("float32") * rate / BANDWIDTH_BYTES_PER_S
        assert rows[mode].bandwidth_share == pytest.approx(share)
    assert [rows[mode].is_auto for mode in rows] == [False, False, True]
    assert rows["packed"].step_costs == (1.0, backbone_s(8) / backbone_s(1), None)  # 32 nodes were not timed
    assert (rows["eager"].num_same_text, rows["packed"].num_same_text, rows["packed"].num_prompts) == (
        2,
        3,
        3,
    )


def test_speed_against_batch_has_known_answers() -> None:
    points = batch_points(fake_batches(), spec=IntervalSpec())
    assert [made.batch for made in points] == [1, 2, 4, 8]
    for made in points:
        assert made.vanilla_tokens_per_s == pytest.approx(made.batch)
        assert made.speedup.estimate == pytest.approx(BATCH_SPEEDUPS[made.batch])
        assert made.tokens_per_step == pytest.approx(2.5)
        assert made.speedup.num_prompts == 8 // made.batch  # groups are what is resampled
    assert points[0].speedup.low == pytest.approx(1.5) == points[0].speedup.high  # all groups are alike
    # one group bounds nothing
    assert (points[3].speedup.low, points[3].speedup.high) == (
        -math.inf,
        math.inf,
    )


def test_rounds_of_a_group_are_one_draw_and_groups_that_differ_widen_the_interval() -> None:
    (slow, *_, fast) = (trial for trial in fake_batches({1: 1.0}).trials if trial.method == "medusa")
    trials = [trial for trial in fake_batches({1: 1.0}).trials if trial not in (slow, fast)]
    trials += [slow.model_copy(update={"decode_s": 10.0}), fast.model_copy(update={"decode_s": 2.5})]
    twice = [trial.model_copy(update={"round": number}) for number in range(2) for trial in trials]
    both = (fake_batches().model_copy(update={"trials": tuple(some)}) for some in (trials, twice))
    once, again = (batch_points(batches, spec=IntervalSpec())[0] for batches in both)
    assert once.speedup.low < once.speedup.estimate < once.speedup.high
    assert again.speedup == once.speedup


@pytest.mark.parametrize(
    ("speedups", "largest", "crossing", "words"),
    [
        ({1: 1.5, 2: 1.25, 4: 0.75, 8: 0.5}, 2, 2**1.5, "batch 2, crossing 1 at about 2.8"),
        ({1: 0.9, 2: 0.8}, None, None, "none: no speedup at any measured batch (1, 2)"),
        ({1: 1.5, 8: 1.01}, 8, None, "beyond the largest measured batch, 8"),
        ({1: 1.2, 2: 0.9, 4: 1.1, 8: 0.6}, 4, 4 * 2**0.2, "batch 4, crossing 1 at about 4.6"),
        ({1: 1.5, 4: 1.0}, 1, 4.0, "batch 1, crossing 1 at about 4.0"),
    ],
)
def test_break_even_has_known_answers(
    speedups: dict[int, float], largest: int | None, crossing: float | None, words: str
) -> None:
    found = break_even(speedups)
    assert found.largest_batch == largest and found.words == words
    assert found.crossing == (None if crossing is None else pytest.approx(crossing))


def test_report_shows_the_figures_and_no_place(record: LatencyRecord) -> None:
    text = render_latency_report(record)
    for figure in (
        "| 18.0 ",
        f"{backbone_s(64) / backbone_s(1):.2f}",
        "crossing 1 at about 3.2",
        "`packed` *",
        "20.0 [20.0, 20.0]",
        "2 of 3",
    ):
        assert figure in text, figure
    assert "off by" in text and "moves no value" in text and not holds_absolute_path(text)
    assert str(record.folder.parent) not in text


def test_prediction_and_read_share_are_this_runs(record: LatencyRecord) -> None:
    one = next(made for made in record.points if made.num_nodes == 1 and made.context_tokens == 1024)
    facts = fake_facts()
    least_s = (facts.step_bytes("float32") + facts.cache_bytes(1024, dtype="float32")) / BANDWIDTH_BYTES_PER_S
    assert read_share(record, one) == pytest.approx(least_s / median(one.backbone_s))
    made = prediction_of(record, one)
    assert made is not None and made.measured_s == median(one.backbone_s)
    # activations and scores are all that the roofline adds at one node
    assert made.predicted_s == pytest.approx(least_s, rel=0.02)


def test_headline_is_one_json_object(record: LatencyRecord) -> None:
    shown = json.loads(json.dumps(latency_headline(record, base=record.folder.parent), allow_nan=False))
    assert shown["record"] == "some-run" and shown["num_points"] == 18 and shown["num_skipped"] == 0
    assert shown["step_cost"]["float32 packed"]["64"] == round(backbone_s(64) / backbone_s(1), 4)
    assert [row["mode"] for row in shown["modes"] if row["auto"]] == ["packed"]
    assert shown["speedup_by_batch"] == {str(batch): speedup for batch, speedup in BATCH_SPEEDUPS.items()}


def test_terminal_shows_every_context_and_batch(record: LatencyRecord) -> None:
    out = StringIO()
    print_latency(Console(file=out, width=200), record)
    rows = [line for line in out.getvalue().splitlines() if "float32 │" in line]
    assert len(rows) == 6 and "8: 1.09" in rows[0]
    assert "float32 packed (auto): 20.0" in out.getvalue()


def test_readme_shows_the_modes_until_a_figure_is_typed_by_hand(record: LatencyRecord) -> None:
    readme = record.folder.parent.parent / "README.md"
    readme.write_text(PAGE)
    assert not shows(readme, latency_block(record))
    update_readme(readme, latency_block(record))
    assert shows(readme, latency_block(record))
    text = readme.read_text()
    assert text.startswith(PAGE.split("<!-- begin:modes -->")[0]) and text.endswith(
        "<!-- end:modes -->\n\nRest.\n"
    )
    assert "(results/some-run/report.md)" in text and "20.0 [20.0, 20.0]" in text
    readme.write_text(text.replace("20.0 [", "25.0 ["))
    assert not shows(readme, latency_block(record))


def test_readme_takes_no_altered_record_and_none_without_modes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    record = write_fake_latency(tmp_path / "run")
    (record.folder / "modes.json").write_text("{}")
    with pytest.raises(UserError, match="found SHA-256"):
        update_readme(readme, latency_block(record))
    with pytest.raises(UserError, match="no table of modes"):
        latency_block(write_fake_latency(tmp_path / "bare", modes_table=None))
    readme.write_text("# Title\n")
    with pytest.raises(UserError, match=r"in README\.md"):
        update_readme(readme, latency_block(write_fake_latency(tmp_path / "other")))
    assert readme.read_text() == "# Title\n"


def test_record_is_valid_and_each_fault_is_named(tmp_path: Path) -> None:
    folder = write_fake_latency(tmp_path / "run").folder
    assert validate_record(folder) == ()
    lines = (folder / POINTS_FILE).read_text().splitlines(keepends=True)

    def faults(text: str) -> str:
        (folder / POINTS_FILE).write_text(text)
        return "\n".join(validate_record(folder))

    assert "SHA-256" in faults("".join(lines[1:])) and "as many as in manifest.json" in faults(
        "".join(lines[1:])
    )
    assert "a point twice" in faults("".join([*lines, lines[0]]))
    both = json.dumps({**json.loads(lines[0]), "skipped": "why"}) + "\n"
    assert "times and a reason to skip" in faults("".join([both, *lines[1:]]))
    assert "a truncated last line" in faults("".join(lines)[:-1])
    assert faults("".join(lines)) == ""
    (folder / "manifest.json").unlink()
    assert "no manifest.json" in faults("".join(lines))


def test_schemas_know_every_key_that_a_record_writes(tmp_path: Path) -> None:
    folder, schemas = write_fake_latency(tmp_path / "run").folder, json_schemas()
    for file, name in (
        ("model.json", "model"),
        ("modes.json", "modes"),
        ("batches.json", "batches"),
        ("manifest.json", "manifest"),
    ):
        assert set(json.loads((folder / file).read_text())) == set(schemas[f"latency_{name}"]["properties"])
    first = json.loads((folder / POINTS_FILE).read_text().splitlines()[0])
    assert set(first) <= set(schemas["latency_point"]["properties"]) and "latency_spec" in schemas


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_records_are_sealed_and_sound(folder: Path) -> None:
    assert validate_record(folder) == ()


@pytest.mark.skipif(not COMMITTED, reason="no latency record is committed yet")
def test_readme_shows_what_its_latency_record_gives() -> None:
    readme = ROOT / "results" / "README.md"
    assert shows(readme, latency_block(LatencyRecord(shown_record(readme, "modes"))))
