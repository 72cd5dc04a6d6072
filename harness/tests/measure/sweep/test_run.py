"""Sweeps that run the tiny model: what is decoded against what is replayed, kills and resumes, cells that
fail alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from pytest import MonkeyPatch

import harness.device.locks
import harness.device.machine
import harness.measure.sweep.cells
import harness.measure.sweep.run
import harness.report.figures.sweep
from harness.compose.devices import find_latency_records
from harness.compose.plan import gather_curves, plan_sweep
from harness.device.arms import ArmRunner, TimedGeneration
from harness.device.engine import Engine, LoadedModel
from harness.device.machine import device_info, git_state
from harness.errors import ExitCode, UserError
from harness.files import file_sha256, write_json
from harness.judge.schemas import json_schemas
from harness.judge.sweep import decoded_check, decoded_checks
from harness.judge.validate.record import validate_record
from harness.measure.sweep.cells import CellRunner
from harness.measure.sweep.decoded import step_difference
from harness.measure.sweep.run import SweepOptions, cell_inputs, own_curve, plan_runs, run_sweep
from harness.measure.sweep.sampled import arm_of
from harness.measure.sweep.tasks import DecodedTask
from harness.measure.trace import trace_suite
from harness.records.latency import LatencyRecord
from harness.records.machines.comparable import MeasuredMachine
from harness.records.machines.identity import machine_slug
from harness.records.provenance import Environment
from harness.records.store import Store
from harness.records.sweep import CELLS_FILE, SweepRecord
from harness.records.sweep_cells import AnyCell, FailedCell
from harness.records.trace import Trace
from harness.specs.suite import parse_suite
from harness.specs.sweep import SampledSetting, SweepSpec, parse_sweep
from harness.stats import FigureKind
from harness.tests.fake_latency import BANDWIDTH_BYTES_PER_S, write_fake_latency
from harness.tests.fake_sweep import sweep_data
from harness.tests.tiny_suite import QUIET, command, micro_data, write_suite
from medusa_impl.tree import DraftTree

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def quick_and_steady() -> Iterator[None]:
    """One state of the checkout for all sweeps, no pause for other processes between two blocks, and a
    CPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.device.machine, "git_state", cache(git_state))
        patch.setattr(harness.device.locks, "_YIELD_S", 0.0)
        for module in (harness.measure.sweep.run, harness.measure.sweep.cells):
            patch.setattr(module, "best_device", lambda: CPU)
        yield


def measured_here(folder: Path, *, model: str, sha256: str) -> None:
    """The made-up latency record, as if it were of this machine and of that model."""
    record = write_fake_latency(folder, levels=(0.9, 1.0, 1.1))
    here = device_info(CPU)
    environment = record.environment.model_copy(update={"device": here, "backbone_sha256": sha256})
    write_json(folder / "environment.json", Environment.model_validate(environment.model_dump()))
    write_json(folder / "model.json", record.facts.model_copy(update={"name": model}))
    manifest = record.manifest
    assert manifest is not None
    changed = {name: file_sha256(folder / name) for name in manifest.sha256}
    write_json(folder / "manifest.json", manifest.model_copy(update={"sha256": changed}))


@pytest.fixture(scope="module")
def home(
    tiny: tuple[LoadedModel, Engine], heads_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a suite of the tiny model, its trace, and a latency record of this machine."""
    folder = tmp_path_factory.mktemp("sweep")
    data = micro_data(heads_file)
    write_suite(folder / "suite.toml", data)
    suite = parse_suite(tomli_w.dumps(data), where="the test")
    trace_suite(
        suite,
        suite_file=folder / "suite.toml",
        out=folder / "trace.npz",
        limit=None,
        allow_hub=False,
        console=QUIET,
    )
    measured_here(
        folder / "results" / "latency" / "fake" / "here" / "20240119T120000Z-01234567",
        model=tiny[0].name,
        sha256=tiny[0].sha256,
    )
    return folder


def tiny_sweep(model: str, **changes: Any) -> dict[str, Any]:
    return sweep_data(
        **{
            "name": "tiny",
            "shape": model,
            "calibration_trace": "trace.npz",
            "trees": [{"kind": "chain", "depths": [1, 3]}, {"kind": "grown", "num_nodes": [4, 8, 16]}],
            "search": {"max_nodes": 16},
            "predicted": None,
            "sampled": {
                "tree_nodes": 8,
                "num_prompts": 2,
                "seeds": [1, 2],
                "max_new_tokens": 12,
                "vanilla": [0.7],
                "rejection": [0.7],
                "typical": [{"temperatures": [0.7], "epsilons": [0.09]}],
            },
            "decoded": {"num_points": 3, "seed": 5, "num_prompts": 3},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def spec(tiny: tuple[LoadedModel, Engine]) -> SweepSpec:
    return parse_sweep(tomli_w.dumps(tiny_sweep(tiny[0].name)), where="the test")


def swept(home: Path, spec: SweepSpec, results: Path | None = None, **options: Any) -> SweepRecord:
    where = results or home / "results"
    return SweepRecord(
        run_sweep(
            spec, spec_file=home / "sweep.toml", options=SweepOptions(results=where, **options), console=QUIET
        )
    )


@pytest.fixture(scope="module")
def record(home: Path, spec: SweepSpec) -> SweepRecord:
    return swept(home, spec)


def test_a_whole_sweep_is_valid(record: SweepRecord) -> None:
    assert validate_record(record.folder) == ()
    manifest = record.manifest
    assert manifest is not None and manifest.num_failed == 0
    assert manifest.num_planned == manifest.num_done == len(record.cells) == 1 + 4 + 3
    kinds: set[FigureKind] = {cell.kind for cell in record.composed}
    assert kinds == {"composed"}
    assert record.folder.parents[2].name == "sweep" and record.folder.parents[1].name == "tiny"


def test_greedy_points_decode_as_replayed(record: SweepRecord) -> None:
    """Same tokens and same steps as the replay on every prompt of every drawn tree."""
    assert len(record.decoded) == 3
    for cell in record.decoded:
        assert cell.differences == () and len(cell.rows) == 3
        assert all(row.medusa_steps >= 1 and row.medusa_s > 0 and row.vanilla_s > 0 for row in cell.rows)
    assert len({cell.tree for cell in record.decoded}) == 3
    assert all(check.num_bugs == check.num_ties == 0 for check in decoded_checks(record))


def test_the_gap_of_a_decoded_point_holds_the_error_of_the_step_times(record: SweepRecord) -> None:
    """The curve was timed in three rounds at three levels; over prompts alone the gap looks surer."""
    assert {cell.timing_rounds for cell in record.composed} == {3}
    for cell, check in zip(record.decoded, decoded_checks(record), strict=True):
        alone = decoded_check(cell.model_copy(update={"gap": None}), spec=record.spec.interval)
        assert check.holds_timing and not alone.holds_timing
        assert cell.gap is not None and alone.gap_interval is not None
        assert check.gap_interval == cell.gap
        assert cell.gap.estimate == pytest.approx(alone.gap_interval.estimate) == check.gap
        assert cell.gap.high - cell.gap.low > alone.gap_interval.high - alone.gap_interval.low
        assert check.is_within is (cell.gap.low <= 0 <= cell.gap.high)


def test_the_sampled_tree_at_temperature_0_is_the_replay(record: SweepRecord, home: Path) -> None:
    (cell,) = (cell for cell in record.sampled if cell.setting.rule == "greedy")
    assert cell.tree is not None
    tree, trace = record.trees.trees[cell.tree].tree(), Trace.load(home / "trace.npz")
    assert tree.num_nodes == 8
    from harness.compose.replay import replay

    replayed = replay(trace, tree)
    keys = [prompt.key for prompt in trace.prompts]
    for row in cell.rows:
        assert len(row.step_tokens) == replayed.num_steps[keys.index(row.prompt_key)] and row.seed is None
        assert sum(row.step_tokens) == row.num_tokens - 1


def test_sampled_rows(record: SweepRecord) -> None:
    by_rule = {cell.setting.rule: cell for cell in record.sampled}
    assert set(by_rule) == {"greedy", "vanilla", "rejection", "typical"}
    assert by_rule["vanilla"].tree is None and all(
        set(row.step_tokens) == {1} for row in by_rule["vanilla"].rows
    )
    for rule in ("vanilla", "rejection", "typical"):
        rows = by_rule[rule].rows
        assert [row.seed for row in rows] == [1, 2, 1, 2] and all(row.log_likelihood < 0 for row in rows)
    texts = [row.text_sha256 for row in by_rule["rejection"].rows]
    assert texts[0] != texts[1] or texts[2] != texts[3]  # seeds matter


def stripped(cell: AnyCell) -> dict[str, Any]:
    """A cell without what a clock made."""
    data: dict[str, Any] = cell.model_dump(mode="json", exclude={"elapsed_s", "gap"})
    for row in data.get("rows", ()):
        row.pop("vanilla_s", None)
        row.pop("medusa_s", None)
    return data


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_killed_sweep_goes_on_where_it_stopped(
    after: int, record: SweepRecord, home: Path, spec: SweepSpec, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Killed in the middle of a line: finished cells stay, none is repeated, and the rest comes out as it
    would have.
    """
    results = tmp_path / "results"
    (results / "latency").parent.mkdir(parents=True)
    (results / "latency").symlink_to(home / "results" / "latency")
    append, left = Store.append, [after]

    def dying(store: Store[AnyCell], cell: AnyCell) -> None:
        if left[0] == 0:
            with (store.folder / CELLS_FILE).open("a") as file:
                file.write(cell.model_dump_json()[:30])
            raise KeyboardInterrupt
        left[0] -= 1
        append(store, cell)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "append", dying)
        swept(home, spec, results)
    (folder,) = results.glob("sweep/tiny/*/*")
    kept = (folder / CELLS_FILE).read_text().splitlines()[:after]
    resumed = swept(home, spec, results)
    assert resumed.folder == folder
    assert (folder / CELLS_FILE).read_text().splitlines()[:after] == kept
    assert [stripped(cell) for cell in resumed.cells] == [stripped(cell) for cell in record.cells]


def test_a_cell_that_fails_stands_alone(
    home: Path, spec: SweepSpec, record: SweepRecord, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "latency").symlink_to(home / "results" / "latency")
    generate = ArmRunner.generate

    def failing(runner: ArmRunner, prompt_ids: Any, **options: Any) -> TimedGeneration:
        if runner.arm.acceptance is not None and runner.arm.acceptance.rule == "typical":
            raise RuntimeError("no luck at /home/someone/file")
        return generate(runner, prompt_ids, **options)

    monkeypatch.setattr(ArmRunner, "generate", failing)
    broken = swept(home, spec, results)
    (failed,) = broken.failed
    assert (
        failed.words.startswith("typical, T 0.7")
        and failed.error_type == "RuntimeError"
        and "/home" not in failed.message
    )
    assert len(broken.cells) == len(record.cells) and validate_record(broken.folder) == ()


def test_resume_refuses_another_sweep(
    home: Path, spec: SweepSpec, record: SweepRecord, tmp_path: Path
) -> None:
    told = shutil.copytree(record.folder, tmp_path / "told")
    (told / "report.md").write_text("told")
    with pytest.raises(UserError, match="found a finished sweep"):
        swept(home, spec, resume=told)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("sweep.toml", "origin.json", "trees.json"):
        (unfinished / name).write_bytes((record.folder / name).read_bytes())
    other = spec.model_copy(update={"description": "another"})
    with pytest.raises(UserError, match="found another spec"):
        swept(home, other, resume=unfinished)
    origin = json.loads((unfinished / "origin.json").read_text())
    (unfinished / "origin.json").write_text(json.dumps(origin | {"inputs": {}}))
    with pytest.raises(UserError, match="found another inputs"):
        swept(home, spec, resume=unfinished)


def test_a_device_without_a_record_has_nothing_to_check_with(
    home: Path, spec: SweepSpec, tiny: tuple[LoadedModel, Engine], tmp_path: Path
) -> None:
    """Only a prediction is at hand: points cannot be decoded against a measured curve, and the sweep says
    so.
    """
    shape = "smollm2-135m-instruct"
    changes: dict[str, Any] = {
        "measured": None,
        "predicted": {"devices": ["a40"], "shapes": [shape]},
        "shape": shape,
        "sampled": None,
    }
    other = parse_sweep(tomli_w.dumps(tiny_sweep(tiny[0].name, **changes)), where="the test")
    record = swept(home, other, tmp_path / "results")
    (failed,) = record.failed
    assert failed.key == "decoded none" and "no latency record of this device" in failed.message


def test_a_point_is_not_composed_with_the_curve_of_another_machine_of_the_name(
    home: Path, spec: SweepSpec
) -> None:
    """A processor whose vanilla step took 42 ms once priced the steps of one that takes 18."""
    plan = plan_sweep(spec, base_folder=home, results=home / "results")
    here = device_info(CPU)
    curve, others = own_curve(plan, dtype="float32", device=here)
    assert curve is not None and curve.label.timed_on == here and others == {}
    assert curve.label.machine == MeasuredMachine(here, BANDWIDTH_BYTES_PER_S)
    other = here.model_copy(update={"details": here.details | {"architecture": "pdp11"}})
    (source,) = {one.label.source for one in plan.curves if one.label.kind == "measured"}
    none, refused = own_curve(plan, dtype="float32", device=other)
    why = f"another machine: architecture {here.details['architecture']} against pdp11"
    assert none is None and refused == {source: why}
    tasks, (failed,) = plan_runs(plan, devices={None: other}, base_folder=home)
    assert not any(isinstance(task, DecodedTask) for task in tasks)
    assert failed.message.endswith(f"; {source} is of {why}")
    task = DecodedTask(plan.drafts[0], 0, curve, None)
    runner = CellRunner(cell_inputs(plan, base_folder=home, allow_hub=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.measure.sweep.cells, "device_info", lambda device: other)
        cell = runner.run(task)
    assert isinstance(cell, FailedCell) and f"found a {here.name} ({why}); need the" in cell.message


def test_curves_of_machines_that_share_a_name_say_which_they_are_of(home: Path, spec: SweepSpec) -> None:
    """Two rows of a sweep once bore one name, one of 42 ms a vanilla step and one of 18."""
    (record,) = find_latency_records(home / "results")
    limits = record.limits("float32")
    assert limits is not None
    here = record.environment.device

    def like(gb_per_s: float, **details: str) -> LatencyRecord:
        other = LatencyRecord(record.folder)
        device = here.model_copy(update={"details": {**here.details, **details}})
        other.__dict__["environment"] = record.environment.model_copy(update={"device": device})
        rate = {"read_bandwidth_bytes_per_s": 1e9 * gb_per_s}
        patch.setattr(other, "limits", lambda dtype: limits.model_copy(update=rate), raising=True)
        return other

    with pytest.MonkeyPatch.context() as patch:
        own, other = like(40), like(40, architecture="pdp11")
        alone, _ = gather_curves(spec, [own, like(45)])
        apart, _ = gather_curves(spec, [own, other])
        fast, _ = gather_curves(spec, [own, like(77)])
    assert {one.label.device for one in alone} == {here.name}
    devices = (own.environment.device, other.environment.device)
    assert [one.label.device for one in apart] == [
        f"{here.name} ({machine_slug(one)}, reads 40.0 GB/s)" for one in devices
    ]
    assert [one.label.read_bandwidth_bytes_per_s for one in fast] == [40e9, 77e9]
    assert len({one.label.device for one in fast}) == 2


def test_a_trace_of_other_heads(home: Path, tiny: tuple[LoadedModel, Engine], tmp_path: Path) -> None:
    trace = Trace.load(home / "trace.npz")
    changed = trace.provenance.model_copy(update={"heads_hash": "d" * 64})
    Trace(provenance=changed, prompts=trace.prompts).save(tmp_path / "other.npz")
    data = tiny_sweep(
        tiny[0].name, trace=str(tmp_path / "other.npz"), calibration_trace=str(tmp_path / "other.npz")
    )
    with pytest.raises(UserError, match="found a trace of another model or other heads"):
        swept(home, parse_sweep(tomli_w.dumps(data), where="the test"))


def test_the_command(
    home: Path, tiny: tuple[LoadedModel, Engine], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    monkeypatch.setenv("MEDUSA_REPRO_CACHE", str(tmp_path / "cache"))
    kept = {"fig4_nodes": harness.report.figures.sweep._FIGURES["fig4_nodes"]}
    monkeypatch.setattr(harness.report.figures.sweep, "_FIGURES", kept)
    file = home / "sweep_command.toml"
    file.write_text(tomli_w.dumps(tiny_sweep(tiny[0].name, name="commanded")))
    ran = command("sweep", file, "--results", home / "results", "--replay-only")
    assert ran.code == ExitCode.OK, ran.err
    last = json.loads(ran.out.splitlines()[-1])
    (folder,) = (home / "results" / "sweep" / "commanded").glob("*/*")
    assert last["num_points"] == SweepRecord(folder).num_points > 0 and last["decoded"]["points"] == 0
    assert (folder / "figures" / "fig4_nodes.svg").exists() and "figures/fig4_nodes.svg" in (
        folder / "report.md"
    ).read_text()
    assert command("validate", folder).code == ExitCode.OK
    assert list((tmp_path / "cache" / "trees").iterdir())
    before = (folder / "report.md").read_text()
    again = command("report", folder)
    assert again.code == ExitCode.OK and (folder / "report.md").read_text() == before
    wrong = command("sweep", "no-such-sweep")
    assert wrong.code == ExitCode.USER_ERROR and "need one of ['embedded']" in wrong.error_line


def test_a_results_folder_without_latency_records_is_said(
    home: Path, tiny: tuple[LoadedModel, Engine], tmp_path: Path
) -> None:
    shape = "smollm2-135m-instruct"
    changes: dict[str, Any] = {"predicted": {"devices": ["a40"], "shapes": [shape]}, "shape": shape}
    file = home / "sweep_predicted.toml"
    file.write_text(tomli_w.dumps(tiny_sweep(tiny[0].name, name="predicted", **changes)))
    ran = command("sweep", file, "--results", tmp_path / "elsewhere", "--replay-only")
    assert ran.code == ExitCode.OK, ran.err
    assert "found no latency record in elsewhere/latency: no measured device is in this sweep" in ran.err


def test_damage_is_found(record: SweepRecord, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in record.folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    lines = (folder / CELLS_FILE).read_text().splitlines(keepends=True)
    (folder / CELLS_FILE).write_text("".join([*lines[:-1], lines[0]]))
    faults = validate_record(folder)
    assert any("found a cell twice" in fault for fault in faults) and any(
        "SHA-256" in fault for fault in faults
    )
    (folder / CELLS_FILE).write_text("".join(lines[:-1]))
    assert any("of 8 planned cells" in fault for fault in validate_record(folder))
    (folder / CELLS_FILE).write_text("".join(lines))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_planned": 3}))
    assert any("found 8 of 3 planned cells" in fault for fault in validate_record(folder))
    (folder / "trees.json").write_text("{}")
    assert any(fault.startswith("trees.json") for fault in validate_record(folder))


def test_schemas_know_what_a_sweep_writes(record: SweepRecord) -> None:
    schemas = json_schemas()
    for name, file in (
        ("sweep_origin", "origin.json"),
        ("sweep_trees", "trees.json"),
        ("sweep_manifest", "manifest.json"),
    ):
        written = set(json.loads((record.folder / file).read_text()))
        assert set(schemas[name]["required"]) <= written <= set(schemas[name]["properties"])
    assert schemas["sweep_cell"]["discriminator"]["propertyName"] == "cell"


def test_settings_as_arms() -> None:
    assert arm_of(SampledSetting(rule="vanilla", temperature=0.7), (1,)).method == "vanilla"
    greedy = arm_of(SampledSetting(rule="greedy"), (1, 2))
    assert greedy.seeds == () and not greedy.stochastic
    typical = arm_of(SampledSetting(rule="typical", temperature=0.5, epsilon=0.1, delta=0.3), (1, 2))
    assert typical.stochastic and typical.sampling_temperature == 0.5 and typical.seeds == (1, 2)
    assert arm_of(SampledSetting(rule="rejection", temperature=1.0), (3,)).sampling_temperature == 1.0


def test_differences_are_ties_only_where_rounding_explains_them(home: Path) -> None:
    trace = Trace.load(home / "trace.npz")
    first = trace.prompts[0]
    tokens = first.tokens.tolist()

    def result(ids: list[int], steps: list[int]) -> TimedGeneration:
        return TimedGeneration(
            token_ids=tuple(ids),
            ended_by="budget",
            prefill_s=1.0,
            step_tokens=tuple(steps),
            step_times_s=(1.0,) * len(steps),
            cache_bytes=None,
        )

    ones, alone = [1] * (len(tokens) - 1), DraftTree.root_only()
    hops = list(range(1, len(tokens)))
    assert step_difference(first, result(tokens, ones), alone, replayed=hops, trace=trace) is None
    other_steps = [2, *ones[2:]]
    found = step_difference(first, result(tokens, other_steps), alone, replayed=hops, trace=trace)
    assert found is not None and (found.kind, found.position) == ("bug", 1)
    tied = trace.provenance.model_copy(update={"extra": {"head_ties": [[first.key, 1, 1]]}})
    found = step_difference(
        first,
        result(tokens, other_steps),
        alone,
        replayed=hops,
        trace=Trace(provenance=tied, prompts=trace.prompts),
    )
    assert found is not None and found.kind == "tie"
    wrong = [*tokens[:-1], tokens[-1] + 1]
    found = step_difference(first, result(wrong, ones), alone, replayed=hops, trace=trace)
    assert found is not None
    assert first.gaps is not None
    assert found.kind == ("tie" if float(first.gaps[-1]) < 5e-4 else "bug")
    even = replace(first, gaps=0 * first.gaps)  # every place a tie of the text
    traces = Trace(provenance=trace.provenance, prompts=(even, *trace.prompts[1:]))
    found = step_difference(even, result(wrong, ones), alone, replayed=hops, trace=traces)
    assert found is not None and found.kind == "tie"
    found = step_difference(even, result(wrong, other_steps), alone, replayed=hops, trace=traces)
    assert found is not None and found.kind == "bug"  # a later tie excuses no step before it


def test_failed_cells_have_keys_of_their_own() -> None:
    written = FailedCell(key="sampled x", words="x", error_type="E", message="m").model_dump()
    assert (written["cell"], written["key"]) == ("failed", "sampled x")
