"""Plans for a GPU machine: what a file may say, which parts are chosen, and how their time is divided."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from harness.errors import UserError
from harness.paths import resolve_path, shipped
from harness.specs.gpu import GpuSpec, allotted_s, chosen_parts, load_gpu_spec, schedule
from harness.specs.latency import load_latency_spec

TESTS = {"part": "tests", "marker": "gpu", "limit_s": 60}
LIMITS = {"part": "limits", "dtypes": ["float32"], "limit_s": 30}
SUITE = {
    "part": "suite",
    "suite": "smoke.toml",
    "num_prompts": 2,
    "limit_s": 90,
    "least_s": 20,
    "reserve_s": 10,
}


def plan(*parts: dict[str, Any], **changes: Any) -> GpuSpec:
    data = {"schema_version": 1, "kind": "gpu", "name": "x", "description": "for tests", **changes}
    return GpuSpec.model_validate({**data, "parts": list(parts or (TESTS, LIMITS, SUITE))})


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_shipped_plans_hold_every_part_in_order_of_worth_and_in_their_time(name: str) -> None:
    spec = load_gpu_spec(shipped("gpu", f"{name}.toml"))
    assert spec.device == name and spec.minutes == 5
    assert [one.part for one in spec.parts] == ["tests", "limits", "latency", "suite", "rates", "kernels"]
    # The rest is for the process that asks the device and for what lies between two parts.
    assert sum(one.limit_s for one in spec.parts) <= 0.9 * 60 * spec.minutes
    planned = schedule(spec)
    assert all((planned[one.part] or 0) >= one.limit_s for one in spec.parts)
    for one in spec.parts:
        for named in (getattr(one, field, None) for field in ("spec", "suite", "recipe")):
            assert named is None or resolve_path(named, base_folder=shipped("gpu")).is_file()


def test_the_curve_of_a_card_has_13_sizes_2_contexts_and_batches_1_to_16() -> None:
    points = load_latency_spec(shipped("latency", "gpu_acceptance.toml")).points("bfloat16", ("cuda_graph",))
    assert len(points) == 13 * 2 * 5
    assert [len({getattr(point, name) for point in points}) for name in ("num_nodes", "context_tokens")] == [
        13,
        2,
    ]
    batches = [point.batch for point in points]
    assert batches == sorted(batches) and set(batches) == {1, 2, 4, 8, 16}, "a short run has batch 1"


def test_parts_are_chosen_by_name_and_keep_their_order() -> None:
    assert [one.part for one in chosen_parts(plan(), only="suite, tests").parts] == ["tests", "suite"]
    assert [one.part for one in chosen_parts(plan(), skip="limits").parts] == ["tests", "suite"]
    assert [one.part for one in chosen_parts(plan(), only="tests,limits", skip="tests").parts] == ["limits"]
    assert chosen_parts(plan(), minutes=2).minutes == 2
    with pytest.raises(UserError, match="no part 'latency'"):
        chosen_parts(plan(), only="latency")
    with pytest.raises(UserError, match="no part left to run"):
        chosen_parts(plan(), only="tests", skip="tests")


@pytest.mark.parametrize(
    ("limits_s", "left_s", "given_s"),
    [
        ((60, 30, 90), 180, 60),  # as planned
        ((30, 90), 150, 60),  # the part before took 30 s less: this one may have them
        ((30, 90), 100, 30),  # no more is left than both need: the order of worth decides
        ((30, 90), 20, 20),
        ((90,), 300, 300),
        ((90,), -4, 0),
    ],
)
def test_time_that_a_part_leaves_over_goes_to_the_next_one(
    limits_s: tuple[float, ...], left_s: float, given_s: float
) -> None:
    assert allotted_s(limits_s, left_s=left_s) == given_s


def test_a_plan_that_is_short_of_time_leaves_its_last_parts_out() -> None:
    assert schedule(plan(minutes=3)) == {"tests": 60, "limits": 30, "suite": 90}
    assert schedule(plan(minutes=1.75)) == {"tests": 60, "limits": 30, "suite": None}, "15 s, of 20 at least"
    assert schedule(plan(minutes=4)) == {"tests": 120, "limits": 30, "suite": 90}
    bounded = plan({**TESTS, "most_s": 70}, LIMITS, minutes=4)
    assert schedule(bounded) == {"tests": 70, "limits": 170}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((TESTS, TESTS), "each at most once"),
        (({"part": "tests", "limit_s": 60},), "give a marker, files, or both"),
        (({**SUITE, "reserve_s": 15},), "least_s has to be 6 s more than reserve_s"),
        (({**TESTS, "limit_s": 0},), "greater than 0"),
        (({**TESTS, "part": "other"},), "union_tag_invalid"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(parts: tuple[dict[str, Any], ...], words: str) -> None:
    with pytest.raises(ValidationError) as found:
        plan(*parts)
    assert words in f"{found.value} {[error['type'] for error in found.value.errors()]}"
