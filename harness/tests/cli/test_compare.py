"""`compare` and `reproduce --against`: pages, last lines, exit codes, refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from harness.cli.compare import finish_against, promising_run
from harness.cli.marked import MARK
from harness.errors import ExitCode, UserError
from harness.judge.history.compare import compare
from harness.records.folder import kind_of
from harness.records.opened import open_record
from harness.report.tables.compare import comparison_headline, render_comparison
from harness.tests.fake_record import STEP_S, FakeParts, write_fake_record
from harness.tests.tiny_suite import MicroRun, command, write_suite

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT / "harness" / "tests" / "records" / "fixtures" / "v1"
COMMITTED = sorted(path.parent for path in (ROOT / "results").rglob("manifest.json"))


def write(folder: Path, **changes: Any) -> Path:
    return write_fake_record(folder, **{"rounds": 1, "num_prompts": 8, "jitter": 0.0, **changes}).folder


def last(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def test_two_runs_are_compared_on_standard_output_or_in_a_file(tmp_path: Path) -> None:
    a, b, page = write(tmp_path / "a"), write(tmp_path / "b"), tmp_path / "page.md"
    ran = command("compare", a, b)
    assert ran.code == ExitCode.OK and ran.out.startswith(
        "# B against A: texts within the band, speeds within"
    )
    told = last(ran.out)
    assert (told["outcome"], told["texts"], told["speeds"]) == ("within the band",) * 3
    assert told["outside"] == [] and told["num_differences"] == 0
    assert told["valid"] == {"texts": True, "speeds": True}
    ran = command("compare", a, b, "--out", page)
    assert len(ran.out.splitlines()) == 1 and page.read_text().startswith("# B against A")
    assert str(tmp_path) not in page.read_text()


def test_outside_the_band_is_a_finding_and_an_error_only_if_strict(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", step_s={"chain": STEP_S["chain"] * 2})
    ran = command("compare", a, b)
    assert ran.code == ExitCode.OK and "chain: speedup" in last(ran.out)["outside"]
    assert command("compare", a, b, "--strict").code == ExitCode.GATE_REGRESSION
    assert command("compare", a, a.parent / "a" / ".." / "b", "--strict").code == ExitCode.GATE_REGRESSION
    assert command("compare", b, b.parent / "a", "--strict").code == ExitCode.GATE_REGRESSION


def test_nothing_to_compare_is_no_success_if_strict(tmp_path: Path) -> None:
    """It ended with 0, as if B lay within the band."""
    for name in ("a", "b"):
        shutil.copytree(FIXTURES / "sweep", tmp_path / name)
    ran = command("compare", tmp_path / "a", tmp_path / "b")
    assert ran.code == ExitCode.OK and last(ran.out)["outcome"] == "not comparable"
    ran = command("compare", tmp_path / "a", tmp_path / "b", "--strict")
    assert ran.code == ExitCode.USER_ERROR and last(ran.out)["outcome"] == "not comparable"
    assert "found no figure that can be compared" in ran.error_line


def test_records_are_found_in_another_results_folder(tmp_path: Path) -> None:
    names = ("20260101T000000Z-aaaaaaaa", "20260102T000000Z-bbbbbbbb")
    for name in names:
        write(tmp_path / "results" / "micro" / "cpu-x" / name)
    ran = command("compare", names[0], "micro", "--results", tmp_path / "results")
    assert ran.code == ExitCode.OK and last(ran.out)["outcome"] == "within the band"


def test_figures_that_do_not_hold_end_with_code_2(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", step_s={"hf_greedy": STEP_S["hf_greedy"] / 2})
    ran = command("compare", a, b)
    assert ran.code == ExitCode.INVALID_MEASUREMENT
    assert last(ran.out)["speeds"] == "not comparable" and last(ran.out)["texts"] == "within the band"
    assert last(ran.out)["valid"] == {"texts": True, "speeds": False}
    assert "Times are not compared: the times of B do not hold" in ran.out


def test_an_altered_record_is_refused_or_marked(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    (b / "trees.json").write_text(json.dumps(json.loads((b / "trees.json").read_text())))
    ran = command("compare", a, b)
    assert ran.code == ExitCode.USER_ERROR and "--unsealed" in ran.error_line and ran.out == ""
    ran = command("compare", a, b, "--unsealed")
    *lines, _ = ran.out.splitlines()
    assert ran.code == ExitCode.INVALID_MEASUREMENT and all(line.startswith(MARK) for line in lines)
    assert last(ran.out)["unsealed"].startswith("found ")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("compare", "{a}", "{a}"), "found one record twice"),
        (("compare", "{a}", "nosuch"), "found no record 'nosuch'"),
        (("compare", "{a}", "{sweep}"), "need two records of one kind"),
        (("reproduce", "smoke", "--against", "nosuch"), "found no record 'nosuch'"),
        (("reproduce", "smoke", "--against", "{sweep}"), "need a run of a suite"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, words: tuple[str, ...], found: str) -> None:
    places = {"a": write(tmp_path / "a"), "sweep": FIXTURES / "sweep"}
    ran = command(*(word.format(**places) for word in words))
    assert ran.code == ExitCode.USER_ERROR and found in ran.error_line and ran.out == ""


def test_a_run_is_held_against_another_at_its_end(micro: MicroRun, tmp_path: Path) -> None:
    """The micro suite once more: its tokens are those of the first run, and no speed is asked for."""
    suite = write_suite(tmp_path / "micro.toml", micro.data)
    words = ("reproduce", suite, "--results", tmp_path / "results", "--against", micro.record.folder)
    ran = command(*words)
    assert ran.code == ExitCode.OK, ran.err
    own, told = (json.loads(line) for line in ran.out.splitlines() if line.startswith("{"))
    assert own["suite"] == "micro" and "outcome" not in own
    assert told["compare"]["a"] == micro.record.folder.name
    assert told["texts"] == "within the band" and told["speeds"] == "not comparable"
    assert told["speeds_not_compared"] == "the suite of A reports no speed"
    assert told["valid"] == {"texts": True, "speeds": None}


def test_a_run_that_does_not_hold_keeps_its_code_and_is_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", step_s={"hf_greedy": STEP_S["hf_greedy"] / 2})
    with pytest.raises(typer.Exit) as ended:
        finish_against(b, promising_run(str(a)), claims=(), readme=None)
    assert ended.value.exit_code == ExitCode.INVALID_MEASUREMENT and (b / "report.md").exists()


def test_committed_records_are_compared_each_with_the_next_of_its_kind() -> None:
    """Every pair ends in an outcome, which a sweep or a training has none of; two kinds are refused."""
    records = [open_record(folder) for folder in COMMITTED]
    outcomes = []
    for a, b in itertools.pairwise(records):
        if kind_of(a.folder) != kind_of(b.folder):
            with pytest.raises(UserError, match="two records of one kind"):
                compare(a, b, claims=())
            continue
        compared = compare(a, b, claims=())
        told = comparison_headline(compared, base=ROOT)
        assert compared.is_valid and render_comparison(compared).startswith("# B against A: ")
        outcomes.append(told["outcome"])
    assert len(outcomes) >= 5


def test_the_two_embedded_runs_of_one_name_are_of_two_machines() -> None:
    """Their bandwidths differ by 2.3 times; their greedy texts are the same, token for token."""
    a, b = (
        open_record(ROOT / "results" / "embedded" / "cpu-amd-epyc-2c" / name)
        for name in ("20261123T185015Z-91c33b0b", "20261125T202908Z-e4ce6458")
    )
    compared = compare(a, b, claims=())
    assert compared.no_times is not None and "33.9 and 77.1 GB/s" in compared.no_times
    assert compared.counts_outcome == "within the band" and compared.times_outcome == "not comparable"
    same = {one.arm: one.num_same for one in compared.texts if not one.inputs and one.is_exact}
    assert set(same.values()) == {16, 32} and "optimised" in same
    assert compared.only_in_b == ("vanilla_tuned", "medusa2_optimised", "medusa2_fastest")


def test_names_of_others_cannot_steer_the_page(tmp_path: Path) -> None:
    def named(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(
            update={"packages": {"x\x1b[31m|y": "<b>1</b>"}, "engine": "[link](http://example.org)"}
        )

    b = write_fake_record(tmp_path / "b", spoil=named, rounds=1, num_prompts=8)
    page = render_comparison(compare(open_record(write(tmp_path / "a")), b, claims=()))
    assert "\x1b" not in page and "<b>" not in page and "](http" not in page
