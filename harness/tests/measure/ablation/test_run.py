"""An ablation on a tiny model: its record, resuming arm by arm, what is measured, the report and the command
line.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import tomli_w
import torch
from torch.nn.functional import kl_div, log_softmax

from harness.device.engine import Engine
from harness.device.machine import git_state
from harness.device.prompts import Prompt
from harness.device.trace import Text, kept_states, rank_rows
from harness.errors import ExitCode, UserError
from harness.judge.ablation import ablation_rows, rate_columns
from harness.judge.validate.record import validate_record
from harness.measure.ablation.arm import ArmJob, budgeted, train_arm
from harness.measure.ablation.backbone_change import (
    MeasuredText,
    greedy_text,
    head_text,
    read_text,
    text_change,
)
from harness.measure.ablation.run import AblateOptions, _arms_of_machine, run_ablation
from harness.records.ablation import ARMS_FILE, AblationRecord
from harness.records.machines.identity import machine_slug
from harness.records.provenance import DeviceInfo
from harness.specs.ablation import AblationSpec
from harness.tests.tiny_suite import QUIET, command
from harness.tests.tiny_training import ablation_data, write_corpus
from medusa_impl.engine.backbone import Backbone
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.training.sequences import TrainingSequence

SEQUENCE = TrainingSequence(token_ids=(3, 9, 4, 17, 33, 2, 8, 5, 21), answers=((2, 5), (7, 9)))


@pytest.fixture(scope="module")
def folder(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ablation")
    write_corpus(place / "corpus.safetensors", engine)
    return place


@pytest.fixture(scope="module")
def record(folder: Path, heads_file: Path) -> AblationRecord:
    """The tiny ablation, cut off after its second arm and run again."""
    spec = AblationSpec.model_validate(ablation_data(folder, heads_file))
    options = AblateOptions(results=folder / "results", work=folder / "work", own_process=False)
    trained: list[tuple[str, int]] = []

    def cut(job: ArmJob) -> None:
        if (job.arm, job.seed) == ("hard_labels", 0) and len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((job.arm, job.seed))
        train_arm(job)

    with (
        patch("harness.device.machine.git_state", cache(git_state)),
        patch("harness.measure.ablation.run.train_arm", cut),
    ):
        with pytest.raises(KeyboardInterrupt):
            run_ablation(spec, suite_file=folder / "tiny.toml", options=options, console=QUIET)
        trained.append(("again", 0))
        done = run_ablation(spec, suite_file=folder / "tiny.toml", options=options, console=QUIET)
    trained.remove(("again", 0))
    assert sorted(trained) == sorted(
        (arm, seed) for arm in ("medusa1", "ramped", "hard_labels") for seed in (0, 1)
    ), "no arm twice"
    return AblationRecord(done)


def test_the_record_is_whole_and_says_what_every_arm_did(record: AblationRecord) -> None:
    assert [(result.arm, result.seed) for result in record.results] == list(record.spec.plan())
    assert validate_record(record.folder) == ()
    start, *trained = record.results
    assert start.recipe is None and not start.num_steps
    assert {result.num_answer_tokens for result in trained} == {120}, "an equal budget"
    for result in trained:
        assert result.recipe is not None and result.recipe["seed"] == result.seed
        assert len(record.steps(result)) == result.num_steps == 3 and (result.memory_bytes or 0) > 0
        assert record.trace(result).provenance.heads_hash == result.heads_sha256
        assert len(result.held_out) == len(result.greedy) == len(result.heads) == 5
    assert len({result.heads_sha256 for result in record.results}) == len(record.results)


def test_rates_are_of_this_machine_before_older_records_of_its_name(tmp_path: Path) -> None:
    old = DeviceInfo(kind="cpu", name="box", num_cores=2, num_threads=2, memory_bytes=8_000_000_000)
    here = old.model_copy(update={"details": {"stepping": "1"}})
    for machine, stem in (
        (machine_slug(old), "20260103"),
        (machine_slug(here), "20260101"),
        (machine_slug(here), "20260102"),
        ("cpu-abacus-2c", "20260104"),
    ):
        (tmp_path / "tiny" / machine / stem).mkdir(parents=True)
        (tmp_path / "tiny" / machine / stem / ARMS_FILE).touch()
    assert [path.parent.name for path in _arms_of_machine(tmp_path, device=here)] == [
        "20260102",
        "20260101",
        "20260103",
    ]


def test_a_frozen_backbone_is_the_original_and_a_trained_one_is_not(record: AblationRecord) -> None:
    for result in (*record.of("start"), *record.of("medusa1")):
        assert {text.kl_sum for text in result.held_out} == {0.0} and all(
            text.is_equal for text in result.greedy
        )
        assert all(text.num_agreements == text.num_positions for text in result.held_out)
    for result in record.of("medusa1"):
        assert result.backbone_sha256s is not None and len(set(result.backbone_sha256s)) == 1, (
            "hashed where it was trained"
        )
    for result in (*record.of("ramped"), *record.of("hard_labels")):
        assert result.backbone_sha256s is None
        assert all(text.kl_sum > 0 for text in result.held_out) and result.adapter_sha256


def test_figures_and_report_follow_from_the_record_alone(record: AblationRecord, tmp_path: Path) -> None:
    # as deep as records lie: other ablations are looked for in the results folder above
    moved = shutil.copytree(record.folder, tmp_path / "results" / "tiny_training" / "cpu" / "moved")
    readme = tmp_path / "README.md"
    readme.write_text("# T\n\n<!-- begin:tiny_training -->\n<!-- end:tiny_training -->\n")
    ran = command("report", moved, "--readme", readme)
    assert ran.code == ExitCode.OK, ran.err
    headline = json.loads(ran.out.splitlines()[-1])
    rows = ablation_rows(record)
    assert (
        list(headline["arms"]) == [row.arm for row in rows] == ["start", "medusa1", "ramped", "hard_labels"]
    )
    assert headline["arms"]["ramped"]["tokens_per_step"] == round(
        rate_columns(record, "ramped").interval(record.spec.interval).estimate, 4
    )
    text = (moved / "report.md").read_text()
    assert (
        "| ramped" in text
        and "T2-Medusa-1-q" in text
        and "curves.png" in text
        and (moved / "curves.png").stat().st_size > 5000
    )
    assert "moved/curves.png" in readme.read_text() and "| hard_labels" in readme.read_text()
    assert validate_record(moved) == (), "report and picture are not sealed"
    verdicts = {name: kind for name, kind in headline["verdicts"].items()}
    assert verdicts["T2-Medusa-1-q"] == "reproduced" and verdicts["T2-DirectFine-tuning-q"] == "not tested"


def test_damage_is_found(record: AblationRecord, tmp_path: Path) -> None:
    moved = shutil.copytree(record.folder, tmp_path / "moved")
    lines = (moved / ARMS_FILE).read_text().splitlines(keepends=True)
    (moved / ARMS_FILE).write_text("".join(lines[:-1]))
    assert any("SHA-256" in fault for fault in validate_record(moved)) and any(
        "found 6 arms" in fault for fault in validate_record(moved)
    )
    (moved / ARMS_FILE).write_text("".join(lines)[:-5])
    assert any("truncated last line" in fault for fault in validate_record(moved))


def test_a_finished_run_is_not_resumed_and_another_suite_begins_its_own(
    folder: Path, heads_file: Path, record: AblationRecord, tmp_path: Path
) -> None:
    spec = AblationSpec.model_validate(ablation_data(folder, heads_file))
    told = shutil.copytree(record.folder, tmp_path / "told")
    (told / "report.md").write_text("told")
    options = AblateOptions(results=folder / "results", work=folder / "work", resume=told, own_process=False)
    with pytest.raises(UserError, match="a finished run"):
        run_ablation(spec, suite_file=folder / "tiny.toml", options=options, console=QUIET)


def test_every_arm_trains_in_a_process_of_its_own_from_the_command_line(
    folder: Path, heads_file: Path, tmp_path: Path
) -> None:
    data = ablation_data(
        folder,
        heads_file,
        seeds=[0],
        arms=[{"name": "ramped", "recipe": "ramped.toml"}],
        decides_claims=False,
    )
    suite = folder / "one_training.toml"
    suite.write_text(tomli_w.dumps(data))
    planned = command("ablate", suite, "--dry-run", "--results", tmp_path / "results")
    assert planned.code == ExitCode.OK and json.loads(planned.out.splitlines()[-1])["trainings"] == 1
    assert "the suite's own expectation" in planned.out and not (tmp_path / "results").exists()
    ran = command("ablate", suite, "--results", tmp_path / "results", "--work", tmp_path / "work")
    assert ran.code == ExitCode.OK, ran.err
    headline = json.loads(ran.out.splitlines()[-1])
    assert headline["arms"]["ramped"]["seeds"] == 1 and set(headline["verdicts"].values()) == {"not tested"}
    (made,) = (tmp_path / "results").glob("*/*/*/report.md")
    assert "Signs and orders only" in made.read_text()
    again = command("ablate", suite, "--dry-run", "--results", tmp_path / "results")
    assert f"record {made.parent.name}" in " ".join(again.out.split())


def test_what_an_arms_own_process_refuses_is_raised_here(
    folder: Path, heads_file: Path, tmp_path: Path
) -> None:
    spec = AblationSpec.model_validate(ablation_data(folder, heads_file, answer_tokens=10**6))
    options = AblateOptions(results=tmp_path / "results", work=tmp_path / "work")
    with pytest.raises(UserError, match="answer tokens; need 1000000, the suite's budget"):
        run_ablation(spec, suite_file=folder / "tiny.toml", options=options, console=QUIET)


def test_a_budget_is_met_by_whole_answers_that_the_seed_draws() -> None:
    sequences = [
        TrainingSequence(token_ids=(1, *[2] * (3 + index % 4)), answers=((1, 4 + index % 4),))
        for index in range(30)
    ]
    one, two, other = (budgeted(sequences, answer_tokens=50, seed=seed) for seed in (0, 0, 1))
    assert one == two != other
    for taken in (one, other):
        assert 50 <= sum(sequence.num_targets for sequence in taken) < 50 + 6
    with pytest.raises(UserError, match="need 500"):
        budgeted(sequences, answer_tokens=500, seed=0)


def test_divergence_and_likelihood_against_their_definition() -> None:
    text = MeasuredText("k", None, SEQUENCE)
    original, tuned = (read_text(Backbone(tiny_llama(seed=seed)), text) for seed in (0, 4))
    change = text_change(text, original=original, tuned=tuned)
    rows = [1, 2, 3, 6, 7]
    wanted = torch.tensor([SEQUENCE.token_ids[row + 1] for row in rows])
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([SEQUENCE.token_ids])).logits[0, rows]
            for model in (tiny_llama(), tiny_llama(seed=4))
        ]
    before, after = (log_softmax(one, -1) for one in logits)
    assert change.num_positions == 5
    assert change.kl_sum == pytest.approx(
        float(kl_div(after, before, log_target=True, reduction="sum")), rel=1e-4
    )
    assert change.original_nll_sum == pytest.approx(-float(before.gather(1, wanted[:, None]).sum()), rel=1e-4)
    assert change.tuned_nll_sum == pytest.approx(-float(after.gather(1, wanted[:, None]).sum()), rel=1e-4)
    assert change.num_agreements == int((before.argmax(-1) == after.argmax(-1)).sum())
    same = text_change(text, original=original, tuned=original)
    assert same.kl_sum == 0 and same.num_agreements == 5 and same.tuned_nll_sum == same.original_nll_sum


def test_heads_are_counted_as_traces_count_them(engine: Engine) -> None:
    token_ids = (5, 8, 13, 40, 41, 2, 90, 7)
    text = MeasuredText("k", None, TrainingSequence(token_ids, ((3, 8),)))
    counted = head_text(text, engine.heads, read_text(engine.runner.backbone, text))
    states, _ = kept_states(
        engine.runner.backbone, Text(Prompt("k", None, token_ids[:3]), token_ids[3:], "budget")
    )
    ranks, losses, _ = rank_rows(engine.heads, engine.runner.backbone.lm_head, states, token_ids[3:])
    assert counted.num_targets == (4, 3, 2, 1)
    assert counted.loss_sums == pytest.approx(losses.nan_to_num().sum(0).tolist(), rel=1e-4)
    assert counted.rank_hits == tuple(
        tuple(int((ranks[:, head] == rank).sum()) for rank in range(10)) for head in range(4)
    )


def test_all_ten_ranks_of_a_text_are_those_of_the_sorted_logits() -> None:
    """Counted one by one on random heads, over two answers: head k is asked for the token k places on within
    one answer only.
    """
    torch.manual_seed(6)
    backbone = Backbone(tiny_llama())
    heads = MedusaHeads(
        num_heads=3, num_layers=1, hidden_size=32, vocab_size=TINY_VOCAB, architecture="shared"
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    token_ids = torch.randint(TINY_VOCAB, (480,)).tolist()
    text = MeasuredText("k", None, TrainingSequence(tuple(token_ids), ((5, 200), (210, 480))))
    counted = head_text(text, heads, read_text(backbone, text))
    with torch.no_grad():
        states = tiny_llama().model(torch.tensor([token_ids])).last_hidden_state[0]
        logits = heads(states, lm_head=backbone.lm_head).tolist()
    hits, targets = [[0] * 10 for _ in range(3)], [0] * 3
    for start, end in text.sequence.answers:
        for index in range(
            start, end
        ):  # the token that the backbone's state at index - 1 yields; head k proposes the k-th after it
            for head in range(min(3, end - 1 - index)):
                row = logits[index - 1][head]
                place = sorted(row, reverse=True).index(row[token_ids[index + 1 + head]])
                targets[head] += 1
                if place < 10:
                    hits[head][place] += 1
    assert counted.num_targets == tuple(targets) == (463, 461, 459)
    assert [list(row) for row in counted.rank_hits] == hits
    assert all(min(row) > 0 for row in hits) and all(sum(row) < 200 for row in hits), (
        "ten different counts, most targets after them"
    )


def test_greedy_texts_are_compared_up_to_where_they_part() -> None:
    assert greedy_text("k", (1, 2, 3), original=(1, 2, 4, 5)).num_shared == 2
    assert greedy_text("k", (1, 2), original=(1, 2)).is_equal
    assert not greedy_text("k", (1, 2), original=(1, 2, 3)).is_equal
