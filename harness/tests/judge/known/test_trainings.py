"""Findings on trainings, on made-up ablations with one figure changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness.judge.ablation import Columns, kl_of
from harness.judge.claims.ablation import judge_training
from harness.judge.claims.ablation_parts import (
    check_step_cost,
    divergence_part,
    gain_parts,
    recipe_of,
    worse_part,
)
from harness.judge.claims.findings import NotTestable
from harness.judge.judgement import VerdictKind
from harness.records.ablation import AblationRecord, ArmResult
from harness.specs.forms import training as forms
from harness.tests.fake_ablation import ARMS, write_fake_ablation

YES, NO, OPEN = VerdictKind.REPRODUCED, VerdictKind.NOT_REPRODUCED, VerdictKind.INCONCLUSIVE
WHY = "made up for a test"
Write = Callable[..., AblationRecord]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> AblationRecord:
    return write_fake_ablation(tmp_path_factory.mktemp("training") / "record")


def with_arm(folder: Path, arm: str, **changes: Any) -> AblationRecord:
    return write_fake_ablation(folder / "record", arms={**ARMS, arm: replace(ARMS[arm], **changes)})


def hurts(**changes: Any) -> forms.HurtsMoreForm:
    data = {"test": "hurts_more", "arm": "direct", "over": "ramped", "bound": 0.0, "reason": WHY}
    return forms.HurtsMoreForm.model_validate({**data, "on_references": False, **changes})


def test_the_memory_of_an_arm_is_its_mean_over_anothers(tmp_path: Path) -> None:
    def form(margin: float) -> forms.LittleMemoryForm:
        data = {"test": "little_memory", "arm": "ramped", "over": "medusa1", "reason": WHY}
        return forms.LittleMemoryForm.model_validate({**data, "margin": margin})

    record = with_arm(tmp_path, "ramped", memory_mb=1250)
    exact, less = judge_training(form(0.25), record), judge_training(form(0.24), record)
    assert (exact.kind, less.kind) == (YES, NO)  # as much as is allowed is allowed
    assert exact.ours == "+25.0 % memory"
    assert exact.reason == (
        "ramped takes 1,250 MB at most, medusa1 1,000 MB (cpu, mean over seeds); up to 25% more: holds"
    )


@pytest.mark.parametrize(("kl", "kind"), [(0.008, YES), (0.02, NO), (0.012, OPEN)])
def test_a_divergence_is_held_against_its_bound(tmp_path: Path, kl: float, kind: VerdictKind) -> None:
    """Texts differ by a fifth either way and seeds by a tenth: between them the bound is open."""
    found = divergence_part("ramped", with_arm(tmp_path, "ramped", kl=kl), max_kl=0.0125)
    assert found.kind is kind
    assert found.ours.startswith(f"ramped {1.05 * kl:.4f} nats [")
    assert f"(by seed {kl:.4f}, {1.1 * kl:.4f})" in found.reason


def test_a_seed_that_says_otherwise_leaves_a_divergence_open(record: AblationRecord) -> None:
    interval_holds_but_a_seed_does_not = divergence_part("ramped", record, max_kl=0.01099)
    assert interval_holds_but_a_seed_does_not.kind is OPEN
    assert divergence_part("start", record, max_kl=0.0001).kind is YES


def test_an_arm_that_is_further_off_by_more_than_the_bound(record: AblationRecord) -> None:
    def part(bound: float, arm: str = "direct", over: str = "ramped") -> Any:
        form = hurts(arm=arm, over=over)
        return worse_part(form, record, kl_of, bound=bound, description="further", references=False)

    assert part(0.0).kind is YES and part(0.1).kind is NO
    assert part(0.0, "ramped", "direct").kind is NO
    assert part(0.0).ours.startswith("further: 0.0420 nats [")  # 1.05 x (0.05 - 0.01)
    assert part(0.0).reason == (
        "direct is further than ramped, by more than 0 nats a token: holds (by seed 0.0400, 0.0440)"
    )
    assert part(0.0, "direct", "start").reason.endswith("holds (by seed 0.0500, 0.0550)")


def test_texts_by_others_are_judged_apart(tmp_path: Path) -> None:
    """An arm that is further off and predicts others' texts as well hurts no more there."""
    same = with_arm(tmp_path, "direct", reference_nll=0.52)  # as ramped on these texts: 0.5 + 2 x 0.01
    assert judge_training(hurts(), same).kind is YES
    both = judge_training(hurts(on_references=True), same)
    assert both.kind is not YES
    assert "worse at predicting texts by others" in both.reason


def test_a_gain_is_given_on_both_texts_with_its_seeds(record: AblationRecord) -> None:
    from harness.judge.ablation import rate_columns

    own, original = gain_parts(record, "ramped", over="medusa1", bound=1.0, columns=rate_columns)
    assert own.kind is original.kind is YES
    ratio = float(own.ours.split("x")[0])
    assert own.reason == f"holds on each one's own text (by seed {ratio:.3f}, {ratio:.3f})"
    assert own.ours.endswith("] on each one's own text") and own.ours.split("x")[0] == f"{ratio:.3f}"
    low, high = own.ours.split("[")[1].split("]")[0].split(", ")
    assert len(low) == len(high) == 5 and float(low) < ratio < float(high)
    assert original.ours.endswith("on the original model's text")
    back, _ = gain_parts(record, "medusa1", over="ramped", bound=1.0, columns=rate_columns)
    assert back.kind is NO
    above_all, _ = gain_parts(record, "ramped", over="start", bound=5.0, columns=rate_columns)
    assert above_all.kind is NO


def test_more_tokens_says_where_and_how_much_is_repeated(record: AblationRecord) -> None:
    for trees, where in (
        ("fixed", f"one tree of {len(record.tree.paths)} paths"),
        ("best", "each one's own best tree"),
    ):
        data = {"test": "more_tokens", "arm": "ramped", "over": "medusa1", "bound": 1.0, "reason": WHY}
        form = forms.MoreTokensForm.model_validate({**data, "trees": trees})
        found = judge_training(form, record)
        assert found.reason.startswith(f"tokens/step of ramped over medusa1 at {where} above 1, where")
        assert "4-grams repeated within an answer: 0.0 % against 0.0 %" in found.reason


def test_what_is_repeated_is_told_of_each_arm(
    record: AblationRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(record: AblationRecord, arm: str) -> Columns:
        share = {"ramped": 0.25, "medusa1": 0.125}[arm]
        return Columns(np.full(4, share), np.ones(4), (share,))

    monkeypatch.setattr("harness.judge.claims.ablation.repetition_columns", repeated)
    data = {"test": "more_tokens", "arm": "ramped", "over": "medusa1", "trees": "fixed", "bound": 1.0}
    found = judge_training(forms.MoreTokensForm.model_validate({**data, "reason": WHY}), record)
    assert found.reason.endswith("4-grams repeated within an answer: 25.0 % against 12.5 %")


def test_a_backbone_that_changed_in_any_direction_has_changed(record: AblationRecord) -> None:
    form = forms.UnchangedForm.model_validate({"test": "unchanged", "arm": "medusa1", "reason": WHY})
    same = judge_training(form, record)
    assert (same.kind, same.ours) == (YES, "0 of 2 trainings changed a tensor")
    results = [
        result.model_copy(update={"backbone_sha256s": ("d" * 64, "b" * 64)})
        if result.arm == "medusa1"
        else result
        for result in record.results
    ]
    changed = AblationRecord(record.folder)
    changed.__dict__["results"] = tuple(results)
    found = judge_training(form, changed)
    assert (found.kind, found.ours) == (NO, "2 of 2 trainings changed a tensor")
    changed.__dict__["results"] = tuple(
        result.model_copy(update={"backbone_sha256s": None}) if result.seed == 1 else result
        for result in record.results
    )
    with pytest.raises(NotTestable, match="does not say what training medusa1 did"):
        judge_training(form, changed)


def test_losses_of_an_arm_rise_from_head_to_head(record: AblationRecord) -> None:
    def form(arm: str) -> forms.HeadOrderForm:
        return forms.HeadOrderForm.model_validate(
            {"test": "head_order", "arm": arm, "bound": 0.0, "reason": WHY}
        )

    found = judge_training(form("ramped"), record)
    assert found.kind is YES and found.ours.startswith("rise in nats from head to head: 0.50 [")
    assert found.reason.startswith("the mean loss of ramped rises by more than 0 nats")
    with pytest.raises(NotTestable, match="the record has no arm nobody"):
        judge_training(form("nobody"), record)


@pytest.mark.parametrize(("num_heads", "rises"), [(1, None), (2, 1), (3, 2)])
def test_an_order_of_heads_needs_two(record: AblationRecord, num_heads: int, rises: int | None) -> None:
    changed = AblationRecord(record.folder)

    def trace(result: ArmResult) -> Any:
        nll = np.arange(num_heads) + np.zeros((4, 1))
        prompts = [SimpleNamespace(key=f"p{i}", nll=nll, num_heads=num_heads) for i in range(3)]
        return SimpleNamespace(prompts=prompts)

    changed.__dict__["trace"] = trace
    form = forms.HeadOrderForm.model_validate(
        {"test": "head_order", "arm": "ramped", "bound": 0.0, "reason": WHY}
    )
    if rises is None:
        with pytest.raises(NotTestable, match="no losses of two heads or more"):
            judge_training(form, changed)
    else:
        assert judge_training(form, changed).ours.count("1.00 [1.00, 1.00]") == rises


def test_a_spare_head_needs_heads_enough(record: AblationRecord) -> None:
    def form(arm: str, heads: int) -> forms.SpareHeadForm:
        data = {"test": "spare_head", "arm": arm, "num_nodes": 3, "margin": 0.05, "reason": WHY}
        return forms.SpareHeadForm.model_validate({**data, "with_heads": heads, "without_heads": 1})

    for arm, has in (("ramped", 2), ("nobody", 0)):
        for heads in (3, 4):
            with pytest.raises(NotTestable, match=f"of {arm} have {has} heads, the claim is about {heads}"):
                judge_training(form(arm, heads), record)
    assert "ramped with 2 heads against 1, 3 nodes each" in judge_training(form("ramped", 2), record).reason


RECIPE = {"num_layers": 1, "num_heads": 5, "architecture": "own"}
TWO = {
    "backbone": "lora",
    "lora": {"lm_head": True},
    "architecture": "shared",
    "heads_lm_head": "original",
}


def costs(record: AblationRecord, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    changed = AblationRecord(record.folder)
    recipes = {"ramped": ours, "medusa1": theirs}
    changed.__dict__["results"] = tuple(
        result.model_copy(update={"recipe": recipes.get(result.arm, result.recipe)})
        for result in record.results
    )
    check_step_cost(changed, "ramped", over="medusa1")


@pytest.mark.parametrize(
    ("name", "value"), [("num_heads", 4), ("num_heads", 6), ("num_layers", 2), ("num_layers", 0)]
)
@pytest.mark.parametrize("swap", [False, True])
def test_heads_of_other_shapes_cost_another_step(
    record: AblationRecord, name: str, value: int, swap: bool
) -> None:
    pair = [RECIPE, {**RECIPE, name: value}]
    costs(record, RECIPE, RECIPE)
    ours, theirs = pair[::-1] if swap else pair
    with pytest.raises(NotTestable, match=f"the heads of ramped and medusa1 differ in {name}"):
        costs(record, ours, theirs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", "frozen"),
        ("backbone", "whole"),
        ("lora", {"lm_head": False}),
        ("lora", {}),
        ("heads_lm_head", "adapted"),
        ("heads_lm_head", "tuned"),
    ],
)
def test_two_lm_heads_are_read_where_all_of_it_is_so(record: AblationRecord, name: str, value: Any) -> None:
    shared = {"architecture": "shared"}
    with pytest.raises(NotTestable, match="a step of ramped reads two LM heads"):
        costs(record, TWO, shared)
    with pytest.raises(NotTestable, match="a step of medusa1 reads two LM heads"):
        costs(record, shared, TWO)
    costs(record, {**TWO, name: value}, shared)
    own = {"architecture": "own"}
    costs(record, {**TWO, **own}, own)


def test_a_recipe_is_the_arms_own(record: AblationRecord) -> None:
    assert recipe_of(record, "hard_labels") == {"num_layers": 1, "target": "tokens", "seed": 0}
    assert recipe_of(record, "start") == {}
    with pytest.raises(NotTestable, match="no arm nobody"):
        recipe_of(record, "nobody")
