"""Transfer forms of a run, given themselves instead of through the registry, on figures worked out here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.compose.replay import replay
from harness.judge.claims.evidence import Evidence, paired_counts, replay_counts, search_split
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.run import judge_transfer
from harness.judge.claims.verdicts import evaluate_claims
from harness.judge.judgement import Divergence, VerdictKind
from harness.judge.metrics import comparisons
from harness.judge.parity import parity_report
from harness.records.run import ArmTree
from harness.records.trace import Trace
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.forms import claims as forms
from harness.specs.forms.literal import LiteralForm
from harness.tests.fake_record import FakeParts, fake_rounding, write_fake_record
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import random_dense

YES, NO, OPEN, UNTESTED = (
    VerdictKind.REPRODUCED,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.NOT_TESTED,
)
WHY = "made up for a test"


def evidence_on(folder: Path, **options: Any) -> Evidence:
    record = write_fake_record(folder, **{"rounds": 1, **options})
    return Evidence(record=record, arms=(), comparisons=comparisons(record), parity=parity_report(record))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return evidence_on(tmp_path_factory.mktemp("run"), num_prompts=8)


def parity_of(evidence: Evidence, *rows: tuple[str, str], **changes: Any) -> Evidence:
    """Evidence whose texts part so: arm and kind of each divergence, all at token 3 with a gap of 0.5."""
    found = tuple(
        Divergence(arm=arm, reference="vanilla", prompt_key=f"p{i}", position=3, gap=0.5, kind=kind)  # type: ignore[arg-type]
        for i, (arm, kind) in enumerate(rows)
    )
    parity = evidence.parity.model_copy(update={"divergences": found, **changes})
    return dataclasses.replace(evidence, parity=parity)


def lossless(rate: float = 1e-4) -> forms.LosslessForm:
    return forms.LosslessForm(test="lossless", max_tie_rate=rate, reason=WHY)


def test_losslessness_counts_ties_bugs_and_tokens(evidence: Evidence) -> None:
    greedy = [
        one for one in evidence.record.generations if one.trial.arm in ("chain", "cartesian", "optimised_64")
    ]
    tokens = sum(one.num_tokens for one in greedy)
    start = f"{len(greedy)} generations of 3 arms"
    clean = judge_transfer(lossless(), evidence=evidence)
    assert (clean.kind, clean.ours) == (YES, f"{start}, 0 ties, 0 other divergences")
    assert clean.reason == f"all match vanilla but for 0 shown ties; 1 allowed in {tokens:,} tokens"
    mixed = parity_of(
        evidence, ("chain", "tie"), ("cartesian", "bug"), ("chain", "bug"), ("hf_greedy", "bug")
    )
    found = judge_transfer(lossless(), evidence=mixed)
    assert (found.kind, found.ours) == (NO, f"{start}, 1 ties, 2 other divergences")
    assert found.reason == "cartesian differs from vanilla at token 3 of p1, with a gap of 0.5"
    none = mixed.parity.divergences[1].model_copy(update={"gap": None})
    unknown = parity_of(evidence, divergences=(none,))
    assert judge_transfer(lossless(), evidence=unknown).reason.endswith("with no known gap")


@pytest.mark.parametrize(("num_ties", "kind"), [(1, YES), (2, OPEN), (3, OPEN)])
def test_one_tie_is_always_allowed_and_two_need_the_tokens(
    evidence: Evidence, num_ties: int, kind: VerdictKind
) -> None:
    ties = parity_of(evidence, *[("chain", "tie")] * num_ties)
    found = judge_transfer(lossless(), evidence=ties)
    assert found.kind is kind
    allowed = judge_transfer(lossless(3.2 / _tokens(evidence)), evidence=ties)
    assert allowed.kind is YES and "; 3 allowed in" in allowed.reason
    if kind is OPEN:
        assert found.reason.startswith(f"{num_ties} ties in ") and found.reason.endswith("explains 1")


def _tokens(evidence: Evidence) -> int:
    greedy = ("chain", "cartesian", "optimised_64")
    return sum(one.num_tokens for one in evidence.record.generations if one.trial.arm in greedy)


def test_nothing_compared_leaves_losslessness_and_speed_untested(evidence: Evidence) -> None:
    nothing = parity_of(evidence, num_compared=0)
    for form in (lossless(), forms.FasterForm(test="faster", arm="chain", bound=1.0, reason=WHY)):
        with pytest.raises(NotTestable):
            judge_transfer(form, evidence=nothing)


def test_an_arm_is_faster_where_its_texts_hold(evidence: Evidence) -> None:
    form = forms.FasterForm(test="faster", arm="chain", bound=1.0, reason=WHY)
    found = judge_transfer(form, evidence=evidence)
    assert found.kind is YES and found.ours.endswith("]; lossless")
    assert "tokens/s of chain over vanilla above 1x: holds; no outputs differ" in found.reason
    of_others = judge_transfer(form, evidence=parity_of(evidence, ("cartesian", "bug")))
    assert of_others == found
    bad = judge_transfer(form, evidence=parity_of(evidence, ("chain", "bug"), ("chain", "tie")))
    assert bad.kind is NO and bad.ours.endswith("; not lossless") and "; 1 outputs differ" in bad.reason
    assert judge_transfer(form, evidence=parity_of(evidence, ("chain", "tie"))) == found


def half(gap: float) -> Callable[[FakeParts], object]:
    """Part one text at a known gap, with a measured rounding of 0.125."""

    def spoil(parts: FakeParts) -> None:
        assert parts.trace is not None
        prompts = [
            dataclasses.replace(one, gaps=np.full(one.num_kept_tokens, gap)) for one in parts.trace.prompts
        ]
        parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))
        parts.rounding = fake_rounding(0.125)
        parts.edit(
            lambda one: {"token_ids": (*one.token_ids[:5], one.token_ids[5] + 1, *one.token_ids[6:])},
            arm="chain",
            limit=1,
        )

    return spoil


def test_half_precision_with_a_bug_is_told_as_a_bug(tmp_path: Path) -> None:
    form = forms.FasterForm(test="faster", arm="chain", bound=1.0, reason=WHY)
    bug = evidence_on(tmp_path / "bug", spoil=half(0.3), dtype="bfloat16", num_prompts=4)
    found = judge_transfer(form, evidence=bug)
    assert found.kind is NO and found.ours.endswith("not lossless") and "1 outputs differ" in found.reason
    tie = evidence_on(tmp_path / "tie", spoil=half(0.2), dtype="bfloat16", num_prompts=4)
    held = judge_transfer(form, evidence=tie)
    assert held.ours.endswith("lossless up to ties") and "up to 1 ties in" in held.reason


def rung(**changes: Any) -> forms.LadderStepForm:
    data = {"test": "ladder_step", "arm": "cartesian", "over": "chain", "bound": 1.0, "reason": WHY}
    return forms.LadderStepForm.model_validate({**data, **changes})


def sums(evidence: Evidence, arm: str, *, timed: bool) -> tuple[float, float, float]:
    rows = [
        one for one in evidence.record.generations if one.trial.arm == arm and (one.timing_valid or not timed)
    ]
    return (
        sum(one.num_tokens - 1 for one in rows),
        sum(one.num_steps for one in rows),
        sum(one.decode_s for one in rows),
    )


def unlike(parts: FakeParts) -> None:
    """Leave one text of each arm out of the times, so that counts and times are of other prompts."""
    parts.edit(lambda one: {"timing_valid": False}, arm="cartesian", limit=2)
    parts.edit(lambda one: {"timing_valid": False}, arm="typical", limit=3)


def test_a_rung_is_rates_over_rates(tmp_path: Path) -> None:
    evidence = evidence_on(tmp_path, num_prompts=8, spoil=unlike)
    found = judge_transfer(rung(), evidence=evidence)
    own, base = (sums(evidence, arm, timed=False) for arm in ("cartesian", "chain"))
    tokens_per_step = own[0] / own[1] / (base[0] / base[1])
    assert found.ours.startswith(f"tokens/step {tokens_per_step:.2f}x [")
    shared = paired_counts(evidence, "cartesian", over="chain", timed=True)
    fast = (
        shared.tokens[0].sum() / shared.seconds[0].sum() / (shared.tokens[1].sum() / shared.seconds[1].sum())
    )
    assert f"; speed {fast:.2f}x [" in found.ours
    assert len(shared.tokens[0]) == 6
    sizes = {arm: len(evidence.record.trees[arm].paths) for arm in ("cartesian", "chain")}
    assert found.reason.endswith(f"(bound 1; {sizes['chain']} to {sizes['cartesian']} nodes)")
    over_vanilla = judge_transfer(rung(arm="chain", over="vanilla"), evidence=evidence)
    assert over_vanilla.reason.endswith(f"(bound 1; 1 to {sizes['chain']} nodes)")


def test_a_rung_has_a_tree_of_no_more_than_the_allowed_nodes(evidence: Evidence) -> None:
    nodes = len(evidence.record.trees["cartesian"].paths)
    assert judge_transfer(rung(max_nodes=nodes), evidence=evidence).kind is not UNTESTED
    for limit in (nodes - 1, nodes - 2):
        with pytest.raises(NotTestable, match=f"a tree has {nodes} nodes, and this rung"):
            judge_transfer(rung(max_nodes=limit), evidence=evidence)
    with pytest.raises(NotTestable, match="no tree of arm vanilla"):
        judge_transfer(rung(arm="vanilla", over="chain"), evidence=evidence)


def test_a_rung_without_step_times_is_tested_all_the_same(tmp_path: Path) -> None:
    bare = evidence_on(tmp_path, num_prompts=4, omit=("step_costs.json",))
    known = dataclasses.replace(bare, calibration=bare.trace())
    assert judge_transfer(rung(slack=1.5), evidence=known).figure_kind == "measured"


@pytest.mark.parametrize(("slack", "is_fixed"), [(1.2, True), (3.0, False)])
def test_a_rung_is_fixed_where_its_cost_outweighs_the_promise(
    evidence: Evidence, slack: float, is_fixed: bool
) -> None:
    """Expected speed is what the calibration text promises over what the sizes cost."""
    trace = evidence.trace()
    own, over = (evidence.record.trees[arm].tree() for arm in ("cartesian", "chain"))
    gain = replay(trace, own).tokens_per_step / replay(trace, over).tokens_per_step
    assert evidence.record.step_costs is not None
    costs = {
        one.num_nodes: float(np.median(one.backbone_s))
        for one in evidence.record.step_costs.costs
        if one.arm is None
    }
    sizes = sorted(costs)
    own_s, over_s = (
        np.interp(tree.num_nodes, sizes, [costs[size] for size in sizes]) for tree in (own, over)
    )
    bound = 1.6 * gain / (own_s / over_s)  # so it is missed by a factor of 1.6
    known = dataclasses.replace(evidence, calibration=trace)
    found = judge_transfer(rung(slack=slack, bound=bound), evidence=known)
    assert (found.kind is VerdictKind.NOT_DECIDABLE) == is_fixed
    if is_fixed:
        assert found.ours == f"expected speed {gain * over_s / own_s:.2f}x"
        assert f"a step of {own.num_nodes} nodes costs {own_s / over_s:.2f} times one of" in found.reason
        assert f"promises {gain:.2f} times the tokens/step" in found.reason


def over(**changes: Any) -> forms.RateOverForm:
    data = {"test": "rate_over", "arm": "typical", "over": "optimised_64", "reason": WHY}
    return forms.RateOverForm.model_validate({**data, **changes})


def test_a_rate_over_another_is_given_in_steps_and_in_seconds(tmp_path: Path) -> None:
    evidence = evidence_on(tmp_path, num_prompts=8, spoil=unlike, jitter=0)
    found = judge_transfer(over(), evidence=evidence)
    own, base = (sums(evidence, arm, timed=False) for arm in ("typical", "optimised_64"))
    assert found.ours.startswith(f"tokens/step {own[0] / own[1] / (base[0] / base[1]):.2f}x [")
    pairs = paired_counts(evidence, "typical", over="optimised_64", timed=True)
    speed = pairs.tokens[0].sum() / pairs.seconds[0].sum() / (pairs.tokens[1].sum() / pairs.seconds[1].sum())
    assert f"; speed {speed:.2f}x [" in found.ours
    assert "at one tree, above 1x: " in found.reason


@pytest.mark.parametrize(("gain", "kind"), [(0.25, YES), (0.2, NO), (0.3, NO)])
def test_a_stated_gain_is_met_to_within_its_margin(tmp_path: Path, gain: float, kind: VerdictKind) -> None:
    def spoil(parts: FakeParts) -> None:
        shape = {"token_ids": (9,) * 41, "ended_by": "budget"}
        parts.suite_text = parts.suite_text.replace("max_new_tokens = 40", "max_new_tokens = 41")
        parts.trace = None
        parts.edit(
            lambda one: {**shape, "step_tokens": (2,) * 20, "step_times_s": (0.1,) * 20}, arm="optimised_64"
        )
        steps = (*(3,) * 8, *(2,) * 8)  # 16 steps for 20: a gain of 0.25
        parts.edit(lambda one: {**shape, "step_tokens": steps, "step_times_s": (0.1,) * 16}, arm="typical")

    evidence = evidence_on(tmp_path, num_prompts=8, spoil=spoil)
    found = judge_transfer(over(gain=gain, margin=0.02), evidence=evidence)
    assert found.kind is kind and found.ours.startswith("tokens/step 1.25x [1.25, 1.25]; speed 1.25x [1.25")
    assert f"{1 + gain:g}x to within 2% of it, by the 90 % interval" in found.reason


def test_other_trees_are_not_compared(tmp_path: Path) -> None:
    def spoil(parts: FakeParts) -> None:
        parts.trees["typical"] = ArmTree(paths=DraftTree.chain(2).paths, origin="another")

    with pytest.raises(NotTestable, match="typical and optimised_64 decode with other trees"):
        judge_transfer(over(), evidence=evidence_on(tmp_path, num_prompts=4, spoil=spoil))


def sparse(**changes: Any) -> forms.SparseBeatsDenseForm:
    data = {"test": "sparse_beats_dense", "tree": "optimised_64", "max_nodes": 64, "dense_nodes": 32}
    return forms.SparseBeatsDenseForm.model_validate(
        {**data, "num_dense": 5, "seed": 3, "bound": 1.0, "reason": WHY, **changes}
    )


def test_a_sparse_tree_is_held_against_all_dense_ones_together(evidence: Evidence) -> None:
    found = judge_transfer(sparse(), evidence=evidence)
    trace, rng = evidence.trace(), np.random.default_rng(3)
    dense = [replay(trace, random_dense(32, num_heads=5, rng=rng)) for _ in range(5)]
    own = replay(trace, evidence.record.trees["optimised_64"].tree())
    tokens, steps = (sum(replay_counts(one)[i].sum() for one in dense) for i in (0, 1))
    below = sum(one.tokens_per_step < own.tokens_per_step for one in dense)
    assert found.ours.startswith(f"{own.tokens_per_step / (tokens / steps):.2f}x [")
    assert (
        f"yields {own.tokens_per_step:.2f} tokens/step, 5 random dense trees of about 32 nodes yield "
        f"{tokens / steps:.2f} together ({below} of them less than the sparse one)"
    ) in found.reason
    poor = judge_transfer(sparse(tree="chain", dense_nodes=64), evidence=evidence)
    chain = replay(trace, evidence.record.trees["chain"].tree()).tokens_per_step
    rng = np.random.default_rng(3)
    rivals = [replay(trace, random_dense(64, num_heads=5, rng=rng)).tokens_per_step for _ in range(5)]
    assert f"({sum(one < chain for one in rivals)} of them less" in poor.reason
    for nodes in (63, 62):
        with pytest.raises(NotTestable, match=f"has 64 nodes, allowed {nodes}"):
            judge_transfer(sparse(max_nodes=nodes), evidence=evidence)


@pytest.mark.parametrize("heads", [6, 7])
def test_heads_that_are_not_there_cannot_be_spared(evidence: Evidence, heads: int) -> None:
    data = {"test": "extra_head", "num_nodes": 8, "without_heads": 4, "max_rank": 10, "margin": 0.1}
    form = forms.ExtraHeadForm.model_validate({**data, "with_heads": heads, "reason": WHY})
    with pytest.raises(NotTestable, match=f"the trace has 5 heads, the claim is about {heads}"):
        judge_transfer(form, evidence=evidence)
    five = form.model_copy(update={"with_heads": 5})
    assert "tokens/step with 5 heads" in judge_transfer(five, evidence=evidence).reason


def test_evidence_is_of_the_arm_that_was_asked(evidence: Evidence) -> None:
    for arm in ("cartesian", "chain", "typical", "hf_greedy"):
        assert evidence.comparison(arm).arm == arm
        assert {one.trial.arm for one in evidence.generations(arm)} == {arm}
    for arm in ("aaa", "zzz"):
        with pytest.raises(NotTestable, match=f"no arm {arm} with a baseline"):
            evidence.comparison(arm)
        with pytest.raises(NotTestable, match=f"no generation of arm {arm}"):
            evidence.generations(arm)
    with pytest.raises(NotTestable, match="no tree of arm vanilla"):
        evidence.tree("vanilla")


@pytest.mark.parametrize("digit", ["0", "f"])
def test_a_calibration_of_heads_before_or_after_is_refused(evidence: Evidence, digit: str) -> None:
    trace = evidence.trace()
    other = trace.provenance.model_copy(update={"heads_hash": digit * 64})
    changed = dataclasses.replace(evidence, calibration=Trace(provenance=other, prompts=trace.prompts))
    with pytest.raises(NotTestable, match="of other heads than the record's"):
        search_split(changed)


class Tuned:
    """The suite of a record with one arm on the tuned backbone."""

    def __init__(self, evidence: Evidence, arm: str) -> None:
        suite = evidence.record.suite
        arms = [
            one.model_copy(update={"backbone": "tuned"}) if one.name == arm else one for one in suite.arms
        ]
        self.suite = suite.model_copy(update={"arms": tuple(arms)})
        self.reports_speed, self.is_timed = True, evidence.record.is_timed
        self.generations, self.trees = evidence.record.generations, evidence.record.trees


@pytest.mark.parametrize("arm", ["cartesian", "chain"])
def test_an_arm_on_the_tuned_backbone_is_another_claim(evidence: Evidence, arm: str) -> None:
    changed = dataclasses.replace(evidence, record=Tuned(evidence, arm))  # type: ignore[arg-type]
    asked: tuple[Callable[[], object], ...] = (
        lambda: changed.comparison(arm),
        lambda: changed.tree(arm),
        lambda: changed.generations(arm),
        lambda: paired_counts(changed, "cartesian", over="chain", timed=False),
    )
    for ask in asked:
        with pytest.raises(NotTestable, match=f"arm {arm} decodes with the tuned backbone"):
            ask()
    assert changed.comparison("optimised_64").arm == "optimised_64"


@pytest.fixture(scope="module")
def claim() -> ClaimSpec:
    return next(one for one in load_claims() if one.id == "Q-loss")


NO_FIGURE = "the registry does not say which figure of a run to compare"


def test_a_claim_without_a_test_says_what_it_needs(evidence: Evidence, claim: ClaimSpec) -> None:
    bare = {"transfer": None, "paper_only": None, "also": (), "needs": None}
    literal = LiteralForm(backbone="b", heads="h", device="d", benchmark="m", tolerance=0.1, reason=WHY)
    for changes, form, reason in (
        ({**bare, "literal": literal}, "literal", NO_FIGURE),
        ({**bare, "literal": literal, "needs": "more"}, "literal", f"{NO_FIGURE}; more"),
        ({**bare, "literal": None, "needs": "more"}, "none", "more"),
    ):
        (found,) = evaluate_claims([claim.model_copy(update=changes)], evidence)
        assert (found.kind, found.form, found.reason, found.decides) == (UNTESTED, form, reason, True)


def test_the_first_form_that_can_be_tested_decides_and_comes_first(
    evidence: Evidence, claim: ClaimSpec
) -> None:
    rising = forms.LossGrowsForm(test="loss_grows", bound=0.0, reason=WHY)
    steep = rising.model_copy(update={"bound": 5.0, "states": "rises by 5 nats"})
    found = evaluate_claims([claim.model_copy(update={"transfer": rising, "also": (steep,)})], evidence)
    assert [(one.kind, one.decides, one.stated) for one in found] == [
        (YES, True, claim.stated),
        (NO, False, "rises by 5 nats"),
    ]
    missing = forms.FasterForm(test="faster", arm="nobody", bound=1.0, reason=WHY)
    untested, shown = evaluate_claims(
        [claim.model_copy(update={"transfer": missing, "also": (steep,)})], evidence
    )
    assert (untested.kind, untested.form, untested.decides) == (UNTESTED, "transfer", True)
    assert "no arm nobody" in untested.reason and (shown.kind, shown.decides) == (NO, False)
