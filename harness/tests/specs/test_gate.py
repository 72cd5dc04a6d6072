"""What a gate's data file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.errors import UserError
from harness.paths import shipped
from harness.specs.gate import GateSpec, load_gate_spec, parse_gate_spec
from harness.specs.suite import SuiteSpec


def data() -> dict[str, Any]:
    return load_gate_spec(shipped("gate", "gate.toml")).model_dump()


@pytest.mark.parametrize("path", sorted(shipped("gate").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_gates_are_whole(path: Path) -> None:
    spec = load_gate_spec(path)
    assert spec.name == path.stem and parse_gate_spec(path.read_text(encoding="utf-8"), where="x") == spec
    assert all(one.reason for one in spec.margins)
    suite = SuiteSpec.model_validate(spec.suite_data())
    assert suite.prompts.limit == spec.looks[-1] and suite.arms == spec.arms
    assert spec.vanilla in {arm.name for arm in spec.timed_arms}


def test_the_gate_has_a_block_for_each_of_its_prompts() -> None:
    """Three of each of MT-Bench's eight categories."""
    spec = load_gate_spec(shipped("gate", "gate.toml"))
    assert spec.prompts.per_category is not None and 8 * spec.prompts.per_category == spec.looks[-1]
    assert spec.minutes < 10


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"looks": (8, 4)}, "need growing numbers"),
        ({"looks": (2, 4)}, "the first at least 3"),
        ({"must_see": 0.02}, "have to be below must_see"),
        ({"margins": ()}, "at least 1 item"),
        ({"mark_every": 6}, "need an odd number"),
        ({"alpha": 0}, "greater than 0"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        GateSpec.model_validate({**data(), **change})


def test_arms_that_a_gate_cannot_compare_are_refused() -> None:
    whole = data()
    tree = next(arm for arm in whole["arms"] if arm["name"] == "tree")
    fastest = {**tree, "tree": {"kind": "fastest", "max_nodes": 8}}
    for arms, fault in (
        ([whole["arms"][0], fastest], "chosen by step times"),
        ([whole["arms"][0], {**whole["arms"][0]}], "must be distinct"),
        ([{"name": "hf", "method": "hf_greedy", "baseline": "vanilla"}, whole["arms"][0]], "decodes vanilla"),
        ([whole["arms"][2]], "no greedy vanilla arm"),
    ):
        with pytest.raises(ValidationError, match=fault):
            GateSpec.model_validate({**whole, "arms": arms})
    with pytest.raises(ValidationError, match="name a quantity twice"):
        GateSpec.model_validate({**whole, "margins": [whole["margins"][0]] * 2})


def test_a_suite_is_no_gate() -> None:
    with pytest.raises(UserError, match=r'need kind = "gate".*medusa-repro reproduce'):
        load_gate_spec(shipped("smoke.toml"))
