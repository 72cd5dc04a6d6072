"""Answers made by several processes, and a corpus distilled from them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from rich.console import Console

from harness.device.clock import device_clock
from harness.device.engine import LoadedModel, best_device, load_model, model_sha256
from harness.device.limits import measure_device_limits
from harness.errors import UserError
from harness.files import canonical_sha256, write_bytes
from harness.safe_text import SafeConsole
from harness.specs.recipe import AnyRecipe, CorpusSpec, HeadsRecipe, needed_corpus, recipe_of
from harness.training.conversations import conversation_and_turn
from harness.training.corpus import (
    amount,
    check_overlap,
    check_same_behaviour,
    corpus_prompts,
    fingerprint,
    keep_date,
    make_corpus,
    next_questions,
    next_turn_prompts,
    rows_together,
)
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.runner import StepRunner
from medusa_impl.training.distill import (
    CorpusPrompt,
    CorpusStore,
    answer_fits,
    check_answers_fit,
    generate_corpus,
    pack_corpus,
)

_BACKBONE_FILE = "backbone.sha256"
_DONE_FILE = "done.sha256"


def corpus_store(work: Path, *, backbone_sha256: str, writer: str = "0") -> CorpusStore:
    """Return the corpus in a work folder; one that is still empty becomes this model's.

    Raises: UserError for the corpus of another model: its token ids may be other words, and its states
    another model's.
    """
    store = CorpusStore(work / "corpus", writer=writer)
    theirs = corpus_backbone(store)
    if theirs is None and not store.shard_files():
        write_bytes(store.folder / _BACKBONE_FILE, backbone_sha256.encode())
    if theirs not in (None, backbone_sha256):
        raise UserError(
            found=f"the answers of a model whose tensors hash to {theirs[:16]}",
            need=f"answers of the recipe's model, whose tensors hash to {backbone_sha256[:16]}",
            where="the work folder",
            do="give another --work, or empty it to start afresh",
        )
    return store


def fill_corpus(spec: AnyRecipe, *, work: Path, console: Console, allow_hub: bool = False) -> None:
    """Bring the corpus to its size, with a process for each GPU, or for each core.

    On a CPU each process has one thread, since they then need no barriers between them.
    Raises: UserError for a work folder with another model's answers, or for what a worker refuses or fails
    at.
    """
    corpus = needed_corpus(spec)
    store = corpus_store(work, backbone_sha256=model_sha256(spec.model, allow_hub=allow_hub))
    samples = list(store.samples(with_states=False))
    held = amount(corpus, samples)
    if held >= corpus.goal and not next_questions(samples, spec=corpus):
        return
    num_gpus = torch.cuda.device_count()
    num_workers = spec.num_workers or num_gpus or os.cpu_count() or 1

    def state(keys: Iterable[str]) -> str:
        return canonical_sha256([fingerprint(corpus, keys), spec.model.chat_template, num_workers])

    # prompts may run out and conversations end early: then the workers have no more to do
    done = store.folder / _DONE_FILE
    if done.exists() and _word(done) == state(sample.key for sample in samples):
        return
    console.print(f"corpus: {held} of {corpus.goal} {corpus.unit}; {num_workers} workers")
    context = multiprocessing.get_context("spawn")
    refusals: SimpleQueue[UserError] = context.SimpleQueue()
    workers = [
        context.Process(
            target=_corpus_process,
            args=(refusals, spec.model_dump(mode="json"), str(work), index, num_workers, num_gpus),
        )
        for index in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not refusals.empty():
        raise refusals.get()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise UserError(
            found=f"corpus workers that ended with exit codes {failed}",
            need="all workers to finish",
            where="making the corpus",
            do="read the messages above and run the command again: it goes on where it stopped",
        )
    write_bytes(done, state(store.finished_keys()).encode())


def corpus_backbone(store: CorpusStore) -> str | None:
    """Return the hash of the model that answers into a corpus; None for one from before it was noted."""
    path = store.folder / _BACKBONE_FILE
    return _word(path) if path.exists() else None


def _word(path: Path) -> str:
    """Return what a small file of a work folder says; what a kill left of it fits nothing."""
    return path.read_text(encoding="utf-8", errors="replace")


def _rates(folder: Path) -> list[float]:
    """Return the tokens a second that each worker noted last; a note that a kill cut short is passed over."""
    found = []
    for path in sorted(folder.glob("rate-*.txt")):
        with contextlib.suppress(OSError, ValueError):
            found.append(float(_word(path)))
    return [rate for rate in found if 0 < rate < math.inf]


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, be it by kill -9.

    Else it would go on to write into a folder that the same command, run again, writes into.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def worker_device(index: int, *, num_gpus: int) -> torch.device:
    """Return where a corpus worker computes.

    On a GPU of its own as long as there are enough of them; without any, on the CPU.
    """
    return torch.device("cuda", index % num_gpus) if num_gpus else torch.device("cpu")


def _corpus_process(
    refusals: SimpleQueue[UserError],
    spec_data: dict[str, object],
    work: str,
    index: int,
    num_workers: int,
    num_gpus: int,
) -> None:
    """Be a corpus worker in a process of its own: what the user can mend is told to the one that waits."""
    end_with_parent()
    if num_workers > 1:
        torch.set_num_threads(1)
    try:
        corpus_worker(spec_data, work, index, num_workers, num_gpus=num_gpus)
    except UserError as error:
        refusals.put(error)


def corpus_worker(
    spec_data: dict[str, object], work: str, index: int, num_workers: int, *, num_gpus: int
) -> None:
    """Answer every `num_workers`-th prompt into shards of its own until the store holds enough.

    Then the later turns, one by one.
    Raises: UserError before anything is generated, where a prompt of any worker's leaves no room for its
    answer.
    """
    spec = recipe_of(spec_data)
    corpus = needed_corpus(spec)
    device = worker_device(index, num_gpus=num_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = load_model(spec.model, device=device)
    keep_date(spec.model, loaded, work=Path(work))
    backbone = StepRunner(loaded.model, None).backbone
    prompts = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=corpus.num_prompts())
    # all, so that no worker starts where another refuses
    check_answers_fit(backbone, prompts, max_new_tokens=corpus.max_new_tokens)
    prompts = prompts[index::num_workers]
    own_goal = -(-corpus.goal // num_workers)
    share = corpus.model_copy(
        update={"num_tokens" if corpus.num_tokens is not None else "num_samples": own_goal}
    )
    store = corpus_store(Path(work), backbone_sha256=loaded.sha256, writer=str(index))
    check_same_behaviour(Path(work), loaded.behaviour)
    # what heads alone learn from, unless the backbone runs with them; with it they learn from text
    keep_states = isinstance(spec, HeadsRecipe) and spec.recipe.features != "none"
    console = SafeConsole(stderr=True, quiet=index > 0)
    rate_file = store.folder / f"rate-{index}.txt"
    make_corpus(
        backbone,
        prompts,
        store=store,
        spec=share,
        eos_ids=loaded.eos_ids,
        console=console,
        rate_file=rate_file,
        keep_states=keep_states,
    )
    answer_further_turns(
        loaded, backbone, prompts, store=store, spec=corpus, console=console, keep_states=keep_states
    )


def answer_further_turns(
    loaded: LoadedModel,
    backbone: Backbone,
    prompts: Sequence[CorpusPrompt],
    *,
    store: CorpusStore,
    spec: CorpusSpec,
    console: Console,
    keep_states: bool,
) -> None:
    """Ask what is left to be asked in the conversations that these prompts began.

    One turn of all of them at a time, until none goes on.
    """
    own = {prompt.key for prompt in prompts}

    def fits(prompt_tokens: int) -> bool:
        return answer_fits(backbone, prompt_tokens=prompt_tokens, max_new_tokens=spec.max_new_tokens)

    def next_prompts() -> tuple[CorpusPrompt, ...]:
        answers = [
            sample
            for sample in store.samples(with_states=False)
            if conversation_and_turn(sample.key)[0] in own
        ]
        return next_turn_prompts(loaded.tokenizer, answers, spec=spec, fits=fits)

    while going_on := next_prompts():
        console.print(f"corpus: {len(going_on)} conversations go on")
        generate_corpus(
            backbone,
            going_on,
            store=store,
            num_rows=rows_together(backbone, going_on, spec=spec, keep_states=keep_states),
            max_new_tokens=spec.max_new_tokens,
            eos_ids=loaded.eos_ids,
            keep_states=keep_states,
        )


def announce(
    spec: AnyRecipe, *, work: Path, from_scratch: bool, console: Console, allow_hub: bool = False
) -> None:
    """Say how much text is missing and how long making it should take; refuse to start hours of work unasked.

    Raises: UserError where the corpus is incomplete and `from_scratch` was not given.
    """
    if spec.corpus is None:
        return
    corpus = spec.corpus
    held = amount(corpus, CorpusStore(work / "corpus").samples(with_states=False))
    missing = (
        0 if spec.packed_corpus is not None and not held and not from_scratch else max(0, corpus.goal - held)
    )
    rates = _rates(work / "corpus")
    tokens = missing if corpus.num_tokens is not None else missing * corpus.max_new_tokens
    if missing and rates:
        console.print(
            f"corpus: {held} of {corpus.goal} {corpus.unit}; about {tokens / sum(rates) / 3600:.1f} hours "
            f"at {sum(rates):.0f} tokens/s"
        )
    elif missing:
        device = best_device()
        throughput = measure_device_limits(
            device, torch.float32, clock=device_clock(device)
        ).matmul_flop_per_s
        model = load_model(spec.model, device=torch.device("cpu"), allow_hub=allow_hub).model
        least = tokens * 2 * sum(parameter.numel() for parameter in model.parameters()) / throughput / 3600
        console.print(
            f"corpus: {held} of {corpus.goal} {corpus.unit}; {least:.1f} hours at full matrix throughput, "
            "expect 2 to 4 times that"
        )
    if missing and not from_scratch:
        raise UserError(
            found=f"a corpus that lacks {missing} of {corpus.goal} {corpus.unit}",
            need="all of them",
            where="the work folder",
            do="pass --from-scratch, which makes the rest first",
        )


@dataclass(frozen=True)
class DistilledCorpus:
    """A corpus on disk and what it holds."""

    file: Path
    num_answers: int
    num_second_turns: int
    num_tokens: int


def distill_corpus(
    spec: AnyRecipe, *, work: Path, target: Path, console: Console, allow_hub: bool = False
) -> DistilledCorpus:
    """Answer a recipe's prompts until its goal is met, and pack the answers.

    Shards in `work` are kept and added to.
    Raises: UserError for a recipe without a [corpus], prompts that overlap with a benchmark's, a prompt that
    leaves no room for its answer, or a work folder of another model.
    """
    needed_corpus(spec)
    check_overlap(spec, allow_hub=allow_hub)
    fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    store = CorpusStore(work / "corpus")
    samples = list(store.samples(with_states=False))
    target.mkdir(parents=True, exist_ok=True)
    file = target / "corpus.safetensors"
    pack_corpus(samples, file, backbone_sha256=corpus_backbone(store))
    return DistilledCorpus(
        file=file,
        num_answers=len(samples),
        num_second_turns=sum(conversation_and_turn(sample.key)[1] == 2 for sample in samples),
        num_tokens=sum(len(sample.token_ids) for sample in samples),
    )
