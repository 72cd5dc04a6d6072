"""Acceptance rules: which path of a draft tree is kept, and which token comes next.

The backbone has scored every node of the tree. From its logits at node n it predicts the token that follows
n, so the logits at a node judge the tokens of its children. Every rule has two methods:

    root    draws one token from the logits of one position: after the prefill, and after the kept path,
            where it is the bonus token and becomes the root of the next tree
    verify  chooses the path to keep, then the next root

All rules judge nodes, never whole candidates: a node that several candidates share is judged once. The root
is always kept, since `root` drew it.

Paper: Section 2.3.1. Lossless rules: greedy (at temperature 0) and rejection. Lossy rule: typical.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from medusa_impl.tree_buffers import TreeBuffers
from medusa_impl.waiting import may_look

_BLOCK_TOKENS, _LEAST_BLOCK_TOKENS = 256, 32  # of the vocabulary, in `first_choice`


@dataclass(frozen=True)
class Acceptance:
    """The outcome of one verification.

    nodes: the kept path from the root on; in row b the first `num_kept[b]` entries count.
    num_kept: the acceptance length, root included, at least 1.
    last_node: the deepest kept node, from whose state the next tree is drafted.
    next_token: the bonus token, which is the root of the next step.

    Shapes: nodes `[B, D]`; num_kept, last_node and next_token `[B]`.
    """

    nodes: Tensor
    num_kept: Tensor
    last_node: Tensor
    next_token: Tensor


def keep_root(next_token: Tensor) -> Acceptance:
    """Return the outcome for the root alone, after which `next_token` `[B]` was drawn."""
    root = torch.zeros_like(next_token)
    return Acceptance(
        nodes=root[:, None], num_kept=torch.ones_like(root), last_node=root, next_token=next_token
    )


class AcceptanceRule(Protocol):
    """A law to sample tokens from, together with a way to verify a tree under it.

    key: what tells two laws apart. A step that was recorded under one rule is replayed under another of the
    same key, with the state of the other's generator.
    generator: where the rule draws from; None for a rule that draws nothing, or from PyTorch's own.
    """

    generator: torch.Generator | None

    @property
    def key(self) -> tuple[object, ...]: ...

    def root(self, logits: Tensor) -> Tensor:
        """Return one token a row.

        Shapes: logits `[B, V]`, result `[B]`.
        """
        ...

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        """Return the kept path and the next root.

        Shapes: logits `[B, N, V]`, tokens `[B, N]`.
        """
        ...


def first_choice(logits: Tensor) -> Tensor:
    """Return the id of the greatest logit; of equal logits, the lowest id.

    Shapes: logits `[.., V]`, result `[..]`.
    """
    # On a CPU PyTorch's `argmax` is not vectorised, but `amax` is. So `amax` finds the block of the
    # vocabulary that holds the greatest logit, and `argmax` searches this block only.
    size = math.gcd(logits.shape[-1], _BLOCK_TOKENS)
    if logits.device.type != "cpu" or size < _LEAST_BLOCK_TOKENS:
        return logits.argmax(-1)
    blocks = logits.reshape(*logits.shape[:-1], -1, size)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.gather(-2, best[..., None].expand(*best.shape, size)).squeeze(-2).argmax(-1)
    choice: Tensor = best.squeeze(-1) * size + within
    return choice


class GreedyRule:
    """Keep the longest path whose every token is the backbone's argmax.

    Lossless at temperature 0: the output is that of vanilla decoding. The rule compares ids and not
    probabilities, so that it decides between equal logits as vanilla decoding does.

    Paper: Section 2.3.1.
    """

    generator: torch.Generator | None = None

    @property
    def key(self) -> tuple[object, ...]:
        return (type(self),)

    def root(self, logits: Tensor) -> Tensor:
        return first_choice(logits)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        return _longest_agreed(first_choice(logits), tokens, buffers)


class RejectionRule:
    """Rejection sampling on the tree; the output follows the backbone's law at `temperature` exactly.

    The tree proposes the heads' top tokens, which are not sampled: each proposal is a point mass. At a node
    where the backbone's law is p, rejection sampling accepts child x with probability p(x), else removes x
    from p, renormalises, and tries the next child. If no child is left, the bonus token is drawn from what
    remains of p. The same law results, with one draw, from

        y ~ p;  if some child has the token y: keep it and go on from there;  else: y is the bonus token

    Paper: Section 2.3.1, the lossless alternative to typical acceptance.
    Departs: the rule of Leviathan et al. (2023) divides by the proposal's probability. The heads' softmax is
    not that probability here: with it, the output would not follow the backbone's law.
    """

    def __init__(self, *, temperature: float, generator: torch.Generator) -> None:
        self.temperature = temperature
        self.generator: torch.Generator | None = generator

    @property
    def key(self) -> tuple[object, ...]:
        return type(self), self.temperature

    def root(self, logits: Tensor) -> Tensor:
        return torch.multinomial(self._law(logits), 1, generator=self.generator).squeeze(1)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        if may_look(tokens.device):
            return self._descend(logits, tokens, buffers)
        # One draw of noise a depth and one token a node: a walk from the root visits one node of each depth,
        # chosen by noise above it only, so its tokens follow the law as if each were drawn on the way.
        # `multinomial` draws in this way, too: of p / noise the greatest.
        probs = self._law(logits)
        noise = torch.stack(
            [
                torch.empty_like(probs[:, 0]).exponential_(generator=self.generator)
                for _ in range(buffers.tree.depth + 1)
            ],
            dim=1,
        )
        return _longest_agreed((probs / noise[:, buffers.depths]).argmax(-1), tokens, buffers)

    def _law(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.float() / self.temperature, -1)

    def _descend(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        """Verify a tree with a look after each draw: one draw for each new token, and no more."""
        num_rows = tokens.shape[0]
        rows = torch.arange(num_rows, device=tokens.device)
        # `children` is padded with N. The token at index N is -1, which is never drawn.
        known = torch.cat([tokens, tokens.new_full((num_rows, 1), -1)], dim=1)
        node = torch.zeros(num_rows, dtype=torch.long, device=tokens.device)
        going = torch.ones(num_rows, dtype=torch.bool, device=tokens.device)  # rows that still descend
        num_kept, next_token = torch.ones_like(node), torch.zeros_like(node)
        nodes = [node]
        # One round for each depth, and one more for the bonus token of a row that reached a deepest leaf.
        for _ in range(buffers.tree.depth + 1):
            drawn = self.root(logits[rows, node])
            next_token = torch.where(going, drawn, next_token)
            children = buffers.children[node]
            hit = known.gather(1, children) == drawn[:, None]
            going = going & hit.any(1)
            node = torch.where(going, children.gather(1, hit.int().argmax(1, keepdim=True)).squeeze(1), node)
            num_kept = num_kept + going
            nodes.append(node)
            if not bool(going.any()):
                break
        # After an early end the last node fills up; entries from `num_kept` on do not count.
        width = buffers.tree.depth + 1
        stacked = torch.stack([*nodes, *[node] * width][:width], dim=1)
        return Acceptance(nodes=stacked, num_kept=num_kept, last_node=node, next_token=next_token)


class TypicalRule:
    """Keep token x if p(x) > min(epsilon, delta * exp(-H(p))).

    Here p is the backbone's law at `temperature` and H its entropy: where the backbone is uncertain, less
    likely tokens pass. The longest accepted path wins; ties go to the higher sum of log-probabilities.

    The next root is drawn from p restricted to the tokens that pass, renormalised (`sampled`), or is the
    argmax (`greedy`). With delta < 1 the argmax always passes, because p(argmax) >= exp(-H). With
    delta >= 1 it can happen that no token passes; the argmax is the next root then.

    Lossy: the output does not follow the backbone's law.

    Units: H in nats.
    Paper: Section 2.3.1; the released code has epsilon 0.09 and delta 0.3.
    Departs: the released code takes the entropy of log(p + 1e-5) in half precision. Here it is taken from a
    log-softmax in float32, with nothing added.
    """

    def __init__(
        self,
        *,
        temperature: float,
        epsilon: float,
        delta: float,
        root: Literal["sampled", "greedy"],
        generator: torch.Generator | None,
    ) -> None:
        self.temperature, self.epsilon, self.delta = temperature, epsilon, delta
        self.root_rule = root
        self.generator = generator

    @property
    def key(self) -> tuple[object, ...]:
        return type(self), self.temperature, self.epsilon, self.delta, self.root_rule

    def thresholds(self, log_probs: Tensor) -> Tensor:
        """Return min(epsilon, delta * exp(-H)) of each law.

        Shapes: log_probs `[.., V]`, result `[..]`.
        """
        # A token of probability 0 adds nothing to the entropy, but 0 * -inf is NaN.
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        return (self.delta * torch.exp(-entropy)).clamp_max(self.epsilon)

    def root(self, logits: Tensor) -> Tensor:
        if self.root_rule == "greedy":
            return first_choice(logits)
        log_probs = torch.log_softmax(logits.float() / self.temperature, -1)
        probs = log_probs.exp()
        passing = probs > self.thresholds(log_probs)[..., None]
        # Let the argmax pass too where nothing else does, so that there is something to draw.
        passing.scatter_(
            -1,
            logits.argmax(-1, keepdim=True),
            ~passing.any(-1, keepdim=True) | passing.gather(-1, logits.argmax(-1, keepdim=True)),
        )
        return torch.multinomial(probs * passing, 1, generator=self.generator).squeeze(1)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        # Leaves judge nothing, and they are most of the nodes: only inner nodes need a softmax.
        log_probs = torch.log_softmax(logits[:, buffers.inner].float() / self.temperature, -1)
        # For every node, the row of `log_probs` that judges it: its parent's.
        law = buffers.inner_position[buffers.parents]
        thresholds = self.thresholds(log_probs)[:, law]
        token_log_probs = log_probs[
            torch.arange(len(tokens), device=tokens.device)[:, None], law[None, :], tokens
        ]
        accepted = token_log_probs.exp() > thresholds
        nodes, num_kept = _longest_path(accepted, buffers, log_probs=token_log_probs)
        last_node = nodes.gather(1, (num_kept - 1)[:, None]).squeeze(1)
        last = logits[torch.arange(len(tokens), device=tokens.device), last_node]
        return Acceptance(nodes=nodes, num_kept=num_kept, last_node=last_node, next_token=self.root(last))


def _longest_agreed(predicted: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
    """Return the longest path of which every token is the one that its parent's state predicts.

    Shapes: predicted `[B, N]`, the token that follows each node; tokens `[B, N]`.
    """
    accepted = tokens == predicted[:, buffers.parents]
    nodes, num_kept = _longest_path(accepted, buffers)
    last = nodes.gather(1, (num_kept - 1)[:, None])
    return Acceptance(
        nodes=nodes,
        num_kept=num_kept,
        last_node=last.squeeze(1),
        next_token=predicted.gather(1, last).squeeze(1),
    )


def _longest_path(
    accepted: Tensor, buffers: TreeBuffers, *, log_probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the candidate with the longest accepted prefix, and the length of this prefix, root included.

    `accepted[b, n]` says whether node n passes given its parent. Without `log_probs` the first of several
    longest candidates wins, else the one whose accepted nodes have the highest sum of `log_probs`.

        path          root  a  b  c      a path of the tree
        accepted         -  1  0  1      c is right, but follows a wrong token
        cumprod          -  1  0  0      so the accepted prefix is root, a: its length is 2

    Shapes: accepted `[B, N]`, whose column 0 is overwritten; log_probs `[B, N]`; results `[B, D]` and `[B]`.
    """
    # Short paths are padded with the root. Marked as not accepted, the padding ends a prefix whatever its
    # token; the root itself is counted at the end.
    accepted[:, 0] = False
    edges = buffers.paths[:, 1:]
    prefix = accepted[:, edges].cumprod(-1)
    lengths = prefix.sum(-1)
    longest, chosen = lengths.max(-1)
    if log_probs is not None:
        # Minus infinity times the prefix's 0 would be NaN, so a very low finite number replaces it.
        summed = (log_probs[:, edges].nan_to_num(neginf=-1e30) * prefix).sum(-1)
        chosen = summed.masked_fill(lengths < longest[:, None], -torch.inf).argmax(-1)
    return buffers.paths[chosen], longest + 1
