"""The decoding loops: vanilla and Medusa, one token or one draft tree a step, and a stream of vanilla rows for making corpora.

One Medusa step (paper, Section 2.1 and Figure 1): the heads read the state that produced the last token and propose a tree of
continuations; one backbone pass scores all its nodes; the acceptance rule keeps the longest plausible path and the bonus token behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medusa_impl.acceptance import AcceptanceRule
from medusa_impl.backbone import Backbone
from medusa_impl.heads import MedusaHeads, ordered_topk
from medusa_impl.kv_cache import TreeCache
from medusa_impl.sections import Section, no_section
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers

EndedBy = Literal["eos", "budget"]


@dataclass(frozen=True)
class DecodingStep:
    """What one pass added: the prefill yields one token a row, each later step its acceptance length, cut at end-of-sequence and budget.

    `tokens[b]` is empty for rows that had ended; `ended[b]` says why row b ended, once it has.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[EndedBy | None, ...]


class _Rows:
    """Kept tokens of every row and the one cut that all arms share: at the first end-of-sequence, then at the budget.

    `live` is 1 for rows that go on and 0 for those that have ended, on the host and `[B]` on the device.
    """

    def __init__(self, num_rows: int, *, max_new_tokens: int, eos_ids: frozenset[int], device: torch.device) -> None:
        self.left = [max_new_tokens] * num_rows
        self.ended: list[EndedBy | None] = [None] * num_rows
        self.live = [1] * num_rows
        self.device_live = torch.ones(num_rows, dtype=torch.long, device=device)
        self._eos_ids = eos_ids

    @property
    def going(self) -> bool:
        return any(ended is None for ended in self.ended)

    def add(self, new_tokens: Sequence[Sequence[int]]) -> DecodingStep:
        kept: list[tuple[int, ...]] = []
        for row, tokens in enumerate(new_tokens):
            if self.ended[row] is not None:
                kept.append(())
                continue
            taken: list[int] = []
            for token in tokens:
                taken.append(token)
                self.left[row] -= 1
                if token in self._eos_ids:
                    self.ended[row] = "eos"
                elif self.left[row] == 0:
                    self.ended[row] = "budget"
                if self.ended[row] is not None:
                    break
            kept.append(tuple(taken))
            if self.ended[row] is not None:
                self.live[row] = 0
                self.device_live[row] = 0
        return DecodingStep(tokens=tuple(kept), ended=tuple(self.ended))


def _prefill(backbone: Backbone, prompts: Sequence[Sequence[int]], cache: TreeCache) -> tuple[Tensor, Tensor]:
    """Run all prompts and return the last logits `[B, V]` and the states that they come from `[B, H]`."""
    outputs = [backbone.prefill(torch.tensor(prompt), cache=cache, row=row) for row, prompt in enumerate(prompts)]
    return torch.cat([output.logits[:, -1] for output in outputs]), torch.cat([output.hidden[:, -1] for output in outputs])


def _cache_for(backbone: Backbone, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, tree: DraftTree) -> TreeCache:
    """Return a cache for prompt, budget and tree; a row that ends inside a path has kept up to a tree's depth of tokens beyond its budget,
    and idles there while others go on."""
    longest = max(len(prompt) for prompt in prompts)
    backbone.check_positions(prompt_tokens=longest, max_new_tokens=max_new_tokens, depth=tree.depth)
    return backbone.new_cache(batch_size=len(prompts), max_length=longest + max_new_tokens + tree.depth + tree.num_nodes)


@torch.inference_mode()
def decode_vanilla(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    rule: AcceptanceRule,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    section: Section = no_section,
    cache: TreeCache | None = None,
) -> Iterator[DecodingStep]:
    """Yield the prefill's token, then one token a row and step, until every row has ended.

    `rule.root` draws the tokens; B rows decode together, each with its own length.
    Raises: UserError where prompt and budget exceed the cache or the model's positions.
    """
    root = tree_buffers(DraftTree.root_only(), device=backbone.device)
    cache = cache or _cache_for(backbone, prompts, max_new_tokens=max_new_tokens, tree=root.tree)
    rows = _Rows(len(prompts), max_new_tokens=max_new_tokens, eos_ids=eos_ids, device=backbone.device)
    logits, _ = _prefill(backbone, prompts, cache)
    tokens = rule.root(logits)
    yield rows.add(tokens[:, None].tolist())
    while rows.going:
        output = backbone.forward(tokens[:, None], depths=root.depths, visible=root.visible, cache=cache, section=section)
        with section("acceptance"):
            tokens = rule.root(output.logits[:, -1])
            new_tokens = tokens[:, None].tolist()  # here, once a step, the host waits for the device
        with section("cache"):
            cache.keep(torch.zeros_like(tokens)[:, None], rows.device_live, counts=rows.live)
        yield rows.add(new_tokens)


@torch.inference_mode()
def decode_medusa(
    backbone: Backbone,
    heads: MedusaHeads,
    tree: DraftTree,
    prompts: Sequence[Sequence[int]],
    *,
    rule: AcceptanceRule,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    section: Section = no_section,
    cache: TreeCache | None = None,
) -> Iterator[DecodingStep]:
    """Yield the prefill's token, then one verified path a row and step, until every row has ended.

    Heads are read only at the state that a draft starts from, never at every tree node.
    Raises: UserError where the tree is deeper than the heads, or prompt, budget and tree exceed the cache or the model's positions.
    """
    tree.check_fits(num_heads=heads.num_heads, vocab_size=backbone.vocab_size)
    buffers = tree_buffers(tree, device=backbone.device)
    cache = cache or _cache_for(backbone, prompts, max_new_tokens=max_new_tokens, tree=tree)
    rows = _Rows(len(prompts), max_new_tokens=max_new_tokens, eos_ids=eos_ids, device=backbone.device)
    batch = torch.arange(len(prompts), device=backbone.device)

    logits, states = _prefill(backbone, prompts, cache)
    roots = rule.root(logits)
    yield rows.add(roots[:, None].tolist())
    while rows.going:
        with section("heads"):
            head_logits = heads(states, lm_head=backbone.lm_head, num_heads=tree.depth)
        with section("candidates"):
            tokens = draft_tokens(head_logits, roots, buffers)
        output = backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache, section=section)
        with section("acceptance"):
            acceptance = rule.verify(output.logits, tokens, buffers)
            num_kept = acceptance.num_kept * rows.device_live
            path_tokens = tokens.gather(1, acceptance.nodes)
            outcome = torch.cat([num_kept[:, None], path_tokens[:, 1:], acceptance.next_token[:, None]], dim=1)
            fetched = outcome.tolist()  # here, once a step, the host waits for the device
        with section("cache"):
            cache.keep(acceptance.nodes, num_kept, counts=[count for count, *_ in fetched])
        states, roots = output.hidden[batch, acceptance.last_node], acceptance.next_token
        yield rows.add([[*drafted[: count - 1], bonus] if count else [] for count, *drafted, bonus in fetched])


def draft_tokens(head_logits: Tensor, roots: Tensor, buffers: TreeBuffers) -> Tensor:
    """Return the token of every tree node: the root, then each head's best tokens at the ranks that the tree names.

    Shapes: head_logits `[B, K, V]`, roots `[B]`, result `[B, N]`.
    """
    if buffers.num_nodes == 1:
        return roots[:, None]
    best = ordered_topk(head_logits, buffers.num_ranks).flatten(1)
    return torch.cat([roots[:, None], best[:, buffers.draft_index]], dim=1)


@dataclass(frozen=True)
class StreamRequest:
    """One prompt for `decode_stream`; temperature 0 is greedy, otherwise `seed` starts the row's own random numbers."""

    key: str
    prompt_ids: Sequence[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class StreamCompletion:
    """One finished row of `decode_stream`: kept tokens (end-of-sequence included) and the states that produced them.

    Shapes: states `[n, H]` float16, or None where they were not asked for.
    """

    key: str
    token_ids: list[int]
    ended_by: EndedBy
    states: Tensor | None


class _StreamRow:
    def __init__(self, request: StreamRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.states: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(request.seed)

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def decode_stream(
    backbone: Backbone,
    requests: Iterable[StreamRequest],
    *,
    num_rows: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    keep_states: bool = False,
) -> Iterator[StreamCompletion]:
    """Decode many prompts one token a step, `num_rows` at a time; a finished row takes the next prompt at once.

    For making corpora, not for measuring: completions come in order of finishing. A row's text depends on its own seed only
    (and, where two logits lie within rounding, on the batch it ran in).
    """
    pending = iter(requests)
    first = next(pending, None)
    if first is None:
        return
    cache = None
    rows: list[_StreamRow | None] = [None] * num_rows
    next_ids = torch.zeros(num_rows, 1, dtype=torch.long)
    depth, visible = torch.zeros(1, dtype=torch.long, device=backbone.device), torch.ones(1, 1, dtype=torch.bool, device=backbone.device)
    queue: list[StreamRequest] = [first]

    def take(row_index: int, logits: Tensor, hidden: Tensor) -> StreamCompletion | None:
        row = rows[row_index]
        assert row is not None
        token = _pick_token(logits, row)
        row.token_ids.append(token)
        if keep_states:
            row.states.append(hidden.to("cpu", torch.float16, copy=True))
        next_ids[row_index, 0] = token
        if token not in eos_ids and len(row.token_ids) < max_new_tokens:
            return None
        rows[row_index] = None
        return StreamCompletion(
            key=row.request.key,
            token_ids=row.token_ids,
            ended_by="eos" if token in eos_ids else "budget",
            states=torch.stack(row.states) if keep_states else None,
        )

    while True:
        for row_index in range(num_rows):
            while rows[row_index] is None:
                request = queue.pop() if queue else next(pending, None)
                if request is None:
                    break
                needed = len(request.prompt_ids) + max_new_tokens
                if cache is None or needed > cache.max_length:
                    if any(row is not None for row in rows):
                        queue.append(request)  # waits until the rows in flight are done and a longer cache can replace this one
                        break
                    cache = backbone.new_cache(batch_size=num_rows, max_length=-(-(needed + 128) // 64) * 64)
                rows[row_index] = _StreamRow(request)
                cache.clear_rows(slice(row_index, row_index + 1))
                output = backbone.prefill(torch.tensor(request.prompt_ids), cache=cache, row=row_index)
                completion = take(row_index, output.logits[0, -1], output.hidden[0, -1])
                if completion is not None:
                    yield completion
            if queue:
                break
        active = [index for index in range(num_rows) if rows[index] is not None]
        if not active:
            if queue:
                continue
            return
        assert cache is not None
        for index in set(range(num_rows)) - set(active):
            cache.clear_rows(slice(index, index + 1))
        step = backbone.forward(next_ids.to(backbone.device), depths=depth, visible=visible, cache=cache)
        counts = [int(row is not None) for row in rows]
        cache.keep(torch.zeros_like(next_ids, device=backbone.device), torch.tensor(counts, device=backbone.device), counts=counts)
        for index in active:
            completion = take(index, step.logits[index, -1], step.hidden[index, -1])
            if completion is not None:
                yield completion


def _pick_token(logits: Tensor, row: _StreamRow) -> int:
    if row.request.temperature == 0:
        return int(logits.argmax())
    cumulative = torch.softmax(logits.float() / row.request.temperature, dim=-1).cumsum(-1, dtype=torch.float64)
    return int(torch.searchsorted(cumulative, row.uniform() * cumulative[-1]).clamp_max(logits.shape[-1] - 1))
