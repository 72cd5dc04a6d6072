"""What is measured apart from the timed generations.

It is step costs, the profile, the heads' control and likelihoods.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from harness.device.arms import ArmRunner
from harness.device.clock import Clock, Marks, SectionTimer
from harness.device.engine import Engine
from harness.device.trace import Text, kept_states, rank_rows
from harness.records.probes import HeadsControl, ProfileRow, StepCost
from harness.records.trials import ProcessorObservation
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import TreeStep
from medusa_impl.heads import MedusaHeads
from medusa_impl.tree import DraftTree

_ENDLESS_TOKENS = 2**62


def measure_step_costs(
    engine: Engine, sizes: Sequence[int], *, context_tokens: int, repeats: int, clock: Clock
) -> tuple[StepCost, ...]:
    """Time the backbone step, and the whole step around it, at each number of nodes.

    The context has one length, and sizes are interleaved. A step's cost depends on its number of nodes, not
    on the tree's shape (the mask is dense either way), so any tree of that size serves. The whole step adds
    heads, candidates, acceptance and compaction; it is left out for one node, which drafts nothing.
    """
    backbone, heads = engine.runner.backbone, engine.heads
    cache = backbone.new_cache(batch_size=1, max_length=context_tokens + max(sizes))
    output = backbone.prefill(torch.arange(context_tokens) % backbone.vocab_size, cache=cache)
    timer = SectionTimer(clock)
    marks = Marks(timer)
    steps: dict[int, TreeStep] = {}
    for size in sizes:
        tree = _tree_of(size, num_heads=heads.num_heads)
        steps[size] = TreeStep(backbone, heads, tree, rule=GreedyRule(), num_eos=0, cache=cache)
        steps[size].begin(
            GreedyRule().root(output.logits[:, -1]),
            output.hidden[:, -1],
            max_new_tokens=_ENDLESS_TOKENS,
            eos_ids=frozenset(),
        )

    def take(size: int, *, marked: bool) -> float:
        cache.clear_rows()
        cache.keep_all(row=0, count=context_tokens)
        marks.on = marked
        started = clock()
        steps[size].take(marks)
        return clock() - started

    alone: dict[int, list[float]] = {size: [] for size in sizes}
    whole: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat, size in itertools.product(range(repeats + 2), sizes):
        step_s = take(size, marked=True)
        if engine.runner.records_steps:
            step_s = take(size, marked=False)
        if repeat >= 2:  # the first two rounds warm kernels and allocator up
            alone[size].append(timer.last["backbone"])
            whole[size].append(step_s)
    return tuple(
        StepCost(
            num_nodes=size,
            num_heads=steps[size].buffers.tree.depth,
            context_tokens=context_tokens,
            backbone_s=tuple(alone[size]),
            step_s=tuple(whole[size]) if size > 1 else (),
        )
        for size in sizes
    )


def _tree_of(num_nodes: int, *, num_heads: int) -> DraftTree:
    """Return some tree of that many nodes: a chain, then further first-level children."""
    chain = [(0,) * depth for depth in range(1, min(num_heads, num_nodes - 1) + 1)]
    return DraftTree.from_paths([(), *chain, *((rank,) for rank in range(1, num_nodes - len(chain)))])


class ArmSteps:
    """Whole steps of one arm after a given context, timed apart from decoding, and the backbone's part.

    The context is kept text, so that acceptance and compaction do what they do in a generation. Prefill and
    first step are left out.
    """

    def __init__(
        self, runner: ArmRunner, prompt_ids: Sequence[int], *, seed: int | None, clock: Clock
    ) -> None:
        self.runner, self.context_tokens = runner, len(prompt_ids)
        self._clock, self._marks = clock, Marks(SectionTimer(clock))
        self._steps = runner.steps(prompt_ids, seed=seed, section=self._marks)
        self._backbone_s: list[float] = []
        self._step_s: list[float] = []
        self._ended = False
        # What is recorded in its first step of a kind is recorded here.
        for marked in (True, True, False)[: 3 if runner.engine.runner.records_steps else 2]:
            self._marks.on = marked
            self._advance()

    def time_one(self) -> None:
        """Time the next step; nothing happens where the text has ended.

        A recorded step and its marked parts are two steps, of which the first gives the backbone's time.
        """
        marked_s = self._time(marked=True)
        backbone_s = self._marks.timer.last.get("backbone", 0.0)
        step_s = self._time(marked=False) if self.runner.engine.runner.records_steps else marked_s
        if step_s is not None:
            self._step_s.append(step_s)
            self._backbone_s.append(backbone_s)

    def _time(self, *, marked: bool) -> float | None:
        """Return the seconds of the next step, or None where there is none."""
        self._marks.on = marked
        started = self._clock()
        if self._ended or not self._advance():
            return None
        return self._clock() - started

    @property
    def num_timed(self) -> int:
        """Return how many steps were timed so far; a short text can end before the first."""
        return len(self._step_s)

    def cost(
        self, *, prompt_key: str | None = None, processor: ProcessorObservation | None = None
    ) -> StepCost:
        """Return what was timed so far, at least one step, and what the host's cores did meanwhile."""
        tree = self.runner.tree
        return StepCost(
            arm=self.runner.arm.name,
            prompt_key=prompt_key,
            num_nodes=tree.num_nodes if tree is not None else 1,
            num_heads=tree.depth if tree is not None else 0,
            context_tokens=self.context_tokens,
            backbone_s=tuple(self._backbone_s),
            step_s=tuple(self._step_s),
            processor=processor,
        )

    def _advance(self) -> bool:
        """Take the next step; return whether there was one. After an exception there is none any more."""
        self._ended = True
        step = next(self._steps, None)
        self._ended = step is None or step.ended[0] is not None
        return step is not None


def profile_arm(
    runner: ArmRunner, prompts: Sequence[Sequence[int]], *, seed: int | None, clock: Clock
) -> ProfileRow:
    """Return where an arm's step time goes, summed over whole generations, prefill left out."""
    runner.record(section=SectionTimer(clock))
    timer = SectionTimer(clock)
    num_steps, step_s = 0, 0.0
    for prompt_ids in prompts:
        result = runner.generate(prompt_ids, seed=seed, section=timer)
        num_steps += len(result.step_times_s)
        step_s += sum(result.step_times_s)
    part = timer.seconds
    return ProfileRow(
        arm=runner.arm.name,
        num_steps=num_steps,
        step_s=step_s,
        backbone_s=part["backbone"],
        heads_s=part["heads"],
        candidates_s=part["candidates"] + part["mask"],
        acceptance_s=part["acceptance"],
        cache_s=part["cache"],
    )


def control_heads(engine: Engine, texts: Sequence[Text], *, seed: int = 0) -> HeadsControl:
    """Compare the top-1 share of the trained heads with that of others on kept text.

    The others are heads with random weights and untrained ones, which predict what the model does.
    """
    trained = engine.heads
    torch.manual_seed(seed)
    random, identity = (_fresh_heads(trained, engine) for _ in range(2))
    for parameter in random.blocks.parameters():
        nn.init.normal_(parameter, std=1.0 / trained.hidden_size**0.5)
    hits = {name: torch.zeros(trained.num_heads) for name in ("trained", "random", "identity")}
    counts = torch.zeros(trained.num_heads)
    for text in texts:
        states, _ = kept_states(engine.runner.backbone, text)
        for name, heads in (("trained", trained), ("random", random), ("identity", identity)):
            ranks, _, _ = rank_rows(heads, engine.runner.backbone.lm_head, states, text.token_ids)
            hits[name] += (ranks == 0).sum(0)
        counts += (ranks >= 0).sum(0)
    share = {name: tuple((hit / counts.clamp_min(1)).tolist()) for name, hit in hits.items()}
    return HeadsControl(
        num_positions=int(counts[0]),
        trained_top1=share["trained"],
        random_top1=share["random"],
        identity_top1=share["identity"],
    )


def mean_log_likelihood(engine: Engine, text: Text) -> float:
    """Return the mean log-likelihood of kept tokens under the original backbone.

    Units: nats a token, at temperature 1.
    """
    _, logits = kept_states(engine.runner.backbone, text)
    tokens = torch.tensor(text.token_ids, device=logits.device)
    return float(torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None]).mean())


def _fresh_heads(like: MedusaHeads, engine: Engine) -> MedusaHeads:
    heads = MedusaHeads(
        num_heads=like.num_heads,
        num_layers=like.num_layers,
        hidden_size=like.hidden_size,
        vocab_size=like.vocab_size,
        architecture=like.architecture,
        lm_head=engine.runner.backbone.lm_head,
    )
    return heads.eval().to(device=engine.runner.backbone.device, dtype=engine.runner.backbone.dtype)
