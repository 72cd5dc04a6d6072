"""The registry of claims: complete, validated, its roles and shared texts filled in; verdicts of all claims
on one record.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.judge.claims.evidence import Evidence
from harness.judge.claims.verdicts import evaluate_claims
from harness.judge.judgement import ParityReport, VerdictKind
from harness.specs.claims import CLAIMS_FILE, ROLE_KEYS, ClaimSpec, load_claims
from harness.specs.forms.claims import LadderStepForm, SpeedIdentityForm
from harness.tests.fake_record import write_fake_record

NUM_CLAIMS = 233  # entries of the collection of the paper's figures that the registry was written from
CATEGORIES = ("Coding", "Extraction", "Humanities", "Math", "Reasoning", "Roleplay", "STEM", "Writing")
DECIDED = {
    "A1",
    "A5",
    "A6",
    "F3a-7B-Medusa-1",
    "F3a-13B-Medusa-1",
    "T2-Medusa-1-S",
    "F3cap",
    *(f"F3b-{category}" for category in CATEGORIES),
    *(f"BLOGCAT-{category}" for category in CATEGORIES),
    "LOGCAT-7b",
    *(f"H-{size}-head{head}" for size in ("7b", "13b", "33b") for head in range(1, 6)),
    "H-blog",
    "DEF-rej",
    "DEF-search",
    "T3-1",
    "T3-2",
    "T3-3",
    "F4-1",
    "F4-2",
    "F6",
    "BLOG-greedy",
    "BLOG-typ10",
    "Q-loss",
    "DEF-nheads",
    "DEF-spd",
    "RL-acc",
}
PAPER_ONLY = {
    "CK1",
    "CK2",
    "CK3",
    "CK4",
    "CK5",
    "RL-OI",
    "RL-44",
    "RL-lat7",
    "RL-lat8",
    "RL-64",
    "RL-32",
    "RL-seq",
    "RL-acc",
    "RL-reg",
    "RL-hw-A100-80GB-PCIe",
    "RL-hw-A40",
    "RL-hw-A6000",
}
NO_PARITY = ParityReport(num_compared=0, num_tokens=0, num_identical=0, divergences=())
SMALL = """schema_version = 1
[roles]
chain = "chain"
[needs]
later = "a later suite"
[literal.x]
backbone = "b"
heads = "h"
device = "d"
benchmark = "m"
tolerance = 0.1
reason = "r"
[[claims]]
id = "X"
kind = "claim"
stated = "something"
place = "Table 1"
version = "v3"
figure = "1.5x"
value = 1.5
reading = "read"
literal = "x"
needs = "later"
"""


@pytest.fixture(scope="module")
def claims() -> tuple[ClaimSpec, ...]:
    return load_claims()


def test_every_entry_is_there_once(claims: tuple[ClaimSpec, ...]) -> None:
    assert len(claims) == len({claim.id for claim in claims}) == NUM_CLAIMS


def test_the_forms_decided_today(claims: tuple[ClaimSpec, ...]) -> None:
    assert {claim.id for claim in claims if claim.transfer is not None} == DECIDED
    assert {claim.id for claim in claims if claim.paper_only is not None} == PAPER_ONLY


def test_every_bound_has_a_reason_and_every_name_is_used(claims: tuple[ClaimSpec, ...]) -> None:
    forms = [
        form
        for claim in claims
        for form in (claim.literal, claim.transfer, claim.paper_only, *claim.also)
        if form is not None
    ]
    assert all(len(form.reason) > 10 for form in forms)
    data = tomllib.loads(CLAIMS_FILE.read_text())
    for table in ("needs", "literal"):
        assert {claim[table] for claim in data["claims"] if table in claim} == set(data[table])
    given = [claim[key] for claim in data["claims"] for key in ("transfer", "training") if key in claim]
    assert {form for form in given if isinstance(form, str)} == set(data["forms"])
    on_runs = [claim["transfer"] for claim in data["claims"] if "transfer" in claim]
    forms_on_runs = [data["forms"][form] if isinstance(form, str) else form for form in on_runs]
    named = [form.get(key, ()) for form in forms_on_runs for key in ROLE_KEYS]
    assert {role for roles in named for role in ([roles] if isinstance(roles, str) else roles)} == set(
        data["roles"]
    )


def test_roles_are_filled_in_and_can_be_renamed() -> None:
    renamed = {claim.id: claim.transfer for claim in load_claims(roles={"chain": "line", "vanilla": "plain"})}
    rung, identity = renamed["T3-1"], renamed["DEF-spd"]
    assert isinstance(rung, LadderStepForm) and isinstance(identity, SpeedIdentityForm)
    assert (rung.arm, rung.over) == ("line", "plain")
    assert identity.arms == ("line", "cartesian", "optimised", "fastest")


def registry(text: str, folder: Path) -> tuple[ClaimSpec, ...]:
    path = folder / "own.toml"
    path.write_text(text)
    return load_claims(path)


def test_shared_texts_are_filled_in(tmp_path: Path) -> None:
    (claim,) = registry(SMALL, tmp_path)
    assert claim.needs == "a later suite"
    assert claim.literal is not None and claim.literal.backbone == "b"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('figure = "1.5x"', 'figure = "1.5x"\nfigur = "1.5x"', r"claims\.X\.figur"),
        ('kind = "claim"', 'kind = "opinion"', r"claims\.X\.kind"),
        ('needs = "later"', 'needs = "never"', "needs 'never'.*later.*'X'"),
        ('literal = "x"', 'literal = "y"', "literal 'y'"),
        ('literal = "x"\nneeds = "later"', "", "give a form, or needs"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        (
            'needs = "later"',
            '[claims.transfer]\ntest = "faster"\narm = "winner"\nbound = 1.0\nreason = "r"',
            "roles 'winner'",
        ),
        ('needs = "later"', '[claims.transfer]\ntest = "faster"\narm = "chain"\nbound = 1.0', "reason"),
        ('needs = "later"', '[claims.transfer]\ntest = "luck"\nreason = "r"', "transfer"),
        (
            'needs = "later"',
            "[claims.table]\nrows = [1, 2]\ncolumns = [1]\ntflop_per_s = [[1]]\nintensity = [[1], [2]]",
            "2 rows of 1",
        ),
        ("[[claims]]", "[[claims", "invalid TOML"),
    ],
)
def test_a_bad_registry_is_refused_with_its_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in SMALL
    with pytest.raises(UserError, match=message):
        registry(SMALL.replace(old, new), tmp_path)


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'X' stands twice"):
        registry(SMALL + "[[claims]]" + SMALL.split("[[claims]]")[1], tmp_path)


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(UserError, match="role 'winner'"):
        load_claims(roles={"winner": "fastest"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml"):
        load_claims(tmp_path / "none.toml")


def test_a_record_with_nothing_in_it_gives_reasons_and_no_crash(
    tmp_path: Path, claims: tuple[ClaimSpec, ...]
) -> None:
    record = write_fake_record(
        tmp_path / "empty", spoil=lambda parts: parts.outcomes.clear(), omit=("trace.npz", "step_costs.json")
    )
    verdicts = evaluate_claims(claims, Evidence(record=record, arms=(), comparisons=(), parity=NO_PARITY))
    assert [verdict.claim_id for verdict in verdicts if verdict.decides] == [claim.id for claim in claims]
    assert all(verdict.reason for verdict in verdicts)
    assert {
        verdict.claim_id for verdict in verdicts if verdict.kind is not VerdictKind.NOT_TESTED
    } == PAPER_ONLY
    assert all(
        (verdict.figure_kind is None) == (verdict.kind is VerdictKind.NOT_TESTED) for verdict in verdicts
    )
    assert {verdict.form for verdict in verdicts if verdict.claim_id in DECIDED - PAPER_ONLY} == {"transfer"}
