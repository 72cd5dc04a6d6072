"""A latency run beside other work: it times again what was disturbed, keeps both, or shows no times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from harness.compose.devices import find_latency_records, measured_curves
from harness.compose.prices.measured import curves_of_latency
from harness.device.noise import ProcessorMoment
from harness.errors import ExitCode, UserError
from harness.judge.history.valid import latency_holds
from harness.judge.judgement import CheckStatus
from harness.judge.latency_checks import latency_checks, latency_quiet
from harness.judge.validate.record import validate_record
from harness.measure.latency.sittings import Watch
from harness.records.latency import LatencyPoint, LatencyRecord
from harness.records.trials import GpuObservation, ProcessorObservation
from harness.report.latency import latency_headline, render_latency_report
from harness.specs.disturbance import LatencyDisturbance
from harness.tests.fake_latency import write_fake_latency
from harness.tests.measure.latency.test_run import tiny_spec
from harness.tests.records.test_disturbance import seen
from harness.tests.tiny_suite import command

RULE = LatencyDisturbance()


def disturb(monkeypatch: pytest.MonkeyPatch, is_disturbed: Callable[[int], bool]) -> list[int]:
    """Let others take half of all cores in some looks at the machine, counted from 0; return the looks."""
    looks: list[int] = []

    def until(self: ProcessorMoment, after: ProcessorMoment) -> ProcessorObservation:
        looks.append(len(looks))
        return seen(0.5 if is_disturbed(looks[-1]) else 0.0)

    monkeypatch.setattr(ProcessorMoment, "until", until)
    return looks


def latency_run(heads_file: Path, folder: Path) -> tuple[LatencyRecord, int, str, str]:
    data = tiny_spec(
        heads_file,
        disturbance=None,
        batch_table={"batches": [1, 2], "tree": {"kind": "chain", "depth": 2}, "max_new_tokens": 6},
    )
    file = folder / "tiny.toml"
    file.write_text(tomli_w.dumps(data))
    ran = command("latency", file, "--results", folder / "results")
    (record,) = (folder / "results" / "latency" / "tiny").glob("*/*")
    assert validate_record(record) == ()
    return LatencyRecord(record), ran.code, ran.out, ran.err


def test_what_was_disturbed_is_timed_again_and_kept(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The looks: four groups of points, two prompts of the table of modes, three groups of texts."""
    looks = disturb(monkeypatch, lambda look: look in (0, 5, 8))
    record, code, out, err = latency_run(heads_file, tmp_path)
    assert code == ExitCode.OK and json.loads(out.splitlines()[-1])["valid"] is True
    assert len(looks) == 9 + 3, "each disturbed sitting once more, at once"
    assert (out + err).count("timing it again") == 3
    rule = record.spec.disturbance
    assert rule == RULE, "the default, since the file names none"
    again = [point for point in record.points if point.disturbed]
    assert {point.group for point in again} == {record.points[0].group} and len(again) == 3
    for point in again:
        (before,) = point.disturbed
        assert before.machine.processor == seen(0.5) and point.processor == (seen(0.0),)
        assert len(before.backbone_s) == len(point.backbone_s) and before.backbone_s != point.backbone_s
    assert all(point.disturbances(rule) == () for point in record.points)
    assert record.modes is not None and record.batches is not None
    assert {trial.prompt_key for trial in record.modes.disturbed} == {record.modes.trials[0].prompt_key}
    assert [trial.method for trial in record.batches.disturbed] == ["vanilla", "medusa"]
    assert all(trial.machine.processor == seen(0.0) for trial in record.modes.trials)
    assert all(trial.machine.processor == seen(0.0) for trial in record.batches.trials)
    report = render_latency_report(record)
    assert "## Disturbance" in report and "more than 5.0 % of all cores, or more than 0.5 cores" in report
    lines = [[cell.strip() for cell in line.split("|")] for line in report.splitlines()]
    assert ["", "sizes", "10", "3", "0", ""] in lines
    assert record.quiet_share == 1.0 and latency_quiet(record).status is CheckStatus.PASSED


def test_a_neighbour_that_stays_costs_the_record_its_times(
    heads_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = disturb(monkeypatch, lambda look: True)
    record, code, out, err = latency_run(heads_file, tmp_path)
    assert code == ExitCode.INVALID_MEASUREMENT and json.loads(out.splitlines()[-1])["valid"] is False
    assert len(looks) == 9 * 3, "two repeats each"
    assert "INVALID: machine_quiet: found 0% of sizes and trials" in out + err
    assert record.quiet_share == 0.0 and not record.is_quiet
    holds = latency_holds(record)
    assert holds.texts and not holds.speeds and holds.why == ("machine_quiet",)
    assert curves_of_latency(record) == ()
    assert find_latency_records(tmp_path / "results") == ()
    with pytest.raises(UserError, match="found times taken while others used the machine"):
        measured_curves(record)
    report = render_latency_report(record)
    assert "**INVALID.** Others used the machine meanwhile, so no time may be cited." in report


def test_without_a_rule_nothing_is_asked(tmp_path: Path) -> None:
    record = write_fake_latency(tmp_path / "fake")
    assert record.is_quiet and latency_quiet(record).status is CheckStatus.SKIPPED
    assert "## Disturbance" not in render_latency_report(record)
    assert latency_headline(record)["valid"] is True


@pytest.mark.parametrize(("num_disturbed", "status"), [(0, "passed"), (5, "passed"), (6, "failed")])
def test_half_of_sizes_and_trials_have_to_be_quiet(tmp_path: Path, num_disturbed: int, status: str) -> None:
    record = write_fake_latency(
        tmp_path / "fake", modes_table=None, batch_table=None, disturbance={"max_repeats": 1}
    )
    points = tuple(
        point.model_copy(update={"processor": (seen(0.5 if index < num_disturbed else 0.0),)})
        for index, point in enumerate(record.points[:10])
    )
    record.points = points
    share = 1 - num_disturbed / 10
    assert record.quiet_share == pytest.approx(share) and record.is_quiet is (status == "passed")
    limits, quiet = latency_checks(record)
    assert (limits.name, quiet.name) == ("within_limits", "machine_quiet")
    assert quiet.status == status and quiet.of_times
    assert quiet.found == f"{share:.0%} of sizes and trials were timed while others left the machine alone"
    assert quiet.need == "at least 50%"


def test_rounds_add_up_what_was_seen(tmp_path: Path) -> None:
    point = write_fake_latency(tmp_path / "fake", levels=(1.0, 2.0)).points[0]
    shared, alone = GpuObservation(num_others=1), GpuObservation(num_others=0)

    def sitting(share: float, gpu: GpuObservation) -> LatencyPoint:
        return point.model_copy(update={"processor": (seen(share),), "gpu": gpu})

    both = sitting(0.0, shared).with_rounds_of(sitting(0.3, alone))
    assert both.processor == (seen(0.0), seen(0.3)) and both.gpu == shared
    assert both.disturbances(RULE) == ("another process used the GPU", "others used 30% of all cores")
    assert sitting(0.0, alone).with_rounds_of(sitting(0.0, shared)).gpu == shared
    assert both.disturbances(None) == ()


def test_processes_of_a_compiler_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda look: True)
    watch = Watch(rule=RULE)
    for modes, processors in ((("eager",), 3), (("eager", "compiled"), 1), (("fused_graph",), 1)):
        found = watch.sittings(lambda: 1, what="x", modes=modes)
        assert len(found) == processors and (found[-1].machine.processor is None) is (processors == 1)
    late = Watch(rule=RULE, ends=0.0).sittings(lambda: 1, what="x", modes=("eager",))
    assert len(late) == 1, "no repeat after the time budget"
