"""Greedy parity of an arm with its baseline, and of decoding with replay.

Every difference is found, classed and shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.compose.differences import (
    NearTokens,
    RankRanges,
    difference_kind,
    last_common,
    near_tokens,
    parting,
    rank_ranges,
    step_starts,
)
from harness.compose.replay import replay
from harness.files import Frozen
from harness.judge.judgement import Divergence, ParityReport, ParityRounding
from harness.records.run import TIE_MARGIN_FLOAT32, TIE_SHIFTS, RunRecord
from harness.records.trace import PromptTrace, Trace
from harness.records.trials import Generation, TrialKey
from harness.specs.suite import ArmSpec, BackboneName, RejectionAcceptance, is_deterministic


class ReplayDifference(Frozen):
    """The first step at which decoding one prompt took another path than the replay of its trace.

    `position` is i of the trace: the step starts when y_i is the last known token. `kind` is `tie` where
    rounding explains every step from there on, to where the texts themselves part at a shown tie; else `bug`.
    """

    arm: str
    prompt_key: str
    decoded_steps: int
    replayed_steps: int
    position: int
    kind: Literal["tie", "bug"]


def tie_margin_of(record: RunRecord, backbone: BackboneName = "original") -> float | None:
    """Return the gap of a backbone's two best logits below which rounding explains a divergence.

    It is a fixed one in float32; in half precision a multiple of what the run measured, None where it did
    not.
    """
    if record.environment.dtype == "float32":
        return TIE_MARGIN_FLOAT32
    rounding = record.rounding_of(backbone)
    return TIE_SHIFTS * rounding.largest_gap_shift if rounding is not None else None


def parity_report(record: RunRecord, *, tie_margin: float | None = None) -> ParityReport:
    """Compare every generation of every deterministic arm with its baseline's on the same prompt.

    Lengths are compared too. A first divergence is a `tie` where the trace's top-two gap of the reference is
    0 or below `tie_margin` (by default that of the record's precision, or float32's where it is not known),
    else a `bug`; so are a text that stops early or goes on, and a divergence whose gap is not known. Where
    the trace's provenance lists `extra["text_ties"]` (prompt key, position i, ids of the tokens within the
    margin of the best), any other token is a bug too. `Divergence.position` is 0-based.
    """
    margins = {
        name: tie_margin if tie_margin is not None else tie_margin_of(record, name)
        for name in record.suite.backbones
    }
    references = {generation.trial: generation for generation in record.generations}
    traced = {backbone: record.trace_of(backbone) for backbone in record.suite.backbones}
    prompts = {
        backbone: {prompt.key: prompt for prompt in trace.prompts}
        for backbone, trace in traced.items()
        if trace is not None
    }
    near = {backbone: near_tokens(trace) for backbone, trace in traced.items()}
    num_compared = num_tokens = num_equal = 0
    divergences = []
    for generation in record.generations:
        arm = record.suite.arm(generation.trial.arm)
        if not is_deterministic(arm) or arm.baseline is None:
            continue
        reference = references.get(generation.trial.model_copy(update={"arm": arm.baseline}))
        if reference is None:
            continue
        num_compared += 1
        num_tokens += reference.num_tokens
        prompt, margin = prompts.get(arm.backbone, {}).get(generation.trial.prompt_key), margins[arm.backbone]
        found = _first_divergence(
            generation,
            reference,
            prompt=prompt,
            near=near[arm.backbone],
            tie_margin=TIE_MARGIN_FLOAT32 if margin is None else margin,
        )
        num_equal += reference.num_tokens if found is None else found.position
        if found is not None:
            divergences.append(found)
    return ParityReport(
        num_compared=num_compared,
        num_tokens=num_tokens,
        num_identical=num_compared - len(divergences),
        divergences=tuple(divergences),
        rounding=_rounding(record, margins=margins, num_equal_tokens=num_equal),
    )


def replay_differences(record: RunRecord, *, tie_margin: float | None = None) -> tuple[ReplayDifference, ...]:
    """Compare the decoded steps of every greedy Medusa generation with its replay, step by step.

    The replay is that of the arm's tree on the record's trace. A difference is a `tie` where every step from
    there on, up to where the texts differ at a shown tie, kept as many tokens as the tree allows with ranks
    that rounding moved. How far it moves them is read from the trace's provenance, `extra["head_ties"]`: rows
    of prompt key, position i, head k, lowest and highest rank. Older traces have no ranks there: then the
    position excuses what follows it.
    """
    divergences = parity_report(record, tie_margin=tie_margin).divergences
    parted = {(row.arm, row.prompt_key): (row.position, row.kind) for row in divergences}
    differences = []
    for arm, trace, ranges in _replayable(record):
        tree = record.trees[arm.name].tree()
        replayed = replay(trace, tree, num_heads=arm.num_heads)
        prompts = {prompt.key: index for index, prompt in enumerate(trace.prompts)}
        for generation in record.generations:
            key = generation.trial.prompt_key
            if generation.trial.arm != arm.name or key not in prompts:
                continue
            decoded, expected = step_starts(generation.step_tokens), replayed.hops(prompts[key]).tolist()
            if decoded == expected:
                continue
            position = last_common(decoded, expected)
            kind = difference_kind(
                generation.step_tokens,
                tree,
                num_heads=arm.num_heads,
                ranges=ranges[key],
                since=position,
                parted=parted.get((arm.name, key)),
            )
            differences.append(
                ReplayDifference(
                    arm=arm.name,
                    prompt_key=key,
                    decoded_steps=len(decoded),
                    replayed_steps=len(expected),
                    position=position,
                    kind=kind,
                )
            )
    return tuple(differences)


def steps_known(record: RunRecord) -> tuple[int, int]:
    """Return how many greedy Medusa steps can be compared, and in how many rounding leaves one length.

    Steps are counted until their texts differ. The second over the first is what `replay_differences` can
    see: in the other steps more than one number of tokens counts as a tie.
    """
    parted = {(row.arm, row.prompt_key): row.position for row in parity_report(record).divergences}
    num_steps = num_known = 0
    for arm, _, ranges in _replayable(record):
        tree = record.trees[arm.name].tree()
        for generation in record.generations:
            key = generation.trial.prompt_key
            if generation.trial.arm == arm.name and key in ranges:
                end = min(parted.get((arm.name, key), generation.num_tokens), ranges[key].num_tokens)
                starts = [
                    start
                    for start, kept in zip(
                        step_starts(generation.step_tokens), generation.step_tokens, strict=True
                    )
                    if start + kept <= end
                ]
                num_steps += len(starts)
                num_known += sum(
                    len(ranges[key].kept_tokens(tree, start, num_heads=arm.num_heads)) == 1
                    for start in starts
                )
    return num_steps, num_known


@dataclass(frozen=True)
class RejectionPairs:
    """Texts of rejection sampling next to those of its baseline, sampled with the same seeds.

    `parted` are the trials whose tokens are other ones; `num_tokens` counts the baseline's.
    """

    num_texts: int
    num_tokens: int
    parted: tuple[TrialKey, ...]


def rejection_pairs(record: RunRecord, *, arm: str | None = None) -> RejectionPairs | str:
    """Return what rejection sampling wrote next to its baseline, of all its arms or of one; else why not.

    On a CPU both draw once a token from one generator, in the order of the text, so in float32 they part only
    where rounding decides a draw. On a GPU the rule draws on after a path has ended.
    """
    arms = {
        one.name: one.baseline
        for one in record.suite.arms
        if isinstance(one.acceptance, RejectionAcceptance)
        and one.baseline is not None
        and arm in (None, one.name)
    }
    if not arms:
        return "no arm with rejection and a baseline"
    if (dtype := record.environment.dtype) != "float32":
        return f"{dtype} rounds draws differently in passes of other sizes"
    if record.environment.device.kind != "cpu":
        return "a GPU draws on after a path has ended, so seeds do not pair texts"
    texts = {one.trial: one.token_ids for one in record.generations}
    pairs = [
        (trial, tokens, base)
        for trial, tokens in texts.items()
        if trial.arm in arms
        and (base := texts.get(trial.model_copy(update={"arm": arms[trial.arm]}))) is not None
    ]
    if not pairs:
        return "no generation of rejection has a baseline's of the same seed"
    return RejectionPairs(
        num_texts=len(pairs),
        num_tokens=sum(len(base) for _, _, base in pairs),
        parted=tuple(trial for trial, tokens, base in pairs if tokens != base),
    )


def _first_divergence(
    generation: Generation,
    reference: Generation,
    *,
    prompt: PromptTrace | None,
    near: NearTokens | None,
    tie_margin: float,
) -> Divergence | None:
    key = generation.trial.prompt_key
    found = parting(
        generation.token_ids, reference.token_ids, key=key, prompt=prompt, near=near, tie_margin=tie_margin
    )
    if found is None:
        return None
    arms = {"arm": generation.trial.arm, "reference": reference.trial.arm}
    return Divergence(**arms, prompt_key=key, position=found.position, gap=found.gap, kind=found.kind)


def _rounding(
    record: RunRecord, *, margins: Mapping[BackboneName, float | None], num_equal_tokens: int
) -> ParityRounding | None:
    """Return what parity was judged by; None where that was not measured, or in float32.

    With two backbones the larger shift and margin are shown, and each position counts under its own.
    """
    measured = {name: rounding for name in margins if (rounding := record.rounding_of(name)) is not None}
    known = {name: margin for name, margin in margins.items() if margin is not None}
    if (
        record.environment.dtype == "float32"
        or measured.keys() != margins.keys()
        or known.keys() != margins.keys()
    ):
        return None
    below = [
        prompt.gaps < known[name]
        for name in known
        if (trace := record.trace_of(name)) is not None
        for prompt in trace.prompts
        if prompt.gaps is not None
    ]
    return ParityRounding(
        dtype=record.environment.dtype,
        largest_shift=max(rounding.largest_gap_shift for rounding in measured.values()),
        tie_margin=max(known.values()),
        share_below=float(np.mean(np.concatenate(below))) if below else 0.0,
        num_equal_tokens=num_equal_tokens,
    )


def _replayable(record: RunRecord) -> Iterator[tuple[ArmSpec, Trace, dict[str, RankRanges]]]:
    """Yield every greedy Medusa arm whose backbone has a trace, with that trace and its ranks."""
    for backbone in record.suite.backbones:
        trace = record.trace_of(backbone)
        if trace is not None:
            ranges = rank_ranges(trace)
            for arm in record.suite.arms:
                if is_deterministic(arm) and arm.method == "medusa" and arm.backbone == backbone:
                    yield arm, trace, ranges
