"""A run's page: what it shows is what the record holds, nothing of others is markup, and it stays small."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from harness.files import write_json
from harness.judge.judgement import VerdictKind
from harness.records.run import TOKENS_FILE, RunRecord, TokenTexts
from harness.report.pages.run import (
    MOST_GENERATIONS,
    accepted_paths,
    chosen_generations,
    player_data,
    render_page,
)
from harness.tests.fake_judgement import VERDICTS, judge, verdict
from harness.tests.fake_record import FakeParts, write_fake_record
from medusa_impl.tree import DraftTree


def with_texts(folder: Path, **options: Any) -> RunRecord:
    """A made-up record whose tokens read as their ids."""
    record = write_fake_record(folder, **{"rounds": 1, "num_prompts": 6, **options})
    ids = {token for one in record.generations for token in one.token_ids}
    write_json(folder / TOKENS_FILE, TokenTexts(texts={token: f" {token}" for token in ids}))
    return RunRecord(folder)


def test_of_each_arm_the_first_the_worst_and_the_median_are_shown(tmp_path: Path) -> None:
    record = with_texts(tmp_path / "a")
    chosen = chosen_generations(record)
    arms = [arm.name for arm in record.suite.arms if arm.method == "medusa"]
    assert {one.trial.arm for one, _ in chosen} == set(arms) and len(chosen) <= MOST_GENERATIONS
    for arm in arms:
        mine = [one for one in record.generations if one.trial.arm == arm]
        rates = {one.trial: (one.num_tokens - 1) / one.num_steps for one in mine}
        shown = {why: one for one, why in chosen if one.trial.arm == arm}
        assert shown["the first of its arm"] == mine[0]
        of_shown = [rates[one.trial] for one, _ in chosen if one.trial.arm == arm]
        assert min(of_shown) == min(rates.values()) and statistics.median_low(rates.values()) in of_shown


def test_the_player_holds_the_records_tokens_steps_and_times(tmp_path: Path) -> None:
    record = with_texts(tmp_path / "a")
    data = player_data(record)
    assert data is not None
    for shown, (one, _) in zip(data["generations"], chosen_generations(record), strict=True):
        assert shown["ids"] == list(one.token_ids) and shown["kept"] == list(one.step_tokens)
        assert sum(shown["kept"]) == len(shown["ids"]) - 1
        assert shown["ms"] == pytest.approx([1000 * seconds for seconds in one.step_times_s], abs=0.006)
        assert all(str(token) in {str(key) for key in data["texts"]} for token in shown["ids"])
        assert shown["vanilla"] is None or shown["vanilla"]["arm"].startswith("vanilla")
    assert player_data(write_fake_record(tmp_path / "b", rounds=1, num_prompts=2)) is None, "no token texts"


def test_lit_paths_are_nodes_of_the_tree_as_long_as_what_was_accepted(tmp_path: Path) -> None:
    record = with_texts(tmp_path / "a")
    seen = 0
    for one in record.generations:
        if record.suite.arm(one.trial.arm).method != "medusa":
            continue
        paths, tree = accepted_paths(record, one), record.trees[one.trial.arm].tree()
        if paths is None:
            assert one.trial.seed is not None or one.trial.arm not in ("chain", "cartesian", "optimised_64")
            continue
        seen += 1
        assert [len(path) for path in paths] == [kept - 1 for kept in one.step_tokens]
        assert all(tuple(path) in tree.index for path in paths)
    assert seen == 18, "three greedy arms on six prompts"


def test_trees_are_drawn_without_two_nodes_at_one_place(tmp_path: Path) -> None:
    data = player_data(with_texts(tmp_path / "a"))
    assert data is not None and data["trees"]
    for tree in data["trees"].values():
        places = {(node["x"], node["y"]) for node in tree["nodes"]}
        assert len(places) == len(tree["nodes"])
        width, height = tree["size"]
        assert all(0 <= node["x"] <= width and 0 <= node["y"] <= height for node in tree["nodes"])
        paths = [tuple(node["path"]) for node in tree["nodes"]]
        for node, path in zip(tree["nodes"], paths, strict=True):
            assert (node["parent"] is None) == (path == ())
            assert path == () or paths[node["parent"]] == path[:-1]
        DraftTree.from_paths(paths)


def test_planted_markup_is_text(tmp_path: Path) -> None:
    """In names of arms' prompts, claims, reasons, figures, checks and tokens."""
    evil = "</script><img src=x onerror=alert(1)>\u202e"

    def spoil(parts: FakeParts) -> None:
        parts.edit(lambda one: {"category": evil})

    record = write_fake_record(tmp_path / "a", rounds=1, num_prompts=2, spoil=spoil)
    ids = {token for one in record.generations for token in one.token_ids}
    write_json(tmp_path / "a" / TOKENS_FILE, TokenTexts(texts=dict.fromkeys(ids, evil)))
    planted = verdict(evil, stated=evil, reason=evil, ours=evil, place=evil, paper_figure=evil)
    judgement = judge(record).model_copy(update={"verdicts": (planted,), "checks": ()})
    page = render_page(RunRecord(tmp_path / "a"), judgement)
    assert "<img" not in page and page.count("</script>") == 2 and "\u202e" not in page
    assert "onerror=alert" in page, "it is there to be read"
    data = json.loads(re.findall(r'id="player-data">(.*?)</script>', page, flags=re.S)[0])
    assert set(data["texts"].values()) == {"</script><img src=x onerror=alert(1)>\\u202e"}
    assert re.search(r"(?:src|href)=\"(?!report\.md\")", page) is None, "nothing is loaded or linked"


def test_the_page_tells_verdicts_with_their_evidence(tmp_path: Path) -> None:
    record = with_texts(tmp_path / "a")
    judgement = judge(record).model_copy(update={"verdicts": VERDICTS})
    page = render_page(record, judgement)
    shown = [one for one in VERDICTS if one.kind is not VerdictKind.NOT_TESTED]
    assert page.count("<details>") == len({(one.ours, one.reason, one.kind, one.form) for one in shown})
    assert "The interval lies above 1." in page and "BIG-1" not in page
    assert "<h2>Arms</h2>" in page and "<h2>Acceptance by depth</h2>" in page and "<h2>Checks</h2>" in page
    speedup = next(one.speedup for one in judgement.comparisons if one.arm == "chain")
    assert f'data-value="{speedup.estimate}"' in page


def test_a_page_of_ten_thousand_generations_stays_small(tmp_path: Path) -> None:
    record = with_texts(tmp_path / "a")
    many = tuple(
        one.model_copy(update={"order": number})
        for number, one in enumerate(record.generations * (10_000 // len(record.generations) + 1))
    )[:10_000]
    record.generations = many
    sound = judge(with_texts(tmp_path / "b")).model_copy(update={"checks": ()})
    page = render_page(record, sound)
    assert len(page.encode()) < 3_000_000 and "of 10,000 generations" in page
