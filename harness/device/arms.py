"""How one arm decodes one prompt, timed step by step.

No other module lets a generation meet the clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from harness.device.clock import Clock
from harness.device.engine import Engine
from harness.errors import UserError
from harness.specs.suite import ArmSpec
from medusa_impl.acceptance import AcceptanceRule, GreedyRule, RejectionRule, TypicalRule
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.rows import EndedBy
from medusa_impl.engine.sections import Section, no_section
from medusa_impl.tree import DraftTree

PROMPT_LOOKUP_TOKENS = 10  # transformers' documented setting for prompt-lookup decoding


@dataclass(frozen=True)
class TimedGeneration:
    """One generation as the clock saw it; `step_tokens` and `step_times_s` leave out the prefill."""

    token_ids: tuple[int, ...]
    ended_by: EndedBy
    prefill_s: float
    step_tokens: tuple[int, ...]
    step_times_s: tuple[float, ...]
    cache_bytes: int | None


def acceptance_rule(arm: ArmSpec, *, seed: int | None, device: torch.device) -> AcceptanceRule:
    """Return the arm's sampling law with a generator of its own, started from `seed`."""
    if arm.sampling_temperature == 0:
        return GreedyRule()
    generator = torch.Generator(device=device)
    if seed is not None:
        generator.manual_seed(seed)
    if arm.acceptance is not None and arm.acceptance.rule == "typical":
        rule = arm.acceptance
        return TypicalRule(
            temperature=rule.temperature,
            epsilon=rule.epsilon,
            delta=rule.delta,
            root=rule.root,
            generator=generator,
        )
    return RejectionRule(temperature=arm.sampling_temperature, generator=generator)


class ArmRunner:
    """Decodes single prompts as one arm.

    It keeps its cache between trials, so that allocation is not timed twice.
    """

    def __init__(
        self,
        engine: Engine,
        arm: ArmSpec,
        *,
        tree: DraftTree | None,
        max_new_tokens: int,
        max_prompt_tokens: int,
        clock: Clock,
    ) -> None:
        if arm.method == "medusa":
            if tree is None:
                raise UserError(
                    found=f"arm {arm.name!r} without a tree", need="a resolved tree", where="the suite"
                )
            tree.check_fits(
                num_heads=min(engine.heads.num_heads, arm.num_heads or engine.heads.num_heads),
                vocab_size=engine.runner.backbone.vocab_size,
            )
        self.engine, self.arm, self.tree, self.clock = engine, arm, tree, clock
        self.max_new_tokens = max_new_tokens
        num_nodes = tree.num_nodes if tree is not None else 1
        self._cache: TreeCache | None = None
        if arm.method in ("vanilla", "medusa"):
            self._cache = engine.runner.backbone.new_cache(
                batch_size=1, max_length=max_prompt_tokens + max_new_tokens + num_nodes
            )

    def generate(
        self, prompt_ids: Sequence[int], *, seed: int | None, section: Section = no_section
    ) -> TimedGeneration:
        """Decode one prompt.

        Units: seconds on the arm's clock, which synchronises the device.
        """
        if not self.takes_turns:
            return self._generate_stock(prompt_ids)
        begun = self.begin(prompt_ids, seed=seed, section=section)
        begun.take(None)
        return begun.result()

    @property
    def takes_turns(self) -> bool:
        """Return whether its generations can be taken a few steps at a time."""
        return self.arm.method in ("vanilla", "medusa")

    def begin(
        self, prompt_ids: Sequence[int], *, seed: int | None, section: Section = no_section
    ) -> TimedSteps:
        """Return a generation of a vanilla or Medusa arm, no step of which is taken yet.

        It uses the arm's cache, so the arm can have only one under way.
        """
        assert self._cache is not None
        self._cache.clear_rows()
        return TimedSteps(
            self.steps(prompt_ids, seed=seed, section=section), clock=self.clock, cache=self._cache
        )

    def steps(
        self, prompt_ids: Sequence[int], *, seed: int | None, section: Section = no_section
    ) -> Iterator[DecodingStep]:
        """Yield the decoding steps of a vanilla or Medusa arm."""
        return self._decoding(
            prompt_ids,
            seed=seed,
            section=section,
            eos_ids=self.engine.loaded.eos_ids,
            max_new_tokens=self.max_new_tokens,
        )

    def _decoding(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int | None,
        section: Section,
        eos_ids: frozenset[int],
        max_new_tokens: int,
    ) -> Iterator[DecodingStep]:
        assert self._cache is not None
        self._cache.clear_rows()
        backbone = self.engine.runner.backbone
        rule = acceptance_rule(self.arm, seed=seed, device=backbone.device)
        if self.tree is None:
            yield from decode_vanilla(
                backbone,
                [prompt_ids],
                rule=rule,
                max_new_tokens=max_new_tokens,
                eos_ids=eos_ids,
                section=section,
                cache=self._cache,
            )
            return
        yield from decode_medusa(
            backbone,
            self.engine.heads,
            self.tree,
            [prompt_ids],
            rule=rule,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            section=section,
            cache=self._cache,
        )

    @torch.inference_mode()
    def record(self, *, section: Section = no_section) -> None:
        """Take a step at each length that attention may read, so that none is recorded in a timed one.

        With marked parts other graphs are recorded. Nothing happens where steps are not recorded.
        """
        if self._cache is None or not self.engine.runner.records_steps:
            return
        eos_ids = self.engine.loaded.eos_ids
        never = frozenset(-1 - number for number in range(len(eos_ids)))  # as many as there are, never met
        steps = self._decoding((0,), seed=0, section=section, eos_ids=never, max_new_tokens=2**62)
        next(steps)
        while self._cache.lengths[0] < self._cache.max_length:
            next(steps)
            widest = self.tree.num_nodes if self.tree is not None else 1
            following = self._cache.plan.view_length + 1 - widest
            if following + widest > self._cache.max_length:
                break
            self._cache.keep_all(row=0, count=max(following - self._cache.lengths[0], 0))
        self._cache.reset()  # of what was kept without being written

    def _generate_stock(self, prompt_ids: Sequence[int]) -> TimedGeneration:
        """Decode with `generate` of transformers on the stock model, configured here alone."""
        eos_ids = self.engine.loaded.eos_ids
        lookup = (
            {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
            if self.arm.method == "hf_prompt_lookup"
            else {}
        )
        end: dict[str, Any] = (
            {"eos_token_id": sorted(eos_ids), "pad_token_id": min(eos_ids)}
            if eos_ids
            else {"pad_token_id": 0}
        )
        configuration = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1, use_cache=True, **end, **lookup
        )
        prompt = torch.tensor([list(prompt_ids)], device=self.engine.runner.backbone.device)
        with self.engine.runner.stock() as stock, torch.inference_mode():
            model: Any = stock
            marks = _Marks(self.clock, prompt_tokens=prompt.shape[1])
            with _without_defaults_of_its_own(model):
                started = self.clock()
                output = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=configuration,
                    streamer=marks,
                )
        token_ids = tuple(output[0, prompt.shape[1] :].tolist()[: self.max_new_tokens])
        ended_by: EndedBy = "eos" if token_ids[-1] in eos_ids else "budget"
        lengths = [min(length, len(token_ids)) for length in marks.lengths]
        times = [later - earlier for earlier, later in pairwise(marks.times_s)]
        gained = [later - earlier for earlier, later in pairwise(lengths)]
        # prompt lookup may accept tokens together with the first one: the prefill's pass, before the decode
        # clock starts so these tokens join those of the first step; without one they are a step of no time
        gained_with_first = lengths[0] - 1
        if gained_with_first and gained:
            gained[0] += gained_with_first
        elif gained_with_first:
            gained, times = [gained_with_first], [0.0]
        return TimedGeneration(
            token_ids=token_ids,
            ended_by=ended_by,
            prefill_s=marks.times_s[0] - started,
            step_tokens=tuple(gained),
            step_times_s=tuple(times),
            cache_bytes=None,
        )


@contextlib.contextmanager
def _without_defaults_of_its_own(model: Any) -> Iterator[None]:
    """Take the generation configuration of a model's folder away for a while.

    `generate` fills from it every field that it is not given, a repetition penalty or stop strings too.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Marks(BaseStreamer):
    """Notes the time and the number of new tokens after every pass of `generate` that yields some.

    A streamer is handed accepted tokens only; a stopping criterion is asked about drafts, too, by
    transformers 5.17.
    """

    def __init__(self, clock: Clock, *, prompt_tokens: int) -> None:
        self._clock = clock
        self._num_new = -prompt_tokens  # `generate` hands over the prompt first
        self.times_s: list[float] = []
        self.lengths: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of one pass."""
        self._num_new += value.numel()
        if self._num_new > 0:
            self.times_s.append(self._clock())
            self.lengths.append(self._num_new)

    def end(self) -> None:
        """Nothing is left to note."""


class TimedSteps:
    """A decoding of one row, taken a few steps at a time; what runs in between counts for no step."""

    def __init__(self, steps: Iterator[DecodingStep], *, clock: Clock, cache: TreeCache | None) -> None:
        self._steps, self._clock, self._cache = steps, clock, cache
        self._token_ids: list[int] = []
        self._step_tokens: list[int] = []
        self._times_s: list[float] = []
        self._ended: EndedBy | None = None

    def take(self, num_steps: int | None) -> bool:
        """Take so many steps, or all that are left; return whether there are more.

        The prefill is a step of its own.
        """
        num_taken, mark = 0, self._clock()
        while self._ended is None and num_taken != num_steps:
            step = next(self._steps)
            now = self._clock()
            self._times_s.append(now - mark)
            self._token_ids.extend(step.tokens[0])
            self._step_tokens.append(len(step.tokens[0]))
            self._ended = step.ended[0]
            mark, num_taken = now, num_taken + 1
        return self._ended is None

    def result(self) -> TimedGeneration:
        """Return the tokens and the time of every step, once there are no more."""
        assert self._ended is not None
        return TimedGeneration(
            token_ids=tuple(self._token_ids),
            ended_by=self._ended,
            prefill_s=self._times_s[0],
            step_tokens=tuple(self._step_tokens[1:]),
            step_times_s=tuple(self._times_s[1:]),
            cache_bytes=self._cache.num_bytes if self._cache is not None else None,
        )


def timed(steps: Iterator[DecodingStep], *, clock: Clock, cache: TreeCache | None = None) -> TimedGeneration:
    """Exhaust a single-row decoding and return its tokens and the time of every step."""
    begun = TimedSteps(steps, clock=clock, cache=cache)
    begun.take(None)
    return begun.result()
