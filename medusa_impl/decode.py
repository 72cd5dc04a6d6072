"""The two decoding loops: vanilla decoding, one token a step, and Medusa decoding, one draft tree a step.

One step of Medusa decoding, for a tree of four nodes and a greedy rule:

    text so far          The
    root                 cat                     chosen by the step before; not yet in the cache
    1. draft             cat                     the heads read the state that predicted `cat` and propose
                         |- sat                  their best tokens: head 1 `sat` and `ran`, head 2 `on`
                         |  `- on
                         `- ran
    2. verify            cat sat on ran          one backbone pass scores all nodes under the tree's mask
    3. accept            cat > sat > on          the longest path that the backbone agrees with
                         the                     the bonus token: what the backbone predicts after this path
    4. keep              The cat sat on          the cache keeps the path and drops the other nodes
    yielded              sat on the              3 tokens for one pass: the acceptance length
    next root            the

Paper: Section 2.1 and Figure 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.acceptance import AcceptanceRule
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.rows import EndedBy, Rows
from medusa_impl.engine.sections import Section, no_section
from medusa_impl.heads import MedusaHeads, ordered_topk
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers


@dataclass(frozen=True)
class DecodingStep:
    """The tokens that one step added to each row, cut at end-of-sequence and at the budget.

    The first step is the prefill, which yields one token a row. `tokens[b]` is empty if row b ended in an
    earlier step. `ended[b]` says why row b has ended, or is None.
    """

    tokens: tuple[tuple[int, ...], ...]
    ended: tuple[EndedBy | None, ...]


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

    `rule.root` draws the tokens. All rows decode together, each with its own length.

    Raises: UserError if a prompt and the budget exceed the cache or the model's positions.
    """
    root = tree_buffers(DraftTree.root_only(), device=backbone.device)
    if cache is None:
        cache = backbone.cache_for(prompts, max_new_tokens=max_new_tokens, tree=root.tree)
    rows = Rows(len(prompts), max_new_tokens=max_new_tokens, eos_ids=eos_ids, device=backbone.device)
    logits, _ = backbone.prefill_rows(prompts, cache=cache)
    tokens = rule.root(logits)
    yield DecodingStep(tokens=rows.add(tokens[:, None].tolist()), ended=rows.ended)
    while rows.going:
        output = backbone.forward(
            tokens[:, None], depths=root.depths, visible=root.visible, cache=cache, section=section
        )
        with section("acceptance"):
            tokens = rule.root(output.logits[:, -1])
            new_tokens = tokens[:, None].tolist()  # the host waits for the device here, once a step
        with section("cache"):
            cache.keep(torch.zeros_like(tokens)[:, None], rows.device_live, counts=rows.live)
        yield DecodingStep(tokens=rows.add(new_tokens), ended=rows.ended)


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

    Raises: UserError if the tree is deeper than there are heads, or if a prompt, the budget and the tree
    exceed the cache or the model's positions.
    Departs: the released code runs the heads at every node of the tree; here they run once a step, at the
    state from which the next tree is drafted.
    """
    tree.check_fits(num_heads=heads.num_heads, vocab_size=backbone.vocab_size)
    buffers = tree_buffers(tree, device=backbone.device)
    if cache is None:
        cache = backbone.cache_for(prompts, max_new_tokens=max_new_tokens, tree=tree)
    rows = Rows(len(prompts), max_new_tokens=max_new_tokens, eos_ids=eos_ids, device=backbone.device)
    batch = torch.arange(len(prompts), device=backbone.device)

    logits, states = backbone.prefill_rows(prompts, cache=cache)
    roots = rule.root(logits)
    yield DecodingStep(tokens=rows.add(roots[:, None].tolist()), ended=rows.ended)
    while rows.going:
        # 1. Draft: the heads read the state that predicted the root.
        with section("heads"):
            head_logits = heads(states, lm_head=backbone.lm_head, num_heads=tree.depth)
        with section("candidates"):
            tokens = draft_tokens(head_logits, roots, buffers)
        # 2. Verify: one pass scores every node.
        output = backbone.forward(
            tokens, depths=buffers.depths, visible=buffers.visible, cache=cache, section=section
        )
        # 3. Accept: one path of the tree, and the bonus token after it.
        with section("acceptance"):
            acceptance = rule.verify(output.logits, tokens, buffers)
            num_kept = acceptance.num_kept * rows.device_live  # a row that has ended keeps nothing more
            path_tokens = tokens.gather(1, acceptance.nodes)
            # All that the host needs is in one tensor, because every transfer makes it wait for the device.
            outcome = torch.cat(
                [num_kept[:, None], path_tokens[:, 1:], acceptance.next_token[:, None]], dim=1
            )
            fetched = outcome.tolist()  # the host waits for the device here, once a step
        # 4. Keep: the cache moves the path's keys and values to the end of the kept prefix.
        with section("cache"):
            cache.keep(acceptance.nodes, num_kept, counts=[count for count, *_ in fetched])
        # The state of the last kept node predicted the bonus token; the next tree is drafted from it.
        states, roots = output.hidden[batch, acceptance.last_node], acceptance.next_token
        # The path's root is not new: the step before has yielded it as its bonus token.
        new_tokens = [[*drafted[: count - 1], bonus] if count else [] for count, *drafted, bonus in fetched]
        yield DecodingStep(tokens=rows.add(new_tokens), ended=rows.ended)


def draft_tokens(head_logits: Tensor, roots: Tensor, buffers: TreeBuffers) -> Tensor:
    """Return the token of every tree node: the root's, then those that the heads propose.

    A node of depth k and rank r gets the r-th best token of head k, with r counted from 0.

    Shapes: head_logits `[B, K, V]`, roots `[B]`, result `[B, N]`.
    """
    if buffers.num_nodes == 1:
        return roots[:, None]
    best = ordered_topk(head_logits, buffers.num_ranks).flatten(1)
    return torch.cat([roots[:, None], best[:, buffers.draft_index]], dim=1)
