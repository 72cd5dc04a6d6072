"""Take the profile of a recipe's training steps, on the trainers' own steps and the recipe's own text.

A stage is what the steps of a recipe have in common: heads alone on a subset of the vocabulary, then on all
of it; joint training with the heads alone, then with the backbone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PrinterCallback

from harness.device.clock import Clock, device_clock
from harness.device.engine import LoadedModel, best_device, load_model, new_heads
from harness.device.environment import describe_training
from harness.device.limits import measure_device_limits
from harness.device.locks import device_turns
from harness.device.progress import progress_bar
from harness.errors import UserError
from harness.measure.watch import BACKBONE, HEADS_PARTS, JOINT_PARTS, StepWatch, heads_marks, joint_marks
from harness.paths import resolve_path
from harness.records.probes import DeviceLimits
from harness.records.profiles.training import MatrixThroughput, TrainingProfile
from harness.records.provenance import Environment
from harness.specs.recipe import AnyRecipe, HeadsRecipe, JointRecipe
from harness.training.heads import unembedding
from harness.training.joint import check_runnable, first_heads
from harness.training.room import heads_device
from harness.training.text import read_text, token_subset
from medusa_impl.engine.runner import StepRunner
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.distill import CorpusSample, unpack_corpus
from medusa_impl.training.features import AnswerTable, add_states, load_answers, load_features
from medusa_impl.training.medusa1 import train_medusa1
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sequences import LikeLengthSampler, TrainingSequence
from medusa_impl.training.trainer import MedusaTrainer, training_arguments
from medusa_impl.training_log import TrainingStep

_STATE_BATCHES = 2  # batches' worth of cached states that heads alone are profiled on
_NEVER = 1_000_000_000  # steps between two saves: none falls among the timed ones


@dataclass(frozen=True)
class _Bench:
    """A trainer that is ready to take the watched steps.

    `rates` are the stages' shares of the recipe's steps.
    """

    watch: StepWatch
    run: Callable[[], object]
    rates: Mapping[str, float]
    parts: tuple[str, ...]
    dtypes: tuple[str, ...]
    environment: Environment


def profile_training(
    spec: AnyRecipe, *, num_steps: int, allow_hub: bool, command: str, console: Console
) -> TrainingProfile:
    """Return the profile of a recipe's training steps, by stage.

    It takes `num_steps` plain and as many marked steps of every stage, and counts the products of one more.
    Heads alone learn from states on the device, unless the recipe says otherwise. Matrix throughput is
    measured just before and after, the device held throughout.
    Raises: UserError for a recipe that cannot run here or whose text is not there.
    """
    _check_profiled(spec)
    device = best_device() if isinstance(spec, JointRecipe) else heads_device(spec.recipe)
    clock = device_clock(device)
    console.print(f"{spec.name}: loading {spec.model.asset or spec.model.path or 'a tiny random model'}")
    quantisation = spec.recipe.quantisation if isinstance(spec, JointRecipe) else None
    loaded = load_model(spec.model, device=device, allow_hub=allow_hub, quantisation=quantisation)
    with tempfile.TemporaryDirectory() as text:
        bench = (
            _joint_bench(spec, loaded, folder=Path(text), num_steps=num_steps, clock=clock, command=command)
            if isinstance(spec, JointRecipe)
            else _heads_bench(
                spec, loaded, folder=Path(text), num_steps=num_steps, clock=clock, command=command
            )
        )
        console.print(
            f"{bench.watch.num_steps} steps, {num_steps} of them plain in each stage: "
            f"{', '.join(bench.rates)}"
        )
        with device_turns(device, console=console)():
            before = _limits(bench.dtypes, device=device, clock=clock)
            with bench.watch, progress_bar(console) as progress:
                task = progress.add_task("steps", total=bench.watch.num_steps)
                bench.watch.on_step = lambda: progress.advance(task)
                bench.run()
            after = _limits(bench.dtypes, device=device, clock=clock)
    stages = bench.watch.profiles(bench.rates, parts=bench.parts)
    counted = {dtype for stage in stages for dtype in stage.flops}
    throughput = tuple(
        MatrixThroughput(
            dtype=dtype,
            before_flop_per_s=before[dtype].matmul_flop_per_s,
            after_flop_per_s=after[dtype].matmul_flop_per_s,
            method=before[dtype].method,
        )
        for dtype in bench.dtypes
        if dtype in counted
    )
    return TrainingProfile(
        recipe=spec.name,
        kind="heads" if isinstance(spec, HeadsRecipe) else "joint",
        environment=bench.environment,
        throughput=throughput,
        stages=stages,
    )


def _check_profiled(spec: AnyRecipe) -> None:
    """Refuse, before anything is loaded, a recipe that cannot run here or whose text is still to be made."""
    if isinstance(spec, JointRecipe):
        check_runnable(spec.recipe)
    if spec.packed_corpus is None and (isinstance(spec, HeadsRecipe) or spec.conversations is None):
        raise UserError(
            found="a recipe whose text is still to be made",
            need="packed_corpus, or conversations",
            where=f"{spec.name}.toml",
            do="make it with medusa-repro distill and name it there",
        )


def _limits(dtypes: Sequence[str], *, device: torch.device, clock: Clock) -> dict[str, DeviceLimits]:
    return {dtype: measure_device_limits(device, getattr(torch, dtype), clock=clock) for dtype in dtypes}


def _heads_bench(
    spec: HeadsRecipe, loaded: LoadedModel, *, folder: Path, num_steps: int, clock: Clock, command: str
) -> _Bench:
    """Return Medusa-1's trainer on the cached states of as many answers as a few batches need."""
    recipe = spec.recipe
    samples = _samples(spec, loaded)
    features = _features(samples, loaded, recipe, folder=folder)
    heads = new_heads(loaded, recipe)
    rates = heads_stages(recipe, vocab_size=heads.vocab_size)
    watch = StepWatch(tuple(rates), num_steps=num_steps, clock=clock, marks=partial(heads_marks, heads=heads))
    changed: dict[str, object] = {
        "num_epochs": None,
        "num_steps": watch.num_steps,
        "full_vocabulary_rate": (len(rates) - 1) / 2,
    }
    if "subset" not in rates:
        changed["subset_size"] = None
    texts = [[sample.key, [*sample.prompt_ids, *sample.token_ids]] for sample in samples]
    environment = describe_training(loaded, heads, dtype=spec.model.dtype, texts=texts, command=command)
    run = partial(
        train_medusa1,
        features,
        heads,
        unembedding(loaded, recipe),
        recipe=recipe.model_copy(update=changed),
        checkpoint_dir=folder / "training",
        decoder=loaded.model.get_decoder(),
        resume=False,
        on_step=_Positions(watch),
        log_every_steps=1,
        save_every_steps=_NEVER,
    )
    reads = recipe.features == "none"
    dtypes = tuple(sorted({"float32", recipe.matmul_dtype, *((spec.model.dtype,) if reads else ())}))
    parts = (BACKBONE, *HEADS_PARTS) if reads else HEADS_PARTS
    return _Bench(watch=watch, run=run, rates=rates, parts=parts, dtypes=dtypes, environment=environment)


class _Positions:
    """Tells a watch how many positions each logged step learnt from."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch, self._seen = watch, 0

    def __call__(self, step: TrainingStep) -> None:
        taken, self._seen = step.num_positions_seen - self._seen, step.num_positions_seen
        self._watch(taken)


def heads_stages(recipe: Medusa1Settings, *, vocab_size: int) -> dict[str, float]:
    """Return Medusa-1's stages, with their shares of the recipe's steps.

    They are a subset of the vocabulary, then all of it.
    """
    full = (
        recipe.full_vocabulary_rate
        if recipe.subset_size is not None and recipe.subset_size < vocab_size
        else 1.0
    )
    return {stage: rate for stage, rate in (("subset", 1 - full), ("full", full)) if rate > 0}


def _samples(spec: HeadsRecipe, loaded: LoadedModel) -> list[CorpusSample]:
    """Return the corpus' first answers, enough for a few batches."""
    assert spec.packed_corpus is not None
    needed, rows, taken = _STATE_BATCHES * spec.recipe.batch_positions, 0, list[CorpusSample]()
    for sample in unpack_corpus(
        resolve_path(spec.packed_corpus, base_folder=None), backbone_sha256=loaded.sha256
    ):
        if rows >= needed:
            break
        taken.append(sample)
        rows += len(sample.token_ids) - 1
    if rows < spec.recipe.batch_positions:
        raise UserError(
            found=f"{rows} positions",
            need=f"a batch of {spec.recipe.batch_positions}",
            where=Path(spec.packed_corpus).name,
            do="add text",
        )
    return taken


def _features(
    samples: Sequence[CorpusSample], loaded: LoadedModel, recipe: Medusa1Settings, *, folder: Path
) -> AnswerTable:
    if recipe.features == "none":
        return load_answers(samples, num_heads=recipe.num_heads, held_out_rate=0.0)
    backbone = StepRunner(loaded.model, None, mode="eager").backbone
    store = add_states(backbone, samples, cache_folder=folder, backbone_sha256=loaded.sha256)
    return load_features(store, num_heads=recipe.num_heads, held_out_rate=0.0)


def _joint_bench(
    spec: JointRecipe, loaded: LoadedModel, *, folder: Path, num_steps: int, clock: Clock, command: str
) -> _Bench:
    """Return the joint trainer on one batch of the recipe's text.

    It is the same in every step, so that the counted step is like the timed ones.
    """
    recipe = spec.recipe
    text = read_text(spec, loaded, work=folder).train
    start = resolve_path(spec.start_heads, base_folder=None) if spec.start_heads is not None else None
    heads, _ = first_heads(loaded, recipe, start_heads=start)
    batch = one_batch(text, size=recipe.batch_sequences * recipe.accumulation_steps, seed=recipe.seed)
    texts = [[str(index), list(sequence.token_ids)] for index, sequence in enumerate(batch)]
    environment = describe_training(loaded, heads, dtype=spec.model.dtype, texts=texts, command=command)
    torch.manual_seed(recipe.seed)
    rates = joint_stages(spec)
    watch = StepWatch(
        tuple(rates),
        num_steps=num_steps,
        clock=clock,
        marks=lambda parts: joint_marks(parts, model=model, accelerator=trainer.accelerator),
    )
    planned = recipe.model_copy(update={"num_epochs": None, "num_steps": watch.num_steps, "stage_rate": 0.5})
    subset = token_subset(text, recipe, vocab_size=heads.vocab_size)
    model = MedusaTrainingModel(loaded.model, heads, recipe=planned, subset=subset)
    arguments = training_arguments(
        planned, folder=folder / "joint", save_steps=_NEVER, use_cpu=loaded.model.device.type == "cpu"
    )
    arguments.set_save(strategy="no")
    arguments.train_sampling_strategy = "sequential"
    trainer = MedusaTrainer(
        model,
        sequences=batch * watch.num_steps,
        arguments=arguments,
        on_step=lambda step: watch(step.num_positions),
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the table
    dtypes = tuple(sorted({"float32", spec.model.dtype, recipe.autocast or "float32"}))
    return _Bench(
        watch=watch, run=trainer.train, rates=rates, parts=JOINT_PARTS, dtypes=dtypes, environment=environment
    )


def joint_stages(spec: JointRecipe) -> dict[str, float]:
    """Return the joint stages, with their shares of the recipe's steps.

    They are the heads alone, then heads and backbone.
    """
    if spec.recipe.backbone == "frozen":
        return {"heads": 1.0}
    if spec.recipe.warmup == "two_stage":
        return {"heads": spec.recipe.stage_rate, "both": 1 - spec.recipe.stage_rate}
    return {"both": 1.0}


def one_batch(sequences: Sequence[TrainingSequence], *, size: int, seed: int) -> tuple[TrainingSequence, ...]:
    """Return a batch as training under that seed sees it: the one of median length.

    Raises: UserError where there are fewer.
    """
    if len(sequences) < size:
        raise UserError(
            found=f"{len(sequences)} sequences",
            need=f"a batch of {size}",
            where="the recipe's text",
            do="add text",
        )
    sampler = LikeLengthSampler(
        [len(sequence.token_ids) for sequence in sequences], batch_size=size, seed=seed
    )
    order = list(sampler)
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    by_length = sorted(batches, key=lambda batch: max(len(sequences[index].token_ids) for index in batch))
    return tuple(sequences[index] for index in by_length[len(by_length) // 2])
