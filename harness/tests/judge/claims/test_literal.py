"""Literal forms on planted records of published weights: for each figure one that reaches the paper's, one
that does not, one that leaves it open, and every way in which a record is not the paper's own run.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.judge.claims.evidence import Evidence
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.literal import judge_literal
from harness.judge.claims.standing import Records, finished_records, standings
from harness.judge.claims.verdicts import evaluate_claims
from harness.judge.judgement import ClaimVerdict, Divergence, ParityReport, VerdictKind
from harness.judge.run import judge
from harness.records.run import RunRecord
from harness.records.trace import Trace
from harness.records.trials import Generation
from harness.report.claims import render_claims_page
from harness.report.run import render_report
from harness.specs.claims import ClaimsFile, ClaimSpec, load_claims, load_registry
from harness.tests.fake_record import EOS_ID, FakeParts, fake_rounding, write_fake_record
from harness.tests.test_layers import ROOT

YES, NO, OPEN, UNTESTED = (
    VerdictKind.REPRODUCED,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.NOT_TESTED,
)
ROLES = {"optimised": "optimised_64", "fastest": "optimised_64"}  # the names of the made-up suite
NO_PARITY = ParityReport(num_compared=0, num_tokens=0, num_identical=0, divergences=())
VANILLA_S, RATE = 0.02, 3.0
Spoil = Callable[[FakeParts], object]
# Stands in where the registry knows no published repository.
MODEL, HEADS = "someone/backbone", "someone/heads"


@pytest.fixture(scope="module")
def registry() -> ClaimsFile:
    return load_registry(roles=ROLES)


@pytest.fixture(scope="module")
def claims(registry: ClaimsFile) -> dict[str, ClaimSpec]:
    return {claim.id: with_repositories(claim) for claim in registry.claims if claim.literal is not None}


def with_repositories(claim: ClaimSpec, **changes: Any) -> ClaimSpec:
    """Return a claim whose literal form names repositories, its own or made-up ones, and other prompts."""
    assert claim.literal is not None and claim.literal.setting is not None
    own = claim.literal.setting
    prompts = {"prompts": "mt_bench", "num_prompts": 80}  # no suite can name AlpacaEval's yet
    update = {"model": own.model or MODEL, "heads": own.heads or HEADS, **prompts, **changes}
    setting = own.model_copy(update=update)
    return claim.model_copy(update={"literal": claim.literal.model_copy(update={"setting": setting})})


def publish(parts: FakeParts, claim: ClaimSpec, *, gpu: str = "NVIDIA A100-SXM4-80GB") -> None:
    """Make a record that of a claim's published weights, on a GPU, with answers that end by themselves."""
    assert claim.literal is not None and claim.literal.setting is not None and parts.trace is not None
    setting, environment = claim.literal.setting, parts.environment
    suite = parts.suite_text.replace('asset = "smollm2-135m-instruct"', 'asset = "backbone"')
    suite = suite.replace('path = "heads"', 'asset = "heads"')
    parts.suite_text = suite.replace("max_new_tokens = 40", "max_new_tokens = 512")
    device = environment.device.model_copy(update={"kind": "cuda", "name": gpu})
    assets = {
        name: f"hub {repository}@main (commit {'1' * 40}) {'a' * 64}"
        for name, repository in (("backbone", setting.model), ("heads", setting.heads))
    }
    parts.environment = environment.model_copy(update={"device": device, "assets": assets})
    parts.rounding = fake_rounding(0.01)

    def ended(one: Generation) -> dict[str, Any]:
        return {"token_ids": (*one.token_ids[:-1], EOS_ID), "ended_by": "eos"}

    parts.edit(ended)
    prompts = []
    for prompt in parts.trace.prompts:
        tokens = prompt.tokens.copy()
        tokens[-1] = EOS_ID
        prompts.append(replace(prompt, tokens=tokens, ended_by="eos"))
    provenance = parts.trace.provenance.model_copy(update={"max_new_tokens": 512})
    parts.trace = Trace(provenance=provenance, prompts=tuple(prompts))


def decode(parts: FakeParts, arm: str, *, rate: float = RATE, step_s: float = 0.0, wall: float = 0.0) -> None:
    """Let an arm keep `rate` tokens a step of `step_s`, or of what makes `wall` tokens/s with the prefill.

    Every other prompt is 4 % slower and the rest 4 % faster, so that intervals have a width.
    """
    numbers = {key: number for number, key in enumerate(sorted({o.trial.prompt_key for o in parts.outcomes}))}

    def change(one: Generation) -> dict[str, Any]:
        tokens, bend = one.num_tokens - 1, 1.04 if numbers[one.trial.prompt_key] % 2 else 0.96
        steps = max(1, round(tokens / (rate * (bend if rate > 1 else 1.0))))
        kept = tuple(tokens // steps + (number < tokens % steps) for number in range(steps))
        each = bend * (one.num_tokens / ((steps + 1) * wall) if wall else step_s * tokens / steps / rate)
        return {"step_tokens": kept, "step_times_s": (each,) * steps, "prefill_s": each}

    parts.edit(change, arm=arm)


def speed(arm: str, speedup: float) -> Spoil:
    return lambda parts: decode(parts, arm, step_s=VANILLA_S * RATE / speedup)


def wall(arm: str, tokens_per_s: float) -> Spoil:
    return lambda parts: decode(parts, arm, wall=tokens_per_s, rate=1.0 if arm == "vanilla" else RATE)


def rate(tokens_per_step: float) -> Spoil:
    return lambda parts: decode(parts, "optimised_64", rate=tokens_per_step, step_s=VANILLA_S)


def overhead(times: float) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        decode(parts, "optimised_64", step_s=times * VANILLA_S)

        def change(one: Generation) -> dict[str, Any]:
            bend = one.step_times_s[0] / (sum(one.step_times_s) / len(one.step_times_s))
            number = int(one.trial.prompt_key.rsplit("-", 1)[1])
            each = bend * times * VANILLA_S * (1.04 if number % 2 else 0.96)
            return {"step_times_s": (each,) * len(one.step_tokens)}

        parts.edit(change, arm="optimised_64")

    return spoil


def table_4(base: float, medusa: float) -> Spoil:
    """Plain and Medusa speed on the wall clock, at the printed rate."""

    def spoil(parts: FakeParts) -> None:
        decode(parts, "vanilla", rate=1.0, wall=base)
        decode(parts, "optimised_64", rate=3.23, wall=medusa)

    return spoil


def evidence(
    folder: Path, claim: ClaimSpec, *spoils: Spoil, gpu: str = "NVIDIA A100-SXM4-80GB", **options: Any
) -> Evidence:
    def spoil(parts: FakeParts) -> None:
        publish(parts, claim, gpu=gpu)
        for one in spoils:
            one(parts)

    options = {"rounds": 1, "num_prompts": 80, "jitter": 0.0, "dtype": "bfloat16", **options}
    record = write_fake_record(folder, spoil=spoil, **options)
    return Evidence(record=record, arms=(), comparisons=(), parity=NO_PARITY)


def judged(claim: ClaimSpec, evidence: Evidence) -> ClaimVerdict:
    verdict = evaluate_claims([claim.model_copy(update={"transfer": None, "also": ()})], evidence)[0]
    assert verdict.form == "literal" and verdict.decides and verdict.reason
    assert (verdict.figure_kind == "measured") == (verdict.kind is not UNTESTED)
    return verdict


CASES: list[tuple[str, VerdictKind, Spoil]] = [
    ("F3a-7B-Medusa-1", YES, speed("optimised_64", 2.18)),
    ("F3a-7B-Medusa-1", NO, speed("optimised_64", 1.7)),
    ("F3a-7B-Medusa-1", NO, speed("optimised_64", 2.7)),
    ("F3a-7B-Medusa-1", OPEN, speed("optimised_64", 2.18 * 0.9)),
    ("T3-1", YES, speed("chain", 1.5)),
    ("T3-1", NO, speed("chain", 1.1)),
    ("T3-1", OPEN, speed("chain", 1.5 * 1.1)),
    ("T1-Vicuna7B-acc", YES, rate(3.47)),
    ("T1-Vicuna7B-acc", NO, rate(2.5)),
    ("T1-Vicuna7B-acc", OPEN, rate(3.12)),
    ("T1-Vicuna7B-ovh", YES, overhead(1.22)),
    ("T1-Vicuna7B-ovh", NO, overhead(1.5)),
    ("T1-Vicuna7B-ovh", OPEN, overhead(1.22 * 1.1)),
    ("F3a-7B-Medusa-1-tps", YES, wall("optimised_64", 99.1)),
    ("F3a-7B-Medusa-1-tps", NO, wall("optimised_64", 60.0)),
    ("F3a-7B-Medusa-1-tps", OPEN, wall("optimised_64", 99.1 * 1.1)),
    ("F3a-7B-base-tps", YES, wall("vanilla", 45.4)),
    ("F3a-7B-base-tps", NO, wall("vanilla", 30.0)),
    ("F3a-7B-base-tps", OPEN, wall("vanilla", 45.4 * 0.9)),
    ("A1", YES, speed("optimised_64", 2.2)),
    ("A1", YES, speed("optimised_64", 4.0)),
    ("A1", NO, speed("optimised_64", 1.5)),
    ("A1", OPEN, speed("optimised_64", 2.2 * 0.9)),
    ("A2", YES, speed("optimised_64", 2.5)),
    ("A2", YES, speed("optimised_64", 2.8)),
    ("A2", NO, speed("optimised_64", 3.6)),
    ("A2", OPEN, speed("optimised_64", 2.3 * 0.9)),
    ("BLOGCAT-Coding", YES, speed("cartesian", 2.15)),
    ("BLOGCAT-Coding", NO, speed("cartesian", 1.5)),
    ("BLOGCAT-Coding", OPEN, speed("cartesian", 2.15 * 1.1)),
]


@pytest.mark.parametrize(
    ("claim_id", "kind", "spoil"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_a_figure_is_the_papers_within_the_tolerance_or_not(
    tmp_path: Path, claims: dict[str, ClaimSpec], claim_id: str, kind: VerdictKind, spoil: Spoil
) -> None:
    verdict = judged(claims[claim_id], evidence(tmp_path / "record", claims[claim_id], spoil))
    assert verdict.kind is kind, verdict
    assert "within +-10%" in verdict.reason and claims[claim_id].literal is not None


@pytest.mark.parametrize(
    ("claim_id", "spoil", "shape"),
    [
        ("A1", speed("optimised_64", 2.2), r"speedup of optimised_64 2\.\d\dx \[\d\.\d\d, \d\.\d\d\]"),
        ("T1-Vicuna7B-ovh", overhead(1.22), r"overhead of optimised_64 1\.\d\dx \[\d\.\d\d, \d\.\d\d\]"),
        ("T1-Vicuna7B-acc", rate(3.47), r"tokens/step of optimised_64 3\.\d\d \[\d\.\d\d, \d\.\d\d\]"),
        ("F3a-7B-base-tps", wall("vanilla", 45.4), r"tokens/s of vanilla 45\.\d \[\d+\.\d, \d+\.\d\]"),
    ],
)
def test_a_figure_has_the_digits_of_its_kind(
    tmp_path: Path, claims: dict[str, ClaimSpec], claim_id: str, spoil: Spoil, shape: str
) -> None:
    """Times over times and tokens/step to a hundredth, tokens/s to a tenth, as the paper prints them."""
    verdict = judged(claims[claim_id], evidence(tmp_path / "record", claims[claim_id], spoil))
    assert re.fullmatch(shape, verdict.ours), verdict.ours


def test_one_category_is_judged_on_its_own_prompts(tmp_path: Path, claims: dict[str, ClaimSpec]) -> None:
    def spoil(parts: FakeParts) -> None:
        slow, fast = VANILLA_S * RATE / 1.2, VANILLA_S * RATE / 2.15
        decode(parts, "cartesian", step_s=slow)

        def change(one: Generation) -> dict[str, Any]:
            factor = fast / slow if one.category == "coding" else 1.0
            return {"step_times_s": tuple(factor * step_s for step_s in one.step_times_s)}

        parts.edit(change, arm="cartesian")

    made = evidence(tmp_path / "record", claims["BLOGCAT-Coding"], spoil)
    coding, math = (judged(claims[f"BLOGCAT-{name}"], made) for name in ("Coding", "Math"))
    assert (coding.kind, math.kind) == (YES, NO)
    assert "on coding" in coding.reason


def test_a_row_of_several_figures_is_as_good_as_its_worst(
    tmp_path: Path, claims: dict[str, ClaimSpec]
) -> None:
    claim = claims["T4-Vicuna-7b"]
    for name, spoil, kind in (
        ("all", table_4(37.07, 106.76), YES),
        ("slow", table_4(37.07, 60.0), NO),
        ("edge", table_4(37.07 * 1.1, 106.76), OPEN),
    ):
        verdict = judged(claim, evidence(tmp_path / name, claim, spoil))
        assert verdict.kind is kind, verdict
        assert verdict.ours.count(";") == 3 and "tokens/s of vanilla" in verdict.ours


def _in_suite(old: str, new: str) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        assert old in parts.suite_text
        parts.suite_text = parts.suite_text.replace(old, new)

    return spoil


def _came_from(asset: str, source: str) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        assets = {**parts.environment.assets, asset: source}
        parts.environment = parts.environment.model_copy(update={"assets": assets})

    return spoil


def _on(**device: Any) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        changed = parts.environment.device.model_copy(update=device)
        parts.environment = parts.environment.model_copy(update={"device": changed})

    return spoil


def _in_dtype(dtype: str) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(update={"dtype": dtype})

    return spoil


def _without(arm: str) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        parts.outcomes = [one for one in parts.outcomes if one.trial.arm != arm]

    return spoil


def _renamed(parts: FakeParts) -> None:
    _without("optimised_64")(parts)
    parts.suite_text = parts.suite_text.replace('"optimised_64"', '"other"')
    parts.trees["other"] = parts.trees.pop("optimised_64")


def _first_untimed(parts: FakeParts) -> None:
    parts.edit(lambda one: {"timing_valid": False}, arm="optimised_64", limit=1)


VICUNA = "lmsys/vicuna-7b-v1.5"
LOCAL = f"local {'a' * 64}"
MISFITS: list[tuple[str, str, Spoil]] = [
    (
        "F3a-7B-Medusa-1",
        f"the backbone is no asset of a suite, need {VICUNA} from the hub",
        _in_suite('asset = "backbone"', 'path = "vicuna-7b-v1.5"'),
    ),
    (
        "F3a-7B-Medusa-1",
        f"the backbone is asset backbone from local, need {VICUNA}",
        _came_from("backbone", LOCAL),
    ),
    (
        "F3a-7B-Medusa-1",
        f"the backbone is asset backbone from {VICUNA}-16k, need {VICUNA} from",
        _came_from("backbone", f"hub {VICUNA}-16k@main (commit {'1' * 40}) {'a' * 64}"),
    ),
    (
        "F3a-7B-Medusa-1",
        "the backbone is asset backbone from pypi",
        _came_from("backbone", "pypi hub lmsys/vicuna-7b-v1.5@main (commit 1) a"),
    ),
    ("F3a-7B-Medusa-1", "an adapter is merged", _in_suite("[heads]", 'adapter = "a"\n\n[heads]')),
    (
        "F3a-7B-Medusa-1",
        "the heads are no asset of a suite",
        _in_suite('asset = "heads"', 'path = "medusa-1.0-vicuna-7b-v1.5"'),
    ),
    ("F3a-7B-Medusa-1", "the heads are asset heads from local", _came_from("heads", LOCAL)),
    (
        "F3a-7B-Medusa-1",
        "the prompts are those of human_eval, need mt_bench",
        _in_suite('"mt_bench"', '"human_eval"'),
    ),
    ("F3a-7B-Medusa-1", "answers are cut at 511 tokens, need 512", _in_suite("= 512", "= 511")),
    (
        "F3a-7B-Medusa-1",
        "79 prompts of optimised_64 and vanilla count, need the 80 of mt_bench",
        _first_untimed,
    ),
    ("F3a-7B-Medusa-1", "0 prompts of optimised_64", _without("optimised_64")),
    ("T1-Vicuna7B-acc", "the device is a CPU (made-up CPU)", _on(kind="cpu", name="made-up CPU")),
    (
        "F3a-7B-Medusa-1",
        "the times are in float32, need float16 or bfloat16",
        _in_dtype("float32"),
    ),
    (
        "F3a-7B-Medusa-1-tps",
        "the GPU is NVIDIA H200, and the paper names none: tokens/s are compared on an A100 alone",
        _on(name="NVIDIA H200"),
    ),
    ("BLOG-7B", "the GPU is NVIDIA H200, need the A100 that is stated", _on(name="NVIDIA H200")),
    ("BLOG-7B", "reports no speed", _in_suite("reports_speed = true", "reports_speed = false")),
    (
        "F3a-7B-Medusa-1",
        "the suite has no arm optimised_64",
        _renamed,
    ),
]


@pytest.mark.parametrize(
    ("claim_id", "reason", "spoil"), MISFITS, ids=[f"{case[0]}-{i}" for i, case in enumerate(MISFITS)]
)
def test_a_record_of_another_run_says_first_what_does_not_fit(
    tmp_path: Path, claims: dict[str, ClaimSpec], claim_id: str, reason: str, spoil: Spoil
) -> None:
    verdict = judged(claims[claim_id], evidence(tmp_path / "record", claims[claim_id], spoil))
    assert verdict.kind is UNTESTED and reason in verdict.reason, verdict


def test_what_does_not_bend_a_figure_is_not_asked_for(tmp_path: Path, claims: dict[str, ClaimSpec]) -> None:
    """Tokens/step hang on no GPU and no precision, vanilla's speed on no heads, and a ratio of speeds whose
    GPU the paper does not name is judged on any, which the verdict then says.
    """
    spoils: list[tuple[str, Spoil]] = [
        ("T1-Vicuna7B-acc", _in_dtype("float32")),
        ("F3a-7B-base-tps", _came_from("heads", LOCAL)),
        ("F3a-7B-Medusa-1", _on(name="NVIDIA H200")),
    ]
    for claim_id, spoil in spoils:
        verdict = judged(claims[claim_id], evidence(tmp_path / claim_id, claims[claim_id], spoil))
        assert verdict.kind is not UNTESTED, verdict
    assert "timed on NVIDIA H200, where the paper names no device" in verdict.reason
    assert "first turns alone" in verdict.reason


def test_without_a_published_repository_no_record_fits(tmp_path: Path, registry: ClaimsFile) -> None:
    claim = next(claim for claim in registry.claims if claim.id == "F3a-7B-Medusa-1")
    verdict = judged(claim, evidence(tmp_path / "record", with_repositories(claim)))
    assert verdict.kind is UNTESTED
    assert verdict.reason.startswith("the registry knows no repository of the hub with the claim's heads")
    assert verdict.reason.endswith(claim.needs or "?")


def test_outputs_that_are_not_vanillas_are_no_figure_of_the_method(
    tmp_path: Path, claims: dict[str, ClaimSpec]
) -> None:
    claim = claims["F3a-7B-Medusa-1"]
    made = evidence(tmp_path / "record", claim, speed("optimised_64", 2.18))
    bug = Divergence(arm="optimised_64", reference="vanilla", prompt_key="p", position=3, gap=1.0, kind="bug")
    for divergence, kind in ((bug, UNTESTED), (bug.model_copy(update={"kind": "tie"}), YES)):
        parity = NO_PARITY.model_copy(update={"divergences": (divergence,)})
        verdict = judged(claim, replace(made, parity=parity))
        assert verdict.kind is kind, verdict


def test_every_literal_form_says_what_it_compares_or_why_nothing_can_be(registry: ClaimsFile) -> None:
    literal = [claim for claim in registry.claims if claim.literal is not None]
    assert all(bool(claim.measures) != bool(claim.unmeasured) for claim in literal)
    assert all(claim.literal is not None and claim.literal.setting is not None for claim in literal)
    categories = {m.category for claim in literal for m in claim.measures if m.category is not None}
    assert len(categories) == 8
    assert not any(claim.measures or claim.unmeasured for claim in registry.claims if claim.literal is None)


def test_a_claim_that_no_figure_can_judge_says_why(tmp_path: Path, claims: dict[str, ClaimSpec]) -> None:
    verdict = judged(claims["F8"], evidence(tmp_path / "record", claims["F8"]))
    assert verdict.kind is UNTESTED and verdict.reason.startswith("four models, of which a run has one")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 2.2\n", "value = { x = 2.2 }\n", "claim 'A1' measures a at least"),
        ("value = 2.2\n", "value = -2.2\n", "claim 'A1' measures a at least"),
        ("value = [2.3, 2.8]\n", "value = 2.3\n", "claim 'A2' measures a range"),
        ('of = "rate"', 'of = "rates"', "measures a figure 'rates'"),
        ('literal = "medusa1_7b"\nmeasures', "measures", "measures go with a literal form"),
        ('arm = "chain" }]', 'arm = "line" }]', "roles 'line'"),
        ('metric = "overhead"', 'metric = "latency"', "metric"),
    ],
)
def test_a_registry_whose_measures_do_not_fit_its_value_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (ROOT / "suites" / "claims.toml").read_text(encoding="utf-8")
    assert old in text
    own = tmp_path / "own.toml"
    own.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_claims(own)


@pytest.fixture(scope="module")
def committed() -> Records:
    return finished_records(ROOT / "results")


def test_no_committed_record_is_the_papers_own_run(committed: Records, registry: ClaimsFile) -> None:
    literal = [claim for claim in registry.claims if claim.literal is not None]
    for _, record in committed.runs:
        evidence = Evidence(record=record, arms=(), comparisons=(), parity=NO_PARITY)
        for claim in literal:
            assert claim.literal is not None
            with pytest.raises(NotTestable, match=r"\w"):
                judge_literal(claim, claim.literal, evidence=evidence)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, claims: dict[str, ClaimSpec]) -> RunRecord:
    folder = tmp_path_factory.mktemp("results") / "paper" / "cuda" / "run"
    claim = claims["A1"]
    return write_fake_record(
        folder, spoil=partial(publish, claim=claim), rounds=1, num_prompts=80, dtype="bfloat16"
    )


def test_a_literal_verdict_is_the_claims_and_goes_through_report_and_page(
    published: RunRecord, committed: Records, registry: ClaimsFile
) -> None:
    named = tuple(with_repositories(one) if one.id == "A1" else one for one in registry.claims)
    registry = registry.model_copy(update={"claims": named})
    judgement = judge(published, claims=registry.claims)
    assert judgement.valid, [check for check in judgement.checks if check.status.value == "failed"]
    literal, transfer = (one for one in judgement.verdicts if one.claim_id == "A1")
    assert (literal.form, literal.decides, transfer.form, transfer.decides) == (
        "literal",
        True,
        "transfer",
        False,
    )
    assert "measured (literal)" in render_report(published, judgement)
    embedded = next(one for one in committed.runs if one[1].suite.name == "embedded")
    runs = [("paper/cuda/run", copy.copy(published)), embedded]
    standing = standings(registry, Records(runs, [], []))
    first = next(one for one in standing if one.claim.id == "A1")
    assert first.decides is not None and first.decides.record == "paper/cuda/run"
    assert first.decides.verdict.form == "literal"
    page = render_claims_page(registry, standing)
    assert "| A1 (Abstract) " in page and "paper/cuda/run/report.md" in page
