"""Trees of a suite: each kind resolves, depth is checked, the fastest one follows the measured step costs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.compose.replay import replay
from harness.compose.trees import check_fixed_trees, fastest_tree, grow, resolve_trees
from harness.errors import UserError
from harness.records.probes import StepCost
from harness.records.run import ArmTree
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.specs.suite import SuiteSpec
from harness.tests.tiny_suite import CHAIN, VANILLA, smoke_suite
from medusa_impl.tree import DraftTree

NUM_TOKENS, NUM_HEADS = 40, 4
CHECK_TREES = partial(check_fixed_trees, num_heads=NUM_HEADS, vocab_size=99, base_folder=None)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Six prompts on which head k's true token has geometric ranks, wider for later heads."""
    rng = np.random.default_rng(5)
    beyond = np.arange(1, NUM_TOKENS + 1)[:, None] + np.arange(1, NUM_HEADS + 1) > NUM_TOKENS
    prompts = []
    for number in range(6):
        ranks = rng.geometric(p=[0.6, 0.5, 0.4, 0.35], size=(NUM_TOKENS, NUM_HEADS)) - 1
        tokens = np.arange(NUM_TOKENS)
        prompts.append(
            PromptTrace(f"p{number}", None, 5, tokens, "budget", np.where(beyond, -1, ranks).astype(np.int32))
        )
    return Trace(
        TraceProvenance(model_hash="m", heads_hash="h", dtype="float32", max_new_tokens=NUM_TOKENS),
        tuple(prompts),
    )


def costs(curve: dict[int, float]) -> tuple[StepCost, ...]:
    one = StepCost(num_nodes=1, num_heads=0, context_tokens=8, backbone_s=(0.5,), step_s=())
    rows = [
        StepCost(num_nodes=size, num_heads=1, context_tokens=8, backbone_s=(0.1,), step_s=(s, s, 9 * s))
        for size, s in curve.items()
    ]
    other = StepCost(
        arm="chain", num_nodes=3, num_heads=1, context_tokens=8, backbone_s=(1e-9,), step_s=(1e-9,)
    )
    return (one, *rows, other)  # neither the lone node nor an arm's own steps belong to the curve


def suite(*trees: dict[str, Any], num_heads: int | None = None) -> SuiteSpec:
    arms = [
        {**CHAIN, "name": f"arm{number}", "tree": tree, "num_heads": num_heads}
        for number, tree in enumerate(trees)
    ]
    return SuiteSpec.model_validate({**smoke_suite().model_dump(), "arms": [VANILLA, *arms]})


def resolve(
    spec: SuiteSpec, calibration: Trace | None, *, base_folder: Path | None = None
) -> dict[str, ArmTree]:
    return resolve_trees(
        spec.arms,
        calibration=calibration,
        costs=costs({2: 1.0, 64: 2.0}),
        num_heads=NUM_HEADS,
        base_folder=base_folder,
    )


def test_every_kind_resolves(trace: Trace, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(DraftTree.from_paths([(0,), (2,), (0, 1)]).to_json())
    spec = suite(
        {"kind": "chain", "depth": 3},
        {"kind": "cartesian", "widths": [3, 2]},
        {"kind": "cartesian", "max_nodes": 20},
        {"kind": "file", "path": "mine.json"},
        {"kind": "searched", "num_nodes": 16, "values": "joint"},
        {"kind": "searched", "num_nodes": 16, "values": "marginals"},
        {"kind": "fastest", "max_nodes": 64},
    )
    trees = resolve(spec, trace, base_folder=tmp_path)
    assert list(trees) == [f"arm{number}" for number in range(7)]  # vanilla has none
    assert trees["arm0"].tree() == DraftTree.chain(3) and trees["arm0"].origin == "chain of 3"
    assert trees["arm1"].tree() == DraftTree.cartesian((3, 2)) and "[3, 2]" in trees["arm1"].origin
    assert 10 < trees["arm2"].tree().num_nodes <= 20
    assert trees["arm3"].paths == ((), (0,), (2,), (0, 1)) and trees["arm3"].origin == "file mine.json"
    assert trees["arm4"].tree().num_nodes == trees["arm5"].tree().num_nodes == 16
    assert trees["arm6"].tree().num_nodes <= 64 and "step times" in trees["arm6"].origin
    for tree in trees.values():
        assert tree.predicted_tokens_per_step == pytest.approx(replay(trace, tree.tree()).tokens_per_step)
    assert len({tree.tree().fingerprint for tree in trees.values()}) > 4


def test_without_a_calibration_trace_nothing_is_predicted() -> None:
    assert resolve(suite({"kind": "chain", "depth": 2}), None)["arm0"].predicted_tokens_per_step is None


@pytest.mark.parametrize("kind", [{"kind": "searched", "num_nodes": 8}, {"kind": "fastest", "max_nodes": 8}])
def test_a_search_needs_a_calibration_trace(kind: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="need a calibration_trace; in arm 'arm0'"):
        resolve(suite(kind), None)
    with pytest.raises(UserError, match="need a calibration_trace"):
        CHECK_TREES(suite(kind), has_calibration=False)
    CHECK_TREES(suite(kind), has_calibration=True)


def test_trees_deeper_than_the_heads_of_their_arm_are_refused(trace: Trace) -> None:
    for spec, need in (
        (suite({"kind": "chain", "depth": 5}), 4),
        (suite({"kind": "chain", "depth": 3}, num_heads=2), 2),
    ):
        with pytest.raises(UserError, match=f"need at most {need}, the number of heads"):
            resolve(spec, trace)
        with pytest.raises(UserError, match=f"need at most {need}, the number of heads"):
            CHECK_TREES(spec, has_calibration=True)


def test_a_search_stays_within_the_heads_of_its_arm(trace: Trace) -> None:
    searched, fastest = {"kind": "searched", "num_nodes": 30}, {"kind": "fastest", "max_nodes": 64}
    trees = resolve(suite(searched, fastest, num_heads=2), trace)
    assert max(tree.tree().depth for tree in trees.values()) <= 2


def test_missing_tree_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no file 'gone\.json'"):
        resolve(suite({"kind": "file", "path": "gone.json"}), None)


def test_fastest_tree_follows_the_step_costs(trace: Trace) -> None:
    def num_nodes(curve: dict[int, float], *, max_nodes: int = 64) -> int:
        return fastest_tree(trace, costs=costs(curve), max_nodes=max_nodes, num_heads=NUM_HEADS)[0].num_nodes

    assert num_nodes({2: 1.0, 64: 1.0}) == 64  # free nodes: take them all
    assert num_nodes({2: 1.0, 64: 100.0}) == 2  # each node as dear as a step: hardly any
    assert 2 < num_nodes({2: 1.0, 16: 1.05, 17: 9.0, 64: 9.5}) <= 16  # a cliff: stay before it
    assert 10 < num_nodes({2: 1.0, 64: 1.0}, max_nodes=20) <= 20
    assert 10 < num_nodes({2: 1.0, 32: 1.0}) <= 32  # nothing is known beyond what was measured


def test_fastest_tree_maximises_tokens_a_second_over_all_sizes(trace: Trace) -> None:
    curve = {2: 1.0, 8: 1.1, 16: 1.3, 64: 2.5}
    chosen, _ = fastest_tree(trace, costs=costs(curve), max_nodes=64, num_heads=NUM_HEADS)
    grown = grow(trace, num_nodes=64, values="joint", num_heads=NUM_HEADS)

    def speed(tree: DraftTree) -> float:
        return replay(trace, tree).tokens_per_step / float(
            np.interp(tree.num_nodes, list(curve), list(curve.values()))
        )

    assert all(speed(chosen) >= speed(grown.nested(size)) for size in (2, 4, 8, 12, 16, 24, 32, 48, 64))


def test_fastest_tree_needs_step_times(trace: Trace) -> None:
    with pytest.raises(UserError, match="no step times of this machine"):
        fastest_tree(trace, costs=(), max_nodes=8, num_heads=NUM_HEADS)


def test_a_rank_beyond_the_vocabulary_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "wide.json").write_text("[[99]]")
    spec = suite({"kind": "file", "path": str(tmp_path / "wide.json")})
    with pytest.raises(UserError, match=r"rank 99 in node .*need a rank below the vocabulary size 99"):
        CHECK_TREES(spec, has_calibration=False)
