"""The identity of speed, rate and overhead, on totals formed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.claims.evidence import Evidence
from harness.judge.claims.run import judge_transfer
from harness.judge.judgement import VerdictKind
from harness.judge.metrics import comparisons
from harness.judge.parity import parity_report
from harness.records.probes import StepCosts
from harness.specs.forms.claims import SpeedIdentityForm
from harness.tests.fake_record import FakeParts, write_fake_record

NUM_PROMPTS = 8
STEP_S = {"vanilla": 0.3, "chain": 0.35}  # so that steps a second are no whole numbers


def keyed(parts: FakeParts) -> None:
    """Give both arms a step after each prompt, longer from prompt to prompt."""
    assert parts.step_costs is not None
    rows = [one for one in parts.step_costs.costs if one.arm is None]
    for number in range(NUM_PROMPTS):
        for one in parts.step_costs.costs:
            if one.arm in STEP_S:
                step_s = (STEP_S[one.arm] * (1 + 0.01 * number + (0.02 if one.arm == "chain" else 0)),)
                rows.append(
                    one.model_copy(update={"prompt_key": f"mt_bench-{81 + number}", "step_s": step_s})
                )
    parts.step_costs = StepCosts(costs=tuple(rows))


@pytest.mark.parametrize("with_keys", [False, True])
def test_the_gap_is_separate_overhead_over_the_decoded_one(tmp_path: Path, with_keys: bool) -> None:
    record = write_fake_record(
        tmp_path, rounds=1, num_prompts=NUM_PROMPTS, step_s=STEP_S, spoil=keyed if with_keys else None
    )
    evidence = Evidence(record=record, arms=(), comparisons=comparisons(record), parity=parity_report(record))
    rows = {arm: [one for one in record.generations if one.trial.arm == arm] for arm in ("chain", "vanilla")}
    step_s = {
        arm: sum(one.decode_s for one in some) / sum(one.num_steps for one in some)
        for arm, some in rows.items()
    }
    tokens, steps = (
        sum(one.num_tokens - 1 for one in rows["chain"]),
        sum(one.num_steps for one in rows["chain"]),
    )
    levels = [1 + 0.01 * number for number in range(NUM_PROMPTS)]
    overhead = STEP_S["chain"] / STEP_S["vanilla"]
    if with_keys:
        overhead *= sum(level + 0.02 for level in levels) / sum(levels)
    gap = overhead / (step_s["chain"] / step_s["vanilla"]) - 1
    form = SpeedIdentityForm(test="speed_identity", arms=("chain",), margin=0.05, reason="made up for a test")
    found = judge_transfer(form, evidence=evidence)
    assert found.kind is VerdictKind.REPRODUCED
    assert found.ours.startswith(f"chain {gap:+.1%} [".replace("%", " %"))
    assert (
        f"(rate over overhead {tokens / steps / overhead:.2f}x, separate overhead {overhead:.3f}"
        in found.reason
    )
    assert ("the error of the separate steps is left out" in found.reason) != with_keys
