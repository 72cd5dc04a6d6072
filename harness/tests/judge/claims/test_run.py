"""Every transfer form on a made-up record where the claim holds, one where it does not, and one that leaves
it open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.judge.claims.evidence import Evidence
from harness.judge.claims.verdicts import evaluate_claims
from harness.judge.judgement import ClaimVerdict, Divergence, VerdictKind
from harness.judge.metrics import comparisons
from harness.judge.parity import parity_report
from harness.records.probes import StepCosts
from harness.records.run import ArmTree
from harness.records.trace import Trace
from harness.records.trials import Generation
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.forms.claims import LogGrowthForm
from harness.tests.fake_record import FakeParts, fake_rounding, write_fake_record
from medusa_impl.tree import DraftTree

YES, NO, OPEN, UNTESTED = (
    VerdictKind.REPRODUCED,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.NOT_TESTED,
)
ROLES = {"optimised": "optimised_64", "fastest": "optimised_64"}  # the names of the made-up suite
Losses = np.ndarray[Any, Any]
Spoil = Callable[[FakeParts], object]


@pytest.fixture(scope="module")
def claims() -> dict[str, ClaimSpec]:
    return {claim.id: claim for claim in load_claims(roles=ROLES)}


def _evidence(folder: Path, **options: Any) -> Evidence:
    record = write_fake_record(folder, **{"rounds": 1, **options})
    return Evidence(record=record, arms=(), comparisons=comparisons(record), parity=parity_report(record))


@pytest.fixture(scope="module")
def evidence_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evidence]:
    """Make evidence by options, each set of options once: the records are read only."""
    made: dict[str, Evidence] = {}

    def make(**options: Any) -> Evidence:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = _evidence(tmp_path_factory.mktemp("record") / "record", **options)
        return made[key]

    return make


def _judge(claim: ClaimSpec, evidence: Evidence) -> ClaimVerdict:
    verdict, *others = evaluate_claims([claim], evidence)
    assert verdict.decides and not any(other.decides for other in others)
    assert verdict.reason
    assert (verdict.ours == "") == (verdict.kind is UNTESTED)
    return verdict


def _with_tree(tree: DraftTree) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        parts.trees["optimised_64"] = ArmTree(paths=tree.paths, origin="another tree")

    return spoil


def _with_losses(change: Callable[[Losses, int], Losses]) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        assert parts.trace is not None
        prompts = [
            dataclasses.replace(prompt, nll=change(prompt.nll, number))
            for number, prompt in enumerate(parts.trace.prompts)
            if prompt.nll is not None
        ]
        parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))

    return spoil


def _up_and_down(losses: Losses, number: int) -> Losses:
    """Losses that rise with the head on one prompt and fall on the next."""
    return losses if number % 2 else 4.8 - losses


def _with_steps(*, of_arms: float = 1.0, per_node: float | None = None) -> Spoil:
    """Scale the arms' separately timed steps, or make the bare ones cost 1 + `per_node` x (nodes - 1)."""

    def spoil(parts: FakeParts) -> None:
        assert parts.step_costs is not None
        costs = []
        for cost in parts.step_costs.costs:
            if cost.arm in parts.trees:
                cost = cost.model_copy(update={"step_s": tuple(of_arms * step_s for step_s in cost.step_s)})
            elif cost.arm is None and per_node is not None:
                cost = cost.model_copy(update={"backbone_s": (0.02 * (1 + per_node * (cost.num_nodes - 1)),)})
            costs.append(cost)
        parts.step_costs = StepCosts(costs=tuple(costs))

    return spoil


def _with_steps_a_block(*, jitter: float, of_arms: float = 1.0, keyed: bool = True) -> Spoil:
    """Give every arm steps after each prompt's block, their level off by `jitter` from prompt to prompt.

    Without `keyed` the rows do not name their prompts, as in records from before they did.
    """

    def spoil(parts: FakeParts) -> None:
        assert parts.step_costs is not None
        rng = np.random.default_rng(3)
        rows = [cost for cost in parts.step_costs.costs if cost.arm is None]
        for key in dict.fromkeys(outcome.trial.prompt_key for outcome in parts.outcomes):
            for cost in (cost for cost in parts.step_costs.costs if cost.arm is not None):
                level = float(np.exp(rng.normal(0.0, jitter))) * (of_arms if cost.arm in parts.trees else 1.0)
                steps = {"step_s": tuple(level * step_s for step_s in cost.step_s)}
                rows.append(cost.model_copy(update={**steps, "prompt_key": key if keyed else None}))
        parts.step_costs = StepCosts(costs=tuple(rows))

    return spoil


def _with_rate(factor: float, *, speed: float | None = None) -> Spoil:
    """Let typical acceptance keep `factor` times the greedy tokens a step, `speed` times those a second."""

    def spoil(parts: FakeParts) -> None:
        greedy, seconds = {}, {}
        for one in parts.outcomes:
            if isinstance(one, Generation) and one.trial.arm == "optimised_64":
                greedy[one.trial.prompt_key] = (one.num_tokens - 1) / one.num_steps
                seconds[one.trial.prompt_key] = sum(one.step_times_s) / (one.num_tokens - 1)

        def change(one: Generation) -> dict[str, Any]:
            tokens = one.num_tokens - 1
            steps = max(1, round(tokens / (factor * greedy[one.trial.prompt_key])))
            kept = tuple(tokens // steps + (number < tokens % steps) for number in range(steps))
            step_s = seconds[one.trial.prompt_key] / (speed or factor) * tokens / steps
            return {"step_tokens": kept, "step_times_s": (step_s,) * steps}

        parts.edit(change, arm="typical", limit=None)

    return spoil


def _other_first_token(parts: FakeParts) -> None:
    parts.edit(
        lambda one: {"token_ids": (one.token_ids[0] + 1, *one.token_ids[1:])}, arm="optimised_64", limit=1
    )


CASES: list[tuple[str, VerdictKind, dict[str, Any]]] = [
    ("A6", YES, {}),
    ("A6", NO, {"spoil": _other_first_token}),
    ("A1", YES, {}),
    ("A1", NO, {"step_s": {"optimised_64": 0.2}}),
    ("A1", NO, {"spoil": _other_first_token}),
    ("A1", OPEN, {"step_s": {"optimised_64": 0.069}}),
    ("A1", UNTESTED, {"reports_speed": False}),
    ("T3-1", YES, {}),
    ("T3-1", NO, {"step_s": {"chain": 0.2}}),
    ("T3-1", OPEN, {"step_s": {"chain": 0.0473}}),
    ("T3-1", UNTESTED, {"reports_speed": False}),
    ("T3-2", YES, {"num_prompts": 32}),
    ("T3-2", NO, {"step_s": {"cartesian": 0.05}}),
    ("T3-3", YES, {}),
    ("T3-3", NO, {"spoil": _with_tree(DraftTree.chain(1)), "step_s": {"optimised_64": 0.2}}),
    ("F4-1", YES, {}),
    ("F4-1", NO, {"spoil": _with_tree(DraftTree.chain(1))}),
    ("F4-1", OPEN, {"spoil": _with_tree(DraftTree.cartesian((5, 3, 2)))}),
    ("F4-1", UNTESTED, {"spoil": _with_tree(DraftTree.cartesian((8, 8)))}),
    ("F4-1", UNTESTED, {"omit": ("trace.npz",)}),
    ("F6", YES, {"head_hits": (0.5, 0.3, 0.15, 0.05, 0.02)}),
    ("F6", NO, {"head_hits": (0.97, 0.97, 0.97, 0.97, 0.97)}),
    ("F6", UNTESTED, {"omit": ("trace.npz",)}),
    ("F6", UNTESTED, {"head_hits": (0.6, 0.5, 0.4, 0.3)}),
    ("BLOG-greedy", YES, {"spoil": _with_rate(1.1)}),
    ("BLOG-greedy", NO, {"spoil": _with_rate(0.9)}),
    ("BLOG-greedy", OPEN, {"spoil": _with_rate(1.0)}),
    ("BLOG-greedy", NO, {"spoil": _with_rate(1.1, speed=0.9)}),
    ("BLOG-typ10", NO, {"spoil": _with_rate(1.1, speed=1.0)}),
    ("BLOG-greedy", UNTESTED, {"spoil": _with_tree(DraftTree.chain(1))}),
    ("BLOG-typ10", YES, {"spoil": _with_rate(1.1)}),
    ("BLOG-typ10", NO, {"spoil": _with_rate(1.3)}),
    ("Q-loss", YES, {}),
    ("Q-loss", NO, {"spoil": _with_losses(lambda losses, number: 9 - losses)}),
    ("Q-loss", OPEN, {"spoil": _with_losses(_up_and_down)}),
    ("Q-loss", UNTESTED, {"omit": ("trace.npz",)}),
    ("DEF-nheads", YES, {"head_hits": (0.6, 0.45, 0.3, 0.2, 0.02), "num_prompts": 32}),
    ("DEF-nheads", NO, {"head_hits": (0.95, 0.95, 0.95, 0.95, 0.95)}),
    ("DEF-nheads", OPEN, {}),
    ("DEF-nheads", UNTESTED, {"head_hits": (0.6, 0.5, 0.4, 0.3)}),
    ("DEF-spd", YES, {"rounds": 2}),
    ("DEF-spd", NO, {"spoil": _with_steps(of_arms=1.2)}),
    ("DEF-spd", OPEN, {"spoil": _with_steps(of_arms=1.05)}),
    ("DEF-spd", YES, {"num_prompts": 16, "spoil": _with_steps_a_block(jitter=0.03)}),
    ("DEF-spd", OPEN, {"num_prompts": 16, "spoil": _with_steps_a_block(jitter=0.4)}),
    ("DEF-spd", OPEN, {"num_prompts": 16, "spoil": _with_steps_a_block(jitter=0.4, keyed=False)}),
    ("DEF-spd", NO, {"num_prompts": 16, "spoil": _with_steps_a_block(jitter=0.03, of_arms=1.2)}),
    ("DEF-spd", UNTESTED, {"reports_speed": False}),
    ("DEF-spd", UNTESTED, {"omit": ("step_costs.json",)}),
    ("RL-acc", YES, {"head_hits": (0.4, 0.3, 0.25, 0.2, 0.2), "num_prompts": 32}),
    ("RL-acc", NO, {"head_hits": (0.97, 0.97, 0.97, 0.97, 0.97)}),
    ("RL-acc", OPEN, {}),
    ("F4-2", YES, {"spoil": _with_steps(per_node=0.05)}),
    ("F4-2", VerdictKind.NOT_DECIDABLE, {"spoil": _with_steps(per_node=-0.005)}),
    ("F4-2", UNTESTED, {"reports_speed": False}),
    ("F4-2", UNTESTED, {"omit": ("step_costs.json",)}),
]


@pytest.mark.parametrize(
    ("claim_id", "kind", "options"),
    CASES,
    ids=[f"{case[0]}-{case[1].value}-{i}" for i, case in enumerate(CASES)],
)
def test_verdict(
    evidence_of: Callable[..., Evidence],
    claims: dict[str, ClaimSpec],
    claim_id: str,
    kind: VerdictKind,
    options: dict[str, Any],
) -> None:
    verdict = _judge(claims[claim_id], evidence_of(**options))
    assert verdict.kind is kind, verdict
    assert verdict.form == "transfer"


def test_more_ties_than_rounding_explains_leave_losslessness_open(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    evidence = evidence_of()
    ties = [
        Divergence(arm="chain", reference="vanilla", prompt_key=f"p{i}", position=3, gap=1e-5, kind="tie")
        for i in range(3)
    ]
    for num_ties, kind in ((1, YES), (3, OPEN)):
        parity = evidence.parity.model_copy(update={"divergences": tuple(ties[:num_ties])})
        assert _judge(claims["A6"], dataclasses.replace(evidence, parity=parity)).kind is kind


def _half(gap: float, *, measured: bool = True) -> Spoil:
    """Part a text of the optimised tree at a known gap, in a record with a measured rounding of 0.125."""

    def spoil(parts: FakeParts) -> None:
        assert parts.trace is not None
        prompts = [
            dataclasses.replace(prompt, gaps=np.full(prompt.num_kept_tokens, gap))
            for prompt in parts.trace.prompts
        ]
        parts.trace = Trace(provenance=parts.trace.provenance, prompts=tuple(prompts))
        parts.rounding = fake_rounding(0.125) if measured else None
        parts.edit(
            lambda one: {"token_ids": (*one.token_ids[:5], one.token_ids[5] + 1, *one.token_ids[6:])},
            arm="optimised_64",
            limit=2,
        )

    return spoil


def test_half_precision_is_lossless_up_to_so_many_ties_in_so_many_tokens(
    tmp_path: Path, claims: dict[str, ClaimSpec]
) -> None:
    evidence = _evidence(tmp_path / "ties", spoil=_half(0.2), dtype="bfloat16")
    decoded = [
        one for one in evidence.record.generations if one.trial.arm in ("chain", "cartesian", "optimised_64")
    ]
    parted = {row.prompt_key for row in evidence.parity.divergences}
    equal = sum(
        5 if one.trial.arm == "optimised_64" and one.trial.prompt_key in parted else one.num_tokens
        for one in decoded
    )
    lossless, faster = _judge(claims["A6"], evidence), _judge(claims["A1"], evidence)
    assert len(parted) == 2 and lossless.kind is faster.kind is YES
    assert f"up to 2 ties in {equal} tokens" in lossless.reason and "below 0.25" in lossless.reason
    own = sum(
        5 if one.trial.prompt_key in parted else one.num_tokens
        for one in decoded
        if one.trial.arm == "optimised_64"
    )
    assert f"up to 2 ties in {own} tokens" in faster.reason and "lossless up to ties" in faster.ours


def test_half_precision_with_a_bug_is_not_lossless_and_unmeasured_it_is_open(
    tmp_path: Path, claims: dict[str, ClaimSpec]
) -> None:
    bug = _evidence(tmp_path / "bug", spoil=_half(0.3), dtype="bfloat16")
    unmeasured = _evidence(tmp_path / "unmeasured", spoil=_half(0.0, measured=False), dtype="bfloat16")
    for claim_id in ("A6", "A1"):
        assert _judge(claims[claim_id], bug).kind is NO
        verdict = _judge(claims[claim_id], unmeasured)
        assert verdict.kind is UNTESTED and "rounding was not measured" in verdict.reason


def test_ties_of_another_method_are_not_medusas(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    evidence = evidence_of()
    other = Divergence(arm="hf_greedy", reference="vanilla", prompt_key="p", position=3, gap=1.0, kind="bug")
    parity = evidence.parity.model_copy(update={"divergences": (other,)})
    assert _judge(claims["A6"], dataclasses.replace(evidence, parity=parity)).kind is YES


def test_speed_that_does_not_peak_where_calibration_said(
    tmp_path: Path, claims: dict[str, ClaimSpec]
) -> None:
    """The peak is chosen on calibration text; on text where the heads are far better, more nodes are faster
    still.
    """
    evidence = _evidence(
        tmp_path / "record", spoil=_with_steps(per_node=0.01), head_hits=(0.9, 0.9, 0.9, 0.9, 0.9)
    )
    poor = write_fake_record(tmp_path / "poor", head_hits=(0.02, 0.02, 0.02, 0.02, 0.02)).trace
    verdict = _judge(claims["F4-2"], dataclasses.replace(evidence, calibration=poor))
    assert verdict.kind is NO, verdict
    assert verdict.figure_kind == "composed"


def test_a_calibration_of_other_heads_is_refused(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    evidence = evidence_of()
    trace = evidence.trace()
    other = Trace(
        provenance=trace.provenance.model_copy(update={"heads_hash": "e" * 64}), prompts=trace.prompts
    )
    verdict = _judge(claims["DEF-nheads"], dataclasses.replace(evidence, calibration=other))
    assert verdict.kind is UNTESTED
    assert "other heads" in verdict.reason


def test_without_a_trace_the_logarithm_is_judged_by_its_printed_slope(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    evidence = evidence_of(omit=("trace.npz",))
    verdicts = {
        verdict.claim_id: verdict
        for verdict in evaluate_claims([claims["RL-acc"], claims["T1-Vicuna7B-acc"]], evidence)
        if verdict.decides
    }
    assert (verdicts["RL-acc"].form, verdicts["RL-acc"].kind) == ("paper-only", NO)


def test_a_rung_says_which_part_held(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    verdict = _judge(claims["T3-2"], evidence_of(step_s={"cartesian": 0.05}))
    assert "tokens/step of cartesian over chain: holds" in verdict.reason
    assert "speed of cartesian over chain: fails" in verdict.reason


def test_a_rung_that_the_device_fixes_before_the_run_is_not_decidable_there(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    """A CPU whose step of 64 nodes costs three of 6 can gain by no tree, and that was told as a failure."""
    dear, free = (_with_steps(per_node=per_node) for per_node in (0.5, 0.0))
    for spoil, kind in ((dear, VerdictKind.NOT_DECIDABLE), (free, YES)):
        evidence = evidence_of(num_prompts=32, spoil=spoil)
        known = dataclasses.replace(evidence, calibration=evidence.trace())
        verdict = _judge(claims["T3-2"], known)
        assert verdict.kind is kind
        assert ("the speed is fixed before the run" in verdict.reason) == (kind is not YES)
    unpromised = evidence_of(num_prompts=32, spoil=dear)
    assert unpromised.calibration is None and _judge(claims["T3-2"], unpromised).kind is YES


def test_an_arm_that_was_not_run_is_named(evidence_of: Callable[..., Evidence]) -> None:
    # roles as shipped: the made-up suite has no arm `fastest` or `optimised`
    claims = {claim.id: claim for claim in load_claims()}
    evidence = evidence_of()
    for claim_id, arm in (
        ("A1", "fastest"),
        ("T3-3", "optimised"),
        ("F4-1", "optimised"),
    ):
        verdict = _judge(claims[claim_id], evidence)
        assert verdict.kind is UNTESTED
        assert arm in verdict.reason


def test_a_further_form_is_shown_with_its_claim_and_decides_nothing(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    """The paper's search adds up products of accuracies; ours, by joint hits, once stood for it."""
    paper, ours = evaluate_claims([claims["F6"]], evidence_of(num_prompts=32))
    assert paper.decides and "by products of the heads' accuracies" in paper.reason
    assert not ours.decides and "by joint hits" in ours.reason and "project's own search" in ours.stated
    assert paper.stated == claims["F6"].stated and (paper.counts, ours.counts) == (True, False)
    fit, constant = evaluate_claims([claims["RL-acc"], claims["T1-Vicuna7B-acc"]], evidence_of())[:2]
    assert (fit.form, constant.form, constant.decides) == ("transfer", "paper-only", False)
    alone = evaluate_claims([claims["F6"]], evidence_of(omit=("trace.npz",)))
    assert [one.kind for one in alone] == [UNTESTED]  # a further form that cannot be tested says nothing


def test_a_verdict_that_turns_with_a_setting_of_ours_says_so(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    """The logarithm's fit hung on how many ranks of a head the trees may use, and nobody could see it."""
    evidence = evidence_of(head_hits=(0.4, 0.3, 0.25, 0.2, 0.2), num_prompts=32)
    form = claims["RL-acc"].transfer
    assert isinstance(form, LogGrowthForm) and set(form.vary) == {"max_rank"}
    same = _judge(claims["RL-acc"], evidence)
    assert same.reason.endswith("; the same with max_rank 10, max_rank 64")
    varied = form.model_copy(update={"vary": {"sizes": ((1, 2, 3, 4),), "max_rank": (10,)}})
    turned = _judge(claims["RL-acc"].model_copy(update={"transfer": varied}), evidence)
    assert turned.kind is same.kind and "; it turns: " in turned.reason and "with sizes" in turned.reason


def test_what_this_project_states_of_the_papers_figures_is_not_counted(
    evidence_of: Callable[..., Evidence], claims: dict[str, ClaimSpec]
) -> None:
    verdicts = evaluate_claims(list(claims.values()), evidence_of())
    ours = {verdict.claim_id for verdict in verdicts if verdict.is_ours}
    assert ours == {"CK1", "CK2", "CK3", "CK4", "CK5", "RL-OI", "RL-lat7", "RL-lat8"}
    assert sum(verdict.counts for verdict in verdicts) == len(claims) - len(ours)
