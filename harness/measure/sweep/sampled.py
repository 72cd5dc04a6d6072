"""Decode a setting whose text a replay cannot give, and score the text under the backbone."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence

from harness.device.arms import ArmRunner, TimedGeneration
from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.device.locks import Held
from harness.device.prompts import Prompt
from harness.device.trace import Text
from harness.errors import UserError
from harness.measure import probes
from harness.measure.sweep.tasks import CellInputs, SampledTask
from harness.records.sweep_cells import SampledCell, SampledRow
from harness.specs.suite import ArmSpec, GreedyAcceptance, RejectionAcceptance, TypicalAcceptance
from harness.specs.sweep import SampledSetting, SweepSpec

_TREE = {"kind": "chain", "depth": 1}  # ArmSpec wants one; ArmRunner takes the resolved tree


def sampled_prompts(spec: SweepSpec, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Return the prompts of the sampled points.

    Raises: UserError where no prompt is of the wanted categories.
    """
    wanted = spec.sampled
    assert wanted is not None
    found = [prompt for prompt in prompts if not wanted.categories or prompt.category in wanted.categories]
    if not found:
        known = sorted({prompt.category or "none" for prompt in prompts})
        none = f"no prompt of {', '.join(wanted.categories)}"
        raise UserError(found=none, need=f"some of {', '.join(known)}", where="sampled.categories")
    return tuple(found[: wanted.num_prompts])


def arm_of(setting: SampledSetting, seeds: Sequence[int]) -> ArmSpec:
    """Return a setting as an arm."""
    name = f"{setting.rule}_sweep"
    if setting.rule == "vanilla":
        return ArmSpec(name=name, method="vanilla", temperature=setting.temperature, seeds=tuple(seeds))
    acceptance: GreedyAcceptance | RejectionAcceptance | TypicalAcceptance = GreedyAcceptance()
    if setting.rule == "rejection":
        acceptance = RejectionAcceptance(rule="rejection", temperature=setting.temperature)
    elif setting.rule == "typical":
        assert setting.epsilon is not None and setting.delta is not None
        acceptance = TypicalAcceptance(
            rule="typical", temperature=setting.temperature, epsilon=setting.epsilon, delta=setting.delta
        )
    drawn = tuple(seeds) if setting.rule != "greedy" else ()
    return ArmSpec.model_validate(
        {
            "name": name,
            "method": "medusa",
            "baseline": "vanilla",
            "tree": _TREE,
            "acceptance": acceptance,
            "seeds": drawn,
        }
    )


def run_sampled(
    inputs: CellInputs,
    engine: Engine,
    task: SampledTask,
    prompts: Sequence[Prompt],
    *,
    clock: Clock,
    held: Held = contextlib.nullcontext,
) -> SampledCell:
    """Run one setting on every prompt and seed, and score its texts under the backbone.

    Nothing is timed; the device is held all the same, text by text, so as not to disturb what another run
    times.
    """
    wanted = inputs.spec.sampled
    assert wanted is not None
    started = clock()
    arm = arm_of(task.setting, wanted.seeds)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    runner = ArmRunner(
        engine,
        arm,
        tree=task.tree,
        max_new_tokens=wanted.max_new_tokens,
        max_prompt_tokens=longest,
        clock=clock,
    )
    rows = []
    for prompt in prompts:
        for seed in arm.seeds or (None,):
            with held():
                result = runner.generate(prompt.prompt_ids, seed=seed)
                rows.append(_sampled_row(engine, prompt, result, seed=seed))
    return SampledCell(setting=task.setting, tree=task.index, rows=tuple(rows), elapsed_s=clock() - started)


def _sampled_row(engine: Engine, prompt: Prompt, result: TimedGeneration, *, seed: int | None) -> SampledRow:
    text = Text(prompt, result.token_ids, result.ended_by)
    return SampledRow(
        prompt_key=prompt.key,
        category=prompt.category,
        seed=seed,
        prompt_tokens=len(prompt.prompt_ids),
        num_tokens=len(result.token_ids),
        ended_by=result.ended_by,
        step_tokens=result.step_tokens,
        log_likelihood=probes.mean_log_likelihood(engine, text) * len(result.token_ids),
        text_sha256=hashlib.sha256(json.dumps(result.token_ids).encode()).hexdigest()[:16],
    )
