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

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medusa_impl.acceptance import AcceptanceRule, keep_root
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

    It is Medusa decoding with nothing drafted: each step scores the root alone, and `rule.root` draws the
    next. All rows decode together, each with its own length.

    Raises: UserError if a prompt and the budget exceed the given cache, or without one the model's positions.
    """
    yield from _decode(
        backbone,
        None,
        DraftTree.root_only(),
        prompts,
        rule=rule,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        section=section,
        cache=cache,
    )


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
    exceed the given cache, or without one the model's positions.
    Departs: the released code runs the heads at every node of the tree; here they run once a step, at the
    state from which the next tree is drafted.
    """
    tree.check_fits(num_heads=heads.num_heads, vocab_size=backbone.vocab_size)
    yield from _decode(
        backbone,
        heads,
        tree,
        prompts,
        rule=rule,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        section=section,
        cache=cache,
    )


class TreeStep:
    """One decoding step of a batch: draft, verify, accept, keep; without heads nothing is drafted.

    A call is a function of tensors at fixed addresses. No shape, length or branch in it is decided on the
    host, so that it can be recorded once and replayed. Before a call the host plans the step
    (`TreeCache.plan_step`), after it the host reads the outcome (`Rows.read`); `take` does all three.

    Shapes: states `[B, H]`, from which the next tree is drafted; roots `[B]`.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None,
        tree: DraftTree,
        *,
        rule: AcceptanceRule,
        num_eos: int,
        cache: TreeCache,
    ) -> None:
        device, num_rows = backbone.device, cache.num_rows
        self.backbone, self.cache = backbone, cache
        # A rule of the step's own: what is recorded draws from its generator, whoever's state that holds.
        self.rule = copy.copy(rule)
        if rule.generator is not None:
            self.rule.generator = torch.Generator(device=rule.generator.device)
        self.heads = heads if tree.depth else None
        self.buffers = tree_buffers(tree, device=device)
        self.tables = backbone.node_tables(self.buffers.depths, self.buffers.visible)
        self.rows = Rows(num_rows, most_new=tree.depth + 1, num_eos=num_eos, device=device)
        self.states = torch.zeros(num_rows, backbone.hidden_size, dtype=backbone.dtype, device=device)
        self.roots = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.recorded: dict[Any, Any] = {}
        self._batch = torch.arange(num_rows, device=device)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Return all that a call changes, the cache's keys and values apart."""
        return self.states, self.roots, self.rows.left, self.rows.outcome, self.cache.device_lengths

    @property
    def generator(self) -> torch.Generator | None:
        """Return where the rule draws from."""
        return self.rule.generator

    @torch.inference_mode()
    def begin(
        self, roots: Tensor, states: Tensor, *, max_new_tokens: int, eos_ids: frozenset[int]
    ) -> DecodingStep:
        """Start from the roots that were drawn after the prefill, and yield them.

        Shapes: roots `[B]`, states `[B, H]`.
        """
        self.states.copy_(states)
        self.roots.copy_(roots)
        self.rows.begin(self.roots, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        _, tokens = self.rows.read()
        return DecodingStep(tokens=tokens, ended=self.rows.ended)

    @torch.inference_mode()
    def take(
        self, section: Section = no_section, *, generator: torch.Generator | None = None
    ) -> DecodingStep:
        """Take one step in the engine's mode; the host waits for the device once.

        The step draws what `generator`, that of a rule of the same key, would draw, and leaves it in the
        state that it would then have.

        Raises: UserError if the nodes do not fit into the cache.
        """
        self.cache.plan_step(num_new=self.buffers.num_nodes)
        own = self.rule.generator
        if own is not None and generator is not None:
            own.set_state(generator.get_state())
        self.backbone.launch(self, section)
        if own is not None and generator is not None:
            generator.set_state(own.get_state())
        counts, tokens = self.rows.read()
        self.cache.advance(counts)
        return DecodingStep(tokens=tokens, ended=self.rows.ended)

    def __call__(self, section: Section = no_section) -> None:
        """Take the planned step on the device."""
        buffers, tokens = self.buffers, self.roots[:, None]
        if self.heads is not None:
            # 1. Draft: the heads read the state that predicted the root.
            with section("heads"):
                head_logits = self.heads(
                    self.states, lm_head=self.backbone.lm_head, num_heads=buffers.tree.depth
                )
            with section("candidates"):
                tokens = draft_tokens(head_logits, self.roots, buffers)
        # 2. Verify: one pass scores every node.
        output = self.backbone.score(
            tokens, depths=buffers.depths, tables=self.tables, cache=self.cache, section=section
        )
        # 3. Accept: one path of the tree, and the bonus token after it, which is the next root.
        with section("acceptance"):
            if self.heads is None:
                accepted = keep_root(self.rule.root(output.logits[:, 0]))
            else:
                accepted = self.rule.verify(output.logits, tokens, buffers)
            path = tokens.gather(1, accepted.nodes)
            num_kept = self.rows.settle(path, accepted.num_kept, accepted.next_token)
            # The state of the last kept node predicted the bonus token; the next tree is drafted from it.
            self.states.copy_(output.hidden[self._batch, accepted.last_node])
            self.roots.copy_(accepted.next_token)
        # 4. Keep: the cache moves the path's keys and values to the end of the kept prefix.
        with section("cache"):
            self.cache.move(accepted.nodes, num_kept, in_place=buffers.tree.is_chain)


@torch.inference_mode()
def _decode(
    backbone: Backbone,
    heads: MedusaHeads | None,
    tree: DraftTree,
    prompts: Sequence[Sequence[int]],
    *,
    rule: AcceptanceRule,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    section: Section,
    cache: TreeCache | None,
) -> Iterator[DecodingStep]:
    with contextlib.ExitStack() as held:
        if cache is None:
            cache = held.enter_context(backbone.lent_cache(prompts, max_new_tokens=max_new_tokens, tree=tree))
        # A step of this kind over this cache may be there, with what was recorded of it.
        kind = (heads, tree, rule.key, rule.generator is None, len(eos_ids))
        step: TreeStep = cache.step_of(
            kind,
            lambda: TreeStep(backbone, heads, tree, rule=rule, num_eos=len(eos_ids), cache=cache),
        )
        logits, states = backbone.prefill_rows(prompts, cache=cache)
        roots = rule.root(logits)
        yield step.begin(roots, states, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        while step.rows.going:
            yield step.take(section, generator=rule.generator)


def draft_tokens(head_logits: Tensor, roots: Tensor, buffers: TreeBuffers) -> Tensor:
    """Return the token of every tree node: the root's, then those that the heads propose.

    A node of depth k and rank r gets the r-th best token of head k, with r counted from 0.

    Shapes: head_logits `[B, K, V]`, roots `[B]`, result `[B, N]`.
    """
    if buffers.num_nodes == 1:
        return roots[:, None]
    best = ordered_topk(head_logits, buffers.num_ranks).flatten(1)
    return torch.cat([roots[:, None], best[:, buffers.draft_index]], dim=1)
