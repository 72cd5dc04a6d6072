"""How far rounding moves logits between the shapes in which a run computes one position.

It is measured before the trials, in half precision. A token of a text is predicted by a step of one node
(vanilla), at nodes of trees of several sizes (Medusa), by `generate` of transformers with its own kernels,
and by the pass over the whole text that the trace reads. Each shape sums in an order of its own, and bfloat16
keeps 8 bits of every sum. Here kept texts are walked through in every shape, and what comes out is compared
with the trace's pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.device.arms import PROMPT_LOOKUP_TOKENS
from harness.device.engine import Engine
from harness.device.trace import CHUNK_POSITIONS, MAX_TREE_RANK, Text, kept_states
from harness.errors import InvalidMeasurement
from harness.records.probes import Rounding, ShapeShift
from harness.specs.suite import ArmSpec, is_deterministic
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

_STOCK_STEP_TOKENS = {"hf_greedy": 1, "hf_prompt_lookup": 1 + PROMPT_LOOKUP_TOKENS}


@dataclass(frozen=True)
class _Step:
    """What one step says of a text: logits of some rows, and the state that heads read next.

    Row r is what produced y_{r+1}.
    Shapes: rows `[m]`, logits `[m, V]`; state `[H]`, of row `state_row`, None in a stock step.
    """

    rows: Tensor
    logits: Tensor
    state_row: int
    state: Tensor | None


@dataclass(frozen=True)
class _WholePass:
    """What the trace's pass gives for one text.

    It is the two best tokens of every row, and the heads' best candidates in all rows but the last.
    Shapes: best_ids `[n, 2]`, gaps `[n]`; candidate_ids and candidate_logits `[n - 1, K, C]`.
    """

    text: Text
    best_ids: Tensor
    gaps: Tensor
    candidate_ids: Tensor
    candidate_logits: Tensor


@torch.inference_mode()
def measure_rounding(
    engine: Engine, texts: Sequence[Text], *, arms: Sequence[ArmSpec], trees: Mapping[str, DraftTree]
) -> Rounding:
    """Return how far each shape of the greedy arms moves logits on kept texts.

    These are the backbone's top-two gaps and the heads' candidates. A shape is a number of tokens a step: of
    trees of one size the first is walked.
    Raises: InvalidMeasurement where a logit is not finite.
    """
    passes = [_whole_pass(engine, text) for text in texts if len(text.token_ids) > 1]
    greedy = [arm for arm in arms if is_deterministic(arm)]
    gaps, heads = list[ShapeShift](), list[ShapeShift]()
    for tree, names in _trees_by_size(greedy, trees):
        values = [
            _shifts(engine, one, _tree_steps(engine, one.text, tree), num_heads=tree.depth) for one in passes
        ]
        gaps += _summary(names, [row for rows, _ in values for row in rows], num_nodes=tree.num_nodes)
        heads += _summary(names, [row for _, rows in values for row in rows], num_nodes=tree.num_nodes)
    for method, width in _STOCK_STEP_TOKENS.items():
        if names := tuple(arm.name for arm in greedy if arm.method == method):
            values = []
            with contextlib.suppress(
                Exception
            ):  # an arm that cannot run fails in its own trials, where it is recorded
                values = [
                    _shifts(engine, one, _stock_steps(engine, one.text, width), num_heads=0) for one in passes
                ]
            gaps += _summary(names, [row for rows, _ in values for row in rows], num_nodes=width)
    return Rounding(
        dtype=str(engine.runner.backbone.dtype).removeprefix("torch."),
        num_texts=len(passes),
        num_candidates=_num_candidates(engine),
        gaps=tuple(gaps),
        heads=tuple(heads),
    )


def _num_candidates(engine: Engine) -> int:
    return min(MAX_TREE_RANK + 1, engine.heads.vocab_size)


def _whole_pass(engine: Engine, text: Text) -> _WholePass:
    backbone, heads = engine.runner.backbone, engine.heads
    states, logits = kept_states(backbone, text)
    best = logits.float().topk(2, dim=-1)
    chunks = torch.split(states[:-1], CHUNK_POSITIONS)
    candidates = [
        heads(chunk, lm_head=backbone.lm_head).float().topk(_num_candidates(engine), dim=-1)
        for chunk in chunks
    ]
    return _WholePass(
        text=text,
        best_ids=best.indices,
        gaps=best.values[:, 0] - best.values[:, 1],
        candidate_ids=torch.cat([chunk.indices for chunk in candidates]),
        candidate_logits=torch.cat([chunk.values for chunk in candidates]),
    )


def _trees_by_size(
    greedy: Sequence[ArmSpec], trees: Mapping[str, DraftTree]
) -> Iterator[tuple[DraftTree, tuple[str, ...]]]:
    """Yield a tree of every size in which these arms decode, with the arms' names.

    Vanilla's is the root alone.
    """
    own = {
        arm.name: trees.get(arm.name, DraftTree.root_only())
        for arm in greedy
        if arm.method in ("vanilla", "medusa")
    }
    for size in sorted({tree.num_nodes for tree in own.values()}):
        names = tuple(name for name, tree in own.items() if tree.num_nodes == size)
        yield own[names[0]], names


def _tree_steps(engine: Engine, text: Text, tree: DraftTree) -> Iterator[_Step]:
    """Walk a text in steps of a tree all of whose nodes hold the text's own tokens.

    So every node predicts a token of the text. The steps keep 1, 2, .. depth + 1 tokens in turn, so that rows
    are computed at every depth, over a cache that such steps filled.
    """
    backbone = engine.runner.backbone
    buffers = tree_buffers(tree, device=backbone.device)
    path = max(tree.candidates, key=len)
    num_tokens, nodes = len(text.token_ids), torch.tensor([path], device=backbone.device)
    tokens = torch.tensor([*text.token_ids, *text.token_ids[-1:] * tree.depth], device=backbone.device)
    cache = backbone.new_cache(
        batch_size=1, max_length=len(text.prompt.prompt_ids) + num_tokens + tree.num_nodes
    )
    backbone.prefill(torch.tensor(text.prompt.prompt_ids), cache=cache)
    known, number = 1, 0
    while known < num_tokens:
        places = known - 1 + buffers.depths
        output = backbone.forward(
            tokens[places][None], depths=buffers.depths, visible=buffers.visible, cache=cache
        )
        kept = min(1 + number % (tree.depth + 1), num_tokens - known)
        inside = places + 1 < num_tokens
        yield _Step(
            rows=places[inside] + 1,
            logits=output.logits[0, inside],
            state_row=known - 1 + kept,
            state=output.hidden[0, path[kept - 1]],
        )
        cache.keep(nodes, torch.tensor([kept], device=backbone.device), counts=[kept])
        known, number = known + kept, number + 1


def _stock_steps(engine: Engine, text: Text, width: int) -> Iterator[_Step]:
    """Walk a text as `generate` does: the prompt, then `width` tokens at a time.

    Kernels and cache are the stock model's own.
    """
    device, num_tokens = engine.runner.backbone.device, len(text.token_ids)
    tokens = torch.tensor([text.token_ids], device=device)
    with engine.runner.stock() as model:
        output = model(
            input_ids=torch.tensor([text.prompt.prompt_ids], device=device), use_cache=True, logits_to_keep=1
        )
        yield _Step(
            rows=torch.zeros(1, dtype=torch.long, device=device),
            logits=output.logits[0],
            state_row=0,
            state=None,
        )
        for start in range(0, num_tokens - 1, width):
            given = tokens[:, start : min(start + width, num_tokens - 1)]
            output = model(input_ids=given, past_key_values=output.past_key_values, use_cache=True)
            rows = torch.arange(start + 1, start + 1 + given.shape[1], device=device)
            yield _Step(rows=rows, logits=output.logits[0], state_row=0, state=None)


def _shifts(
    engine: Engine, one: _WholePass, steps: Iterable[_Step], *, num_heads: int
) -> tuple[list[float], list[float]]:
    """Return how far steps move each row's gap, and the heads' candidates.

    Candidates are those of the first `num_heads` heads wherever decoding could read them. Of several nodes of
    a row, and of several heads and pairs of candidates, the largest counts.
    """
    gap_shifts, head_shifts = torch.full_like(one.gaps, -1.0), list[float]()
    for step in steps:
        pair = step.logits.float().gather(-1, one.best_ids[step.rows])
        gap_shifts.scatter_reduce_(
            0, step.rows, (pair[:, 0] - pair[:, 1] - one.gaps[step.rows]).abs(), "amax"
        )
        if num_heads and step.state is not None and step.state_row < len(one.candidate_ids):
            logits = engine.heads(
                step.state[None], lm_head=engine.runner.backbone.lm_head, num_heads=num_heads
            )[0].float()
            before = one.candidate_logits[step.state_row, :num_heads]
            moved = logits.gather(-1, one.candidate_ids[step.state_row, :num_heads]) - before
            head_shifts.append(float((moved.amax(-1) - moved.amin(-1)).max()))
    return [
        shift for shift in gap_shifts.tolist() if not shift < 0
    ], head_shifts  # not: NaN stays, to be refused


def _summary(names: tuple[str, ...], values: list[float], *, num_nodes: int) -> tuple[ShapeShift, ...]:
    """Return the figures of one shape; none where no position was seen."""
    if not values:
        return ()
    if not np.isfinite(values).all():
        raise InvalidMeasurement(
            f"rounding: found a logit that is not finite in arm {names[0]!r}, need finite ones; nothing "
            "was timed"
        )
    p50, p90, p99, largest = np.quantile(values, (0.5, 0.9, 0.99, 1.0)).tolist()
    return (
        ShapeShift(
            arms=names,
            num_nodes=num_nodes,
            num_positions=len(values),
            p50=p50,
            p90=p90,
            p99=p99,
            largest=largest,
        ),
    )
