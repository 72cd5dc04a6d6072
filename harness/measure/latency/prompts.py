"""The texts that a latency run's tables decode: first turns of a benchmark, or random token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence

from harness.assets.chat import render_chat
from harness.device.engine import Engine
from harness.device.prompts import benchmark_prompts
from harness.errors import UserError
from harness.files import Frozen
from harness.specs.latency import LatencySpec
from harness.specs.suite import PromptSpec

_SEED = "latency"


class LatencyPrompt(Frozen):
    """One prompt as token ids."""

    key: str
    prompt_ids: tuple[int, ...]


def table_prompts(spec: LatencySpec, engine: Engine, *, allow_hub: bool) -> tuple[LatencyPrompt, ...]:
    """Return as many prompts as the spec's tables need.

    They are first turns in the model's chat template, or random token ids.
    Raises: UserError where there are too few, or one leaves too few positions for its answer.
    """
    tables = (spec.modes_table, spec.batch_table)
    count = max(
        spec.modes_table.num_prompts if spec.modes_table else 0,
        spec.batch_table.num_texts if spec.batch_table else 0,
    )
    if not count:
        return ()
    if spec.prompts.source == "random":
        prompts = random_prompts(engine, [spec.prompts.prompt_tokens] * count)
    else:
        prompts = _benchmark_prompts(spec, engine, count=count, allow_hub=allow_hub)
    if len(prompts) < count:
        raise UserError(
            found=f"{len(prompts)} prompts",
            need=f"{count} for the tables",
            where=f"prompts.source {spec.prompts.source!r}",
        )
    budget = max(table.max_new_tokens for table in tables if table is not None)
    for prompt in prompts:
        engine.loaded.require_known_ids(prompt.prompt_ids, where=f"prompt {prompt.key!r}")
        engine.runner.backbone.check_positions(
            prompt_tokens=len(prompt.prompt_ids), max_new_tokens=budget, depth=engine.heads.num_heads
        )
    return prompts


def random_prompts(engine: Engine, lengths: Sequence[int]) -> tuple[LatencyPrompt, ...]:
    """Return prompts of random token ids, always the same, of these lengths."""
    source, vocab_size = random.Random(_SEED), engine.runner.backbone.vocab_size
    return tuple(
        LatencyPrompt(
            key=f"random-{number}", prompt_ids=tuple(source.randrange(vocab_size) for _ in range(length))
        )
        for number, length in enumerate(lengths)
    )


def _benchmark_prompts(
    spec: LatencySpec, engine: Engine, *, count: int, allow_hub: bool
) -> tuple[LatencyPrompt, ...]:
    tokenizer = engine.loaded.tokenizer
    if tokenizer is None:
        raise UserError(
            found="prompts of text for random weights",
            need="prompts.source = 'random'",
            where=f"the spec {spec.name!r}",
        )
    assert spec.prompts.source != "random"
    wanted = PromptSpec(source=spec.prompts.source, limit=count)
    return tuple(
        LatencyPrompt(key=text.key, prompt_ids=render_chat(tokenizer, text.turns[0]))
        for text in benchmark_prompts(wanted, allow_hub=allow_hub)
    )
