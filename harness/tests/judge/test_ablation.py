"""An ablation's figures and verdicts on a made-up record whose right answers are known."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from harness.compose.replay import Replay, replay
from harness.errors import UserError
from harness.judge.ablation import ablation_rows, best_rate_columns, change_columns, kl_of, rate_columns
from harness.judge.claims.ablation import decided_elsewhere, judge_training, training_verdicts
from harness.judge.claims.evidence import replays
from harness.judge.claims.findings import NotTestable
from harness.judge.judgement import VerdictKind
from harness.judge.validate.record import validate_record
from harness.paths import holds_absolute_path
from harness.records.ablation import ABLATION, AblationRecord, StepPoint, newest_ablations
from harness.records.store import hashes
from harness.records.trace import Trace
from harness.report.ablation import (
    ablation_headline,
    outcome_in_words,
    render_ablation,
    render_readme_ablation,
)
from harness.report.figures.training import curve, curves_figure, draw_curves
from harness.report.readme import ablation_block, update_readme
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.forms.training import HeadOrderForm, SpareHeadForm, TrainingForm
from harness.tests.fake_ablation import ARMS, FakeArm, fake_trace, write_fake_ablation
from harness.tests.readme_blocks import shows
from medusa_impl.tree import DraftTree

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted(
    path.parent
    for path in (ROOT / "results").glob("*/*/*/arms.jsonl")
    if (path.parent / "manifest.json").exists()
)
DECIDED = {
    "A2",
    "F3a-7B-Medusa-2",
    "F3a-13B-Medusa-2",
    "T2-DirectFine-tuning-q",
    "T2-Medusa-1-q",
    "T2-Medusa-2-q",
    "T2-Medusa-2-S",
    "T3-4",
    "Q-loss",
    "Q-sdhard",
    "Q-sdmem",
    "DEF-warm",
    "DEF-nheads",
}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> AblationRecord:
    return write_fake_ablation(tmp_path_factory.mktemp("fake") / "record")


@pytest.fixture(scope="module")
def claims() -> dict[str, ClaimSpec]:
    return {claim.id: claim for claim in load_claims() if claim.training is not None}


def form(claims: dict[str, ClaimSpec], claim_id: str) -> TrainingForm:
    found = claims[claim_id].training
    assert found is not None
    return found


def verdict(claims: dict[str, ClaimSpec], claim_id: str, record: AblationRecord) -> VerdictKind:
    return judge_training(form(claims, claim_id), record).kind


def test_figures_are_those_the_record_was_made_from(record: AblationRecord) -> None:
    rows = {row.arm: row for row in ablation_rows(record)}
    assert list(rows) == list(ARMS)
    for name, arm in ARMS.items():
        row = rows[name]
        alone = replay(fake_trace(arm.hits), DraftTree.chain(2)).tokens_per_step
        assert (
            row.tokens_per_step.estimate == pytest.approx(alone)
            and row.seed_tokens_per_step == (alone,) * row.num_seeds
        )
        seeds = (1.0,) if name == "start" else (1.0, 1.1)
        assert row.kl.estimate == pytest.approx(arm.kl * sum(seeds) / len(seeds))
        assert row.seed_kl == pytest.approx([arm.kl * seed for seed in seeds])
        assert row.perplexity == pytest.approx((math.exp(0.5), math.exp(0.5 + row.kl.estimate)))
        assert [accuracies[0] for accuracies in row.top_accuracies] == pytest.approx([0.8, 0.6])
        assert [accuracies[-1] for accuracies in row.top_accuracies] == pytest.approx([1.0, 0.8])
        assert row.equal_texts_rate == (1.0 if not arm.kl else 0.75)
        assert [change.num_texts for change in row.categories] == [4, 4]
        assert row.best_tokens_per_step is not None and row.best_tokens_per_step.estimate > 1
    assert (
        rows["start"].gain is None
        and rows["start"].start_gain is None
        and rows["ramped"].tokens_per_s == 50.0
    )
    assert rows["medusa1"].gain is None and rows["medusa1"].start_gain is not None
    ours, theirs, first = (rows[name].tokens_per_step.estimate for name in ("ramped", "medusa1", "start"))
    for gain, base in ((rows["ramped"].gain, theirs), (rows["ramped"].start_gain, first)):
        assert gain is not None and gain.estimate == pytest.approx(ours / base) and 1 < gain.low < gain.high


def test_a_gain_on_ones_own_text_alone_is_told_apart(tmp_path: Path) -> None:
    arms = {**ARMS, "ramped": replace(ARMS["ramped"], hits=8, original_hits=5)}
    rows = {row.arm: row for row in ablation_rows(write_fake_ablation(tmp_path / "record", arms=arms))}
    own, original = rows["ramped"].gain, rows["ramped"].original_text_gain
    assert own is not None and original is not None and own.low > 1 == original.estimate
    assert rows["ramped"].original_text_start_gain == rows["medusa1"].start_gain, (
        "there it yields what medusa1 does"
    )
    assert (
        rows["two_stage"].gain == rows["two_stage"].original_text_gain
        and rows["start"].original_text_gain is None
    )


def test_a_record_from_before_the_original_text_was_read_still_reports(
    claims: dict[str, ClaimSpec], tmp_path: Path
) -> None:
    record = write_fake_ablation(tmp_path / "record")
    for path in record.folder.glob("trace-original-text-*.npz"):
        path.unlink()
    rows = ablation_rows(record)
    assert all(row.original_text_gain is None for row in rows if row.arm not in ("medusa1",))
    verdicts = {one.claim_id: one for one in training_verdicts(load_claims(), record)}
    assert (
        verdicts["A2"].kind is VerdictKind.NOT_TESTED and "before arms were measured" in verdicts["A2"].reason
    )
    assert verdicts["Q-sdhard"].kind is VerdictKind.REPRODUCED
    assert "| ramped" in render_ablation(record, rows, list(verdicts.values()), has_curves=False)


def test_a_gain_on_repetition_alone_is_not_counted_as_quality_kept(
    claims: dict[str, ClaimSpec], tmp_path: Path
) -> None:
    arms = {**ARMS, "two_stage": replace(ARMS["two_stage"], original_hits=5)}
    with pytest.raises(NotTestable, match="yields no more tokens/step than medusa1"):
        judge_training(form(claims, "T2-Medusa-2-q"), write_fake_ablation(tmp_path / "record", arms=arms))


def test_repetition_counts_what_stood_in_the_answer_before(tmp_path: Path) -> None:
    record = write_fake_ablation(tmp_path / "record")
    assert {row.repetition.estimate for row in ablation_rows(record) if row.repetition is not None} == {
        0.0
    }, "the fake texts count upwards"
    trace = fake_trace(8)
    looped = [prompt.tokens % 5 for prompt in trace.prompts]
    prompts = tuple(replace(prompt, tokens=ids) for prompt, ids in zip(trace.prompts, looped, strict=True))
    for seed in (0, 1):
        replace(trace, prompts=prompts).save(record.folder / f"trace-ramped-{seed}.npz")
    count = len(looped[0]) - 3
    (row,) = (row for row in ablation_rows(AblationRecord(record.folder)) if row.arm == "ramped")
    assert row.repetition is not None and row.repetition.estimate == pytest.approx((count - 5) / count), (
        "five 4-grams, and all later ones stood there before"
    )


def test_pooling_pairs_texts_by_key_whatever_their_order(record: AblationRecord) -> None:
    columns = change_columns(record, "ramped", kl_of)
    assert len(columns.numerator) == 24 and columns.denominator.sum() == 2 * 24 * 40
    less = change_columns(record, "hard_labels", kl_of).less(columns, spec=record.spec.interval)
    assert less.estimate == pytest.approx((0.08 - 0.01) * 1.05) and less.low > 0


def test_an_own_best_tree_is_judged_on_text_that_it_was_not_grown_on(record: AblationRecord) -> None:
    columns = best_rate_columns(record, "ramped", num_nodes=3)
    assert len(columns.numerator) == 24, "both halves are judged"
    assert columns.interval(record.spec.interval).estimate == pytest.approx(
        replay(fake_trace(8), DraftTree.chain(2)).tokens_per_step
    )
    with pytest.raises(NotTestable, match="no tree of 5000 nodes"):
        best_rate_columns(record, "ramped", num_nodes=5000)


def test_what_was_not_run_is_not_testable(record: AblationRecord) -> None:
    for columns in (rate_columns, best_rate_columns):
        with pytest.raises(NotTestable, match="no arm other"):
            columns(record, "other")


def test_every_claim_of_training_is_decided_by_a_whole_record(
    claims: dict[str, ClaimSpec], record: AblationRecord
) -> None:
    assert set(claims) == DECIDED
    found = {one.claim_id: one for one in training_verdicts(load_claims(), record)}
    assert set(found) == DECIDED and all(len(form(claims, claim_id).reason) > 20 for claim_id in DECIDED)
    reproduced = {claim_id for claim_id, one in found.items() if one.kind is VerdictKind.REPRODUCED}
    assert reproduced == DECIDED - {"DEF-nheads"}
    assert found["DEF-nheads"].kind is VerdictKind.NOT_TESTED and "have 2 heads" in found["DEF-nheads"].reason


@pytest.mark.parametrize(
    ("claim_id", "arm", "changes", "kind"),
    [
        ("A2", "ramped", {"hits": 2}, VerdictKind.NOT_REPRODUCED),
        ("A2", "ramped", {"original_hits": 3}, VerdictKind.NOT_REPRODUCED),
        ("A2", "ramped", {"seed_hits": 4}, VerdictKind.INCONCLUSIVE),
        ("T3-4", "two_stage", {"original_hits": 5}, VerdictKind.NOT_REPRODUCED),
        ("T3-4", "two_stage", {"hits": 5}, VerdictKind.NOT_REPRODUCED),
        ("T2-Medusa-2-S", "two_stage", {"hits": 2}, VerdictKind.NOT_REPRODUCED),
        ("T2-Medusa-1-q", "medusa1", {"changed": True}, VerdictKind.NOT_REPRODUCED),
        ("T2-Medusa-2-q", "two_stage", {"kl": 0.04}, VerdictKind.NOT_REPRODUCED),
        ("T2-Medusa-2-q", "two_stage", {"kl": 0.019}, VerdictKind.INCONCLUSIVE),
        ("T2-DirectFine-tuning-q", "direct", {"kl": 0.004}, VerdictKind.NOT_REPRODUCED),
        ("Q-sdhard", "hard_labels", {"kl": 0.009}, VerdictKind.NOT_REPRODUCED),
        ("Q-sdhard", "ramped", {"kl": 0.03}, VerdictKind.NOT_REPRODUCED),
        ("Q-sdhard", "hard_labels", {"reference_nll": 0.4}, VerdictKind.NOT_REPRODUCED),
        ("Q-sdmem", "ramped", {"memory_mb": 1101}, VerdictKind.NOT_REPRODUCED),
        ("DEF-warm", "two_stage", {"kl": 0.04}, VerdictKind.NOT_REPRODUCED),
        ("DEF-warm", "two_stage", {"hits": 5, "kl": 0.0}, VerdictKind.NOT_REPRODUCED),
        ("DEF-warm", "ramped", {"seed_hits": 4}, VerdictKind.INCONCLUSIVE),
        ("T2-Medusa-2-q", "two_stage", {"seed_hits": 4}, VerdictKind.INCONCLUSIVE),
    ],
)
def test_every_form_can_fail(
    claims: dict[str, ClaimSpec],
    tmp_path: Path,
    claim_id: str,
    arm: str,
    changes: dict[str, float],
    kind: VerdictKind,
) -> None:
    arms = {**ARMS, arm: replace(ARMS[arm], **changes)}  # type: ignore[arg-type]
    assert verdict(claims, claim_id, write_fake_ablation(tmp_path / "record", arms=arms)) is kind


def test_a_divergence_that_bought_nothing_is_not_counted(
    claims: dict[str, ClaimSpec], tmp_path: Path
) -> None:
    record = write_fake_ablation(tmp_path / "record", arms={**ARMS, "two_stage": FakeArm(hits=5, kl=0.0)})
    with pytest.raises(NotTestable, match="no gain whose price"):
        judge_training(form(claims, "T2-Medusa-2-q"), record)


@pytest.mark.parametrize(
    ("claim_id", "arm", "changes", "gap"),
    [
        ("A2", "ramped", {"num_layers": 2}, "differ in num_layers: a step does not cost both the same"),
        ("Q-sdhard", "hard_labels", {"num_layers": 2}, "differ in num_layers, the claim is about target"),
    ],
)
def test_arms_that_differ_in_more_than_the_claim_says_are_not_compared(
    claims: dict[str, ClaimSpec], tmp_path: Path, claim_id: str, arm: str, changes: dict[str, int], gap: str
) -> None:
    arms = {**ARMS, arm: replace(ARMS[arm], **changes)}  # type: ignore[arg-type]
    with pytest.raises(NotTestable, match=gap):
        judge_training(form(claims, claim_id), write_fake_ablation(tmp_path / "record", arms=arms))


def test_a_step_that_reads_two_lm_heads_costs_more(
    claims: dict[str, ClaimSpec], record: AblationRecord, tmp_path: Path
) -> None:
    moved = shutil.copytree(record.folder, tmp_path / "moved")
    two = {
        "backbone": "lora",
        "lora": {"lm_head": True},
        "architecture": "shared",
        "heads_lm_head": "original",
    }
    rows = [json.loads(line) for line in (moved / "arms.jsonl").read_text().splitlines()]
    for row in rows:
        if row["arm"] in ("ramped", "medusa1"):
            row["recipe"] |= two if row["arm"] == "ramped" else {"architecture": "shared"}
    (moved / "arms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(NotTestable, match="a step of ramped reads two LM heads"):
        judge_training(form(claims, "A2"), AblationRecord(moved))


def test_arms_of_other_seeds_are_not_compared(
    claims: dict[str, ClaimSpec], record: AblationRecord, tmp_path: Path
) -> None:
    moved = shutil.copytree(record.folder, tmp_path / "moved")
    lines = [
        line
        for line in (moved / "arms.jsonl").read_text().splitlines(keepends=True)
        if '"arm":"ramped","seed":1' not in line
    ]
    (moved / "arms.jsonl").write_text("".join(lines))
    for claim_id in ("A2", "Q-sdhard"):
        with pytest.raises(NotTestable, match="trained on the seeds"):
            judge_training(form(claims, claim_id), AblationRecord(moved))


def test_a_frozen_backbone_that_was_not_hashed_is_not_vouched_for(
    claims: dict[str, ClaimSpec], record: AblationRecord, tmp_path: Path
) -> None:
    moved = shutil.copytree(record.folder, tmp_path / "moved")
    text = (moved / "arms.jsonl").read_text()
    (moved / "arms.jsonl").write_text(
        re.sub(r'"backbone_sha256s":\[[^]]*\]', '"backbone_sha256s":null', text)
    )
    with pytest.raises(NotTestable, match="does not say what training medusa1 did"):
        judge_training(form(claims, "T2-Medusa-1-q"), AblationRecord(moved))


def test_an_unfinished_record_decides_nothing(tmp_path: Path) -> None:
    record = write_fake_ablation(tmp_path / "record", seal=False)
    verdicts = training_verdicts(load_claims(), record)
    assert {one.kind for one in verdicts} == {VerdictKind.NOT_TESTED} and all(
        "unfinished" in one.reason for one in verdicts
    )
    assert ablation_headline(record, ablation_rows(record), verdicts)["finished"] is False


def test_what_cannot_be_formed_is_left_blank(tmp_path: Path) -> None:
    """Regression: heads too few for a tree of the suite's size ended every report in a traceback, with the
    record sealed.
    """
    record = write_fake_ablation(
        tmp_path / "record", best_tree_nodes=4096, arms={name: ARMS[name] for name in ("start", "medusa1")}
    )
    rows = ablation_rows(record)
    assert all(row.best_tokens_per_step is None and row.kl_above is None for row in rows)
    assert "| medusa1" in render_ablation(
        record, rows, training_verdicts(load_claims(), record), has_curves=False
    )


def test_halves_share_every_category(tmp_path: Path) -> None:
    """Prompts come from the catalogue with their categories in turn: every other one of them would be one
    half's categories alone.
    """
    record = write_fake_ablation(
        tmp_path / "record", arms={name: ARMS[name] for name in ("start", "medusa1")}
    )
    trace = record.trace(record.of("medusa1")[0])
    turns = tuple(
        replace(prompt, category=("math", "coding")[index % 2]) for index, prompt in enumerate(trace.prompts)
    )
    judged: list[set[str | None]] = []

    def note(trace: Trace, trees: Iterable[DraftTree]) -> list[Replay]:
        judged.append({prompt.category for prompt in trace.prompts})
        return replays(trace, trees)

    changed = Trace(provenance=trace.provenance, prompts=turns)
    with (
        patch("harness.judge.ablation.replays", note),
        patch.object(AblationRecord, "trace", lambda *_: changed),
    ):
        best_rate_columns(record, "medusa1")
    assert judged == [{"math", "coding"}] * 4, "two seeds, two halves each"


def test_a_small_budget_decides_nothing_and_says_so(tmp_path: Path) -> None:
    record = write_fake_ablation(tmp_path / "record", decides_claims=False, answer_tokens=10_000)
    verdicts = training_verdicts(load_claims(), record)
    assert {one.kind for one in verdicts} == {VerdictKind.NOT_TESTED} and all(
        "signs and orders only" in one.reason for one in verdicts
    )
    assert "**Signs and orders only**" in render_ablation(
        record, ablation_rows(record), verdicts, has_curves=False
    )


def test_the_report_shows_every_arm_and_no_place(record: AblationRecord) -> None:
    rows, verdicts = ablation_rows(record), training_verdicts(load_claims(), record)
    text = render_ablation(record, rows, verdicts, has_curves=True)
    for name in ARMS:
        assert f"| {name} " in text
    assert "(curves.png)" in text and "1.6" in text and not holds_absolute_path(text)
    headline = ablation_headline(record, rows, verdicts)
    assert json.loads(json.dumps(headline, allow_nan=False))["arms"]["hard_labels"]["kl"] == 0.084
    assert validate_record(record.folder) == ()


def test_an_unfinished_record_is_shown_as_such_and_kept_out_of_the_readme(tmp_path: Path) -> None:
    record = write_fake_ablation(tmp_path / "record", seal=False)
    assert "**Unfinished**" in render_ablation(record, ablation_rows(record), (), has_curves=False)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin:fake_training -->\n<!-- end:fake_training -->\n")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        update_readme(readme, ablation_block(record, ablation_rows(record), (), elsewhere={}))


def test_curves_are_means_over_seeds(record: AblationRecord, tmp_path: Path) -> None:
    logs = [record.steps(result) for result in record.of("ramped")]
    assert curve(logs, lambda step: step.head_losses[-1]) == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert [mean for _, mean in curve(logs, lambda step: step.backbone_loss)] == pytest.approx(
        [0.01, 0.02, 0.03]
    )
    assert record.steps(record.of("start")[0]) == ()
    one = StepPoint(step=1, loss=1.0, backbone_loss=None, head_losses=(1.0,), lambda_0=1.0, memory_bytes=1)
    assert curve([[one]], lambda step: step.backbone_loss) == []
    pytest.importorskip("matplotlib", reason="pictures need medusa-repro[plots]")
    draw_curves(record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    """A frozen backbone has no curve of its own term, and must not hand its colour on there."""
    record = write_fake_ablation(tmp_path / "record")
    for path in record.folder.glob("steps-medusa1-*.jsonl"):
        path.write_text(re.sub(r'"backbone_loss": [^,]*', '"backbone_loss": null', path.read_text()))
    panels = curves_figure(record).axes
    colours = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in panels]
    assert "medusa1" in colours[0] and any("medusa1" not in panel for panel in colours)
    assert len(set(colours[0].values())) == len(colours[0]) == len(record.spec.arms)
    for panel in colours:
        assert panel.items() <= colours[0].items()


def test_a_planned_arm_twice_or_an_unplanned_one_is_a_fault(tmp_path: Path) -> None:
    record = write_fake_ablation(tmp_path / "record", seal=False)
    lines = (record.folder / "arms.jsonl").read_text()
    (record.folder / "arms.jsonl").write_text(lines + lines.splitlines(keepends=True)[1])
    assert any("each planned arm and seed once" in fault for fault in validate_record(record.folder))


def test_a_spare_head_is_judged_where_there_are_heads_enough(record: AblationRecord) -> None:
    """The second head doubles what a chain yields: with a margin of 3 % it is not spare, with one of 90 % it
    is.
    """
    narrow = SpareHeadForm(
        test="spare_head",
        arm="ramped",
        num_nodes=3,
        with_heads=2,
        without_heads=1,
        margin=0.03,
        reason="a test",
    )
    assert judge_training(narrow, record).kind is VerdictKind.NOT_REPRODUCED
    assert judge_training(narrow.model_copy(update={"margin": 0.9}), record).kind is VerdictKind.REPRODUCED


def test_losses_must_rise_from_head_to_head(record: AblationRecord) -> None:
    """Head 2 loses half a nat more at every position where both have a target."""
    grows = HeadOrderForm(test="head_order", arm="ramped", bound=0.0, reason="a test")
    found = judge_training(grows, record)
    assert found.kind is VerdictKind.REPRODUCED and "0.50 [0.50, 0.50]" in found.ours
    assert judge_training(grows.model_copy(update={"bound": 0.6}), record).kind is VerdictKind.NOT_REPRODUCED


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_ablations_are_whole_and_their_reports_follow_from_them(folder: Path) -> None:
    assert validate_record(folder) == ()
    record = AblationRecord(folder)
    verdicts = training_verdicts(load_claims(), record)
    text = render_ablation(
        record, ablation_rows(record), verdicts, has_curves=(folder / "curves.png").exists()
    )
    assert (folder / "report.md").read_text() == text


@pytest.mark.skipif(not COMMITTED, reason="no ablation is committed")
def test_the_readme_shows_the_committed_ablations_that_decide_claims_each_claim_once() -> None:
    claims, others = load_claims(), newest_ablations(ROOT / "results")
    decided: list[str] = []
    for record in (one for one in others if one.spec.decides_claims):
        verdicts, elsewhere = training_verdicts(claims, record), decided_elsewhere(claims, record, others)
        block = ablation_block(record, ablation_rows(record), verdicts, elsewhere=elsewhere)
        assert shows(ROOT / "results" / "README.md", block)
        decided += [
            one.claim_id
            for one in verdicts
            if one.kind is not VerdictKind.NOT_TESTED and one.claim_id not in elsewhere
        ]
    assert sorted(decided) == sorted(DECIDED)


def test_a_claim_is_decided_by_the_largest_budget_that_tests_it(tmp_path: Path) -> None:
    """A second look at a claim must not stand next to the first as if both were asked; which one counts is
    fixed before it is run.
    """
    few = {name: ARMS[name] for name in ("start", "medusa1", "two_stage", "ramped")}
    suites: dict[str, dict[str, Any]] = {
        "small": {},
        "large": {"answer_tokens": 100_000, "arms": few, "name": "large"},
        "signs": {"answer_tokens": 200_000, "decides_claims": False, "name": "signs"},
        "unlike": {"answer_tokens": 300_000, "name": "unlike"},
    }
    small, large, signs, other = (
        write_fake_ablation(tmp_path / "results" / name / "machine" / "2024", **changes)
        for name, changes in suites.items()
    )
    environment = json.loads((other.folder / "environment.json").read_text())
    (other.folder / "environment.json").write_text(json.dumps({**environment, "heads_sha256": "9" * 64}))
    sealed = json.loads((other.folder / "manifest.json").read_text())
    hashed = {**sealed, "sha256": hashes(other.folder, unsealed=ABLATION.unsealed)}
    (other.folder / "manifest.json").write_text(json.dumps(hashed))
    claims, others = load_claims(), newest_ablations(tmp_path / "results")
    assert len(others) == 4
    elsewhere = decided_elsewhere(claims, small, others)
    controls = {"T2-DirectFine-tuning-q", "Q-sdhard", "Q-sdmem"}
    assert (
        elsewhere == dict.fromkeys(DECIDED - controls - {"DEF-nheads"}, "large")
        and decided_elsewhere(claims, large, others) == {}
    )
    shown = render_readme_ablation(
        small, ablation_rows(small), training_verdicts(claims, small), base=tmp_path, elsewhere=elsewhere
    )
    assert (
        "| Q-sdhard (" in shown
        and "| A2 (" not in shown
        and "Decided by `large`, whose budget is larger: A2," in shown
    )
    assert signs.spec.answer_tokens > large.spec.answer_tokens


def test_the_newest_record_of_an_ablation_stands_for_it(tmp_path: Path) -> None:
    few = {name: ARMS[name] for name in ("start", "medusa1")}
    for name, seal in (("20240101T0-a", True), ("20240301T0-b", True), ("20240601T0-c", False)):
        write_fake_ablation(tmp_path / "fake" / "machine" / name, arms=few, seal=seal)
    assert [record.folder.name for record in newest_ablations(tmp_path)] == ["20240301T0-b"]


def test_the_outcome_is_said_in_words(record: AblationRecord, tmp_path: Path) -> None:
    words = outcome_in_words(ablation_rows(record))
    assert (
        "`ramped` lies 0.0105 [" in words
        and "`direct` 0.0525 [" in words
        and "`hard_labels` 0.0840 [" in words
    )
    assert words.count("(above one)") == 4 and "0.0735 [" in words
    arms = {
        **ARMS,
        "two_stage": replace(ARMS["two_stage"], hits=5),
        "ramped": replace(ARMS["ramped"], original_hits=2),
    }
    words = outcome_in_words(ablation_rows(write_fake_ablation(tmp_path / "record", arms=arms)))
    assert words.count("the interval holds one") == 2 and words.count("(below one)") == 1
