"""Answer the project's training prompts with the backbone: the corpus that the heads learn from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.config import Frozen
from harness.conversations import SECOND_TURN, check_has_template, follow_up_ids
from harness.paths import resolve_path
from harness.prompts import load_prompt_file, render_chat
from harness.training_prompts import Split, TrainingPrompt, training_prompts
from medusa_impl.backbone import Backbone
from medusa_impl.distill import CorpusPrompt, CorpusSample, CorpusStore, generate_corpus


class CorpusSpec(Frozen):
    """What to generate: prompts are drawn until `num_tokens` or `num_samples` are answered; a share is sampled, the rest greedy.

    `prompts_file` holds prompts of the user's own instead of the project's. `second_turn_share` of the conversations whose first answer
    came to its end go on to a second question: the file's own second turn, or another of the project's prompts of that category. There is
    no third.
    """

    num_tokens: int | None = Field(default=None, ge=1)
    num_samples: int | None = Field(default=None, ge=1)
    max_new_tokens: int = 160
    max_prompt_tokens: int = 512
    sampled_share: float = 0.34
    temperature: float = 0.3
    num_rows: int = 48
    seed: int = 1
    split: Split = "train"
    prompts_file: str | None = None
    second_turn_share: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_goal(self) -> CorpusSpec:
        if (self.num_tokens is None) == (self.num_samples is None):
            raise ValueError("set exactly one of num_tokens and num_samples")
        return self

    @property
    def goal(self) -> int:
        """How much is wanted, in `unit`."""
        return self.num_tokens or self.num_samples or 0

    @property
    def unit(self) -> str:
        """What the goal counts."""
        return "tokens" if self.num_tokens is not None else "answers"

    def amount(self, samples: Iterable[CorpusSample]) -> int:
        """Return how much of the goal these answers are; second turns come on top of it."""
        first = [sample for sample in samples if not sample.key.endswith(SECOND_TURN)]
        return sum(len(sample.token_ids) for sample in first) if self.num_tokens is not None else len(first)

    def num_prompts(self) -> int:
        """Return enough prompts for the goal: answers average more than half of their budget, and few prompts are too long."""
        return -(-2 * self.num_tokens // self.max_new_tokens) if self.num_tokens is not None else 2 * self.goal

    def catalogue_prompts(self, num_prompts: int) -> tuple[TrainingPrompt, ...]:
        """Return the first turns: the file's, or the project's own."""
        if self.prompts_file is None:
            return training_prompts(num_prompts=num_prompts, seed=self.seed, split=self.split)
        rows = load_prompt_file(resolve_path(self.prompts_file, beside=None))
        return tuple(TrainingPrompt(key=row.key, category=row.category, text=row.turns[0]) for row in rows[:num_prompts])

    def questions(self) -> tuple[str, ...]:
        """Return all that may be asked, a file's second questions included; the project's own are prompts of the catalogue as well."""
        if self.prompts_file is None:
            return tuple(prompt.text for prompt in self.catalogue_prompts(self.num_prompts()))
        rows = load_prompt_file(resolve_path(self.prompts_file, beside=None))[: self.num_prompts()]
        return tuple(turn for row in rows for turn in row.turns[:2])


def corpus_prompts(tokenizer: Any, *, spec: CorpusSpec, num_prompts: int) -> tuple[CorpusPrompt, ...]:
    """Return rendered prompts; whether a prompt is sampled, and its seed, follow from its own text.

    Prompts longer than `max_prompt_tokens` are left out.
    """
    rendered = []
    for prompt in spec.catalogue_prompts(num_prompts):
        digest = _digest(prompt.text)
        ids = render_chat(tokenizer, prompt.text)
        if len(ids) <= spec.max_prompt_tokens:
            sampled = digest % 1000 < 1000 * spec.sampled_share
            temperature = spec.temperature if sampled else 0.0
            rendered.append(CorpusPrompt(key=prompt.key, category=prompt.category, prompt_ids=ids, temperature=temperature, seed=digest))
    return tuple(rendered)


def second_turn_prompts(tokenizer: Any, samples: Iterable[CorpusSample], *, spec: CorpusSpec) -> tuple[CorpusPrompt, ...]:
    """Return the prompts of second turns behind these answers; which conversations go on follows from their own keys."""
    going_on = [sample for sample in samples if goes_on(sample, spec=spec)]
    if not going_on:
        return ()
    check_has_template(tokenizer, where="corpus.second_turn_share")
    questions = _second_questions(spec, going_on)
    made = []
    for sample in going_on:
        if (question := questions.get(sample.key)) is None:
            continue
        follow_up = follow_up_ids(tokenizer, question)
        if len(follow_up) <= spec.max_prompt_tokens:
            made.append(
                CorpusPrompt(
                    key=sample.key + SECOND_TURN,
                    category=sample.category,
                    prompt_ids=(*sample.prompt_ids, *sample.token_ids, *follow_up),
                    temperature=sample.temperature,
                    seed=_digest(sample.key + SECOND_TURN),
                )
            )
    return tuple(made)


def goes_on(sample: CorpusSample, *, spec: CorpusSpec) -> bool:
    """Return whether a conversation gets a second turn: a share of the first answers that ended by themselves."""
    ended = sample.ended_by == "eos" and not sample.key.endswith(SECOND_TURN)
    return ended and _digest(sample.key) % 1000 < 1000 * spec.second_turn_share


def _second_questions(spec: CorpusSpec, samples: Sequence[CorpusSample]) -> dict[str, str]:
    if spec.prompts_file is not None:
        rows = load_prompt_file(resolve_path(spec.prompts_file, beside=None))
        return {row.key: row.turns[1] for row in rows if len(row.turns) > 1}
    pools: dict[str, list[str]] = {}
    for prompt in training_prompts(num_prompts=spec.num_prompts(), seed=spec.seed, split=spec.split):
        pools.setdefault(prompt.category, []).append(prompt.text)
    return {sample.key: pools[sample.category][_digest(sample.key) // 1000 % len(pools[sample.category])] for sample in samples}


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[8:16], 16)


def make_corpus(
    backbone: Backbone,
    prompts: Sequence[CorpusPrompt],
    *,
    store: CorpusStore,
    spec: CorpusSpec,
    eos_ids: frozenset[int],
    console: Console,
    rate_file: Path | None = None,
    keep_states: bool = True,
) -> int:
    """Generate until the store holds as many tokens, or answers, to these prompts as wanted or they run out; return how many it holds.

    `rate_file` is kept up to date with the tokens a second, for the estimate of a later run.
    """
    own = {prompt.key for prompt in prompts}
    samples = [sample for sample in store.samples(with_states=False) if sample.key in own]
    held = spec.amount(samples)
    num_made = 0
    started = time.monotonic()
    columns = (TextColumn("corpus"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} tokens/s"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("corpus", total=spec.goal, completed=held, rate="-")

        def advance(sample: CorpusSample) -> None:
            nonlocal held, num_made
            held += spec.amount([sample])
            num_made += len(sample.token_ids)
            rate = num_made / max(time.monotonic() - started, 1e-9)
            progress.update(task, completed=held, rate=f"{rate:.0f}")
            if rate_file is not None:
                rate_file.write_text(f"{rate:.3f}\n")

        if held < spec.goal:
            generate_corpus(
                backbone,
                prompts,
                store=store,
                num_rows=spec.num_rows,
                max_new_tokens=spec.max_new_tokens,
                eos_ids=eos_ids,
                on_sample=advance,
                stop=lambda: held >= spec.goal,
                keep_states=keep_states,
            )
    return held
