"""The rule that says which record decides, on stand-ins of which the rule alone reads a few fields."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.judge.claims import standing
from harness.judge.claims.standing import Records, RecordVerdict, finished_records
from harness.judge.judgement import ClaimVerdict, Judgement, VerdictKind
from harness.records.machines.comparable import MeasuredMachine
from harness.records.machines.identity import machine_slug
from harness.records.provenance import DeviceInfo
from harness.records.run import RunRecord
from harness.report import claims
from harness.specs.claims import ClaimsFile, ClaimSpec, DecidingRule, load_registry
from harness.specs.forms.claims import FasterForm
from harness.tests.fake_ablation import write_fake_ablation
from harness.tests.fake_record import write_fake_record

YES, NO, OPEN, UNTESTED = (
    VerdictKind.REPRODUCED,
    VerdictKind.NOT_REPRODUCED,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.NOT_TESTED,
)
RULE = DecidingRule(counts="many", speeds="fast", machine="box", read_gb_per_s=(10.0, 20.0), reason="one")


@pytest.fixture(scope="module")
def registry() -> ClaimsFile:
    return load_registry()


def verdict(claim_id: str, kind: VerdictKind = YES, **changes: Any) -> ClaimVerdict:
    data: dict[str, Any] = {
        "claim_id": claim_id,
        "stated": "it",
        "place": "Table 1",
        "paper_figure": "1x",
        "form": "transfer",
        "kind": kind,
        "ours": "1x",
        "figure_kind": "measured",
        "reason": "made up",
    }
    return ClaimVerdict(**{**data, **changes})


def found(record: str, kind: VerdictKind = YES, *, source: Any = "run", **changes: Any) -> RecordVerdict:
    return RecordVerdict(record, source, verdict("X", kind, **changes))


DEVICE = DeviceInfo(kind="cpu", name="made-up", num_cores=2, num_threads=2, memory_bytes=8_000_000_000)


def run(
    suite: str,
    machine: str,
    *,
    gb_per_s: float = 15.0,
    utc: str = "2026-01-01",
    device: DeviceInfo = DEVICE,
) -> RunRecord:
    limits = SimpleNamespace(read_bandwidth_bytes_per_s=1e9 * gb_per_s)
    one = SimpleNamespace(
        suite=SimpleNamespace(name=suite),
        folder=Path("results") / suite / machine / "one",
        device_limits=limits,
        environment=SimpleNamespace(started_utc=utc, device=device),
        failures=(),
    )
    return cast(RunRecord, one)


def test_a_rule_names_a_machine_by_its_own_name_or_by_the_one_that_older_records_share() -> None:
    details = {"family": "25", "model": "17", "stepping": "1"}
    new = DEVICE.model_copy(update={"details": details})
    own = machine_slug(new)
    assert own != "cpu-made-up-2c"
    of_new, of_old = run("fast", own, device=new), run("fast", "cpu-made-up-2c")
    slow = run("fast", own, device=new, gb_per_s=5.0)
    for named, placed in (
        ({"machine": "cpu-made-up-2c"}, (True, True, False)),  # all of the name, by their bandwidth
        ({"machine": "cpu-made-up-2c", "details": {"stepping": "1"}}, (True, True, False)),
        ({"machine": "cpu-made-up-2c", "details": {"stepping": "2"}}, (False, True, False)),
        ({"machine": own}, (True, False, False)),  # one machine alone
        ({"machine": "cpu-made-up-4c"}, (False, False, False)),
    ):
        rule = RULE.model_copy(update=named)
        found = tuple(not standing._rank(rule, one, are_speeds=True)[0] for one in (of_new, of_old, slow))
        assert found == placed, named


def machine(gb_per_s: float | None, **changes: Any) -> MeasuredMachine:
    rate = None if gb_per_s is None else 1e9 * gb_per_s
    return MeasuredMachine(DEVICE.model_copy(update=changes), rate)


def test_a_speed_is_decided_elsewhere_only_on_a_machine_that_is_not_comparable(registry: ClaimsFile) -> None:
    """A run of the very machine that leaves a speed open once counted as another class of machines."""
    timed = next(one for one in registry.claims if isinstance(one.transfer, FasterForm))
    counted = next(one for one in registry.claims if one.id == "Q-loss")
    words = "one machine name, but measured bandwidths 34.0 and 77.0 GB/s, more than 1.3 times apart"
    for other, why in (
        (machine(40), None),
        (machine(77), words),
        (machine(34, name="another"), "another machine: name made-up against another"),
    ):
        first = RecordVerdict("fast/box/one", "run", verdict("X", OPEN), machine(34))
        second = RecordVerdict("fast/box/two", "run", verdict("X", YES), other)
        one = standing._standing(timed, registry, [first, second])
        assert one.differing == (second,) and one.apart(second) == why
        assert one.is_decided_elsewhere is (why is not None)
        of_counts = standing._standing(counted, registry, [first, second])
        assert of_counts.apart(second) is None and not of_counts.is_decided_elsewhere
        shown = claims._differing(one, second)
        assert shown == f"direction holds ([fast box](fast/box/two/report.md){f'; {why}' if why else ''})"
    elsewhere = RecordVerdict("fast/gpu/two", "run", verdict("X", YES), machine(77))
    assert claims._differing(one, elsewhere) == "direction holds ([fast gpu](fast/gpu/two/report.md))"
    unknown = RecordVerdict("fast/box/two", "run", verdict("X", YES))
    assert one.apart(unknown) is None
    decided = standing._standing(timed, registry, [second, first])
    assert decided.group == "decided" and not decided.is_decided_elsewhere


def test_the_rule_ranks_counts_by_suite_first_and_speeds_by_machine_first() -> None:
    runs = {
        "both": run("many", "box"),
        "suite": run("many", "other"),
        "machine": run("small", "box"),
        "slow": run("small", "box", gb_per_s=5.0),
        "neither": run("small", "other"),
        "after": run("zoo", "zebra"),
    }
    for are_speeds, rule in (
        (False, RULE),
        (True, RULE.model_copy(update={"speeds": "many", "counts": "other"})),
    ):
        ranks = {name: standing._rank(rule, one, are_speeds=are_speeds) for name, one in runs.items()}
        suite_first = {
            "both": (False, False),
            "suite": (False, True),
            "machine": (True, False),
            "slow": (True, True),
            "neither": (True, True),
            "after": (True, True),
        }
        assert ranks == {name: both[::-1] if are_speeds else both for name, both in suite_first.items()}
    assert standing._rank(None, runs["both"], are_speeds=True) == (False, False)


def test_the_first_decides_and_others_of_the_same_test_are_kept_where_they_differ(
    registry: ClaimsFile,
) -> None:
    claim = next(one for one in registry.claims if one.transfer is not None)
    many = [
        found("a", OPEN),
        found("b", YES),
        found("c", OPEN),
        found("d", NO, source="sweep"),
        found("e", NO, source="training"),
        found("f", NO, form="paper-only"),
        found("g", NO),
    ]
    one = standing._standing(claim, registry, many)
    assert one.decides is many[0] and one.group == "open"
    assert one.differing == (many[1], many[6])
    groups = {YES: "decided", NO: "decided", OPEN: "open", VerdictKind.NOT_DECIDABLE: "cannot"}
    for kind, group in groups.items():
        assert standing._standing(claim, registry, [found("a", kind)]).group == group
    ours = standing._standing(claim, registry, [found("a", YES, is_ours=True)])
    assert ours.group == "consistency"
    none = standing._standing(claim, registry, [])
    assert (none.decides, none.differing, none.group) == (None, (), registry.group_of(claim))


def test_arithmetic_is_one_test_whatever_record_it_stands_in() -> None:
    assert found("a", form="paper-only").test == ("arithmetic", "paper-only")
    assert found("a", form="paper-only").test == found("a", form="paper-only", source="sweep").test
    assert found("a").test == ("run", "transfer")
    assert found("a", source="training", form="literal").test == ("training", "literal")


def test_what_does_not_decide_or_was_not_tested_is_left_out() -> None:
    verdicts = [verdict("A"), verdict("B", UNTESTED, ours=""), verdict("C", decides=False), verdict("D", NO)]
    kept = standing._deciding("folder", "sweep", verdicts)
    assert [(one.record, one.source, one.verdict) for one in kept] == [
        ("folder", "sweep", verdicts[0]),
        ("folder", "sweep", verdicts[3]),
    ]


def test_speeds_and_counts_are_decided_by_the_runs_that_their_rules_name(
    registry: ClaimsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = next(one for one in registry.claims if isinstance(one.transfer, FasterForm))
    counted = next(one for one in registry.claims if one.transfer is not None and one.id == "Q-loss")
    small = registry.model_copy(update={"claims": (timed, counted), "decides": RULE})
    runs = {
        "fast/box": run("fast", "box", utc="2026-01-01"),
        "fast/other": run("fast", "other", utc="2026-01-03"),
        "many/other": run("many", "other", utc="2026-01-02"),
        "invalid": run("many", "box", utc="2026-01-04"),
        "failed": run("many", "box", utc="2026-01-05"),
    }
    runs["failed"].failures = ("one",)  # type: ignore[misc, assignment]

    def judged(record: RunRecord, *, claims: tuple[ClaimSpec, ...]) -> Judgement:
        verdicts = tuple(verdict(claim.id) for claim in claims)
        valid = record is not runs["invalid"]
        return cast(Judgement, SimpleNamespace(valid_texts=valid, verdicts=verdicts))

    monkeypatch.setattr(standing, "judge", judged)
    records = Records(list(runs.items()), [], [])
    speed, count = standing.standings(small, records)
    assert speed.decides is not None and speed.decides.record == "fast/box"
    assert count.decides is not None and count.decides.record == "many/other"
    alike = {
        name: run("fast", "box", utc=utc) for name, utc in (("old", "2026-01-01"), ("new", "2026-02-01"))
    }
    newest, _ = standing.standings(small, Records(list(alike.items()), [], []))
    assert newest.decides is not None and newest.decides.record == "new"


def test_the_largest_budget_of_training_comes_first(
    registry: ClaimsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(tokens: int) -> Any:
        return SimpleNamespace(spec=SimpleNamespace(answer_tokens=tokens))

    monkeypatch.setattr(standing, "training_verdicts", lambda claims, record: [verdict("X")])
    some = [("small", of(10)), ("large", of(1000)), ("middle", of(100))]
    found = standing._of_trainings(registry, Records([], some, []))
    assert [(one.record, one.source) for one in found] == [
        ("large", "training"),
        ("middle", "training"),
        ("small", "training"),
    ]


def test_finished_records_are_sorted_by_kind_and_named_from_the_results_folder(tmp_path: Path) -> None:
    write_fake_record(tmp_path / "b" / "run", rounds=1, num_prompts=2)
    write_fake_record(tmp_path / "a" / "run", rounds=1, num_prompts=2)
    write_fake_record(tmp_path / "open", rounds=1, num_prompts=2, omit=("manifest.json",))
    write_fake_ablation(tmp_path / "c" / "training")
    found = finished_records(tmp_path)
    assert [name for name, _ in found.runs] == ["a/run", "b/run"]
    assert [name for name, _ in found.ablations] == ["c/training"] and found.sweeps == []
