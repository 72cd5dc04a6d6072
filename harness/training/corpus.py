"""Answer the project's training prompts with the backbone: the corpus that the heads learn from."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness.assets.catalogue import TrainingPrompt, training_prompts
from harness.assets.chat import asks_for_date, render_chat, taken_date
from harness.assets.prompts import BenchmarkPrompt, load_prompt_file, overlap_report
from harness.device.engine import LoadedModel
from harness.device.loading.behaviour import PARTS, differing
from harness.device.progress import progress_bar
from harness.device.prompts import NUM_WARMUP, WARMUP_SEED, benchmark_prompts
from harness.errors import UserError
from harness.files import canonical_sha256, read_text, write_bytes, write_text
from harness.paths import resolve_path
from harness.specs.recipe import AnyRecipe, CorpusSpec
from harness.specs.suite import ModelSpec, PromptSpec
from harness.training.conversations import (
    check_has_template,
    conversation_and_turn,
    follow_up_ids,
    next_turn_key,
)
from medusa_impl.engine.backbone import Backbone
from medusa_impl.stream import CACHE_SPARE_TOKENS
from medusa_impl.training.distill import CorpusPrompt, CorpusSample, CorpusStore, generate_corpus

RUN_FILE = "run.json"  # in a work folder: what a joint training began with
_DATE_FILE, _BEHAVIOUR_FILE = "chat_date.txt", "behaviour.json"
_RATE_EVERY_S = 1.0  # between two notes of the rate: a GPU ends hundreds of answers a second
_GPU_ROWS, _GPU_SHARE = (
    512,
    0.5,
)  # answers that decode together at the most, and the free memory that they fill
_LOG = logging.getLogger(__name__)


def check_same_behaviour(work: Path, behaviour: Mapping[str, str]) -> None:
    """Note in a work folder what its model does besides its tensors, or see that it still does that.

    A folder from before this was noted goes on with a warning, and so does a model without a tokenizer.
    Raises: UserError for the same tensors with another configuration, tokenizer, template or adapter.
    """
    path = work / _BEHAVIOUR_FILE
    if not behaviour:
        return
    if not path.exists():
        if (work / RUN_FILE).exists() or CorpusStore(work / "corpus").shard_files():
            _LOG.warning("the work folder does not say what its model did: only the tensors were compared")
            return
        work.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(dict(behaviour), indent=1) + "\n").encode())
        return
    if changed := differing(behaviour, read_noted(path), parts=PARTS):
        raise UserError(
            found=f"work of another {' and '.join(changed)} of the same tensors",
            need="the configuration, tokenizer and adapter that it began with",
            where="the work folder",
            do="restore them, or give another --work",
        )


def read_noted(path: Path) -> dict[str, Any]:
    """Return what a work folder noted. Raises: UserError where it cannot be read."""
    try:
        noted = json.loads(read_text(path))
    except (UserError, ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict):
        raise UserError(
            found=f"no readable {path.name}",
            need="what the training in this folder began with",
            where="the work folder",
            do="give another --work, or empty it to start afresh",
        )
    return noted


def keep_date(spec: ModelSpec, loaded: LoadedModel, *, work: Path) -> None:
    """Make the model's chat template write the day of the recipe, else that on which the work began.

    The work folder keeps that day, so that text made after midnight is of one kind with the text before.
    """
    if loaded.tokenizer is None or spec.chat_date is not None or not asks_for_date(loaded.tokenizer):
        return
    path = work / _DATE_FILE
    begun = date.fromisoformat(read_text(path).strip()) if path.exists() else None
    day = taken_date(loaded.tokenizer, begun=begun)
    if begun is None:
        work.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{day}\n")


def amount(spec: CorpusSpec, samples: Iterable[CorpusSample]) -> int:
    """Return how much of the goal these answers are; later turns come on top of it."""
    first = [sample for sample in samples if conversation_and_turn(sample.key)[1] == 1]
    return sum(len(sample.token_ids) for sample in first) if spec.num_tokens is not None else len(first)


def catalogue_prompts(spec: CorpusSpec, num_prompts: int) -> tuple[TrainingPrompt, ...]:
    """Return the first turns: the file's, or the project's own."""
    if spec.prompts_file is None:
        return training_prompts(num_prompts=num_prompts, seed=spec.seed, split=spec.split)
    rows = own_conversations(spec)[:num_prompts]
    return tuple(TrainingPrompt(key=row.key, category=row.category, text=row.turns[0]) for row in rows)


def own_conversations(spec: CorpusSpec) -> tuple[BenchmarkPrompt, ...]:
    """Return the rows of the prompts file, none where there is no file.

    Raises: UserError for a file that cannot be read, or a key that the answer to a later turn would bear.
    """
    if spec.prompts_file is None:
        return ()
    path = resolve_path(spec.prompts_file, base_folder=None)
    rows = load_prompt_file(path)
    for row in rows:
        if conversation_and_turn(row.key)[1] > 1:
            raise UserError(
                found=f"the key {row.key!r}",
                need="a key that does not end in a plus sign and a number, as the keys of later turns do",
                where=path.name,
                do="rename the key",
            )
    return rows


def questions(spec: CorpusSpec) -> tuple[str, ...]:
    """Return all that may be asked, a file's further turns included.

    The project's own questions are prompts of the catalogue as well.
    """
    if spec.prompts_file is None:
        return tuple(prompt.text for prompt in catalogue_prompts(spec, spec.num_prompts()))
    return tuple(turn for row in own_conversations(spec)[: spec.num_prompts()] for turn in row.turns)


def fingerprint(spec: CorpusSpec, keys: Iterable[str]) -> str:
    """Return a hash of what is asked for and of the answers there are.

    Where it stays the same, so does what is still to be done.
    """
    return canonical_sha256(
        [spec.model_dump(), [row.model_dump() for row in own_conversations(spec)], sorted(keys)]
    )


def corpus_prompts(tokenizer: Any, *, spec: CorpusSpec, num_prompts: int) -> tuple[CorpusPrompt, ...]:
    """Return rendered prompts; whether a prompt is sampled, and its seed, follow from its own text.

    Prompts longer than `max_prompt_tokens` are left out.
    """
    rendered = []
    for prompt in catalogue_prompts(spec, num_prompts):
        digest = _digest(prompt.text)
        ids = render_chat(tokenizer, prompt.text)
        if len(ids) <= spec.max_prompt_tokens:
            sampled = digest % 1000 < 1000 * spec.sampled_share
            temperature = spec.temperature if sampled else 0.0
            rendered.append(
                CorpusPrompt(
                    key=prompt.key,
                    category=prompt.category,
                    prompt_ids=ids,
                    temperature=temperature,
                    seed=digest,
                )
            )
    return tuple(rendered)


def next_turn_prompts(
    tokenizer: Any, samples: Iterable[CorpusSample], *, spec: CorpusSpec, fits: Callable[[int], bool]
) -> tuple[CorpusPrompt, ...]:
    """Return the next turn's prompt of every conversation among these answers that goes on.

    Which ones go on follows from their own keys.
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
            CorpusPrompt(
                key=key,
                category=sample.category,
                prompt_ids=prompt_ids,
                temperature=sample.temperature,
                seed=_digest(key),
            )
        )
    return tuple(made)


def next_questions(samples: Sequence[CorpusSample], *, spec: CorpusSpec) -> dict[str, str]:
    """Return the questions that are still to be asked, each by the key of the answer that it follows."""
    keys = {sample.key for sample in samples}
    last = [
        sample for sample in samples if goes_on(sample, spec=spec) and next_turn_key(sample.key) not in keys
    ]
    if not last:
        return {}
    if spec.prompts_file is not None:
        asked = {row.key: row.turns for row in own_conversations(spec)}
        places = {sample.key: conversation_and_turn(sample.key) for sample in last}
        return {
            key: asked[name][turn] for key, (name, turn) in places.items() if turn < len(asked.get(name, ()))
        }
    pools: dict[str, list[str]] = {}
    for prompt in training_prompts(num_prompts=spec.num_prompts(), seed=spec.seed, split=spec.split):
        pools.setdefault(prompt.category, []).append(prompt.text)
    asking = [(sample.key, pools[sample.category]) for sample in last if sample.category in pools]
    return {key: pool[_digest(key) // 1000 % len(pool)] for key, pool in asking}


def goes_on(sample: CorpusSample, *, spec: CorpusSpec) -> bool:
    """Return whether a conversation may go on after an answer.

    The conversation is one of the share that does, and the answer ended by itself.
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
    """Generate answers until the store holds as many as wanted, and return how many it holds.

    Tokens or answers to these prompts count; it ends early where the prompts run out.
    `rate_file` is kept up to date with the tokens a second, for the estimate of a later run.
    """
    own = {prompt.key for prompt in prompts}
    samples = [sample for sample in store.samples(with_states=False) if sample.key in own]
    held = amount(spec, samples)
    num_made = 0
    started = time.monotonic()
    noted = -math.inf
    with progress_bar(console) as progress:
        task = progress.add_task("corpus", total=spec.goal, completed=held)

        def advance(sample: CorpusSample) -> None:
            nonlocal held, num_made, noted
            held += amount(spec, [sample])
            num_made += len(sample.token_ids)
            now = time.monotonic()
            rate = num_made / max(now - started, 1e-9)
            progress.update(task, completed=held, description=f"corpus, {rate:.0f} tokens/s")
            if rate_file is not None and now - noted > _RATE_EVERY_S:
                write_text(rate_file, f"{rate:.3f}\n")
                noted = now

        if held < spec.goal:
            generate_corpus(
                backbone,
                prompts,
                store=store,
                num_rows=rows_together(backbone, prompts, spec=spec, keep_states=keep_states),
                max_new_tokens=spec.max_new_tokens,
                eos_ids=eos_ids,
                on_sample=advance,
                stop=lambda: held >= spec.goal,
                keep_states=keep_states,
            )
    return held


def rows_together(
    backbone: Backbone, prompts: Sequence[CorpusPrompt], *, spec: CorpusSpec, keep_states: bool
) -> int:
    """Return how many answers decode together: `num_rows`, and on a GPU more, as far as its memory goes."""
    if backbone.device.type != "cuda":
        return spec.num_rows
    longest = max((len(prompt.prompt_ids) for prompt in prompts), default=0)
    row = row_bytes(backbone, longest + spec.max_new_tokens, budget=spec.max_new_tokens if keep_states else 0)
    free_bytes, _ = torch.cuda.mem_get_info(backbone.device)
    return rows_that_fit(spec.num_rows, row=row, free_bytes=free_bytes)


def rows_that_fit(num_rows: int, *, row: int, free_bytes: int) -> int:
    """Return the recipe's rows, or as many of so many bytes as half of the free memory holds, if more.

    Half, since a longer cache and the one that it replaces are there together for a while.
    """
    return max(num_rows, min(_GPU_ROWS, int(_GPU_SHARE * free_bytes) // row))


def row_bytes(backbone: Backbone, slots: int, *, budget: int) -> int:
    """Return the bytes of one answer in the making: keys and values, kept states, and its logits.

    The cache has some slots more than asked for. Logits are there in float32, as a law, and summed up.
    """
    config: Any = backbone.model.config
    num_heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or backbone.hidden_size // num_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or num_heads) * head_size
    item = torch.empty(0, dtype=backbone.dtype).element_size()
    row_slots = slots + CACHE_SPARE_TOKENS + 1  # one is never read (`TreeCache.row_slots`)
    cache = 2 * backbone.num_layers * keys * row_slots * item
    return cache + 2 * budget * backbone.hidden_size + (4 + 4 + 8) * backbone.vocab_size


def check_overlap(spec: AnyRecipe, *, allow_hub: bool) -> None:
    """Refuse prompts that share eight words in a row with MT-Bench or HumanEval.

    Training, calibration and warm-up prompts are looked into.
    Conversations of the user's own are not looked into, and a tiny model's random tokens are no words.
    """
    if spec.model.tiny is not None:
        return
    benchmark = [
        turn
        for source in ("mt_bench", "human_eval")
        for prompt in benchmark_prompts(PromptSpec(source=source), allow_hub=allow_hub)
        for turn in prompt.turns
    ]
    corpus = spec.corpus
    training = list(questions(corpus)) if corpus is not None else []
    for seed, count in ((spec.calibration.seed, spec.calibration.num_prompts), (WARMUP_SEED, NUM_WARMUP)):
        training += [
            prompt.text for prompt in training_prompts(num_prompts=count, seed=seed, split="held_out")
        ]
    report = overlap_report(training, benchmark)
    if not report.clean:
        first = report.overlaps[0]
        raise UserError(
            found=f"{len(report.overlaps)} overlaps with benchmark prompts, the first {first.ngram!r}",
            need="no eight words in a row that a benchmark prompt has too",
            where="the training prompts",
            do="leave these prompts out of the training text",
        )
