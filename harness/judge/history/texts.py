"""Did two runs decode the same texts in the same steps? Of the same inputs they must, but for ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from harness.judge.parity import tie_margin_of
from harness.records.run import TIE_MARGIN_FLOAT32, RunRecord
from harness.records.trace import PromptTrace
from harness.records.trials import Generation
from harness.specs.suite import is_deterministic


@dataclass(frozen=True)
class ArmTexts:
    """One arm's texts in two runs, by trial.

    `inputs` names what differs in model, heads, tree, prompts or settings, so that texts and steps may
    differ. `num_ties` are texts that part, or steps on the same text that differ, where rounding explains it,
    `num_other` those that nothing explains; both are 0 where the inputs differ. `is_exact` is whether the
    inputs decide the texts: of a greedy arm with a trace to class what differs, or of texts that all agree.
    """

    arm: str
    inputs: tuple[str, ...]
    num_compared: int
    num_same: int
    num_ties: int
    num_other: int
    is_exact: bool
    first_other: str


@dataclass(frozen=True)
class _Reference:
    """What A's trace says of one arm's backbone."""

    prompts: dict[str, PromptTrace]
    near: NearTokens | None
    ranges: dict[str, RankRanges]
    margin: float


def compare_texts(a: RunRecord, b: RunRecord) -> tuple[ArmTexts, ...]:
    """Return, for each arm that both runs have and both decoded a prompt with, how its texts compare."""
    names = [arm.name for arm in a.suite.arms if any(arm.name == other.name for other in b.suite.arms)]
    found = (_arm_texts(a, b, name) for name in names)
    return tuple(one for one in found if one.num_compared)


def differing_inputs(a: RunRecord, b: RunRecord, arm: str) -> tuple[str, ...]:
    """Return what differs of all that decides an arm's texts and steps; nothing where these must agree."""
    return tuple(_differing(a, b, arm))


def _differing(a: RunRecord, b: RunRecord, arm: str) -> Iterator[str]:
    mine, theirs = a.suite.arm(arm), b.suite.arm(arm)
    origins = a.environment, b.environment
    if origins[0].dtype != origins[1].dtype:
        yield "dtype"
    if a.suite.max_new_tokens != b.suite.max_new_tokens:
        yield "max_new_tokens"
    left_out = {"tree", "baseline", "name"}
    if mine.model_dump(exclude=left_out) != theirs.model_dump(exclude=left_out):
        yield "settings of the arm"
    hashes = [
        origin.tuned if spec.backbone == "tuned" and origin.tuned is not None else origin
        for origin, spec in zip(origins, (mine, theirs), strict=True)
    ]
    if hashes[0].backbone_sha256 != hashes[1].backbone_sha256:
        yield "model"
    behaviours = {one.behaviour_sha256 for one in hashes} - {None}
    if len(behaviours) > 1:
        yield "behaviour of the model"
    if "medusa" in (mine.method, theirs.method):
        if hashes[0].heads_sha256 != hashes[1].heads_sha256:
            yield "heads"
        trees = [record.trees[arm].tree() for record in (a, b) if arm in record.trees]
        if len({tree.fingerprint for tree in trees}) > 1:
            yield "tree"
    sizes = [{one.trial.prompt_key: one.prompt_tokens for one in record.generations} for record in (a, b)]
    are_all = sizes[0].keys() == sizes[1].keys()
    has_other_hash = are_all and origins[0].prompts_sha256 != origins[1].prompts_sha256
    if has_other_hash or any(sizes[0][key] != sizes[1][key] for key in sizes[0].keys() & sizes[1].keys()):
        yield "prompts"


def _arm_texts(a: RunRecord, b: RunRecord, arm: str) -> ArmTexts:
    theirs = {one.trial: one for one in b.generations if one.trial.arm == arm}
    pairs = [(one, theirs[one.trial]) for one in a.generations if one.trial in theirs]
    inputs = differing_inputs(a, b, arm)
    reference = _reference(a, arm) if is_deterministic(a.suite.arm(arm)) else None
    kinds = [
        # None: drawn texts, or no trace, so that whether rounding explains it cannot be said
        (mine.trial.prompt_key, reference and _kind(a, mine, other, reference=reference))
        for mine, other in pairs
        if not inputs and (mine.token_ids, mine.step_tokens) != (other.token_ids, other.step_tokens)
    ]
    unexplained = [key for key, kind in kinds if kind == "bug"]
    return ArmTexts(
        arm=arm,
        inputs=inputs,
        num_compared=len(pairs),
        num_same=sum(mine.token_ids == other.token_ids for mine, other in pairs),
        num_ties=sum(kind == "tie" for _, kind in kinds),
        num_other=len(unexplained),
        is_exact=not inputs and all(kind is not None for _, kind in kinds),
        first_other=unexplained[0] if unexplained else "",
    )


def _reference(record: RunRecord, arm: str) -> _Reference | None:
    backbone = record.suite.arm(arm).backbone
    trace = record.trace_of(backbone)
    if trace is None:
        return None
    margin = tie_margin_of(record, backbone)
    return _Reference(
        prompts={prompt.key: prompt for prompt in trace.prompts},
        near=near_tokens(trace),
        ranges=rank_ranges(trace),
        margin=TIE_MARGIN_FLOAT32 if margin is None else margin,
    )


def _kind(record: RunRecord, mine: Generation, other: Generation, *, reference: _Reference) -> str | None:
    """Return whether rounding explains where B's generation leaves A's; None where A's trace cannot say."""
    key, arm = mine.trial.prompt_key, mine.trial.arm
    prompt = reference.prompts.get(key)
    if prompt is None:
        return None
    traced = tuple(prompt.tokens.tolist())

    def parted(ids: tuple[int, ...]) -> tuple[int, str] | None:
        found = parting(ids, traced, key=key, prompt=prompt, near=reference.near, tie_margin=reference.margin)
        return None if found is None else (found.position, found.kind)

    own, theirs = parted(mine.token_ids), parted(other.token_ids)
    if mine.token_ids != other.token_ids:
        # Each text is held against the trace: what left it at a tie goes its own way from there on.
        kinds = {one[1] for one in (own, theirs) if one is not None}
        return "bug" if "bug" in kinds else "tie"
    spec = record.suite.arm(arm)
    if own is not None:
        return own[1]
    if spec.method != "medusa":
        return "bug"
    decoded, expected = step_starts(other.step_tokens), step_starts(mine.step_tokens)
    return difference_kind(
        other.step_tokens,
        record.trees[arm].tree(),
        num_heads=spec.num_heads,
        ranges=reference.ranges[key],
        since=last_common(decoded, expected),
        parted=None,
    )
