"""`medusa-repro train` for heads alone: corpus, features, heads, held-out figures, calibration trace.

Each part resumes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.device.engine import LoadedModel, best_device, load_model, new_heads
from harness.device.machine import checkout_state
from harness.device.progress import progress_bar
from harness.specs.recipe import HeadsRecipe
from harness.training.calibration import calibrate
from harness.training.corpus import check_overlap, check_same_behaviour, keep_date
from harness.training.held_out import print_figures
from harness.training.text import unpacked_corpus
from harness.training.workers import fill_corpus
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.heads import MedusaHeads
from medusa_impl.training.distill import CorpusStore, pack_corpus
from medusa_impl.training.features import FeatureSet, load_features
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

    What is already there is kept.
    Raises: UserError where a training prompt overlaps with a benchmark prompt, or the data cannot train the
    heads.
    """
    loaded = load_model(spec.model, device=best_device(), allow_hub=allow_hub)
    keep_date(spec.model, loaded, work=work)
    check_overlap(spec, allow_hub=allow_hub)
    files = TrainingFiles(
        target / "medusa1.safetensors", target / "calibration.npz", target / "corpus.safetensors"
    )
    store = CorpusStore(work / "corpus")
    if not from_scratch and spec.packed_corpus is not None and not store.shard_files():
        check_same_behaviour(work, loaded.behaviour)
        store = unpacked_corpus(spec, loaded, work=work, console=console)
    else:
        fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    features = load_features(store, num_heads=spec.recipe.num_heads)
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
    save_heads(files.heads, heads, provenance=provenance)
    pack_corpus(store.samples(with_states=False), files.corpus, backbone_sha256=loaded.sha256)
    calibrate(
        spec, loaded, heads_file=files.heads, calibration_file=files.calibration, work=work, console=console
    )
    return files


def _learn(
    heads: MedusaHeads,
    features: FeatureSet,
    loaded: LoadedModel,
    *,
    spec: HeadsRecipe,
    work: Path,
    console: Console,
) -> TrainingFigures:
    """Train the heads, shown as it goes on, and return what they reached on held-out text."""
    lm_head: Any = loaded.model.get_output_embeddings()
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
            lm_head.weight.detach().float().cpu(),
            recipe=spec.recipe,
            checkpoint_dir=work / "training",
            on_step=show,
        )
