"""Answer the project's training prompts with the backbone: the corpus that the heads learn from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.assets.catalogue import Split, TrainingPrompt, training_prompts
from harness.assets.prompts import BenchmarkPrompt, load_prompt_file, render_chat
from harness.conversations import check_has_template, conversation_and_turn, follow_up_ids, next_turn_key
from harness.errors import UserError
from harness.files import Frozen, canonical_sha256
from harness.paths import resolve_path
from medusa_impl.backbone import Backbone
from medusa_impl.distill import CorpusPrompt, CorpusSample, CorpusStore, generate_corpus


class CorpusSpec(Frozen):
    """What to generate: prompts are drawn until `num_tokens` or `num_samples` are answered; a share is sampled, the rest greedy.

    `prompts_file` holds prompts of the user's own instead of the project's. `second_turn_share` of the conversations whose first answer
    came to its end go on: through all further turns of the file's, one after another, or to one other of the project's prompts of that
    category. A conversation ends before its last question where an answer used up its budget, where a question is longer than
    `max_prompt_tokens`, or where the model has too few positions for all that was said and another answer.
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
        """Return how much of the goal these answers are; later turns come on top of it."""
        first = [sample for sample in samples if conversation_and_turn(sample.key)[1] == 1]
        return sum(len(sample.token_ids) for sample in first) if self.num_tokens is not None else len(first)

    def num_prompts(self) -> int:
        """Return enough prompts for the goal: answers average more than half of their budget, and few prompts are too long."""
        return -(-2 * self.num_tokens // self.max_new_tokens) if self.num_tokens is not None else 2 * self.goal

    def catalogue_prompts(self, num_prompts: int) -> tuple[TrainingPrompt, ...]:
        """Return the first turns: the file's, or the project's own."""
        if self.prompts_file is None:
            return training_prompts(num_prompts=num_prompts, seed=self.seed, split=self.split)
        rows = self.own_conversations()[:num_prompts]
        return tuple(TrainingPrompt(key=row.key, category=row.category, text=row.turns[0]) for row in rows)

    def own_conversations(self) -> tuple[BenchmarkPrompt, ...]:
        """Return the rows of the prompts file, none where there is no file.

        Raises: UserError for a file that cannot be read, or a key that the answer to a later turn would bear.
        """
        if self.prompts_file is None:
            return ()
        path = resolve_path(self.prompts_file, beside=None)
        rows = load_prompt_file(path)
        for row in rows:
            if conversation_and_turn(row.key)[1] > 1:
                raise UserError(
                    found=f"the key {row.key!r}",
                    need="one that does not end in a plus sign and a number, as those of later turns do",
                    where=path.name,
                    do="rename it",
                )
        return rows

    def questions(self) -> tuple[str, ...]:
        """Return all that may be asked, a file's further turns included; the project's own are prompts of the catalogue as well."""
        if self.prompts_file is None:
            return tuple(prompt.text for prompt in self.catalogue_prompts(self.num_prompts()))
        return tuple(turn for row in self.own_conversations()[: self.num_prompts()] for turn in row.turns)

    def fingerprint(self, keys: Iterable[str]) -> str:
        """Return a hash of what is asked for and of the answers there are: where it stays the same, so does what is still to be done."""
        return canonical_sha256([self.model_dump(), [row.model_dump() for row in self.own_conversations()], sorted(keys)])


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


def next_turn_prompts(
    tokenizer: Any, samples: Iterable[CorpusSample], *, spec: CorpusSpec, fits: Callable[[int], bool]
) -> tuple[CorpusPrompt, ...]:
    """Return the prompt of the next turn of every conversation among these answers that goes on; which do follows from their own keys.

    `fits` says of a number of prompt tokens whether the model has room for them and an answer.
    """
    kept = list(samples)
    questions = next_questions(kept, spec=spec)
    if questions:
        check_has_template(tokenizer, where="corpus.second_turn_share")
    made = []
    for sample in kept:
        if sample.key not in questions:
            continue
        follow_up = follow_up_ids(tokenizer, questions[sample.key])
        prompt_ids = (*sample.prompt_ids, *sample.token_ids, *follow_up)
        if len(follow_up) > spec.max_prompt_tokens or not fits(len(prompt_ids)):
            continue
        key = next_turn_key(sample.key)
        made.append(
            CorpusPrompt(key=key, category=sample.category, prompt_ids=prompt_ids, temperature=sample.temperature, seed=_digest(key))
        )
    return tuple(made)


def next_questions(samples: Sequence[CorpusSample], *, spec: CorpusSpec) -> dict[str, str]:
    """Return the questions that are still to be asked, each by the key of the answer that it follows."""
    keys = {sample.key for sample in samples}
    last = [sample for sample in samples if goes_on(sample, spec=spec) and next_turn_key(sample.key) not in keys]
    if not last:
        return {}
    if spec.prompts_file is not None:
        asked = {row.key: row.turns for row in spec.own_conversations()}
        places = {sample.key: conversation_and_turn(sample.key) for sample in last}
        return {key: asked[name][turn] for key, (name, turn) in places.items() if turn < len(asked.get(name, ()))}
    pools: dict[str, list[str]] = {}
    for prompt in training_prompts(num_prompts=spec.num_prompts(), seed=spec.seed, split=spec.split):
        pools.setdefault(prompt.category, []).append(prompt.text)
    asking = [(sample.key, pools[sample.category]) for sample in last if sample.category in pools]
    return {key: pool[_digest(key) // 1000 % len(pool)] for key, pool in asking}


def goes_on(sample: CorpusSample, *, spec: CorpusSpec) -> bool:
    """Return whether a conversation may go on behind an answer: one of the share that does, and an answer that ended by itself.

    The project's own conversations have two turns, a file's as many as it gives.
    """
    conversation, turn = conversation_and_turn(sample.key)
    open_ended = sample.ended_by == "eos" and (turn == 1 or spec.prompts_file is not None)
    return open_ended and _digest(conversation) % 1000 < 1000 * spec.second_turn_share


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
