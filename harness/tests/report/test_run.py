"""The report, the headline and the terminal's table, from fake records with known right answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from harness.errors import UserError
from harness.judge.judgement import Divergence, Judgement, ParityReport, ParityRounding, VerdictKind
from harness.paths import holds_absolute_path, shipped, without_paths
from harness.records.run import RunRecord
from harness.records.trials import Failure
from harness.report.formatting import (
    ABSENT,
    cell,
    describe_end,
    megabytes,
    percent,
    ratio_interval,
    significant,
    table,
)
from harness.report.provenance import relative_folder
from harness.report.run import headline, render_report
from harness.report.run_evidence import (
    render_heads,
    render_parity,
    render_predictions,
    render_profile,
    render_step_costs,
)
from harness.report.tables.run import render_arms_table, render_not_tested_table, render_verdict_table
from harness.specs.claims import load_claims
from harness.specs.forms.claims import FasterForm
from harness.specs.suite import load_suite
from harness.stats import Interval
from harness.tests.fake_judgement import FAILED_CHECK, NEEDS_GPU, VERDICTS, judge
from harness.tests.fake_record import HEAD_HITS, STEP_S, FakeParts, node_cost, write_fake_record

SECTIONS = (
    "Summary",
    "Verdicts",
    "Not tested",
    "Arms",
    "Acceptance",
    "Per category of prompt",
    "Predicted against measured",
    "Where a step goes",
    "Step cost",
    "Draft heads",
    "Parity",
    "Likelihood of sampled text",
    "Checks",
    "Failures",
    "Provenance",
)
SPEED_WORDS = re.compile(r"speedup|overhead|tokens/s\b(?!tep)|step cost|, ms\b|GB/s|FLOP", re.IGNORECASE)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return write_fake_record(
        tmp_path_factory.mktemp("report") / "some-run", num_prompts=8, rounds=1, jitter=0.0
    )


@pytest.fixture(scope="module")
def judgement(record: RunRecord) -> Judgement:
    return judge(record)


def _section(report: str, title: str) -> str:
    return report.split(f"\n## {title}\n")[1].split("\n## ")[0]


def _rows(markdown: str) -> dict[str, list[str]]:
    """The cells of every table row by its first cell."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    split = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {cells[0]: cells for cells in split}


def test_report_holds_every_section_in_order(record: RunRecord, judgement: Judgement) -> None:
    report = render_report(record, judgement)
    assert tuple(re.findall(r"^## (.*)$", report, flags=re.MULTILINE)) == SECTIONS
    assert report.startswith("# Medusa claims tested: suite `fake`\n")
    assert "made-up CPU" in report.split("## Summary")[0] and "2024-01-19" in report.split("## Summary")[0]


def test_every_table_row_has_as_many_cells_as_its_header(record: RunRecord, judgement: Judgement) -> None:
    widths: list[int] = []
    for line in [*render_report(record, judgement).splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.split(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1, line
            widths = []


def test_summary_counts_verdicts_and_names_the_headline_arm(record: RunRecord, judgement: Judgement) -> None:
    summary = _section(render_report(record, judgement), "Summary")
    assert "Verdicts: 2 hold, 1 fails, 1 is open. 1 of them rests on arithmetic with the paper's" in summary
    assert "figures, the others on this run. Not tested by it: 2 further claims." in summary
    speedup = next(
        comparison.speedup for comparison in judgement.comparisons if comparison.arm == "optimised_64"
    )
    assert (
        "`optimised_64` (64 nodes)" in summary
        and f"**speedup {ratio_interval(speedup)}** over `vanilla`" in summary
    )


def test_arms_table_gives_the_fake_devices_known_ratios(record: RunRecord, judgement: Judgement) -> None:
    rows = _rows(render_arms_table(record, judgement))
    overhead = f"{STEP_S['optimised_64'] / STEP_S['vanilla']:.2f}"
    assert rows["optimised_64"][1:3] == ["vanilla", "64"]
    assert rows["optimised_64"][4:6] == [f"{node_cost(64):.2f}", f"{overhead} [{overhead}, {overhead}]"]
    assert rows["vanilla"][3:7] == ["1.00", "1.00", ABSENT, ABSENT]


def test_step_costs_show_curve_and_arms(record: RunRecord) -> None:
    rows = _rows(render_step_costs(record))
    assert rows["64"][3] == f"{node_cost(64):.2f}" and rows["1"][3] == "1.00"
    assert (
        rows["chain"][5] == f"{node_cost(6):.2f}"
        and rows["chain"][7] == f"{STEP_S['chain'] / STEP_S['vanilla']:.2f}"
    )


def test_profile_shares_sum_to_the_whole(record: RunRecord) -> None:
    row = _rows(render_profile(record))["chain"]
    assert sum(float(share.split()[0]) for share in row[3:9]) == pytest.approx(100)
    assert row[9] == "3.0 %"


def test_predictions_show_calibrated_replayed_decoded_of_greedy_arms_only(
    record: RunRecord, judgement: Judgement
) -> None:
    first = render_predictions(record, judgement).split("Speedup =")[0]
    rows = _rows(first)
    assert set(rows) >= {"chain", "cartesian", "optimised_64"} and "typical" not in rows
    arm = next(arm for arm in judgement.arms if arm.arm == "chain")
    assert rows["chain"][4] == f"{arm.replayed_tokens_per_step:.2f}" == rows["chain"][5].split()[0]
    assert arm.calibrated_tokens_per_step is not None
    assert float(rows["chain"][6].split()[0]) == pytest.approx(
        100 * (arm.acceleration_rate.estimate / arm.calibrated_tokens_per_step - 1), abs=0.051
    )


def test_heads_table_shows_controls_and_counts_only_seen_positions(record: RunRecord) -> None:
    rows = _rows(render_heads(record))
    assert rows["head 1"][1:4] == [f"{100 * HEAD_HITS[0]:.1f} %", "0.2 %", "5.0 %"]
    assert record.trace is not None
    last = record.trace.ranks[:, 4]
    seen = last[last >= 0]
    assert rows["head 5"][4] == f"{100 * np.mean(seen == 0):.1f} %" and rows["head 5"][6] == str(len(seen))
    assert float(rows["head 5"][5]) == pytest.approx(1.2 + 4 * 0.6, abs=0.1)


def test_verdict_table_leaves_out_the_untested_and_puts_arithmetic_last(judgement: Judgement) -> None:
    rows = _rows(render_verdict_table(judgement))
    assert [name for name in rows if name.endswith("(Table 3)")] == [
        "T3-9 (Table 3)",
        "F9 (Table 3)",
        "Q9 (Table 3)",
        "CK9 (Table 3)",
    ]
    assert rows["Q9 (Table 3)"][4:6] == ["measured (transfer)", "**fails**"]
    assert _rows(render_not_tested_table(judgement))[NEEDS_GPU][1:] == ["2", "BIG-1, BIG-2"]


def test_verdict_table_without_tested_claims_says_so(judgement: Judgement) -> None:
    untested = tuple(one for one in VERDICTS if one.kind is VerdictKind.NOT_TESTED)
    assert "No claim" in render_verdict_table(judgement.model_copy(update={"verdicts": untested}))


def test_invalid_report_says_so_first_and_gives_no_speed_in_summary_or_headline(
    record: RunRecord, judgement: Judgement
) -> None:
    invalid = judgement.model_copy(update={"checks": (*judgement.checks, FAILED_CHECK)})
    report = render_report(record, invalid)
    summary = _section(report, "Summary")
    assert (
        summary.strip().startswith("**INVALID.**")
        and "**greedy_parity**: found 3 bugs; need no bug" in summary
    )
    assert summary.index("greedy_parity") < summary.index("Verdicts:")
    assert not SPEED_WORDS.search(summary) and "tokens/step" not in summary
    assert "for diagnosis only" in _section(report, "Arms") and "for diagnosis only" in _section(
        report, "Verdicts"
    )
    assert list(_rows(_section(report, "Checks")))[2] == "greedy_parity", (
        "after header and rule the failed check comes first"
    )
    found = headline(invalid, record)
    assert (found["valid"], found["failed_checks"], found["headline_arm"]) == (
        {"texts": False, "speeds": False},
        ["greedy_parity"],
        None,
    )


def test_suite_without_speed_prints_none_and_says_why(tmp_path: Path) -> None:
    record = write_fake_record(tmp_path / "run", reports_speed=False, num_prompts=8, rounds=1, jitter=0.0)
    judgement = judge(record, verdicts=())
    report = render_report(record, judgement)
    said = report.replace("no speed is reported", "").replace("reports no speed", "")
    assert not SPEED_WORDS.search(said)
    assert "This suite reports no speed: its suite file says so." in report
    assert "## Step cost" not in report and "## Where a step goes" not in report
    best = headline(judgement, record)["headline_arm"]
    assert set(best) == {"arm", "num_nodes", "tokens_per_step"}


def test_headline_is_one_json_object_with_a_relative_path(record: RunRecord, judgement: Judgement) -> None:
    found = json.loads(
        json.dumps(headline(judgement, record, base=record.folder.parent.parent), allow_nan=False)
    )
    assert found["record"] == f"{record.folder.parent.name}/some-run"
    assert found["verdicts"] == {
        "reproduced": 2,
        "not reproduced": 1,
        "inconclusive": 1,
        "not decidable here": 0,
        "not tested": 2,
    }
    best = found["headline_arm"]
    assert (best["arm"], best["baseline"]) == ("optimised_64", "vanilla")
    assert best["speedup"]["low"] < best["speedup"]["estimate"] < best["speedup"]["high"]
    assert best["overhead"]["estimate"] == pytest.approx(STEP_S["optimised_64"] / STEP_S["vanilla"], abs=1e-4)


def test_record_elsewhere_is_named_without_its_place(record: RunRecord, tmp_path: Path) -> None:
    assert relative_folder(record.folder, base=tmp_path) == "some-run"


def test_the_headline_is_not_picked_by_its_figure(record: RunRecord, judgement: Judgement) -> None:
    """The fastest of many arms is fast by luck too: the suite says before the run which one counts."""
    for named in ("chain", "optimised_64"):
        suite = record.suite.model_copy(update={"headline_arm": named})
        other = RunRecord(record.folder)
        other.__dict__["suite"] = suite
        assert headline(judgement, other)["headline_arm"]["arm"] == named
    unnamed = RunRecord(record.folder)
    unnamed.__dict__["suite"] = record.suite.model_copy(update={"headline_arm": None})
    assert headline(judgement, unnamed)["headline_arm"]["arm"] == "chain"  # the first that drafts
    with pytest.raises(ValidationError, match="headline_arm must be one of chain, cartesian, optimised_64"):
        type(record.suite).model_validate({**record.suite.model_dump(), "headline_arm": "typical"})


def test_the_shipped_suites_are_told_by_the_arm_of_the_papers_first_claim() -> None:
    (first,) = (claim for claim in load_claims() if claim.id == "A1")
    assert isinstance(first.transfer, FasterForm)
    for name in ("embedded", "embedded_full"):
        assert load_suite(shipped(f"{name}.toml")).headline_arm == first.transfer.arm


def test_arm_without_a_generation_is_no_headline(record: RunRecord, judgement: Judgement) -> None:
    nothing = Interval(estimate=float("nan"), low=-float("inf"), high=float("inf"), level=0.95, num_prompts=0)
    arms = tuple(arm.model_copy(update={"acceleration_rate": nothing}) for arm in judgement.arms)
    broken = judgement.model_copy(update={"arms": arms})
    assert headline(broken, record)["headline_arm"] is None
    assert not re.search(r"\b(nan|inf)\b", render_report(record, broken))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"commit": None, "dirty": None}, "outside a git checkout"),
        ({"dirty": True}, "with uncommitted changes"),
        ({"dirty": False}, "- Commit: `0123456789ab`\n"),
    ],
)
def test_commit_is_told_plainly(
    tmp_path: Path, judgement: Judgement, changes: dict[str, Any], said: str
) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(update=changes)

    record = write_fake_record(tmp_path / "run", spoil=spoil, num_prompts=8, rounds=1, jitter=0.0)
    assert said in render_report(record, judgement)


def test_no_place_on_the_machine_reaches_the_report(tmp_path: Path, judgement: Judgement) -> None:
    def spoil(parts: FakeParts) -> None:
        changes = {
            "command": "python -m harness run /data/jane/s.toml",
            "assets": {"model": "/data/jane/m.gguf"},
        }
        parts.environment = parts.environment.model_copy(update=changes)
        trial = parts.outcomes[0].trial
        message = "no file /data/jane/cache | <b>"
        parts.outcomes[0] = Failure(trial=trial, order=0, error_type="OSError", message=message)

    record = write_fake_record(tmp_path / "run", spoil=spoil, num_prompts=8, rounds=1, jitter=0.0)
    report = render_report(record, judgement)
    assert "jane" not in report and str(tmp_path) not in report
    failure = _section(report, "Failures")
    assert "OSError" in failure and "no file .../cache \\| &lt;b>" in failure
    assert "python -m harness run .../s.toml" in _section(report, "Provenance")


def _without(name: str) -> Callable[[FakeParts], None]:
    return lambda parts: setattr(parts, name, None)


@pytest.mark.parametrize(
    ("part", "title"),
    [
        ("profile", "Where a step goes"),
        ("step_costs", "Step cost"),
        ("likelihoods", "Likelihood of sampled text"),
    ],
)
def test_section_without_its_probe_is_left_out(
    tmp_path: Path, judgement: Judgement, part: str, title: str
) -> None:
    record = write_fake_record(tmp_path / "run", spoil=_without(part), num_prompts=8, rounds=1, jitter=0.0)
    assert f"## {title}" not in render_report(record, judgement)


def test_heads_are_shown_by_control_alone_or_trace_alone(tmp_path: Path) -> None:
    control_only = write_fake_record(
        tmp_path / "a", spoil=_without("trace"), num_prompts=8, rounds=1, jitter=0.0
    )
    assert "on this text" not in render_heads(control_only) and "held-out top-1" in render_heads(control_only)
    trace_only = write_fake_record(
        tmp_path / "b", spoil=_without("heads_control"), num_prompts=8, rounds=1, jitter=0.0
    )
    assert "held-out" not in render_heads(trace_only) and "top-1 on this text" in render_heads(trace_only)


def test_unfinished_record_is_reported_as_such(tmp_path: Path, judgement: Judgement) -> None:
    record = write_fake_record(tmp_path / "run", omit=["manifest.json"], num_prompts=8, rounds=1, jitter=0.0)
    assert "not finished" in _section(render_report(record, judgement), "Provenance")


def test_every_divergence_is_shown_with_its_gap(judgement: Judgement) -> None:
    shown = (
        Divergence(arm="chain", reference="vanilla", prompt_key="p-1", position=7, gap=0.0001, kind="tie"),
        Divergence(arm="cartesian", reference="vanilla", prompt_key="p-2", position=9, gap=None, kind="bug"),
    )
    parity = ParityReport(num_compared=3, num_tokens=1200, num_identical=1, divergences=shown)
    text = render_parity(judgement.model_copy(update={"parity": parity}))
    assert "3 greedy generations" in text and "1,200 tokens: 1 identical, 2 divergences." in text
    assert _rows(text)["chain"][1:] == ["vanilla", "p-1", "7", "1.00e-04", "tie"]
    assert _rows(text)["cartesian"][4:] == [ABSENT, "bug"]


def test_parity_of_half_precision_says_what_a_tie_is_and_how_often_one_is_there(judgement: Judgement) -> None:
    assert judgement.parity.rounding is None and "only up to ties" not in render_parity(judgement)
    rounding = ParityRounding(
        dtype="bfloat16", largest_shift=0.375, tie_margin=0.75, share_below=0.277, num_equal_tokens=1100
    )
    text = render_parity(
        judgement.model_copy(update={"parity": judgement.parity.model_copy(update={"rounding": rounding})})
    )
    assert "In bfloat16 a text is equal only up to ties." in text
    assert (
        "at most 0.375 " in text
        and "below 0.750 counts" in text
        and "27.7 % of the traced positions" in text
        and "1,100 tokens" in text
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234, "1.23"),
        (0.01234, "0.0123"),
        (9.996, "10.0"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (0, "0"),
        (None, ABSENT),
        (float("nan"), ABSENT),
    ],
)
def test_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


def test_shares_and_sizes() -> None:
    assert (percent(0.1234), percent(-0.0001, signed=True), percent(0.05, signed=True)) == (
        "12.3 %",
        "+0.0 %",
        "+5.0 %",
    )
    assert (megabytes(6_600_000), megabytes(1_500_000_000), megabytes(None)) == ("6.60", "1,500", ABSENT)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("run /opt/me/suite.toml now", "run .../suite.toml now"),
        ("--record=/opt/me/r/", "--record=.../r"),
        ("~jane/models/m", ".../m"),
        (r"C:\Users\jane\m.gguf", ".../m.gguf"),
        ("in /root", "in .../root"),
    ],
)
def test_absolute_paths_are_cut(text: str, cut: str) -> None:
    assert holds_absolute_path(text)
    assert without_paths(text) == cut


@pytest.mark.parametrize(
    "text",
    ["1.5 tokens/step", "suites/embedded/heads.st", "https://host.org/a/b", "and / or", "3/4/5", "./a/b"],
)
def test_other_slashes_stay(text: str) -> None:
    assert without_paths(text) == text
    assert not holds_absolute_path(text)


def test_cells_stay_in_their_column() -> None:
    assert cell("a | b\n c <!-- x") == "a \\| b c &lt;!-- x"
    assert len(table(["a"], [["x" * 50 + "  y"]]).splitlines()) == 3


def test_a_run_without_the_tree_of_an_arm_is_told_in_one_line(tmp_path: Path) -> None:
    record = write_fake_record(
        tmp_path / "run",
        spoil=lambda parts: parts.trees.pop("chain"),
        num_prompts=8,
        rounds=1,
        jitter=0.0,
    )
    with pytest.raises(UserError, match="found no tree of arm 'chain'"):
        render_report(record, judge(record))


@pytest.mark.parametrize(
    ("finished", "words"),
    [("14:43:00Z", "(10.2 minutes)"), ("17:33:04Z", "(10.2 minutes since it was resumed)")],
)
def test_minutes_of_a_resumed_run_say_what_they_count(finished: str, words: str) -> None:
    shown = describe_end("2026-11-23T14:33:00Z", f"2026-11-23T{finished}", elapsed_s=612.0)
    assert shown == f"2026-11-23T{finished} {words}"
