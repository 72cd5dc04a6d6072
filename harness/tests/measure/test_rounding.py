"""The measured rounding: known shifts are found, every shape of the greedy arms is walked, and half-precision
runs get a parity verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor

from harness.device.engine import Engine, load_engine, load_model
from harness.device.prompts import Prompt
from harness.device.trace import Text, kept_states
from harness.errors import InvalidMeasurement
from harness.judge.judgement import CheckStatus
from harness.judge.run import judge
from harness.judge.validate.record import validate_record
from harness.measure.rounding import measure_rounding
from harness.records.run import RunRecord
from harness.report.run import render_report
from harness.specs.suite import ArmSpec
from harness.tests.device.test_trace import texts_of
from harness.tests.tiny_suite import (
    CHAIN,
    SAMPLED,
    VANILLA,
    MicroRun,
    micro_data,
    run,
    save_tiny_heads,
    smoke_suite,
)
from medusa_impl.engine.backbone import Backbone, BackboneOutput
from medusa_impl.heads import MedusaHeads
from medusa_impl.tree import DraftTree

HF: list[dict[str, Any]] = [
    {"name": name, "method": name, "baseline": "vanilla"} for name in ("hf_greedy", "hf_prompt_lookup")
]
SMALL: dict[str, Any] = {**CHAIN, "name": "small", "tree": {"kind": "cartesian", "widths": [2, 1]}}
SAME_SIZE: dict[str, Any] = {**CHAIN, "name": "same_size", "tree": {"kind": "cartesian", "widths": [4]}}
ARMS = [ArmSpec.model_validate(arm) for arm in (VANILLA, CHAIN, SMALL, SAME_SIZE, SAMPLED, *HF)]
TREES = {
    "chain": DraftTree.chain(4),
    "small": DraftTree.cartesian((2, 1)),
    "same_size": DraftTree.cartesian((4,)),
}
FEW = [arm for arm in ARMS if arm.name in ("vanilla", "small")]


def in_dtype(engine: Engine, dtype: Literal["bfloat16", "float16"]) -> Engine:
    """The tiny model in another precision, with the trained heads copied onto it."""
    suite = smoke_suite()
    suite = suite.model_copy(update={"model": suite.model.model_copy(update={"dtype": dtype})})
    heads = MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=128, architecture="shared")
    heads.load_state_dict(engine.heads.state_dict())
    return load_engine(
        suite, load_model(suite.model, device=torch.device("cpu")), base_folder=None, heads=heads
    )


def test_every_size_of_a_greedy_arm_is_walked_once_and_sampling_is_not(engine: Engine) -> None:
    texts = texts_of(engine, budget=20)
    rounding = measure_rounding(engine, texts, arms=ARMS, trees=TREES)
    assert [(shape.arms, shape.num_nodes) for shape in rounding.gaps] == [
        (("vanilla",), 1),
        (("chain", "small", "same_size"), 5),
        (("hf_greedy",), 1),
        (("hf_prompt_lookup",), 11),
    ]
    assert [shape.arms for shape in rounding.heads] == [("chain", "small", "same_size")]
    assert [shape.num_positions for shape in rounding.gaps[-2:]] == [
        3 * 20
    ] * 2  # the stock prompt's own prediction too
    assert rounding.num_texts == 3 and rounding.num_candidates == 33


def test_float32_moves_hardly_and_half_precision_by_far_more(engine: Engine) -> None:
    engines = {
        "float32": engine,
        "float16": in_dtype(engine, "float16"),
        "bfloat16": in_dtype(engine, "bfloat16"),
    }
    largest = {}
    for dtype, one in engines.items():
        rounding = measure_rounding(one, texts_of(one, budget=20), arms=ARMS, trees=TREES)
        assert rounding.dtype == dtype
        for shape in (*rounding.gaps, *rounding.heads):
            assert 0 <= shape.p50 <= shape.p90 <= shape.p99 <= shape.largest
        largest[dtype] = rounding.largest_gap_shift
    assert largest["float32"] < 1e-4 < largest["float16"] < largest["bfloat16"], largest


def test_a_known_shift_of_the_steps_is_what_is_found(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    """Steps whose logits are one and a half times the pass's move every gap by half of itself."""
    (text,) = texts_of(engine, budget=20, count=1)
    best = kept_states(engine.runner.backbone, text)[1].topk(2, dim=-1).values
    gaps = (
        best[1:, 0] - best[1:, 1]
    ).tolist()  # the first row is the prompt's own, the same for all our arms
    forward = Backbone.forward

    def scaled(backbone: Backbone, token_ids: Tensor, **options: Any) -> BackboneOutput:
        output = forward(backbone, token_ids, **options)
        return BackboneOutput(logits=1.5 * output.logits, hidden=output.hidden)

    monkeypatch.setattr(Backbone, "forward", scaled)
    rounding = measure_rounding(engine, [text], arms=FEW, trees=TREES)
    for shape in rounding.gaps:
        assert shape.num_positions == 19
        assert shape.largest == pytest.approx(max(gaps) / 2, abs=1e-3)
        assert shape.p50 == pytest.approx(sorted(gaps)[9] / 2, abs=1e-3)
    assert rounding.largest_head_shift < 1e-3, "heads read states, which nothing moved"


def test_a_known_shift_of_the_heads_is_what_is_found(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    """Heads that read a state alone give twice the logits: the best and the 33rd candidate part by their
    distance once more.
    """
    (text,) = texts_of(engine, budget=20, count=1)
    states, _ = kept_states(engine.runner.backbone, text)
    with torch.inference_mode():
        best = engine.heads(states, lm_head=engine.runner.backbone.lm_head).topk(33, dim=-1).values[:, :2]
    distances = (best[..., 0] - best[..., -1]).amax(-1)
    steps, row = [], 0  # the tree has two levels: steps keep 1, 2, 3, 1, .. tokens
    for number in range(19):
        row += 1 + number % 3
        if row < 19:  # no step starts at the last token
            steps.append(float(distances[row]))
    forward = MedusaHeads.forward

    def doubled(heads: MedusaHeads, hidden: Tensor, **options: Any) -> Tensor:
        return forward(heads, hidden, **options) * (2 if len(hidden) == 1 else 1)

    monkeypatch.setattr(MedusaHeads, "forward", doubled)
    rounding = measure_rounding(engine, [text], arms=FEW, trees=TREES)
    (shape,) = rounding.heads
    assert (shape.arms, shape.num_positions) == (("small",), len(steps))
    assert shape.largest == pytest.approx(max(steps), abs=1e-3)


def test_texts_of_one_token_have_nothing_to_compare(engine: Engine) -> None:
    (text,) = texts_of(engine, budget=8, count=1)
    short = Text(Prompt("short", None, text.prompt.prompt_ids), text.token_ids[:1], "eos")
    pair = Text(Prompt("pair", None, text.prompt.prompt_ids), text.token_ids[:2], "budget")
    rounding = measure_rounding(engine, [short, pair], arms=FEW, trees=TREES)
    assert rounding.num_texts == 1
    assert [shape.num_positions for shape in rounding.gaps] == [1, 1] and rounding.heads == ()


def test_an_overflowing_logit_is_no_rounding(engine: Engine, monkeypatch: MonkeyPatch) -> None:
    forward = Backbone.forward

    def overflowing(backbone: Backbone, token_ids: Tensor, **options: Any) -> BackboneOutput:
        output = forward(backbone, token_ids, **options)
        return BackboneOutput(logits=output.logits * torch.inf, hidden=output.hidden)

    texts = texts_of(engine, count=1)
    monkeypatch.setattr(Backbone, "forward", overflowing)
    with pytest.raises(InvalidMeasurement, match="not finite in arm 'vanilla'"):
        measure_rounding(engine, texts, arms=FEW, trees=TREES)


def test_stock_generation_that_cannot_run_costs_its_own_figures_only(
    engine: Engine, monkeypatch: MonkeyPatch
) -> None:
    from harness.measure import rounding as module

    def broken(*_: Any) -> Any:
        raise ValueError("no such kernel")

    monkeypatch.setattr(module, "_stock_steps", broken)
    rounding = measure_rounding(engine, texts_of(engine, count=1), arms=ARMS, trees=TREES)
    assert [shape.num_nodes for shape in rounding.gaps] == [1, 5]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_run_gets_a_parity_verdict(
    engine: Engine, dtype: Literal["bfloat16", "float16"], tmp_path: Path
) -> None:
    half = in_dtype(engine, dtype)
    save_tiny_heads(tmp_path / "heads.safetensors", half.heads, backbone_sha256=half.loaded.sha256)
    data = micro_data(tmp_path / "heads.safetensors", arms=[VANILLA, CHAIN, SMALL, *HF], max_new_tokens=32)
    data["model"]["dtype"] = dtype
    record = RunRecord(run(data, tmp_path / "results"))
    assert validate_record(record.folder) == ()
    assert record.manifest is not None and "rounding.json" in record.manifest.sha256
    assert record.rounding is not None and record.rounding.dtype == dtype
    assert record.rounding.gaps[0].num_positions == 4 * 63, (
        "the warm-up texts' own tokens, not the benchmark's"
    )
    assert (
        record.trace is not None
        and record.trace.provenance.extra["head_tie_margin"] == 2 * record.rounding.largest_head_shift
    )
    judgement = judge(record)
    checks = {check.name: check for check in judgement.checks}
    for name in ("greedy_parity", "replay_equals_decode", "provenance_agrees"):
        assert checks[name].status is CheckStatus.PASSED, checks[name]
    assert (
        "equal only up to ties" in checks["greedy_parity"].found
        and "one length only" in checks["replay_equals_decode"].found
    )
    (lossless,) = (verdict for verdict in judgement.verdicts if verdict.claim_id == "A6")
    assert "ties in" in lossless.reason and dtype in lossless.reason
    assert f"In {dtype} a text is equal only up to ties." in render_report(record, judgement)


def test_float32_needs_no_measured_rounding(micro: MicroRun) -> None:
    assert micro.record.rounding is None
    assert micro.record.manifest is not None and "rounding.json" not in micro.record.manifest.sha256
