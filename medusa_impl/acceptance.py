"""Which path of a draft tree is kept, and which token comes next: greedy, typical and rejection acceptance.

Paper: Section 2.3.1. Every rule has two parts: `root` draws a token from one row of logits (after the
prefill, and as the bonus token of each verification), `verify` picks the path. All rules act on nodes, never
on whole candidates, so that a shared node is judged once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from medusa_impl.tree_buffers import TreeBuffers

_BLOCK_TOKENS, _LEAST_BLOCK_TOKENS = 256, 32


@dataclass(frozen=True)
class Acceptance:
    """The outcome of one verification.

    Shapes: nodes `[B, D]`, the kept path from the root on, valid up to `num_kept[b]`; num_kept `[B]`, the
    acceptance length (root included, >= 1); last_node `[B]`, the deepest kept node; next_token `[B]`, the
    root of the next step.
    """

    nodes: Tensor
    num_kept: Tensor
    last_node: Tensor
    next_token: Tensor


class AcceptanceRule(Protocol):
    """A sampling law together with its way to verify a tree."""

    def root(self, logits: Tensor) -> Tensor:
        """Draw one token a row. Shapes: logits `[B, V]`, result `[B]`."""
        ...

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        """Pick the kept path and the next root. Shapes: logits `[B, N, V]`, tokens `[B, N]`."""
        ...


def first_choice(logits: Tensor) -> Tensor:
    """Return the id of the greatest logit, the lowest of equals.

    On a CPU `argmax` looks at one number at a time and `amax` at a register full: the greatest block is found
    first, then the place in it.
    Shapes: logits `[.., V]`, result `[..]`.
    """
    size = math.gcd(logits.shape[-1], _BLOCK_TOKENS)
    if logits.device.type != "cpu" or size < _LEAST_BLOCK_TOKENS:
        return logits.argmax(-1)
    blocks = logits.reshape(*logits.shape[:-1], -1, size)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.gather(-2, best[..., None].expand(*best.shape, size)).squeeze(-2).argmax(-1)
    choice: Tensor = best.squeeze(-1) * size + within
    return choice


class GreedyRule:
    """Keep the longest path whose every token is the backbone's argmax; lossless at temperature 0.

    Departs: compares argmax ids, not softmax values, so that ties cannot break differently from vanilla
    decoding.
    """

    def root(self, logits: Tensor) -> Tensor:
        return first_choice(logits)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        predicted = first_choice(logits)
        accepted = tokens == predicted[:, buffers.parents]
        nodes, num_kept = _longest_path(accepted, buffers)
        last = nodes.gather(1, (num_kept - 1)[:, None])
        return Acceptance(
            nodes=nodes,
            num_kept=num_kept,
            last_node=last.squeeze(1),
            next_token=predicted.gather(1, last).squeeze(1),
        )


class RejectionRule:
    """Rejection sampling on a tree of point-mass proposals: the output follows the backbone's law at
    `temperature` exactly.

    At a node with law p, trying its children one after another against the residual of p is the same as
    drawing y ~ p once and descending if some child is y; where none is, y is the bonus token.
    Paper: Section 2.3.1 (the lossless alternative). Departs: proposals are the tokens themselves, not the
    heads' softmax, under which the rule would not be lossless for top-k candidates.
    """

    def __init__(self, *, temperature: float, generator: torch.Generator) -> None:
        self.temperature = temperature
        self.generator = generator

    def root(self, logits: Tensor) -> Tensor:
        return torch.multinomial(
            torch.softmax(logits.float() / self.temperature, -1), 1, generator=self.generator
        ).squeeze(1)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        num_rows = tokens.shape[0]
        rows = torch.arange(num_rows, device=tokens.device)
        # padding takes an id that cannot be drawn
        known = torch.cat([tokens, tokens.new_full((num_rows, 1), -1)], dim=1)
        node = torch.zeros(num_rows, dtype=torch.long, device=tokens.device)
        going = torch.ones(num_rows, dtype=torch.bool, device=tokens.device)
        num_kept, next_token = torch.ones_like(node), torch.zeros_like(node)
        nodes = [node]
        for _ in range(buffers.tree.depth + 1):
            drawn = self.root(logits[rows, node])
            next_token = torch.where(going, drawn, next_token)
            children = buffers.children[node]
            hit = known.gather(1, children) == drawn[:, None]
            going = going & hit.any(1)
            node = torch.where(going, children.gather(1, hit.int().argmax(1, keepdim=True)).squeeze(1), node)
            num_kept = num_kept + going
            nodes.append(node)
            if going.device.type == "cpu" and not bool(
                going.any()
            ):  # elsewhere asking costs more than a needless level
                break
        width = buffers.tree.depth + 1
        stacked = torch.stack([*nodes, *[node] * width][:width], dim=1)
        return Acceptance(nodes=stacked, num_kept=num_kept, last_node=node, next_token=next_token)


class TypicalRule:
    """Keep x where p(x) > min(epsilon, delta * exp(-H(p))), with p the backbone's law at `temperature` and H
    its entropy in nats.

    The longest accepted path wins, ties go to the higher summed log-probability. The next root comes from p
    restricted to the tokens that pass and renormalised (`sampled`), or is its argmax (`greedy`); where
    nothing passes (possible for delta >= 1) it is the argmax.
    Lossy: the output does not follow the backbone's law.
    Paper: Section 2.3.1. Departs: entropy from a float32 log-softmax without an added constant.
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

    def thresholds(self, log_probs: Tensor) -> Tensor:
        """Return min(epsilon, delta * exp(-H)) of each law. Shapes: log_probs `[.., V]`, result `[..]`."""
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        return (self.delta * torch.exp(-entropy)).clamp_max(self.epsilon)

    def root(self, logits: Tensor) -> Tensor:
        if self.root_rule == "greedy":
            return first_choice(logits)
        log_probs = torch.log_softmax(logits.float() / self.temperature, -1)
        probs = log_probs.exp()
        passing = probs > self.thresholds(log_probs)[..., None]
        passing.scatter_(
            -1,
            logits.argmax(-1, keepdim=True),
            ~passing.any(-1, keepdim=True) | passing.gather(-1, logits.argmax(-1, keepdim=True)),
        )
        return torch.multinomial(probs * passing, 1, generator=self.generator).squeeze(1)

    def verify(self, logits: Tensor, tokens: Tensor, buffers: TreeBuffers) -> Acceptance:
        log_probs = torch.log_softmax(logits[:, buffers.inner].float() / self.temperature, -1)
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


def _longest_path(
    accepted: Tensor, buffers: TreeBuffers, *, log_probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the candidate with the longest accepted prefix and that prefix's length, root included.

    `accepted[b, n]` says whether node n passes given its parent. The root always does and is not counted
    along the paths, where it stands for padding: so padding never passes, whatever its token.
    Shapes: accepted `[B, N]`, overwritten at the root, and log_probs `[B, N]`; result `[B, D]` and `[B]`.
    """
    accepted[:, 0] = False
    edges = buffers.paths[:, 1:]
    prefix = accepted[:, edges].cumprod(-1)
    lengths = prefix.sum(-1)
    longest, chosen = lengths.max(-1)
    if log_probs is not None:
        summed = (log_probs[:, edges].nan_to_num(neginf=-1e30) * prefix).sum(-1)
        chosen = summed.masked_fill(lengths < longest[:, None], -torch.inf).argmax(-1)
    return buffers.paths[chosen], longest + 1
