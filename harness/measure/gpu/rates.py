"""How fast a recipe's corpus is made and its heads train: generation for some seconds, then a few steps."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from rich.console import Console

from harness.device.clock import device_clock
from harness.device.doctor import require_own_gpu
from harness.device.engine import LoadedModel, best_device, load_model
from harness.device.locks import device_turns
from harness.errors import UserError
from harness.files import write_json
from harness.measure.latency.faults import release
from harness.measure.profiles.training import profile_training
from harness.records.gpu.parts import CorpusRate
from harness.records.gpu.record import CORPUS_FILE, TRAINING_FILE
from harness.safe_text import SafeConsole
from harness.specs.recipe import AnyRecipe, HeadsRecipe, load_recipe, needed_corpus
from harness.training.corpus import corpus_prompts, rows_together
from medusa_impl.engine.runner import StepRunner
from medusa_impl.training.distill import (
    CorpusPrompt,
    CorpusSample,
    CorpusStore,
    generate_corpus,
    pack_corpus,
)

_RANDOM_PROMPT_TOKENS = 8  # of models without a tokenizer


def measure_rates(target: Path, *, recipe: Path, corpus_s: float, num_steps: int, command: str) -> None:
    """Write the rate of corpus generation and the profile of training steps into a folder.

    Raises: UserError for a recipe that cannot run here, or a model that gave no answer in that time.
    """
    require_own_gpu()
    spec, console = load_recipe(recipe), SafeConsole(stderr=True)
    loaded = load_model(spec.model, device=best_device())
    with tempfile.TemporaryDirectory() as work:
        store = CorpusStore(Path(work) / "corpus")
        rate = corpus_rate(spec, loaded, store=store, limit_s=corpus_s, console=console)
        write_json(target / CORPUS_FILE, rate)
        if spec.packed_corpus is None:
            packed = Path(work) / "corpus.safetensors"
            pack_corpus(store.samples(with_states=False), packed, backbone_sha256=loaded.sha256)
            spec = load_recipe(recipe).model_copy(update={"packed_corpus": str(packed)})
        device = loaded.model.device
        del loaded  # the profile loads its own
        release(device)
        profile = profile_training(
            spec, num_steps=num_steps, allow_hub=False, command=command, console=console
        )
    write_json(target / TRAINING_FILE, profile)


def corpus_rate(
    spec: AnyRecipe, loaded: LoadedModel, *, store: CorpusStore, limit_s: float, console: Console
) -> CorpusRate:
    """Answer a recipe's prompts for `limit_s` seconds, in this one process, and return the rate.

    Raises: UserError where no answer came to its end in that time.
    """
    corpus, device = needed_corpus(spec), loaded.model.device
    backbone = StepRunner(loaded.model, None, clock=time.perf_counter).backbone
    prompts = (
        _random_prompts(loaded, count=corpus.num_prompts())
        if loaded.tokenizer is None
        else corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=corpus.num_prompts())
    )
    keep_states = isinstance(spec, HeadsRecipe)  # as a corpus for heads alone is made
    num_rows = rows_together(backbone, prompts, spec=corpus, keep_states=keep_states)
    console.print(f"corpus: {len(prompts)} prompts, {num_rows} rows, {limit_s:g} s")
    clock, answers = device_clock(device), list[CorpusSample]()
    with device_turns(device, console=console)():
        started = clock()
        generate_corpus(
            backbone,
            prompts,
            store=store,
            num_rows=num_rows,
            max_new_tokens=corpus.max_new_tokens,
            eos_ids=loaded.eos_ids,
            on_sample=answers.append,
            # The host's own clock: the device's would wait for the step that is under way after each answer.
            stop=lambda: time.perf_counter() - started >= limit_s,
            keep_states=keep_states,
        )
        elapsed_s = clock() - started
    if not answers:
        raise UserError(
            found="no answer at all", need="one at least to take a rate of", where=f"recipe {spec.name!r}"
        )
    return CorpusRate(
        recipe=spec.name,
        model=loaded.name,
        dtype=spec.model.dtype,
        num_rows=num_rows,
        num_answers=len(answers),
        num_tokens=sum(len(answer.token_ids) for answer in answers),
        elapsed_s=elapsed_s,
    )


def _random_prompts(loaded: LoadedModel, *, count: int) -> tuple[CorpusPrompt, ...]:
    source, vocab_size = random.Random(0), int(loaded.model.config.vocab_size)
    return tuple(
        CorpusPrompt(
            f"random-{number}",
            "random",
            tuple(source.randrange(vocab_size) for _ in range(_RANDOM_PROMPT_TOKENS)),
            0.0,
            number,
        )
        for number in range(count)
    )
