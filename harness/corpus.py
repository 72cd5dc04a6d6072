"""Answer the project's training prompts with the backbone: the corpus that the heads learn from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness.config import Frozen
from harness.prompts import render_chat
from harness.training_prompts import Split, training_prompts
from medusa_impl.backbone import Backbone
from medusa_impl.distill import CorpusPrompt, CorpusSample, CorpusStore, generate_corpus


class CorpusSpec(Frozen):
    """What to generate: prompts are drawn until `num_tokens` are answered; a share of them is sampled, the rest greedy."""

    num_tokens: int
    max_new_tokens: int = 160
    max_prompt_tokens: int = 512
    sampled_share: float = 0.34
    temperature: float = 0.3
    num_rows: int = 48
    seed: int = 1
    split: Split = "train"


def corpus_prompts(tokenizer: Any, *, spec: CorpusSpec, num_prompts: int) -> tuple[CorpusPrompt, ...]:
    """Return rendered prompts; whether a prompt is sampled, and its seed, follow from its own text.

    Prompts longer than `max_prompt_tokens` are left out.
    """
    rendered = []
    for prompt in training_prompts(num_prompts=num_prompts, seed=spec.seed, split=spec.split):
        digest = int(hashlib.sha256(prompt.text.encode()).hexdigest()[8:16], 16)
        ids = render_chat(tokenizer, prompt.text)
        if len(ids) <= spec.max_prompt_tokens:
            sampled = digest % 1000 < 1000 * spec.sampled_share
            temperature = spec.temperature if sampled else 0.0
            rendered.append(CorpusPrompt(key=prompt.key, category=prompt.category, prompt_ids=ids, temperature=temperature, seed=digest))
    return tuple(rendered)


def make_corpus(
    backbone: Backbone,
    prompts: Sequence[CorpusPrompt],
    *,
    store: CorpusStore,
    spec: CorpusSpec,
    eos_ids: frozenset[int],
    console: Console,
    rate_file: Path | None = None,
) -> int:
    """Generate until the store holds `num_tokens` tokens of answers to these prompts or they run out; return how many it holds.

    `rate_file` is kept up to date with the tokens a second, for the estimate of a later run.
    """
    own = {prompt.key for prompt in prompts}
    held = sum(len(sample.token_ids) for sample in store.samples(with_states=False) if sample.key in own)
    started, before = time.monotonic(), held
    columns = (TextColumn("corpus"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} tokens/s"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("corpus", total=spec.num_tokens, completed=held, rate="-")

        def advance(sample: CorpusSample) -> None:
            nonlocal held
            held += len(sample.token_ids)
            rate = (held - before) / max(time.monotonic() - started, 1e-9)
            progress.update(task, completed=held, rate=f"{rate:.0f}")
            if rate_file is not None:
                rate_file.write_text(f"{rate:.3f}\n")

        if held < spec.num_tokens:
            generate_corpus(
                backbone,
                prompts,
                store=store,
                num_rows=spec.num_rows,
                max_new_tokens=spec.max_new_tokens,
                eos_ids=eos_ids,
                on_sample=advance,
                stop=lambda: held >= spec.num_tokens,
            )
    return held
