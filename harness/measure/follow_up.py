"""What a run measures after its last trial: traces, the profile, likelihoods of sampled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.device.arms import ArmRunner
from harness.device.limits import better_limits
from harness.device.progress import counted
from harness.device.prompts import Prompt
from harness.device.trace import HEAD_TIE_MARGIN, Text, record_trace
from harness.files import write_json
from harness.measure import probes
from harness.measure.session import Session, greedy_vanilla
from harness.records.folder import file_of
from harness.records.probes import Profile, StepCosts
from harness.records.run import (
    ARM_STEPS,
    TIE_SHIFTS,
    TOKENS_FILE,
    TRACE_FILE,
    Likelihood,
    Likelihoods,
    RunRecord,
    TokenTexts,
)
from harness.records.trials import Generation


def follow_up(session: Session, runners: Mapping[str, ArmRunner]) -> None:
    """Write what follows the timed part, and the separately timed steps in one file with the step costs."""
    folder = session.store.folder
    record = RunRecord(folder)
    session.console.print("tracing the vanilla texts, profiling, scoring sampled texts")
    _trace_vanilla(session, record)
    if session.suite.reports_speed:
        _profile_arms(session, runners, record)
        dtype = session.engine.runner.backbone.dtype
        limits = better_limits(record.device_limits, session.device, dtype, clock=session.clock)
        write_json(folder / "device_limits.json", limits)
    _score_sampled(session, record.generations)
    _write_token_texts(session, record.generations)
    costs = record.step_costs.costs if record.step_costs is not None else ()
    by_size = tuple(cost for cost in costs if cost.arm is None)
    of_arms = [one for one in ARM_STEPS.done(folder) if one.is_quiet(session.suite.disturbance)]
    write_json(folder / "step_costs.json", StepCosts(costs=(*by_size, *of_arms)))


def _write_token_texts(session: Session, generations: Sequence[Generation]) -> None:
    """Write what each kept token reads as; nothing for a model without a tokenizer."""
    tokenizer = session.engine.loaded.tokenizer
    ids = sorted({token for one in generations for token in one.token_ids})
    if tokenizer is None or not ids:
        return

    def text(*tokens: int) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before = text(ids[0])  # some tokenizers drop the blank that a text begins with
    texts = {token: text(ids[0], token).removeprefix(before) for token in ids}
    write_json(session.store.folder / TOKENS_FILE, TokenTexts(texts=texts))


def _trace_vanilla(session: Session, record: RunRecord) -> None:
    """Write the trace of each backbone's greedy vanilla texts of the first round."""
    prompts = {prompt.key: prompt for prompt in session.prompts}
    for backbone, engine in session.engines.items():
        vanilla = greedy_vanilla(session.suite, backbone).name
        texts = [
            _kept_text(item, prompts)
            for item in record.generations
            if item.trial.arm == vanilla and item.trial.round == 0
        ]
        if not texts:
            continue
        rounding = record.rounding_of(backbone)
        trace = record_trace(
            engine,
            texts,
            max_new_tokens=session.suite.max_new_tokens,
            extra={"suite": session.suite.name},
            head_tie_margin=HEAD_TIE_MARGIN if rounding is None else TIE_SHIFTS * rounding.largest_head_shift,
            text_tie_margin=None if rounding is None else TIE_SHIFTS * rounding.largest_gap_shift,
        )
        trace.save(session.store.folder / file_of(TRACE_FILE, backbone))


def _profile_arms(session: Session, runners: Mapping[str, ArmRunner], record: RunRecord) -> None:
    """Write where the step time of every greedy arm goes that did not fail."""
    chosen = [prompt.prompt_ids for prompt in session.prompts[: session.suite.probes.profile_prompts]]
    failed = {failure.trial.arm for failure in record.failures}
    arms = [
        arm
        for arm in session.suite.arms
        if arm.method in ("vanilla", "medusa") and not arm.stochastic and arm.name not in failed
    ]
    rows = [
        probes.profile_arm(runners[arm.name], chosen, seed=None, clock=session.clock)
        for arm in counted(arms, "profiling, arms", total=len(arms), console=session.console)
    ]
    rows_with_steps = tuple(row for row in rows if row.num_steps)
    write_json(session.store.folder / "profile.json", Profile(rows=rows_with_steps))


def _score_sampled(session: Session, generations: Sequence[Generation]) -> None:
    """Write the likelihood of every sampled text under the original backbone, where there is one."""
    prompts = {prompt.key: prompt for prompt in session.prompts}
    sampled = [item for item in generations if session.suite.arm(item.trial.arm).stochastic]
    scored = tuple(
        Likelihood(
            trial=item.trial,
            mean_log_likelihood=probes.mean_log_likelihood(session.engine, _kept_text(item, prompts)),
        )
        for item in counted(sampled, "scoring, texts", total=len(sampled), console=session.console)
    )
    if scored:
        write_json(session.store.folder / "likelihoods.json", Likelihoods(rows=scored))


def _kept_text(item: Generation, prompts: Mapping[str, Prompt]) -> Text:
    return Text(prompts[item.trial.prompt_key], item.token_ids, item.ended_by)
