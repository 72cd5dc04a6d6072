"""Suites as data: shipped ones load, and each inconsistency is refused with the key at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from harness.errors import UserError
from harness.paths import shipped
from harness.specs.suite import SuiteSpec, load_suite, parse_suite

SUITES = shipped()
VANILLA: dict[str, Any] = {"name": "vanilla", "method": "vanilla"}
SAMPLED: dict[str, Any] = {"name": "sampled", "method": "vanilla", "temperature": 0.7, "seeds": [1]}
MEDUSA: dict[str, Any] = {
    "name": "tree",
    "method": "medusa",
    "baseline": "vanilla",
    "tree": {"kind": "chain", "depth": 2},
    "acceptance": {"rule": "greedy"},
}
TYPICAL: dict[str, Any] = {"rule": "typical", "temperature": 0.7, "epsilon": 0.1, "delta": 0.3}


def suite(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    plain = {
        "schema_version": 1,
        "kind": "suite",
        "name": "one",
        "description": "",
        "max_new_tokens": 4,
        "model": {"asset": "some"},
        "heads": {"path": "some"},
        "prompts": {"source": "mt_bench"},
        "arms": list(arms) or [VANILLA],
    }
    return {**plain, **changes}


def parse(data: dict[str, Any]) -> SuiteSpec:
    return parse_suite(tomli_w.dumps(data), where="one.toml")


@pytest.mark.parametrize("name", ["smoke", "embedded", "embedded_full"])
def test_shipped_suites_load_and_survive_being_written(name: str) -> None:
    spec = load_suite(SUITES / f"{name}.toml")
    assert spec.name == name
    assert parse_suite(tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True)), where="again") == spec


def test_full_suite_differs_from_the_default_in_size_only() -> None:
    small, full = load_suite(SUITES / "embedded.toml"), load_suite(SUITES / "embedded_full.toml")
    assert [arm.name for arm in small.arms] == [arm.name for arm in full.arms]
    assert (small.model, small.heads, small.calibration_trace) == (
        full.model,
        full.heads,
        full.calibration_trace,
    )


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (suite(colour="red"), "colour: Extra inputs are not permitted"),
        (suite(schema_version=2), "schema_version"),
        (suite(name="No Good"), "name"),
        (suite(max_new_tokens=1), "max_new_tokens"),
        (suite(rounds=0), "rounds"),
        (suite(model={}), "model: .*exactly one of asset, path, tiny"),
        (suite(model={"asset": "a", "path": "b"}), "model: .*exactly one of asset, path, tiny"),
        (suite(model={"asset": "a", "dtype": "int8"}), r"model\.dtype"),
        (suite(VANILLA, MEDUSA, heads={}), r"a medusa arm needs \[heads\]"),
        (suite(heads={"path": "a", "train_steps": 1}), "heads: .*exactly one of asset, path, train_steps"),
        (suite(prompts={"source": "elsewhere"}), r"prompts\.source"),
        (suite(prompts={"source": "mt_bench", "limit": 0}), r"prompts\.limit"),
        (suite(VANILLA, VANILLA), "arm names must be distinct"),
        (suite(MEDUSA), "baseline 'vanilla' is no vanilla arm"),
        (suite(VANILLA, {key: MEDUSA[key] for key in MEDUSA if key != "baseline"}), "names its baseline"),
        (suite({**VANILLA, "baseline": "vanilla"}), "names its baseline"),
        (
            suite(VANILLA, {key: MEDUSA[key] for key in MEDUSA if key != "tree"}),
            "a medusa arm, and no other, has a tree",
        ),
        (suite({**VANILLA, "tree": {"kind": "chain", "depth": 1}}), "a medusa arm, and no other, has a tree"),
        (
            suite(VANILLA, {**MEDUSA, "temperature": 0.7, "seeds": [1]}),
            "temperature stands in its acceptance",
        ),
        (suite(VANILLA, {**MEDUSA, "tree": {"kind": "bush"}}), r"arms\.1\.tree"),
        (suite(VANILLA, {**MEDUSA, "tree": {"kind": "chain", "depth": 0}}), r"arms\.1\.tree\.chain\.depth"),
        (suite(VANILLA, {**MEDUSA, "tree": {"kind": "cartesian"}}), "exactly one of widths, max_nodes"),
        (
            suite(SAMPLED, VANILLA, {**MEDUSA, "acceptance": TYPICAL, "seeds": [1]}),
            "samples at another temperature",
        ),
    ],
)
def test_inconsistent_suite_is_refused_by_key(data: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        parse(data)
    assert caught.value.where == "one.toml" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arm",
    [
        {**VANILLA, "seeds": [1, 2]},
        {**VANILLA, "temperature": 0.7},
        {**MEDUSA, "seeds": [1]},
        {**MEDUSA, "acceptance": {"rule": "rejection", "temperature": 0.7}},
        {**MEDUSA, "acceptance": TYPICAL},
        {**MEDUSA, "acceptance": {**TYPICAL, "root": "greedy"}, "seeds": [1]},
    ],
)
def test_seeds_stand_exactly_where_random_numbers_are_drawn(arm: dict[str, Any]) -> None:
    """Typical acceptance with a greedy root draws none: three such seeded runs are one run, as the released
    code reported.
    """
    with pytest.raises(UserError, match="need seeds exactly where random numbers are drawn"):
        parse(suite(arm))


def test_a_greedy_root_makes_typical_acceptance_deterministic() -> None:
    spec = parse(
        suite(
            VANILLA, SAMPLED, {**MEDUSA, "baseline": "sampled", "acceptance": {**TYPICAL, "root": "greedy"}}
        )
    )
    assert not spec.arm("tree").stochastic and spec.arm("tree").sampling_temperature == 0.7


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable file"):
        load_suite(tmp_path / "none.toml")
