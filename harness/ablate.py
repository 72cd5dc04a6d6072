"""`medusa-repro ablate`: train every arm at one token budget, then measure what became of its backbone and its heads.

Each arm is trained in a process of its own, so that its memory and its random numbers are its own; it is measured here, as its files load
from disk. One arm after another: a run that was cut off goes on with the arm, and within it with the last checkpoint.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from harness.ablation import AblationRecord, ArmResult
from harness.ablation_specs import START_ARM, AblationSpec
from harness.ablation_store import AblationStore
from harness.assets import cache_dir, fetch_asset, load_asset_specs
from harness.config import SearchedTree
from harness.conversations import conversation_sequence
from harness.corpus import CorpusSpec, corpus_prompts, make_corpus
from harness.engine import Engine, LoadedModel, best_device, describe_engine, heads_for, load_model
from harness.environment import device_info, machine_slug
from harness.errors import ExitCode, UserError
from harness.joint_run import JointText, check_runnable, corpus_text, train_joint
from harness.locks import folder_held
from harness.paths import resolve_path
from harness.prompts import load_mt_bench
from harness.quality.backbone_change import MeasuredText, Reading, greedy_text, head_text, read_text, text_change
from harness.record_trace import KeptText, record_trace
from harness.records import ArmTree, Environment
from harness.trace import Trace
from harness.training_specs import JointSuite, load_training_suite
from harness.trees import grow
from medusa_impl.checkpoint import backbone_sha256
from medusa_impl.distill import CorpusPrompt, CorpusSample, CorpusStore, unpack_corpus
from medusa_impl.medusa2 import Medusa2Recipe
from medusa_impl.medusa2_trainer import STEP_LOG, read_step_log
from medusa_impl.runner import StepRunner
from medusa_impl.sequences import TrainingSequence
from medusa_impl.tree import DraftTree

_RANDOM_PROMPT_TOKENS = 12
_TEXT_ROWS = 32


@dataclass(frozen=True)
class AblateOptions:
    """What the command line may say about an ablation, besides the suite; `own_process` trains each arm in a process of its own."""

    results: Path
    work: Path | None = None
    resume: Path | None = None
    allow_hub: bool = False
    command: str = ""
    own_process: bool = True


@dataclass(frozen=True)
class ArmJob:
    """All that training one arm takes, fit to be sent to another process."""

    spec: AblationSpec
    suite_file: Path | None
    arm: str
    seed: int
    work: Path
    allow_hub: bool

    @property
    def target(self) -> Path:
        """Where the arm's heads, adapter and step log go."""
        return self.work / "out"


def run_ablation(spec: AblationSpec, *, suite_file: Path | None, options: AblateOptions, console: Console) -> Path:
    """Run an ablation, or resume it, and return the folder of its sealed record.

    Raises: UserError for input that cannot be run, an arm whose training fails, or a resume of another run.
    """
    started = time.monotonic()
    if options.resume is not None:
        AblationRecord(options.resume)
    beside = suite_file.parent if suite_file is not None else None
    recipes = {arm.name: arm_recipe(spec, arm.name, beside=beside) for arm in spec.arms}
    for recipe in recipes.values():
        check_runnable(recipe)
    console.print(f"[bold]{spec.name}[/bold]: {len(spec.arms)} arms, {len(spec.seeds)} seeds, {spec.answer_tokens} answer tokens each")
    loaded = load_model(spec.model, device=best_device(), allow_hub=options.allow_hub, beside=beside)
    engine = _engine(loaded, resolve_path(spec.start_heads, beside=beside))
    calibration = _calibration(spec, engine, beside=beside)
    prompts = held_out_prompts(spec, loaded, left_out={prompt.key for prompt in calibration.prompts} if calibration else set())
    references = reference_texts(spec, loaded, allow_hub=options.allow_hub)
    environment = _describe(engine, spec=spec, prompts=prompts, references=references, command=options.command)
    store = AblationStore.open(options.results, spec=spec, environment=environment, resume=options.resume)
    work = (options.work or cache_dir() / "ablation") / spec.name / store.folder.name
    with folder_held(store.folder):
        store.write_tree(fixed_tree(spec, calibration, num_heads=engine.heads.num_heads))
        done = store.prepare()
        bench = _Bench(spec, engine, prompts, references, work, console)
        for arm, seed in spec.plan():
            if (arm, seed) in done:
                continue
            if seed is None:
                result, trace = bench.measure_start()
                store.add(result, trace=trace, step_log=None)
                continue
            job = ArmJob(spec, suite_file, arm, seed, work / f"{arm}-{seed}", options.allow_hub)
            console.print(f"[bold]{arm}[/bold], seed {seed}")
            _train(job, own_process=options.own_process)
            result, trace = bench.measure(job, recipes[arm])
            store.add(result, trace=trace, step_log=job.target / STEP_LOG)
        store.seal(elapsed_s=time.monotonic() - started)
    return store.folder


def train_arm(job: ArmJob) -> None:
    """Train one arm; its files are under the job's target."""
    beside = job.suite_file.parent if job.suite_file is not None else None
    spec = job.spec
    loaded = load_model(spec.model, device=best_device(), allow_hub=job.allow_hub, beside=beside)
    recipe = once_over(arm_recipe(spec, job.arm, beside=beside), seed=job.seed)
    samples = list(unpack_corpus(resolve_path(spec.packed_corpus, beside=beside)))
    text = corpus_text(samples, max_length=recipe.max_length)
    train = budgeted(text.train, answer_tokens=spec.answer_tokens, seed=job.seed)
    start = None if spec.arm(job.arm).fresh_heads else resolve_path(spec.start_heads, beside=beside)
    train_joint(
        loaded,
        recipe,
        text=JointText(train=train, held_out=()),  # the bench measures every arm on the same held-out texts
        start_heads=start,
        work=job.work / "training",
        target=job.target,
        console=Console(stderr=True, quiet=multiprocessing.parent_process() is None),
    )


def once_over(recipe: Medusa2Recipe, *, seed: int) -> Medusa2Recipe:
    """Return a recipe that sees its text once, under a seed."""
    return recipe.model_copy(update={"num_epochs": 1.0, "num_steps": None, "seed": seed})


def budgeted(sequences: Sequence[TrainingSequence], *, answer_tokens: int, seed: int) -> tuple[TrainingSequence, ...]:
    """Return sequences drawn by a seed until their answers hold the budget: the same for every arm, each seen once.

    Raises: UserError for a corpus that holds less.
    """
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    taken, held = [], 0
    for index in order:
        if held >= answer_tokens:
            break
        taken.append(sequences[index])
        held += sequences[index].num_targets
    if held < answer_tokens:
        raise UserError(
            found=f"{held} answer tokens", need=f"{answer_tokens}, the suite's budget", where="the corpus", do="lower answer_tokens"
        )
    return tuple(taken)


def arm_recipe(spec: AblationSpec, arm: str, *, beside: Path | None) -> Medusa2Recipe:
    """Return an arm's recipe from its file, a shipped recipe's name or a path.

    Raises: UserError for a recipe of heads alone: a frozen backbone in a joint recipe sees the same batches as the other arms.
    """
    name = spec.arm(arm).recipe
    shipped = Path(str(resources.files("suites"))) / "recipes" / f"{name}.toml"
    path = shipped if shipped.is_file() else resolve_path(name, beside=beside)
    found = load_training_suite(path)
    if not isinstance(found, JointSuite):
        raise UserError(found=f"the recipe {found.name!r} of heads alone", need="kind = 'joint'", where=path.name)
    return found.recipe


def held_out_prompts(spec: AblationSpec, loaded: LoadedModel, *, left_out: set[str]) -> tuple[CorpusPrompt, ...]:
    """Return the prompts that are answered to measure on; those that the tree was grown on are left out."""
    wanted = spec.held_out
    if wanted.source == "random":
        vocab_size = int(loaded.model.config.vocab_size)
        source = random.Random(wanted.seed)
        rows = [tuple(source.randrange(vocab_size) for _ in range(_RANDOM_PROMPT_TOKENS)) for _ in range(wanted.num_prompts)]
        return tuple(CorpusPrompt(f"random-{index}", f"random-{index % 2}", ids, 0.0, 0) for index, ids in enumerate(rows))
    if loaded.tokenizer is None:
        raise UserError(found="prompts of text for a tiny random model", need="held_out.source = 'random'", where=f"suite {spec.name!r}")
    corpus = _greedy_corpus(spec)
    drawn = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=wanted.num_prompts + len(left_out))
    return tuple(prompt for prompt in drawn if prompt.key not in left_out)[: wanted.num_prompts]


def reference_texts(spec: AblationSpec, loaded: LoadedModel, *, allow_hub: bool) -> tuple[MeasuredText, ...]:
    """Return MT-Bench's conversations with their reference answers, both turns as one text; none where the suite wants none."""
    if spec.references is None:
        return ()
    paths = fetch_asset(load_asset_specs()["mt-bench"], cache_dir=cache_dir(), allow_hub=allow_hub).paths
    prompts = load_mt_bench(paths["questions"], reference_file=paths["references"])
    texts = []
    for prompt in [prompt for prompt in prompts if prompt.reference][: spec.references.limit]:
        turns = list(zip(prompt.turns, prompt.reference or (), strict=False))
        sequence = conversation_sequence(loaded.tokenizer, turns, max_length=spec.references.max_length)
        if sequence is not None:
            texts.append(MeasuredText(prompt.key, prompt.category, sequence))
    return tuple(texts)


def fixed_tree(spec: AblationSpec, calibration: Trace | None, *, num_heads: int) -> ArmTree:
    """Return the one tree that all arms are compared at."""
    if isinstance(spec.tree, SearchedTree):
        assert calibration is not None
        tree = grow(calibration, num_nodes=spec.tree.num_nodes, values=spec.tree.values, num_heads=num_heads).tree
        return ArmTree(paths=tree.paths, origin=f"{spec.tree.values} growth on the calibration trace of the first heads")
    return ArmTree(paths=DraftTree.chain(spec.tree.depth).paths, origin=f"chain of {spec.tree.depth}")


class _Bench:
    """What every arm is measured on, made once: prompts, the original's greedy answers, texts of another hand."""

    def __init__(
        self,
        spec: AblationSpec,
        engine: Engine,
        prompts: Sequence[CorpusPrompt],
        references: tuple[MeasuredText, ...],
        work: Path,
        console: Console,
    ) -> None:
        self.spec, self.engine, self.prompts, self.references = spec, engine, prompts, references
        self.work, self.console = work, console
        self._readings: dict[str, Reading] = {}
        self.answers = self._answer(engine, work / "original")
        self.held_out = tuple(
            MeasuredText(
                sample.key,
                sample.category,
                TrainingSequence(
                    token_ids=(*sample.prompt_ids, *sample.token_ids),
                    answers=((len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.token_ids)),),
                ),
            )
            for sample in self.answers
        )

    def measure_start(self) -> tuple[ArmResult, Trace]:
        """Return the untouched model under the heads that every arm starts from."""
        return self._result(self.engine, self.answers, began=time.monotonic(), job=None, recipe=None)

    def measure(self, job: ArmJob, recipe: Medusa2Recipe) -> tuple[ArmResult, Trace]:
        """Return what an arm's files are, loaded from disk as a user would; a frozen backbone is the original itself."""
        began = time.monotonic()
        adapter, beside = job.target / "adapter", job.suite_file.parent if job.suite_file is not None else None
        if recipe.backbone == "frozen":
            engine, answers = _engine(self.engine.loaded, job.target / "heads.safetensors", mode="eager"), self.answers
        else:
            model = self.spec.model.model_copy(update={"adapter": str(adapter)})
            tuned = load_model(model, device=best_device(), allow_hub=job.allow_hub, beside=beside)
            engine = _engine(tuned, job.target / "heads.safetensors")
            answers = self._answer(engine, job.work / "answers")
        found = self._result(engine, answers, began=began, job=job, recipe=once_over(recipe, seed=job.seed))
        del engine
        gc.collect()
        return found

    def _reading(self, text: MeasuredText) -> Reading:
        """Return a text's states under the original model, kept from the first time on: every arm is compared with them."""
        if text.key not in self._readings:
            self._readings[text.key] = read_text(self.engine.runner.backbone, text)
        return self._readings[text.key]

    def _answer(self, engine: Engine, folder: Path) -> tuple[CorpusSample, ...]:
        """Return the engine's greedy answers to all prompts, in their order; what is on disk is not generated again."""
        store = CorpusStore(folder)
        spec, eos_ids = _greedy_corpus(self.spec), engine.loaded.eos_ids
        make_corpus(engine.runner.backbone, self.prompts, store=store, spec=spec, eos_ids=eos_ids, console=self.console)
        by_key = {sample.key: sample for sample in store.samples(with_states=False)}
        return tuple(by_key[prompt.key] for prompt in self.prompts)

    def _result(
        self,
        engine: Engine,
        answers: Sequence[CorpusSample],
        *,
        began: float,
        job: ArmJob | None,
        recipe: Medusa2Recipe | None,
    ) -> tuple[ArmResult, Trace]:
        arm = job.arm if job is not None else START_ARM
        backbone, is_original = engine.runner.backbone, engine.loaded.model is self.engine.loaded.model
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("measuring", total=len(self.held_out) + len(self.references) + len(answers))

            def advance() -> None:
                progress.advance(task)

            held_out, references, heads = [], [], []
            for text in (*self.held_out, *self.references):
                before = self._reading(text)
                after = before if is_original else read_text(backbone, text)
                change = text_change(text, original=before, tuned=after)
                if text in self.references:
                    references.append(change)
                else:
                    held_out.append(change)
                    heads.append(head_text(text, engine.heads, after))
                advance()
            texts = [KeptText(one.key, one.category, one.prompt_ids, one.token_ids, one.ended_by) for one in answers]
            extra = {"prompts": f"held-out prompts, {self.spec.held_out.source}, seed {self.spec.held_out.seed}", "arm": arm}
            trace = record_trace(engine, texts, max_new_tokens=self.spec.held_out.max_new_tokens, extra=extra, on_text=advance)
        greedy = tuple(
            greedy_text(ours.key, ours.token_ids, original=theirs.token_ids) for ours, theirs in zip(answers, self.answers, strict=True)
        )
        steps = read_step_log(job.target / STEP_LOG) if job is not None else ()
        result = ArmResult(
            arm=arm,
            seed=job.seed if job is not None else None,
            recipe_name=self.spec.arm(arm).recipe if job is not None else None,
            recipe=recipe.model_dump(mode="json") if recipe is not None else None,
            num_steps=len(steps),
            num_sequences=_num_sequences(engine) if job is not None else 0,
            num_answer_tokens=sum(step.num_positions for step in steps),
            train_s=sum(step.num_positions / step.positions_per_s for step in steps if step.positions_per_s),
            evaluate_s=time.monotonic() - began,
            memory_bytes=max((step.memory_bytes for step in steps), default=None),
            heads_sha256=engine.heads_sha256 or "",
            adapter_sha256=engine.loaded.adapter_sha256,
            held_out=tuple(held_out),
            references=tuple(references),
            greedy=greedy,
            heads=tuple(heads),
        )
        return result, trace


def print_ablation_plan(spec: AblationSpec, *, results: Path, console: Console) -> float:
    """Print what is run and how long each arm should take, and return the minutes in all.

    The rates are those of this machine's newest record of an ablation of the same model, else the suite's own word for training.
    """
    train_s, evaluate_s, origin = _known_rates(spec, results=results)
    table = Table("arm", "recipe", "seeds", "answer tokens", "minutes a seed")
    minutes = (train_s * spec.answer_tokens + evaluate_s) / 60
    for arm in spec.arms:
        table.add_row(arm.name, arm.recipe, str(len(spec.seeds)), str(spec.answer_tokens), f"{minutes:.0f}")
    console.print(table)
    total = minutes * len(spec.arms) * len(spec.seeds)
    console.print(f"about {total:.0f} minutes, from {origin}; arms are kept as they finish, and a run resumes", highlight=False)
    return total


def _known_rates(spec: AblationSpec, *, results: Path) -> tuple[float, float, str]:
    """Return seconds a trained token, seconds of measuring an arm, and where they come from."""
    slug = machine_slug(device_info(best_device()))
    texts = spec.held_out.num_prompts
    for path in sorted(results.glob(f"*/{slug}/*/arms.jsonl"), key=lambda path: path.parent.name, reverse=True):
        record = AblationRecord(path.parent)
        try:
            trained = [result for result in record.results if result.num_answer_tokens]
            if record.spec.model != spec.model or not trained:
                continue
        except UserError:
            continue
        tokens = sum(result.num_answer_tokens for result in trained)
        scale = texts * spec.held_out.max_new_tokens / (record.spec.held_out.num_prompts * record.spec.held_out.max_new_tokens)
        measured = sum(result.evaluate_s for result in trained) / len(trained) * scale
        return sum(result.train_s for result in trained) / tokens, measured, f"record {path.parent.name}"
    rate = 1 / spec.expected_tokens_per_s
    return rate, rate * texts * spec.held_out.max_new_tokens, "the suite's own expectation"


def _train(job: ArmJob, *, own_process: bool) -> None:
    """Train an arm; what its work folder holds already is not done again."""
    if not own_process:
        train_arm(job)
        return
    process = multiprocessing.get_context("spawn").Process(target=_train_apart, args=(job,))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(
            found=f"the training of {job.arm}, seed {job.seed}, ended with {process.exitcode}",
            need="all to finish",
            where=f"suite {job.spec.name!r}",
            do="read the message above; the same command goes on from the last checkpoint",
        )


def _train_apart(job: ArmJob) -> None:
    """Train an arm as a process of its own does: a mistake of the user is told in one line."""
    try:
        train_arm(job)
    except UserError as error:
        print(f"{job.arm}, seed {job.seed}: {error}", file=sys.stderr)
        sys.exit(int(ExitCode.USER_ERROR))


def _engine(loaded: LoadedModel, heads_file: Path, *, mode: Literal["auto", "eager"] = "auto") -> Engine:
    heads, provenance = heads_for(loaded, heads_file)
    digest = backbone_sha256(heads)
    runner = StepRunner(loaded.model, heads, mode=mode)
    return Engine(loaded=loaded, runner=runner, heads_sha256=digest, heads_provenance=provenance.model_dump(mode="json"))


def _num_sequences(engine: Engine) -> int:
    training = engine.heads_provenance.get("training")
    return int(training["num_sequences"]) if isinstance(training, dict) else 0


def _calibration(spec: AblationSpec, engine: Engine, *, beside: Path | None) -> Trace | None:
    if spec.calibration_trace is None:
        return None
    trace = Trace.load(resolve_path(spec.calibration_trace, beside=beside))
    if (trace.provenance.model_hash, trace.provenance.heads_hash) != (engine.loaded.sha256, engine.heads_sha256):
        raise UserError(
            found="a calibration trace of another model or other heads",
            need="one of the heads that the arms start from",
            where="calibration_trace",
            do="record it again with medusa-repro trace",
        )
    return trace


def _greedy_corpus(spec: AblationSpec) -> CorpusSpec:
    wanted = spec.held_out
    return CorpusSpec(
        num_samples=wanted.num_prompts,
        max_new_tokens=wanted.max_new_tokens,
        sampled_share=0.0,
        num_rows=min(_TEXT_ROWS, wanted.num_prompts),
        seed=wanted.seed,
        split="held_out",
    )


def _describe(
    engine: Engine, *, spec: AblationSpec, prompts: Sequence[CorpusPrompt], references: Sequence[MeasuredText], command: str
) -> Environment:
    measured = [*((prompt.key, prompt.prompt_ids) for prompt in prompts), *((text.key, text.sequence.token_ids) for text in references)]
    texts = [[key, list(ids)] for key, ids in measured]
    return describe_engine(engine, dtype=spec.model.dtype, texts=texts, command=command)
