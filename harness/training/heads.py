"""`medusa-repro train` for heads alone: corpus, features, heads, held-out figures, calibration trace; each
part resumes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from harness.device.engine import best_device, load_model, new_heads
from harness.device.machine import git_state
from harness.paths import code_folder
from harness.specs.recipe import HeadsRecipe
from harness.training.calibration import calibrate
from harness.training.corpus import check_overlap
from harness.training.text import unpacked_corpus
from harness.training.workers import fill_corpus
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.training.distill import CorpusStore, pack_corpus
from medusa_impl.training.features import load_features
from medusa_impl.training.medusa1 import train_medusa1
from medusa_impl.training_log import TrainingFigures, TrainingStep


@dataclass(frozen=True)
class TrainingFiles:
    """What training leaves behind."""

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
    """Make or unpack the corpus, train the heads, and write heads, packed corpus and calibration trace; what
    is already there is kept.

    Raises: UserError where a training prompt overlaps with a benchmark prompt, or the data cannot train the
    heads.
    """
    loaded = load_model(spec.model, device=best_device(), allow_hub=allow_hub)
    check_overlap(spec, allow_hub=allow_hub)
    files = TrainingFiles(
        target / "medusa1.safetensors", target / "calibration.npz", target / "corpus.safetensors"
    )
    store = CorpusStore(work / "corpus")
    if not from_scratch and spec.packed_corpus is not None and not store.shard_files():
        store = unpacked_corpus(spec, loaded, work=work, console=console)
    else:
        fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    features = load_features(store, num_heads=spec.recipe.num_heads)
    console.print(f"{features.num_tokens} answer tokens of {len(features.keys)} prompts")
    lm_head: Any = loaded.model.get_output_embeddings()
    heads = new_heads(loaded, spec.recipe)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=None)

        def show(step: TrainingStep) -> None:
            progress.update(
                task,
                total=step.num_steps,
                completed=step.step,
                description=f"training ({step.vocabulary}) loss {step.loss:.3f}",
            )

        figures = train_medusa1(
            features,
            heads,
            lm_head.weight.detach().float().cpu(),
            recipe=spec.recipe,
            checkpoint_dir=work / "training",
            on_step=show,
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
    calibrate(
        spec, loaded, heads_file=files.heads, calibration_file=files.calibration, work=work, console=console
    )
    return files


def print_figures(console: Console, figures: TrainingFigures) -> None:
    """Print held-out loss and top-1 per head."""
    if figures.held_out is None:
        return
    for head, (loss, accuracy) in enumerate(
        zip(figures.held_out.losses(), figures.held_out.top_accuracies(), strict=True), start=1
    ):
        first, tenth = (100 * (accuracy[rank] or 0) for rank in (0, -1))
        console.print(
            f"head {head}: held-out loss {loss or 0:.3f} nats, top-1 {first:.1f} %, top-10 {tenth:.1f} %"
        )
