"""Greedy parity of an arm with its baseline, and of decoding with replay: every difference is found, classed and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Literal

import numpy as np

from harness.config import ArmSpec, BackboneName
from harness.files import Frozen
from harness.judgement import Divergence, ParityReport, ParityRounding
from harness.records import Generation, RunRecord
from harness.trace import PromptTrace, Trace, replay
from medusa_impl.tree import DraftTree

TIE_MARGIN_FLOAT32 = 5e-4  # design.md, section 7: rounding moved top-two gaps by at most 8e-5 in trials
# Both runs may shift, each by up to the largest, from the pass whose gap classes them; and a few hundred positions miss the rarest shift.
TIE_SHIFTS = 2.0
HEAD_TIES_KEY, TEXT_TIES_KEY = "head_ties", "text_ties"


Kind = Literal["tie", "bug"]
NearTokens = dict[tuple[str, int], list[int]]  # prompt key and position i to the tokens that rounding may put first


class ReplayDifference(Frozen):
    """The first step at which decoding one prompt took another path than the replay of its trace.

    `position` is i of the trace: the step starts when y_i is the last known token. `kind` is `tie` where rounding explains every step from
    there on, to where the texts themselves part at a shown tie; else `bug`.
    """

    arm: str
    prompt_key: str
    decoded_steps: int
    replayed_steps: int
    position: int
    kind: Literal["tie", "bug"]


def tie_margin_of(record: RunRecord, backbone: BackboneName = "original") -> float | None:
    """Return the gap of a backbone's two best logits below which rounding explains a divergence in this record's precision.

    A fixed one in float32; in half precision a multiple of what the run measured, None where it did not.
    """
    if record.environment.dtype == "float32":
        return TIE_MARGIN_FLOAT32
    rounding = record.rounding_of(backbone)
    return TIE_SHIFTS * rounding.largest_gap_shift if rounding is not None else None


def parity_report(record: RunRecord, *, tie_margin: float | None = None) -> ParityReport:
    """Compare every generation of every deterministic arm with its baseline's on the same prompt, lengths included.

    A first divergence is a `tie` where the trace's top-two gap of the reference is 0 or below `tie_margin` (by default that of the record's
    precision, or float32's where it is not known), else a `bug`; so are a text that stops early or goes on, and a divergence whose gap is
    not known. Where the trace's provenance lists `extra["text_ties"]` (prompt key, position i, ids of the tokens within the margin of the
    best), any other token is a bug too. `Divergence.position` is 0-based.
    """
    margins = {name: tie_margin if tie_margin is not None else tie_margin_of(record, name) for name in record.suite.backbones}
    references = {generation.trial: generation for generation in record.generations}
    traced = {backbone: record.trace_of(backbone) for backbone in record.suite.backbones}
    prompts = {backbone: {prompt.key: prompt for prompt in trace.prompts} for backbone, trace in traced.items() if trace is not None}
    near = {backbone: _near_tokens(trace) for backbone, trace in traced.items()}
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
            generation, reference, prompt=prompt, near=near[arm.backbone], tie_margin=TIE_MARGIN_FLOAT32 if margin is None else margin
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
    """Compare the decoded steps of every greedy Medusa generation with the replay of its tree on the record's trace, step by step.

    A difference is a `tie` where every step from there on, up to where the texts part at a shown tie, kept as many tokens as the tree
    allows with ranks that rounding moved. How far it moves them is read from the trace's provenance, `extra["head_ties"]`: rows of prompt
    key, position i, head k, lowest and highest rank. Older traces have no ranks there: then the position excuses what follows it.
    """
    parted = {(row.arm, row.prompt_key): row for row in parity_report(record, tie_margin=tie_margin).divergences}
    differences = []
    for arm, trace, ranges in _replayable(record):
        tree = record.trees[arm.name].tree()
        replayed = replay(trace, tree, num_heads=arm.num_heads)
        prompts = {prompt.key: index for index, prompt in enumerate(trace.prompts)}
        for generation in record.generations:
            key = generation.trial.prompt_key
            if generation.trial.arm != arm.name or key not in prompts:
                continue
            decoded, expected = _starts(generation.step_tokens), replayed.hops(prompts[key]).tolist()
            if decoded == expected:
                continue
            position = _last_common(decoded, expected)
            kind = _kind(
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


def decoded_difference(
    trace: Trace, prompt: PromptTrace, tree: DraftTree, *, token_ids: Sequence[int], step_tokens: Sequence[int], replayed: Sequence[int]
) -> tuple[int, Kind] | None:
    """Return where a text decoded greedily, apart from any record, took another path than its replay, classed as `replay_differences` does.

    `replayed` are the positions at which the replay's steps start; the result is None where tokens and steps agree. Ties of the text are
    float32's.
    """
    near = _near_tokens(trace)
    expected: list[int] = prompt.tokens.tolist()
    parted = _parting(token_ids, expected, key=prompt.key, prompt=prompt, near=near, tie_margin=TIE_MARGIN_FLOAT32)
    decoded = _starts(step_tokens)
    if parted is None and decoded == list(replayed):
        return None
    position, ranges = _last_common(decoded, list(replayed)), _rank_ranges(trace)[prompt.key]
    return position, _kind(step_tokens, tree, num_heads=None, ranges=ranges, since=position, parted=parted)


def steps_known(record: RunRecord) -> tuple[int, int]:
    """Return how many greedy Medusa steps lie before their texts part, and in how many of them rounding leaves one length only.

    The second over the first is what `replay_differences` can see: in the other steps more than one number of tokens counts as a tie.
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
                    for start, kept in zip(_starts(generation.step_tokens), generation.step_tokens, strict=True)
                    if start + kept <= end
                ]
                num_steps += len(starts)
                num_known += sum(len(ranges[key].kept_tokens(tree, start, num_heads=arm.num_heads)) == 1 for start in starts)
    return num_steps, num_known


def is_deterministic(arm: ArmSpec) -> bool:
    """Whether the arm decodes greedily, so that its text must be its baseline's."""
    return not arm.stochastic and arm.sampling_temperature == 0


def _first_divergence(
    generation: Generation, reference: Generation, *, prompt: PromptTrace | None, near: NearTokens | None, tie_margin: float
) -> Divergence | None:
    key = generation.trial.prompt_key
    found = _parting(generation.token_ids, reference.token_ids, key=key, prompt=prompt, near=near, tie_margin=tie_margin)
    if found is None:
        return None
    arms = {"arm": generation.trial.arm, "reference": reference.trial.arm}
    return Divergence(**arms, prompt_key=key, position=found.position, gap=found.gap, kind=found.kind)


@dataclass(frozen=True)
class _Parting:
    """Where two texts part, the reference's top-two gap there, and what that makes of it."""

    position: int
    gap: float | None
    kind: Kind


def _parting(
    ids: Sequence[int], expected: Sequence[int], *, key: str, prompt: PromptTrace | None, near: NearTokens | None, tie_margin: float
) -> _Parting | None:
    if tuple(ids) == tuple(expected):
        return None
    shorter = min(len(ids), len(expected))
    position = next((index for index in range(shorter) if ids[index] != expected[index]), shorter)
    gap = _gap(prompt, tuple(expected), position=position) if position < shorter else None
    is_tie = gap is not None and (gap == 0 or gap < tie_margin)
    is_tie &= near is None or (position < shorter and ids[position] in near.get((key, position + 1), ()))
    return _Parting(position=position, gap=gap, kind="tie" if is_tie else "bug")


def _gap(prompt: PromptTrace | None, expected: tuple[int, ...], *, position: int) -> float | None:
    """The reference's top-two gap there, if the trace is of this very text up to there."""
    if prompt is None or prompt.gaps is None or tuple(prompt.tokens[: position + 1].tolist()) != expected[: position + 1]:
        return None
    return float(prompt.gaps[position])


def _rounding(record: RunRecord, *, margins: Mapping[BackboneName, float | None], num_equal_tokens: int) -> ParityRounding | None:
    """Sum up what parity was judged by; with two backbones the larger shift and margin are told, each place counts under its own."""
    measured = {name: rounding for name in margins if (rounding := record.rounding_of(name)) is not None}
    known = {name: margin for name, margin in margins.items() if margin is not None}
    if record.environment.dtype == "float32" or measured.keys() != margins.keys() or known.keys() != margins.keys():
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


@dataclass(frozen=True)
class RankRanges:
    """Of one traced prompt the lowest and highest rank that rounding allows in row i and head k; `unknown` positions have no ranks."""

    lowest: list[list[int]]
    highest: list[list[int]]
    unknown: set[int]

    @property
    def num_tokens(self) -> int:
        return len(self.lowest)

    def kept_tokens(self, tree: DraftTree, position: int, *, num_heads: int | None) -> set[int]:
        """Return the numbers of tokens that a step at `position` may keep.

        A path goes on to each child whose rank is possible, and may end wherever some possible rank has no child.
        """
        lowest, highest = self.lowest[position - 1][:num_heads], self.highest[position - 1][:num_heads]
        lengths, nodes = list[int](), [0]
        for depth, (low, high) in enumerate(zip(lowest, highest, strict=True)):
            children = [[child for child in tree.children[node] if low <= tree.ranks[child] <= high] for node in nodes]
            if any(len(some) <= high - low for some in children):
                lengths.append(depth + 1)
            nodes = [child for some in children for child in some]
        if nodes:
            lengths.append(len(lowest) + 1)
        return {min(length, self.num_tokens - position) for length in lengths}


def _near_tokens(trace: Trace | None) -> NearTokens | None:
    """The tokens that rounding may put first, by prompt and position; None in a trace that does not list them."""
    listed = trace.provenance.extra.get(TEXT_TIES_KEY) if trace is not None else None
    if not isinstance(listed, list):
        return None
    return {(str(row[0]), int(str(row[1]))): [int(str(cell)) for cell in row[2:]] for row in listed if isinstance(row, list)}


def _rank_ranges(trace: Trace) -> dict[str, RankRanges]:
    """The ranges of every prompt: its ranks themselves but where the provenance lists a head tie."""
    ranges = {prompt.key: RankRanges(prompt.ranks.tolist(), prompt.ranks.tolist(), set()) for prompt in trace.prompts}
    listed = trace.provenance.extra.get(HEAD_TIES_KEY, [])
    for row in listed if isinstance(listed, list) else []:
        if not isinstance(row, list) or str(row[0]) not in ranges:
            continue
        one, (position, head, *bounds) = ranges[str(row[0])], (int(str(cell)) for cell in row[1:])
        if bounds:
            one.lowest[position - 1][head - 1], one.highest[position - 1][head - 1] = bounds
        else:
            one.unknown.add(position)
    return ranges


def _replayable(record: RunRecord) -> Iterator[tuple[ArmSpec, Trace, dict[str, RankRanges]]]:
    """Yield every greedy Medusa arm whose backbone has a trace, with that trace and its ranks."""
    for backbone in record.suite.backbones:
        trace = record.trace_of(backbone)
        if trace is not None:
            ranges = _rank_ranges(trace)
            for arm in record.suite.arms:
                if is_deterministic(arm) and arm.method == "medusa" and arm.backbone == backbone:
                    yield arm, trace, ranges


def _kind(
    step_tokens: Sequence[int],
    tree: DraftTree,
    *,
    num_heads: int | None,
    ranges: RankRanges,
    since: int,
    parted: Divergence | _Parting | None,
) -> Kind:
    """Class the difference between decoded and replayed steps that begins with the step at `since`."""
    for start, kept in zip(_starts(step_tokens), step_tokens, strict=True):
        if start < since:
            continue
        if parted is not None and start + kept > parted.position:
            return parted.kind
        if start in ranges.unknown:
            return "tie"
        if start >= ranges.num_tokens or kept not in ranges.kept_tokens(tree, start, num_heads=num_heads):
            return "bug"
    return "tie" if 1 + sum(step_tokens) == ranges.num_tokens else "bug"


def _starts(step_tokens: Sequence[int]) -> list[int]:
    """The positions at which the steps of a generation started."""
    return list(accumulate(step_tokens, initial=1))[:-1]


def _last_common(decoded: list[int], expected: list[int]) -> int:
    """The position of the last step that both started: what it accepted differs."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(decoded, expected, strict=False))
    return max((first for first, _ in same), default=1)
