"""`medusa-repro train` for heads alone: corpus, features, heads, held-out figures, calibration trace; each part resumes by itself."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.assets.catalogue import training_prompts
from harness.assets.prompts import overlap_report
from harness.conversations import conversation_and_turn
from harness.corpus import amount, corpus_prompts, fingerprint, make_corpus, next_questions, next_turn_prompts, questions
from harness.device.clock import device_clock
from harness.device.engine import LoadedModel, best_device, load_engine, load_model, model_sha256, new_heads
from harness.device.limits import measure_device_limits
from harness.device.machine import git_state
from harness.device.prompts import NUM_WARMUP, WARMUP_SEED, benchmark_prompts
from harness.device.trace import KeptText, record_trace
from harness.errors import UserError
from harness.files import canonical_sha256, write_bytes
from harness.paths import code_folder, resolve_path
from harness.records.trace import Trace
from harness.specs.recipe import AnySuite, CorpusSpec, TrainingSuite, needed_corpus, training_suite_of
from harness.specs.suite import SuiteSpec
from medusa_impl.backbone import Backbone
from medusa_impl.checkpoint import HeadsProvenance, save_heads
from medusa_impl.distill import CorpusPrompt, CorpusStore, answer_fits, check_answers_fit, generate_corpus, pack_corpus, unpack_corpus
from medusa_impl.features import add_states, load_features
from medusa_impl.runner import StepRunner
from medusa_impl.training import TrainingFigures, TrainingStep, train_medusa1

_BACKBONE_FILE = "backbone.sha256"
_DONE_FILE = "done.sha256"


@dataclass(frozen=True)
class TrainingFiles:
    """What training leaves behind."""

    heads: Path
    calibration: Path
    corpus: Path


def train_suite(
    spec: TrainingSuite, *, work: Path, target: Path, console: Console, from_scratch: bool = False, allow_hub: bool = False
) -> TrainingFiles:
    """Make or unpack the corpus, train the heads, and write heads, packed corpus and calibration trace; what is already there is kept.

    Raises: UserError where a training prompt overlaps with a benchmark prompt, or the data cannot train the heads.
    """
    loaded = load_model(spec.model, device=best_device(), allow_hub=allow_hub)
    check_overlap(spec, allow_hub=allow_hub)
    files = TrainingFiles(target / "medusa1.safetensors", target / "calibration.npz", target / "corpus.safetensors")
    store = CorpusStore(work / "corpus")
    if not from_scratch and spec.packed_corpus is not None and not store.shard_files():
        store = unpacked_corpus(spec, loaded, work=work, console=console)
    else:
        fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    features = load_features(store, num_heads=spec.recipe.num_heads)
    console.print(f"{features.num_tokens} answer tokens of {len(features.keys)} prompts")
    lm_head: Any = loaded.model.get_output_embeddings()
    heads = new_heads(loaded, spec.recipe)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None)

        def show(step: TrainingStep) -> None:
            progress.update(
                task, total=step.num_steps, completed=step.step, description=f"training ({step.vocabulary}) loss {step.loss:.3f}"
            )

        figures = train_medusa1(
            features, heads, lm_head.weight.detach().float().cpu(), recipe=spec.recipe, checkpoint_dir=work / "training", on_step=show
        )
    print_figures(console, figures)
    commit, dirty = git_state(code_folder())
    provenance = HeadsProvenance(
        backbone_name=loaded.name,
        backbone_sha256=loaded.sha256,
        recipe=spec.recipe,
        training=figures,
        corpus_sha256=features.fingerprint(),
        commit=commit,
        dirty=dirty,
    )
    save_heads(files.heads, heads, provenance=provenance)
    pack_corpus(store.samples(with_states=False), files.corpus, backbone_sha256=loaded.sha256)
    calibrate(spec, loaded, heads_file=files.heads, calibration_file=files.calibration, work=work, console=console)
    return files


def unpacked_corpus(spec: TrainingSuite, loaded: LoadedModel, *, work: Path, console: Console) -> CorpusStore:
    """Return the shipped corpus with the states of this backbone, one forward pass an answer; goes on where it stopped."""
    assert spec.packed_corpus is not None
    samples = list(unpack_corpus(resolve_path(spec.packed_corpus, beside=None), backbone_sha256=loaded.sha256))
    runner = StepRunner(loaded.model, None)
    columns = (TextColumn("states"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("states", total=len(samples))
        return add_states(
            runner.backbone,
            samples,
            cache_folder=work,
            backbone_sha256=loaded.sha256,
            on_sample=lambda sample: progress.advance(task),
        )


def check_overlap(spec: AnySuite, *, allow_hub: bool) -> None:
    """Refuse training, calibration and warm-up prompts that share eight words in a row with MT-Bench or HumanEval.

    Conversations of the user's own are not looked into, and a tiny model's random tokens are no words.
    """
    if spec.model.tiny is not None:
        return
    probe = {"schema_version": 1, "name": "overlap", "description": "-", "max_new_tokens": 2, "model": spec.model, "arms": ()}
    benchmark: list[str] = []
    for source in ("mt_bench", "human_eval"):
        suite = SuiteSpec.model_validate({**probe, "heads": {"train_steps": 1}, "prompts": {"source": source}})
        benchmark += [turn for prompt in benchmark_prompts(suite, prompts_file=None, allow_hub=allow_hub) for turn in prompt.turns]
    corpus = spec.corpus
    training = list(questions(corpus)) if corpus is not None else []
    for seed, count in ((spec.calibration.seed, spec.calibration.num_prompts), (WARMUP_SEED, NUM_WARMUP)):
        training += [prompt.text for prompt in training_prompts(num_prompts=count, seed=seed, split="held_out")]
    report = overlap_report(training, benchmark)
    if not report.clean:
        first = report.overlaps[0]
        raise UserError(
            found=f"{len(report.overlaps)} overlaps, the first {first.ngram!r}",
            need="no eight words in common with a benchmark prompt",
            where="the training prompts",
        )


def corpus_store(work: Path, *, backbone_sha256: str, writer: str = "0") -> CorpusStore:
    """Return the corpus in a work folder; one that is still empty becomes this model's.

    Raises: UserError for the corpus of another model: its token ids may be other words, and its states another model's.
    """
    store = CorpusStore(work / "corpus", writer=writer)
    theirs = corpus_backbone(store)
    if theirs is None and not store.shard_files():
        write_bytes(store.folder / _BACKBONE_FILE, backbone_sha256.encode())
    if theirs not in (None, backbone_sha256):
        raise UserError(
            found=f"the answers of a model with tensors {theirs[:16]}",
            need=f"those of the model with tensors {backbone_sha256[:16]}",
            where="the work folder",
            do="give another --work, or empty it to start afresh",
        )
    return store


def fill_corpus(spec: AnySuite, *, work: Path, console: Console, allow_hub: bool = False) -> None:
    """Bring the corpus to its size with a process a GPU, or a single-threaded one a core: on a CPU they need no barriers between them.

    Raises: UserError for a work folder with another model's answers, or for what a worker refuses or fails at.
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

    done = store.folder / _DONE_FILE  # prompts may run out and conversations end early: then the workers have no more to do
    if done.exists() and done.read_text() == state(sample.key for sample in samples):
        return
    console.print(f"corpus: {held} of {corpus.goal} {corpus.unit}; {num_workers} workers")
    context = multiprocessing.get_context("spawn")
    refusals: SimpleQueue[dict[str, str | None]] = context.SimpleQueue()
    workers = [
        context.Process(target=_corpus_process, args=(refusals, spec.model_dump(mode="json"), str(work), index, num_workers, num_gpus))
        for index in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if not refusals.empty():
        refusal = refusals.get()
        raise UserError(found=str(refusal["found"]), need=str(refusal["need"]), where=refusal["where"], do=refusal["do"])
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise UserError(
            found=f"corpus workers that ended with {failed}", need="all to finish", where="corpus", do="run the command again: it resumes"
        )
    write_bytes(done, state(store.finished_keys()).encode())


def corpus_backbone(store: CorpusStore) -> str | None:
    """Return the hash of the model that answers into a corpus; None for one from before it was noted."""
    path = store.folder / _BACKBONE_FILE
    return path.read_text() if path.exists() else None


def worker_device(index: int, *, num_gpus: int) -> torch.device:
    """Return where a corpus worker computes: on a GPU of its own as long as there are enough of them, without any on the CPU."""
    return torch.device("cuda", index % num_gpus) if num_gpus else torch.device("cpu")


def _corpus_process(
    refusals: SimpleQueue[dict[str, str | None]], spec_data: dict[str, object], work: str, index: int, num_workers: int, num_gpus: int
) -> None:
    """Be a corpus worker in a process of its own: what the user can mend is told to the one that waits."""
    if num_workers > 1:
        torch.set_num_threads(1)
    try:
        corpus_worker(spec_data, work, index, num_workers, num_gpus=num_gpus)
    except UserError as error:
        refusals.put({"found": error.found, "need": error.need, "where": error.where, "do": error.do})


def corpus_worker(spec_data: dict[str, object], work: str, index: int, num_workers: int, *, num_gpus: int) -> None:
    """Answer every `num_workers`-th prompt into a shard series of its own until the store holds enough, then the turns behind, one by one.

    Raises: UserError before anything is generated, where a prompt of any worker's leaves no room for its answer.
    """
    spec = training_suite_of(spec_data)
    corpus = needed_corpus(spec)
    device = worker_device(index, num_gpus=num_gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loaded = load_model(spec.model, device=device)
    backbone = StepRunner(loaded.model, None).backbone
    prompts = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=corpus.num_prompts())
    check_answers_fit(backbone, prompts, max_new_tokens=corpus.max_new_tokens)  # all, so that no worker starts where another refuses
    prompts = prompts[index::num_workers]
    own_goal = -(-corpus.goal // num_workers)
    share = corpus.model_copy(update={"num_tokens" if corpus.num_tokens is not None else "num_samples": own_goal})
    store = corpus_store(Path(work), backbone_sha256=loaded.sha256, writer=str(index))
    keep_states = isinstance(spec, TrainingSuite)  # what heads alone learn from; with the backbone they learn from text
    console = Console(stderr=True, quiet=index > 0)
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
    answer_further_turns(loaded, backbone, prompts, store=store, spec=corpus, console=console, keep_states=keep_states)


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
    """Ask what is left to be asked in the conversations that these prompts began, a turn of all of them at a time, until none goes on."""
    own = {prompt.key for prompt in prompts}

    def fits(prompt_tokens: int) -> bool:
        return answer_fits(backbone, prompt_tokens=prompt_tokens, max_new_tokens=spec.max_new_tokens)

    def next_prompts() -> tuple[CorpusPrompt, ...]:
        answers = [sample for sample in store.samples(with_states=False) if conversation_and_turn(sample.key)[0] in own]
        return next_turn_prompts(loaded.tokenizer, answers, spec=spec, fits=fits)

    while going_on := next_prompts():
        console.print(f"corpus: {len(going_on)} conversations go on")
        generate_corpus(
            backbone,
            going_on,
            store=store,
            num_rows=spec.num_rows,
            max_new_tokens=spec.max_new_tokens,
            eos_ids=loaded.eos_ids,
            keep_states=keep_states,
        )


def calibrate(spec: AnySuite, loaded: LoadedModel, *, heads_file: Path, calibration_file: Path, work: Path, console: Console) -> Trace:
    """Answer held-out prompts greedily, once, and record how the heads rank the answers."""
    wanted = spec.calibration
    corpus = CorpusSpec(
        num_tokens=wanted.num_prompts * wanted.max_new_tokens,
        max_new_tokens=wanted.max_new_tokens,
        sampled_share=0.0,
        num_rows=32,
        seed=wanted.seed,
        split="held_out",
    )
    suite = SuiteSpec.model_validate(
        {
            "schema_version": 1,
            "name": "calibration",
            "description": "-",
            "max_new_tokens": wanted.max_new_tokens,
            "model": spec.model,
            "heads": {"path": str(heads_file)},
            "prompts": {"source": "mt_bench"},
            "arms": (),
        }
    )
    engine = load_engine(suite, loaded, beside=None)
    prompts = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=wanted.num_prompts)
    store = CorpusStore(work / f"calibration-{loaded.sha256[:16]}")  # by model: a backbone that was trained anew answers anew
    make_corpus(engine.runner.backbone, prompts, store=store, spec=corpus, eos_ids=loaded.eos_ids, console=console, keep_states=False)
    samples = sorted(store.samples(with_states=False), key=lambda sample: sample.key)
    texts = [KeptText(sample.key, sample.category, sample.prompt_ids, sample.token_ids, sample.ended_by) for sample in samples]
    trace = record_trace(
        engine, texts, max_new_tokens=wanted.max_new_tokens, extra={"prompts": f"held-out training prompts, seed {wanted.seed}"}
    )
    trace.save(calibration_file)
    console.print(f"calibration trace: {trace.num_positions} positions of {len(texts)} prompts")
    return trace


def print_figures(console: Console, figures: TrainingFigures) -> None:
    """Print held-out loss and top-1 per head."""
    if figures.held_out is None:
        return
    for head, (loss, accuracy) in enumerate(zip(figures.held_out.losses(), figures.held_out.top_accuracies(), strict=True), start=1):
        first, tenth = (100 * (accuracy[rank] or 0) for rank in (0, -1))
        console.print(f"head {head}: held-out loss {loss or 0:.3f} nats, top-1 {first:.1f} %, top-10 {tenth:.1f} %")


def announce(spec: AnySuite, *, work: Path, from_scratch: bool, console: Console, allow_hub: bool = False) -> None:
    """Say how much text is missing and how long making it should take; refuse to start hours of work unasked.

    Raises: UserError where the corpus is incomplete and `from_scratch` was not given.
    """
    if spec.corpus is None:
        return
    corpus = spec.corpus
    held = amount(corpus, CorpusStore(work / "corpus").samples(with_states=False))
    missing = 0 if spec.packed_corpus is not None and not held and not from_scratch else max(0, corpus.goal - held)
    rates = [float(path.read_text()) for path in sorted((work / "corpus").glob("rate-*.txt"))]
    tokens = missing if corpus.num_tokens is not None else missing * corpus.max_new_tokens
    if missing and rates:
        console.print(
            f"corpus: {held} of {corpus.goal} {corpus.unit}; about {tokens / sum(rates) / 3600:.1f} hours at {sum(rates):.0f} tokens/s"
        )
    elif missing:
        device = best_device()
        throughput = measure_device_limits(device, torch.float32, clock=device_clock(device)).matmul_flop_per_s
        model = load_model(spec.model, device=torch.device("cpu"), allow_hub=allow_hub).model
        least = tokens * 2 * sum(parameter.numel() for parameter in model.parameters()) / throughput / 3600
        console.print(
            f"corpus: {held} of {corpus.goal} {corpus.unit}; {least:.1f} hours at full matrix throughput, expect 2 to 4 times that"
        )
    if missing and not from_scratch:
        raise UserError(
            found=f"{missing} {corpus.unit} of corpus missing",
            need="the whole corpus",
            where="the work folder",
            do="pass --from-scratch to make it",
        )
