"""The decoding loops: vanilla and Medusa, one token or one draft tree a step, and a stream of vanilla rows
for making corpora.

One Medusa step (paper, Section 2.1 and Figure 1): the heads read the state that produced the last token and
propose a tree of continuations; one backbone pass scores all its nodes; the acceptance rule keeps the longest
plausible path and the bonus token behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medusa_impl.acceptance import AcceptanceRule
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.sections import Section, no_section
from medusa_impl.heads import MedusaHeads, ordered_topk
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers

EndedBy = Literal["eos", "budget"]


@dataclass(frozen=True)
class DecodingStep:
    """What one pass added: the prefill yields one token a row, each later step its acceptance length, cut at
    end-of-sequence and budget.

    `tokens[b]` is empty for rows that had ended; `ended[b]` says why row b ended, once it has.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[EndedBy | None, ...]


class _Rows:
    """Kept tokens of every row and the one cut that all arms share: at the first end-of-sequence, then at the
    budget.

    `live` is 1 for rows that go on and 0 for those that have ended, on the host and `[B]` on the device.
    """

    def __init__(
        self, num_rows: int, *, max_new_tokens: int, eos_ids: frozenset[int], device: torch.device
    ) -> None:
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
    outputs = [
        backbone.prefill(torch.tensor(prompt), cache=cache, row=row) for row, prompt in enumerate(prompts)
    ]
    return torch.cat([output.logits[:, -1] for output in outputs]), torch.cat(
        [output.hidden[:, -1] for output in outputs]
    )


def _cache_for(
    backbone: Backbone, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, tree: DraftTree
) -> TreeCache:
    """Return a cache for prompt, budget and tree; a row that ends inside a path has kept up to a tree's depth
    of tokens beyond its budget, and idles there while others go on.
    """
    longest = max(len(prompt) for prompt in prompts)
    backbone.check_positions(prompt_tokens=longest, max_new_tokens=max_new_tokens, depth=tree.depth)
    return backbone.new_cache(
        batch_size=len(prompts), max_length=longest + max_new_tokens + tree.depth + tree.num_nodes
    )


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
        output = backbone.forward(
            tokens[:, None], depths=root.depths, visible=root.visible, cache=cache, section=section
        )
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
    Raises: UserError where the tree is deeper than the heads, or prompt, budget and tree exceed the cache or
    the model's positions.
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
        output = backbone.forward(
            tokens, depths=buffers.depths, visible=buffers.visible, cache=cache, section=section
        )
        with section("acceptance"):
            acceptance = rule.verify(output.logits, tokens, buffers)
            num_kept = acceptance.num_kept * rows.device_live
            path_tokens = tokens.gather(1, acceptance.nodes)
            outcome = torch.cat(
                [num_kept[:, None], path_tokens[:, 1:], acceptance.next_token[:, None]], dim=1
            )
            fetched = outcome.tolist()  # here, once a step, the host waits for the device
        with section("cache"):
            cache.keep(acceptance.nodes, num_kept, counts=[count for count, *_ in fetched])
        states, roots = output.hidden[batch, acceptance.last_node], acceptance.next_token
        yield rows.add(
            [[*drafted[: count - 1], bonus] if count else [] for count, *drafted, bonus in fetched]
        )


def draft_tokens(head_logits: Tensor, roots: Tensor, buffers: TreeBuffers) -> Tensor:
    """Return the token of every tree node: the root, then each head's best tokens at the ranks that the tree
    names.

    Shapes: head_logits `[B, K, V]`, roots `[B]`, result `[B, N]`.
    """
    if buffers.num_nodes == 1:
        return roots[:, None]
    best = ordered_topk(head_logits, buffers.num_ranks).flatten(1)
    return torch.cat([roots[:, None], best[:, buffers.draft_index]], dim=1)
