"""The rendered prompts of a suite: what is measured, and other prompts to warm up with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.assets.catalogue import training_prompts
from harness.assets.chat import render_chat, taken_date
from harness.assets.fetch import fetch_asset
from harness.assets.prompts import (
    BenchmarkPrompt,
    load_human_eval,
    load_mt_bench,
    load_prompt_file,
    select_prompts,
    turns_note,
)
from harness.device.engine import Engine, LoadedModel
from harness.device.machine import device_info
from harness.errors import UserError
from harness.files import DataFile
from harness.paths import cache_dir, resolve_path
from harness.records.provenance import Environment, Provenance
from harness.records.store import StoreKind, begun_with
from harness.specs.assets import load_asset_specs
from harness.specs.suite import PromptSpec, SuiteSpec

NUM_RANDOM_PROMPTS = 8  # of a tiny suite without a limit
NUM_WARMUP, WARMUP_SEED = 4, 7
_RANDOM_TOKENS = (6, 24)


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids."""

    key: str
    category: str | None
    prompt_ids: tuple[int, ...]


def benchmark_prompts(
    spec: PromptSpec,
    *,
    prompts_file: Path | None = None,
    base_folder: Path | None = None,
    allow_hub: bool,
    console: Console | None = None,
) -> tuple[BenchmarkPrompt, ...]:
    """Return the selected prompts of a source, as text; `prompts_file` stands in for the spec's own file.

    The console, where there is one, is told of turns in a file that will not be decoded.
    """
    if spec.source == "file":
        if prompts_file is None and not spec.path:
            raise UserError(
                found="prompts.source = 'file' without a path", need="a path", where="prompts.path"
            )
        file = prompts_file or resolve_path(spec.path or "", base_folder=base_folder)
        prompts = load_prompt_file(file)
        if console is not None and (note := turns_note(prompts, file=file.name)) is not None:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    else:
        specs = load_asset_specs()
        name = {"mt_bench": "mt-bench", "human_eval": "human-eval"}[spec.source]
        paths = fetch_asset(specs[name], cache_dir=cache_dir(), allow_hub=allow_hub).paths
        prompts = (
            load_mt_bench(paths["questions"])
            if spec.source == "mt_bench"
            else load_human_eval(next(iter(paths.values())))
        )
    return select_prompts(prompts, per_category=spec.per_category, limit=spec.limit)


def suite_prompts(
    suite: SuiteSpec,
    loaded: LoadedModel,
    *,
    prompts_file: Path | None = None,
    base_folder: Path | None = None,
    allow_hub: bool = False,
    console: Console | None = None,
) -> tuple[Prompt, ...]:
    """Return the suite's prompts as token ids.

    They are first turns in the model's own chat template, or random ids for a tiny model. The console, where
    there is one, is told of further turns in a file of the user's own.
    Raises: UserError for prompts that cannot be read, or a template that fails.
    """
    if suite.prompts.source == "random":
        return _random_prompts(suite, count=suite.prompts.limit or NUM_RANDOM_PROMPTS, seed="measured")
    if loaded.tokenizer is None:
        raise UserError(
            found="prompts of text for a tiny random model",
            need="prompts.source = 'random'",
            where=f"suite {suite.name!r}",
        )
    texts = benchmark_prompts(
        suite.prompts,
        prompts_file=prompts_file,
        base_folder=base_folder,
        allow_hub=allow_hub,
        console=console,
    )
    return tuple(
        Prompt(key=text.key, category=text.category, prompt_ids=render_chat(loaded.tokenizer, text.turns[0]))
        for text in texts
    )


def take_date(loaded: LoadedModel, begun: Iterable[Provenance] = ()) -> None:
    """Settle which day the model's chat template writes, if it asks for the date, before it is first used.

    It is the day that the data file gives, else that of the first of the runs in `begun` that has the same
    model, else today.
    """
    dates = (
        past.chat_date
        for past in begun
        if isinstance(past, Environment) and past.backbone_sha256 == loaded.sha256
    )
    taken_date(loaded.tokenizer, begun=next((day for day in dates if day is not None), None))


def take_up_date(
    loaded: LoadedModel, kind: StoreKind[Any], spec: DataFile, *, results: Path, resume: Path | None
) -> None:
    """Settle the day as `take_date` does, by the unfinished runs of a spec on the model's device."""
    device = device_info(loaded.model.device)
    take_date(loaded, begun_with(results, kind=kind, spec=spec, device=device, resume=resume))


def warmup_prompts(suite: SuiteSpec, loaded: LoadedModel) -> tuple[Prompt, ...]:
    """Return prompts for warming up and for the heads' control.

    They are held-out training prompts, and none of them is measured.
    """
    if suite.prompts.source == "random":
        return _random_prompts(suite, count=NUM_WARMUP, seed="warmup")
    return tuple(
        Prompt(
            key=prompt.key, category=prompt.category, prompt_ids=render_chat(loaded.tokenizer, prompt.text)
        )
        for prompt in training_prompts(num_prompts=NUM_WARMUP, seed=WARMUP_SEED, split="held_out")
    )


def check_lengths(prompts: Sequence[Prompt], engine: Engine, *, max_new_tokens: int) -> None:
    """Refuse a prompt with unknown tokens, or that leaves too few of the model's positions for its answer.

    This comes before anything is measured.
    """
    depth = engine.heads.num_heads
    for prompt in prompts:
        engine.loaded.require_known_ids(prompt.prompt_ids, where=f"prompt {prompt.key!r}")
        try:
            engine.runner.backbone.check_positions(
                prompt_tokens=len(prompt.prompt_ids), max_new_tokens=max_new_tokens, depth=depth
            )
        except UserError as error:
            raise UserError(
                found=error.found, need=error.need, where=f"prompt {prompt.key!r}", do=error.do
            ) from error


def _random_prompts(suite: SuiteSpec, *, count: int, seed: str) -> tuple[Prompt, ...]:
    if suite.model.tiny is None:
        raise UserError(found="prompts.source = 'random'", need="a tiny model", where=f"suite {suite.name!r}")
    source, vocab_size = random.Random(f"{suite.plan_seed}-{seed}"), suite.model.tiny.vocab_size
    return tuple(
        Prompt(
            key=f"{seed}-{number}",
            category=f"random-{number % 2}",
            prompt_ids=tuple(source.randrange(vocab_size) for _ in range(source.randint(*_RANDOM_TOKENS))),
        )
        for number in range(count)
    )
