"""One record held against another, on planted records whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import UserError
from harness.judge.history.bands import promised
from harness.judge.history.compare import (
    NOT_COMPARABLE,
    OUTSIDE,
    WITHIN,
    Compared,
    ComparedFigure,
    changed_verdicts,
    compare,
    materials_of,
)
from harness.judge.history.figures import Material
from harness.judge.history.texts import differing_inputs
from harness.judge.judgement import VerdictKind
from harness.records.opened import AnyRecord, open_record
from harness.records.probes import DeviceLimits, StepCost, StepCosts
from harness.records.provenance import TunedOrigin
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.specs.claims import load_claims
from harness.specs.suite import IntervalSpec
from harness.tests.fake_judgement import judge, verdict
from harness.tests.fake_latency import write_fake_latency
from harness.tests.fake_record import (
    BACKBONE_ONE_NODE_S,
    STEP_S,
    FakeParts,
    node_cost,
    write_fake_record,
)

Spoil = Callable[[FakeParts], object]
FIXTURES = Path(__file__).resolve().parents[2] / "records" / "fixtures" / "v1"
GREEDY = ("vanilla", "chain", "cartesian", "optimised_64", "hf_greedy")
STARTED = "2024-01-19T11:55:00Z"


def another_run(parts: FakeParts, *, seed: int, spread: float = 0.02) -> None:
    """The same texts in the same steps, with times of their own."""
    rng = np.random.default_rng(seed)

    def timed(one: Generation) -> dict[str, Any]:
        factor = math.exp(rng.normal(0, spread))
        times = tuple(time * factor for time in one.step_times_s)
        return {"step_times_s": times, "processor_s": 0.98 * (one.prefill_s + sum(times))}

    parts.edit(timed)
    parts.environment = parts.environment.model_copy(update={"started_utc": STARTED})


def write(folder: Path, *spoils: Spoil, seed: int | None = None, **changes: Any) -> RunRecord:
    """A run of sixteen prompts; with a seed its times are its own."""

    def spoil(parts: FakeParts) -> None:
        if seed is not None:
            another_run(parts, seed=seed)
        for one in spoils:
            one(parts)

    record = write_fake_record(folder, spoil=spoil, **{"rounds": 1, **changes})
    return RunRecord.open(record.folder)


def held(a: AnyRecord, b: AnyRecord, **others: Any) -> Compared:
    return compare(a, b, claims=(), **others)


def figures(compared: Compared) -> Mapping[tuple[str, str], ComparedFigure]:
    return {(one.subject, one.name): one for one in compared.figures}


def slower(arm: str, *, by: float) -> dict[str, Any]:
    """Step times of a world in which one arm's steps take longer, wherever they are timed."""
    return {"step_s": {arm: STEP_S[arm] * by}}


def of_environment(**changes: Any) -> Spoil:
    def spoil(parts: FakeParts) -> None:
        parts.environment = parts.environment.model_copy(update=changes)

    return spoil


def test_a_second_run_of_one_commit_lies_within(tmp_path: Path) -> None:
    compared = held(write(tmp_path / "a"), write(tmp_path / "b", seed=1))
    assert compared.counts_outcome == compared.times_outcome == compared.outcome == WITHIN
    assert compared.differences == () and compared.verdicts == () and compared.is_valid
    assert {one.subject for one in compared.figures} == set(STEP_S)
    assert compared.only_in_a == compared.only_in_b == ()
    assert compared.num_repeats == 0 and all(one.drift is None for one in compared.figures)


def test_figures_are_those_of_the_totals(tmp_path: Path) -> None:
    """By hand, without jitter: the overhead is one step time over the other, B over A what was planted."""
    a = write(tmp_path / "a", jitter=0.0)
    found = figures(held(a, write(tmp_path / "b", jitter=0.0, **slower("chain", by=1.5))))
    overhead = found["chain", "overhead"]
    assert overhead.a is not None and overhead.b is not None and overhead.change is not None
    assert overhead.a.estimate == pytest.approx(STEP_S["chain"] / STEP_S["vanilla"])
    assert overhead.b.estimate == pytest.approx(1.5 * overhead.a.estimate)
    assert overhead.change.estimate == pytest.approx(1.5) and overhead.change.low == pytest.approx(1.5)
    speed = found["chain", "tokens/s"].change
    assert speed is not None and speed.estimate == pytest.approx(1 / 1.5)
    wall = found["chain", "wall tokens/s"].change
    assert wall is not None and 1 / 1.5 < wall.estimate < 1, "the prefill is as it was"
    assert found["vanilla", "tokens/s"].outcome == WITHIN and overhead.outcome == OUTSIDE


def test_bands_are_widened_for_the_figures_that_have_one(tmp_path: Path) -> None:
    """Exact counts are none of them, nor are the figures of a suite whose times are not compared."""
    found = figures(held(write(tmp_path / "a"), write(tmp_path / "b", seed=1)))
    banded = [one for one in found.values() if one.band is not None]
    assert {one.name for one in banded} == {"tokens/s", "wall tokens/s", "speedup", "overhead"}
    for one in banded:
        assert one.a is not None and one.band == promised(one.a, num_figures=len(banded))


def test_a_slow_arm_lies_outside_and_no_other(tmp_path: Path) -> None:
    compared = held(write(tmp_path / "a"), write(tmp_path / "b", seed=1, **slower("optimised_64", by=1.5)))
    outside = {key for key, one in figures(compared).items() if one.outcome == OUTSIDE}
    assert outside == {
        ("optimised_64", name) for name in ("speedup", "overhead", "tokens/s", "wall tokens/s")
    }
    assert compared.counts_outcome == WITHIN and compared.outcome == OUTSIDE


def test_what_moved_within_the_band_counts_only_where_the_drift_is_known(tmp_path: Path) -> None:
    """Four percent on sixteen equal texts: far outside B / A's interval, well within sqrt(2) of A's."""
    a, b = write(tmp_path / "a"), write(tmp_path / "b", seed=1, **slower("optimised_64", by=1.04))
    one = figures(held(a, b))["optimised_64", "speedup"]
    assert one.outcome == WITHIN and "drift as far is not known" in one.reason
    repeats = [write(tmp_path / f"r{seed}", seed=seed) for seed in (2, 3)]
    compared = held(a, b, others=[*repeats, b])
    assert compared.num_repeats == 3, "pairs of A and two repeats; B is none of them"
    one = figures(compared)["optimised_64", "speedup"]
    assert one.drift is not None and 0 < one.drift < 0.02
    assert one.outcome == OUTSIDE and "more than runs of one commit do" in one.reason
    assert figures(compared)["chain", "speedup"].outcome == WITHIN


def test_a_drift_that_one_commit_showed_is_no_finding(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", seed=1, **slower("optimised_64", by=1.04))
    drifted = write(tmp_path / "r", seed=2, **slower("optimised_64", by=1.05))
    one = figures(held(a, b, others=[drifted]))["optimised_64", "speedup"]
    assert one.outcome == WITHIN and one.reason == ""


def test_drift_is_read_from_the_figures_that_two_repeats_share(tmp_path: Path) -> None:
    """One of them timed no steps apart by prompt, and so has no step cost."""

    def with_costs(parts: FakeParts) -> None:
        keys = sorted({one.trial.prompt_key for one in parts.outcomes})
        rows = [
            StepCost(
                arm=arm,
                prompt_key=key,
                num_nodes=nodes,
                num_heads=nodes - 1,
                context_tokens=8,
                backbone_s=(BACKBONE_ONE_NODE_S * node_cost(nodes),),
                step_s=(STEP_S[arm],),
            )
            for arm, nodes in (("vanilla", 1), ("chain", 6))
            for key in keys
        ]
        generic = tuple(one for one in parts.step_costs.costs if one.arm is None) if parts.step_costs else ()
        parts.step_costs = StepCosts(costs=(*generic, *rows))

    a, b = write(tmp_path / "a", with_costs), write(tmp_path / "b", with_costs, seed=1)
    found = figures(held(a, b, others=[write(tmp_path / "r", seed=2)]))
    assert found["chain", "speedup"].drift is not None and found["chain", "step cost"].drift is None


@pytest.mark.parametrize(
    "spoil",
    [
        of_environment(commit="f" * 40),
        of_environment(dirty=True),
        lambda parts: setattr(
            parts,
            "device_limits",
            DeviceLimits(read_bandwidth_bytes_per_s=1e12, matmul_flop_per_s=1e12, method="x"),
        ),
        lambda parts: setattr(
            parts, "suite_text", parts.suite_text.replace("max_new_tokens = 40", "max_new_tokens = 41")
        ),
    ],
    ids=["another commit", "changed files", "another machine", "other settings"],
)
def test_only_runs_of_one_commit_machine_and_suite_show_drift(tmp_path: Path, spoil: Spoil) -> None:
    compared = held(
        write(tmp_path / "a"), write(tmp_path / "b", seed=1), others=[write(tmp_path / "r", spoil, seed=2)]
    )
    assert compared.num_repeats == 0


def other_text(parts: FakeParts) -> None:
    """Every greedy arm and the trace have another sixth token on the second prompt."""
    assert parts.trace is not None
    prompts, key = list(parts.trace.prompts), parts.trace.prompts[1].key
    tokens = prompts[1].tokens.copy()
    tokens[5] = 3 + tokens[5] % 9
    prompts[1] = replace(prompts[1], tokens=tokens)
    parts.trace = replace(parts.trace, prompts=tuple(prompts))
    for arm in GREEDY:
        parts.edit(lambda one: {"token_ids": tuple(tokens.tolist())}, arm=arm, prompt_key=key)


def tied(parts: FakeParts) -> None:
    """The two best tokens of that position have the same logit."""
    assert parts.trace is not None
    prompts = list(parts.trace.prompts)
    gaps = prompts[1].gaps
    assert gaps is not None
    prompts[1] = replace(prompts[1], gaps=np.where(np.arange(len(gaps)) == 5, np.float32(0), gaps))
    parts.trace = replace(parts.trace, prompts=tuple(prompts))


def test_a_text_that_differs_without_a_tie_is_outside(tmp_path: Path) -> None:
    compared = held(write(tmp_path / "a"), write(tmp_path / "b", other_text, seed=1))
    found = figures(compared)
    assert {arm for arm in STEP_S if found[arm, "tokens/step"].outcome == OUTSIDE} == set(GREEDY)
    assert "mt_bench-82" in found["chain", "tokens/step"].reason
    (texts,) = [one for one in compared.texts if one.arm == "chain"]
    assert (texts.num_compared, texts.num_same, texts.num_ties, texts.num_other) == (16, 15, 0, 1)


def test_a_text_that_differs_at_a_tie_is_within(tmp_path: Path) -> None:
    compared = held(write(tmp_path / "a", tied), write(tmp_path / "b", other_text, seed=1))
    one = figures(compared)["chain", "tokens/step"]
    assert one.outcome == WITHIN and one.reason == "16 texts in the same steps, but for 1 tie"
    assert compared.counts_outcome == WITHIN


def test_steps_that_differ_on_the_same_text_are_outside(tmp_path: Path) -> None:
    """B kept one token where A's ranks and tree keep more; a text alone would not show it."""

    def split(one: Generation) -> dict[str, Any]:
        longest = max(range(len(one.step_tokens)), key=lambda index: one.step_tokens[index])
        kept = one.step_tokens[longest]
        tokens = (*one.step_tokens[:longest], 1, kept - 1, *one.step_tokens[longest + 1 :])
        times = (*one.step_times_s, one.step_times_s[0])
        return {"step_tokens": tokens, "step_times_s": times}

    b = write(tmp_path / "b", lambda parts: parts.edit(split, arm="cartesian", limit=1), seed=1)
    compared = held(write(tmp_path / "a"), b)
    (texts,) = [found for found in compared.texts if found.arm == "cartesian"]
    assert (texts.num_same, texts.num_other) == (16, 1)
    assert figures(compared)["cartesian", "tokens/step"].outcome == NOT_COMPARABLE, "its replay check fails"
    assert not compared.is_valid


@pytest.mark.parametrize(
    ("spoil", "inputs"),
    [
        (of_environment(heads_sha256="e" * 64), {"chain": ("heads",), "vanilla": ()}),
        (of_environment(backbone_sha256="e" * 64), {"chain": ("model",), "vanilla": ("model",)}),
        (of_environment(prompts_sha256="e" * 64), {"vanilla": ("prompts",)}),
        (
            lambda parts: parts.trees.update(chain=parts.trees["cartesian"]),
            {"chain": ("tree",), "cartesian": ()},
        ),
    ],
    ids=["heads", "model", "prompts", "tree"],
)
def test_other_inputs_are_held_to_a_band(
    tmp_path: Path, spoil: Spoil, inputs: Mapping[str, tuple[str, ...]]
) -> None:
    compared = held(write(tmp_path / "a"), write(tmp_path / "b", spoil, seed=1))
    found = {one.arm: one for one in compared.texts}
    for arm, differing in inputs.items():
        assert found[arm].inputs == differing, arm
        assert found[arm].is_exact == (not differing), arm
    assert any(
        one.name.startswith(("heads_sha256", "backbone_sha256", "prompts_sha256", "tree of"))
        for one in compared.differences
    )


def test_other_heads_with_other_tokens_a_step_lie_outside_their_band(tmp_path: Path) -> None:
    def other_heads(parts: FakeParts) -> None:
        assert parts.trace is not None
        origin = parts.trace.provenance.model_copy(update={"heads_hash": "e" * 64})
        parts.trace = replace(parts.trace, provenance=origin)
        parts.environment = parts.environment.model_copy(update={"heads_sha256": "e" * 64})

    worse = write(tmp_path / "b", other_heads, head_hits=(0.2, 0.1, 0.1, 0.1, 0.1), seed=1)
    compared = held(write(tmp_path / "a"), worse)
    assert compared.holds is not None and compared.holds[1].texts, compared.holds
    one = figures(compared)["chain", "tokens/step"]
    assert one.band is not None and one.b is not None and one.b.estimate < one.band.low
    assert one.outcome == OUTSIDE and one.reason == "beyond what a second run gives; other inputs: heads"


def test_times_of_another_machine_are_refused_and_texts_are_compared(tmp_path: Path) -> None:
    def other_machine(parts: FakeParts) -> None:
        device = parts.environment.device.model_copy(update={"name": "another CPU"})
        parts.environment = parts.environment.model_copy(update={"device": device})

    compared = held(write(tmp_path / "a"), write(tmp_path / "b", other_machine, seed=1))
    assert compared.no_times == "another machine: name made-up CPU against another CPU"
    assert compared.times_outcome == NOT_COMPARABLE and compared.counts_outcome == WITHIN
    assert all(one.change is None for one in compared.figures if not one.is_count)
    assert [(one.group, one.name) for one in compared.differences] == [("machine", "device.name")]


def test_times_that_do_not_hold_are_not_compared_and_counts_are(tmp_path: Path) -> None:
    """A neighbour's load bends no token: a failed check on times takes the times alone."""
    b = write(tmp_path / "b", seed=1, **slower("hf_greedy", by=0.5))  # faster than vanilla: a slow baseline
    compared = held(write(tmp_path / "a"), b)
    assert compared.no_times is not None and compared.no_times.startswith("the times of B do not hold: ")
    assert compared.counts_outcome == WITHIN and compared.times_outcome == NOT_COMPARABLE
    assert not compared.is_valid, "speeds that the suite asked for"


def test_a_suite_that_reports_no_speed_is_compared_by_its_counts(tmp_path: Path) -> None:
    sides = [write(tmp_path / name, reports_speed=False) for name in "ab"]
    compared = held(*sides)
    assert compared.no_times == "the suite of A reports no speed" and compared.is_valid
    assert compared.counts_outcome == WITHIN and {one.name for one in compared.figures} == {"tokens/step"}


def test_arms_that_one_side_lacks_are_named(tmp_path: Path) -> None:
    def without_rejection(parts: FakeParts) -> None:
        parts.suite_text = parts.suite_text[: parts.suite_text.index('[[arms]]\nname = "rejection"')]
        parts.trees.pop("rejection")
        parts.outcomes = [one for one in parts.outcomes if one.trial.arm != "rejection"]

    a, b = write(tmp_path / "a"), write(tmp_path / "b", without_rejection, seed=1)
    assert held(a, b).only_in_a == ("rejection",) and held(b, a).only_in_b == ("rejection",)
    assert ("rejection", "speedup") not in figures(held(a, b))
    assert any(one.name == "arms.rejection" for one in held(a, b).differences)


def test_one_prompt_bounds_nothing(tmp_path: Path) -> None:
    def first_only(parts: FakeParts) -> None:
        parts.outcomes = [one for one in parts.outcomes if one.trial.prompt_key == "mt_bench-81"]

    compared = held(write(tmp_path / "a", first_only), write(tmp_path / "b", first_only, seed=1))
    assert {one.outcome for one in compared.figures if not one.is_count} == {NOT_COMPARABLE}


def test_shared_prompts_alone_are_compared(tmp_path: Path) -> None:
    """B decoded half of A's prompts: both figures are formed on that half."""

    def half(parts: FakeParts) -> None:
        keys = {f"mt_bench-{81 + number}" for number in range(8)}
        parts.outcomes = [one for one in parts.outcomes if one.trial.prompt_key in keys]

    a, b = write(tmp_path / "a", jitter=0.0), write(tmp_path / "b", half, jitter=0.0)
    one = figures(held(a, b))["chain", "tokens/step"]
    assert one.a == one.b and one.a is not None and one.a.num_prompts == 8
    whole = materials_of(a)["chain", "tokens/step"]
    everywhere = whole.on(sorted(whole.columns), spec=a.suite.interval)
    assert everywhere is not None and everywhere.estimate != one.a.estimate


def test_verdicts_that_differ_are_named(tmp_path: Path) -> None:
    slow = write(tmp_path / "b", seed=1, **slower("chain", by=4.0))
    compared = compare(write(tmp_path / "a"), slow, claims=load_claims())
    changes = {one.claim_id: (one.a, one.b) for one in compared.verdicts}
    assert changes["T3-1"][0] == "reproduced" != changes["T3-1"][1]


def test_latency_records_are_compared(tmp_path: Path) -> None:
    a, b = write_fake_latency(tmp_path / "a"), write_fake_latency(tmp_path / "b")
    compared = held(a, b)
    found = figures(compared)
    assert found["float32 packed", "tokens/s"].outcome == WITHIN
    assert found["float32 packed", "over generate"].a == found["float32 packed", "over generate"].b
    steps = found["float32 packed", "tree steps, s"]
    assert steps.outcome == NOT_COMPARABLE and "too few" in steps.reason, "three repeats show no spread"
    assert compared.counts_outcome == NOT_COMPARABLE and compared.times_outcome == WITHIN


def test_records_of_two_kinds_are_refused_and_other_kinds_told_by_their_making(tmp_path: Path) -> None:
    run, latency = write(tmp_path / "a"), write_fake_latency(tmp_path / "b")
    with pytest.raises(UserError, match="two records of one kind"):
        held(run, latency)
    sweep = open_record(FIXTURES / "sweep")
    compared = held(sweep, sweep)
    assert compared.outcome == NOT_COMPARABLE and compared.figures == () and compared.is_valid
    assert compared.no_times == "only figures of runs and of latency records are compared"
    assert compared.valid == {"texts": None, "speeds": None}, "of these kinds it is not known"
    both = {"latency": "a latency record", "gpu": "a record of a GPU machine"}
    for one, other in (("latency", "gpu"), ("gpu", "latency")):
        with pytest.raises(UserError, match=f"found {both[one]} and {both[other]}; need two records"):
            held(open_record(FIXTURES / one), open_record(FIXTURES / other))
    with pytest.raises(UserError, match="found a run's record and a sweep's record; need"):
        held(run, sweep)


def test_validity_is_told_by_kind_of_figure(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    assert held(a, write(tmp_path / "b", seed=1)).valid == {"texts": True, "speeds": True}
    slow = write(tmp_path / "c", step_s={"hf_greedy": STEP_S["hf_greedy"] / 2})
    assert held(a, slow).valid == {"texts": True, "speeds": False} == held(slow, a).valid


def test_step_costs_are_formed_on_prompts_that_arm_and_baseline_were_timed_on(tmp_path: Path) -> None:
    """By hand: the chain takes 3, 4, 5 s on prompts 81 to 83, vanilla 1, 2, 4 s on 82 to 84."""

    def spoil(parts: FakeParts) -> None:
        seconds = {"chain": {81: 3.0, 82: 4.0, 83: 5.0}, "vanilla": {82: 1.0, 83: 2.0, 84: 4.0}}
        rows = [
            StepCost(
                arm=arm,
                prompt_key=f"mt_bench-{number}",
                num_nodes=1 if arm == "vanilla" else 5,
                num_heads=0 if arm == "vanilla" else 4,
                context_tokens=8,
                backbone_s=(taken,),
                step_s=(taken,),
            )
            for arm, prompts in seconds.items()
            for number, taken in prompts.items()
        ]
        parts.step_costs = StepCosts(costs=tuple(rows))

    made = materials_of(write(tmp_path / "a", spoil))["chain", "step cost"]
    assert made.columns == {"mt_bench-82": (4.0, 1.0), "mt_bench-83": (5.0, 2.0)}


def test_arms_mind_the_backbone_that_they_decode_on(tmp_path: Path) -> None:
    """`chain` decodes on the tuned backbone here, vanilla on the original: each minds its own alone."""

    def tuned(digit: str) -> TunedOrigin:
        digest = digit * 64
        hashes: dict[str, Any] = dict.fromkeys(("backbone_sha256", "adapter_sha256", "heads_sha256"), digest)
        return TunedOrigin(**hashes, weight_bytes=1, packed_bytes=0, heads_bytes=1)

    a = write(tmp_path / "a", of_environment(tuned=tuned("a")))
    b = write(tmp_path / "b", of_environment(tuned=tuned("b")))
    c = write(tmp_path / "c", of_environment(backbone_sha256="e" * 64, tuned=tuned("a")))
    for record in (a, b, c):
        arms = [
            arm.model_copy(update={"backbone": "tuned"}) if arm.name == "chain" else arm
            for arm in record.suite.arms
        ]
        record.suite = record.suite.model_copy(update={"arms": tuple(arms)})
    assert differing_inputs(a, b, "chain") == ("model", "heads") and differing_inputs(a, b, "vanilla") == ()
    assert differing_inputs(a, c, "vanilla") == ("model",) and differing_inputs(a, c, "chain") == ()


@pytest.mark.parametrize("kind", ["suite", "latency"])
def test_records_of_the_first_schema_are_compared(kind: str) -> None:
    """Written before prompts were noted with separate steps, and before devices told their details."""
    a, b = open_record(FIXTURES / kind), open_record(FIXTURES / kind)
    compared = held(a, b)
    assert compared.figures and compared.differences == ()
    assert OUTSIDE not in {one.outcome for one in compared.figures}


def test_an_unfinished_run_holds_no_figure(tmp_path: Path) -> None:
    a = write(tmp_path / "a")
    begun = write_fake_record(tmp_path / "b", omit=("manifest.json",), rounds=1).folder
    compared = held(a, open_record(begun, unsealed=True))
    assert not compared.is_valid and compared.outcome == NOT_COMPARABLE
    assert compared.no_times is not None and "trials_complete" in compared.no_times


def test_of_several_forms_of_a_claim_each_is_held_against_its_own(tmp_path: Path) -> None:
    judged = judge(write_fake_record(tmp_path, rounds=1, num_prompts=4))
    first, second = verdict("T3-9", reason="one"), verdict("T3-9", reason="two", decides=False)
    fails = {"kind": VerdictKind.NOT_REPRODUCED}
    a = judged.model_copy(update={"verdicts": (first, second, verdict("Q9"))})
    for changed, other in (
        (0, (first.model_copy(update=fails), second)),
        (1, (first, second.model_copy(update=fails))),
    ):
        b = judged.model_copy(update={"verdicts": (*other, verdict("F9", **fails))})
        (found,) = changed_verdicts(a, b)
        assert (found.claim_id, found.form, found.b) == ("T3-9", "transfer", fails["kind"].value), changed
    assert changed_verdicts(a, a) == ()


def test_steps_without_prompts_have_the_interval_of_their_own_errors() -> None:
    """By hand: errors of 0.3 and 0.4 are 0.5 together, and a normal 95 % interval reaches 1.96 of it."""
    steps = Material(
        subject="float32 packed",
        name="tree steps, s",
        statistic=lambda total: total,
        columns={"1": (2.0,), "8": (3.0,)},
        errors={"1": 0.3, "8": 0.4},
        num_repeats=6,
    )
    found = steps.on(["1", "8"], spec=IntervalSpec(level=0.95))
    assert found is not None and (found.estimate, found.num_prompts) == (5.0, 6)
    assert found.high - 5.0 == pytest.approx(1.95996 * 0.5, rel=1e-5) == 5.0 - found.low
