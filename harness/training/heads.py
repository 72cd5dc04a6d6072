"""`medusa-repro train` for heads alone: corpus, features, heads, held-out figures, calibration trace.

Each part resumes by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from harness.device.engine import LoadedModel, load_model, new_heads
from harness.device.machine import checkout_state
from harness.device.progress import progress_bar
from harness.specs.recipe import HeadsRecipe
from harness.training.calibration import calibrate
from harness.training.corpus import check_overlap, check_same_behaviour, keep_date
from harness.training.held_out import print_figures
from harness.training.room import chosen_plan, corpus_size, heads_device, plans_of, room_here, told
from harness.training.text import conversation_texts, packed_samples, unpacked_corpus
from harness.training.workers import fill_corpus
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.distill import CorpusSample, CorpusStore, pack_corpus
from medusa_impl.training.features import (
    AnswerSet,
    FeatureSet,
    load_answers,
    load_features,
    load_texts,
)
from medusa_impl.training.heads_trainer import check_one_process
from medusa_impl.training.medusa1 import train_medusa1
from medusa_impl.training_log import TrainingFigures, TrainingStep


@dataclass(frozen=True)
class TrainingFiles:
    """The files that training heads alone writes."""

    heads: Path
    calibration: Path
    corpus: Path


def train_heads(
    spec: HeadsRecipe,
    *,
    work: Path,
    target: Path,
    console: Console,
    from_scratch: bool = False,
    allow_hub: bool = False,
) -> TrainingFiles:
    """Make or unpack the corpus, train the heads, and write heads, corpus and calibration trace.

    All of it happens on the recipe's device. The plan says, before anything is loaded, whether it fits, and
    where the backbone's states are kept. What is already there is kept.
    Raises: UserError for several processes, or where a training prompt overlaps with a benchmark prompt, the
    data cannot train the heads, or the device is too small.
    """
    check_one_process(int(os.environ.get("WORLD_SIZE", "1")))  # which launchers set
    device = heads_device(spec.recipe)
    plans = plans_of(spec, device=device, corpus=corpus_size(spec), allow_hub=allow_hub)
    plan = chosen_plan(spec, plans, room_here(device, work=work), work=work)
    console.print(told(plan, asked=spec.recipe.features))
    spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"features": plan.way})})
    loaded = load_model(spec.model, device=device, allow_hub=allow_hub)
    keep_date(spec.model, loaded, work=work)
    check_overlap(spec, allow_hub=allow_hub)
    files = TrainingFiles(
        target / "medusa1.safetensors", target / "calibration.npz", target / "corpus.safetensors"
    )
    features, samples = _read_features(
        spec, loaded, work=work, console=console, from_scratch=from_scratch, allow_hub=allow_hub
    )
    console.print(f"{features.num_tokens} answer tokens of {len(features.keys)} prompts")
    heads = new_heads(loaded, spec.recipe)
    figures = _learn(heads, features, loaded, spec=spec, work=work, console=console)
    print_figures(console, figures)
    commit, dirty = checkout_state()
    provenance = HeadsProvenance(
        backbone_name=loaded.name,
        backbone_sha256=loaded.sha256,
        recipe=spec.recipe,
        training=figures,
        corpus_sha256=features.fingerprint(),
        behaviour=dict(loaded.behaviour) or None,
        commit=commit,
        dirty=dirty,
    )
    save_heads(files.heads, heads.cpu(), provenance=provenance)
    if samples:
        pack_corpus(samples, files.corpus, backbone_sha256=loaded.sha256)
    calibrate(
        spec, loaded, heads_file=files.heads, calibration_file=files.calibration, work=work, console=console
    )
    return files


def _read_features(
    spec: HeadsRecipe,
    loaded: LoadedModel,
    *,
    work: Path,
    console: Console,
    from_scratch: bool,
    allow_hub: bool,
) -> tuple[FeatureSet | AnswerSet, list[CorpusSample]]:
    """Return what the heads learn from, and the corpus that it is of; conversations are no corpus of ours.

    The recipe says which way its states come.
    """
    recipe, store = spec.recipe, CorpusStore(work / "corpus")
    if spec.conversations is not None:
        texts = conversation_texts(
            spec.conversations, loaded, max_length=recipe.max_length, where=f"{spec.name}.toml"
        )
        keys = [key for key, _ in texts]
        return load_texts([text for _, text in texts], keys=keys, num_heads=recipe.num_heads), []
    if not from_scratch and spec.packed_corpus is not None and not store.shard_files():
        check_same_behaviour(work, loaded.behaviour)
        samples = packed_samples(spec, loaded)
        if recipe.features != "none":
            store = unpacked_corpus(spec, loaded, work=work, console=console)
    else:
        fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
        samples = list(store.samples(with_states=False))
    if recipe.features == "none":
        return load_answers(samples, num_heads=recipe.num_heads), samples
    table = work / "states.table" if recipe.features == "file" else None
    return load_features(store, num_heads=recipe.num_heads, states_file=table), samples


def _learn(
    heads: MedusaHeads,
    features: FeatureSet | AnswerSet,
    loaded: LoadedModel,
    *,
    spec: HeadsRecipe,
    work: Path,
    console: Console,
) -> TrainingFigures:
    """Train the heads where the model is, shown as it goes on; return what they reached on held-out text."""
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=None)

        def show(step: TrainingStep) -> None:
            progress.update(
                task,
                total=step.num_steps,
                completed=step.step,
                description=f"training ({step.vocabulary}) loss {step.loss:.3f}",
            )

        return train_medusa1(
            features,
            heads,
            unembedding(loaded, spec.recipe),
            recipe=spec.recipe,
            checkpoint_dir=work / "training",
            decoder=loaded.model.get_decoder(),
            on_step=show,
        )


def unembedding(loaded: LoadedModel, recipe: Medusa1Settings) -> Tensor:
    """Return the LM head's weight that heads learn against, on the model's device.

    Shared heads are evaluated with it in float32; those with unembeddings of their own read none of it.

    Shapes: `[V, H]`.
    """
    lm_head: Any = loaded.model.get_output_embeddings()
    weight: Tensor = lm_head.weight.detach()
    return weight.float() if recipe.architecture == "shared" else weight
