"""Greedy parity of an arm with its baseline, and of decoding with replay: every difference is found, classed and shown."""

from __future__ import annotations

from itertools import accumulate, takewhile
from typing import Literal

from harness.config import ArmSpec, Frozen
from harness.judgement import Divergence, ParityReport
from harness.records import Generation, RunRecord
from harness.trace import PromptTrace, replay

TIE_MARGIN_FLOAT32 = 5e-4  # design.md, section 7: rounding moved top-two gaps by at most 8e-5 in trials
HEAD_TIES_KEY = "head_ties"


class ReplayDifference(Frozen):
    """The first step at which decoding one prompt took another path than the replay of its trace.

    `position` is i of the trace: the step starts when y_i is the last known token. `kind` is `tie` where the texts themselves part at
    a shown tie, or a head's candidates lay within rounding at that position; else `bug`.
    """

    arm: str
    prompt_key: str
    decoded_steps: int
    replayed_steps: int
    position: int
    kind: Literal["tie", "bug"]


def parity_report(record: RunRecord, *, tie_margin: float = TIE_MARGIN_FLOAT32) -> ParityReport:
    """Compare every generation of every deterministic arm with its baseline's on the same prompt, lengths included.

    A first divergence is a `tie` where the trace's top-two gap of the reference is below `tie_margin`, else a `bug`; so are a text that
    stops early or goes on, and a divergence whose gap is not known. For half precision give that dtype's measured rounding.
    `Divergence.position` is 0-based.
    """
    references = {generation.trial: generation for generation in record.generations}
    traces = {prompt.key: prompt for prompt in record.trace.prompts} if record.trace is not None else {}
    num_compared = num_tokens = 0
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
        found = _first_divergence(generation, reference, prompt=traces.get(generation.trial.prompt_key), tie_margin=tie_margin)
        if found is not None:
            divergences.append(found)
    return ParityReport(
        num_compared=num_compared, num_tokens=num_tokens, num_identical=num_compared - len(divergences), divergences=tuple(divergences)
    )


def replay_differences(record: RunRecord, *, tie_margin: float = TIE_MARGIN_FLOAT32) -> tuple[ReplayDifference, ...]:
    """Compare the decoded steps of every greedy Medusa generation with the replay of its tree on the record's trace, step by step.

    Positions where head candidates lie within rounding are read from the trace's provenance, `extra["head_ties"]`: rows of prompt
    key, position i, head k. Without them only a shown tie of the texts excuses a difference.
    """
    if record.trace is None:
        return ()
    indices = {prompt.key: index for index, prompt in enumerate(record.trace.prompts)}
    text_ties = {(row.arm, row.prompt_key) for row in parity_report(record, tie_margin=tie_margin).divergences if row.kind == "tie"}
    head_ties = _head_ties(record)
    differences = []
    for arm in record.suite.arms:
        if not is_deterministic(arm) or arm.method != "medusa":
            continue
        replayed = replay(record.trace, record.trees[arm.name].tree(), num_heads=arm.num_heads)
        for generation in record.generations:
            key = generation.trial.prompt_key
            if generation.trial.arm != arm.name or key not in indices:
                continue
            decoded = list(accumulate(generation.step_tokens, initial=1))[:-1]
            expected = replayed.hops(indices[key]).tolist()
            if decoded == expected:
                continue
            position = _last_common(decoded, expected)
            is_tie = (arm.name, key) in text_ties or (key, position) in head_ties
            differences.append(
                ReplayDifference(
                    arm=arm.name,
                    prompt_key=key,
                    decoded_steps=len(decoded),
                    replayed_steps=len(expected),
                    position=position,
                    kind="tie" if is_tie else "bug",
                )
            )
    return tuple(differences)


def is_deterministic(arm: ArmSpec) -> bool:
    """Whether the arm decodes greedily, so that its text must be its baseline's."""
    return not arm.stochastic and arm.sampling_temperature == 0


def _first_divergence(generation: Generation, reference: Generation, *, prompt: PromptTrace | None, tie_margin: float) -> Divergence | None:
    ids, expected = generation.token_ids, reference.token_ids
    if ids == expected:
        return None
    shorter = min(len(ids), len(expected))
    position = next((index for index in range(shorter) if ids[index] != expected[index]), shorter)
    gap = _gap(prompt, expected, position=position) if position < shorter else None
    return Divergence(
        arm=generation.trial.arm,
        reference=reference.trial.arm,
        prompt_key=generation.trial.prompt_key,
        position=position,
        gap=gap,
        kind="tie" if gap is not None and gap < tie_margin else "bug",
    )


def _gap(prompt: PromptTrace | None, expected: tuple[int, ...], *, position: int) -> float | None:
    """The reference's top-two gap there, if the trace is of this very text up to there."""
    if prompt is None or prompt.gaps is None or tuple(prompt.tokens[: position + 1].tolist()) != expected[: position + 1]:
        return None
    return float(prompt.gaps[position])


def _head_ties(record: RunRecord) -> set[tuple[str, int]]:
    rows = record.trace.provenance.extra.get(HEAD_TIES_KEY, []) if record.trace is not None else []
    return {(str(row[0]), int(str(row[1]))) for row in rows if isinstance(row, list)} if isinstance(rows, list) else set()


def _last_common(decoded: list[int], expected: list[int]) -> int:
    """The position of the last step that both started: what it accepted differs."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(decoded, expected, strict=False))
    return max((first for first, _ in same), default=1)
