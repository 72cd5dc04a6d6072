"""The trace that trees are grown on."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from harness.device.engine import LoadedModel, best_device, engine_from_heads, load_model
from harness.device.prompts import Prompt
from harness.device.trace import Text, record_trace
from harness.errors import UserError
from harness.records.trace import Trace
from harness.specs.recipe import AnyRecipe, CorpusSpec, JointRecipe
from harness.training.corpus import corpus_prompts, keep_date, make_corpus
from medusa_impl.training.distill import CorpusStore


def calibrate(
    spec: AnyRecipe,
    loaded: LoadedModel,
    *,
    heads_file: Path,
    calibration_file: Path,
    work: Path,
    console: Console,
) -> Trace:
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
    engine = engine_from_heads(loaded, heads_file)
    prompts = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=wanted.num_prompts)
    # by model: a backbone that was trained anew answers anew
    store = CorpusStore(work / f"calibration-{loaded.sha256[:16]}")
    make_corpus(
        engine.runner.backbone,
        prompts,
        store=store,
        spec=corpus,
        eos_ids=loaded.eos_ids,
        console=console,
        keep_states=False,
    )
    samples = sorted(store.samples(with_states=False), key=lambda sample: sample.key)
    texts = [
        Text(Prompt(sample.key, sample.category, sample.prompt_ids), sample.token_ids, sample.ended_by)
        for sample in samples
    ]
    trace = record_trace(
        engine,
        texts,
        max_new_tokens=wanted.max_new_tokens,
        extra={"prompts": f"held-out training prompts, seed {wanted.seed}"},
    )
    trace.save(calibration_file)
    console.print(f"calibration trace: {trace.num_positions} positions of {len(texts)} prompts")
    return trace


def calibrate_folder(
    spec: JointRecipe, folder: Path, *, work: Path, console: Console, allow_hub: bool = False
) -> Path | None:
    """Record, on one device, the calibration trace of what a recipe's training wrote, and return its file.

    None for a model without a tokenizer, which has no prompts.

    Raises: UserError for a folder without heads, or with heads of another adapter or model.
    """
    heads, adapter, whole = folder / "heads.safetensors", folder / "adapter", folder / "model"
    if not heads.exists():
        raise UserError(
            found="no heads.safetensors",
            need="the folder that medusa-repro train wrote",
            where=folder.name,
            do="name the folder of --out, or train the recipe first",
        )
    changes = (
        {"asset": None, "path": str(whole.absolute())}
        if whole.exists()
        else {"adapter": str(adapter.absolute())}
        if adapter.exists()
        else {}
    )
    tuned = load_model(spec.model.model_copy(update=changes), device=best_device(), allow_hub=allow_hub)
    keep_date(spec.model, tuned, work=work)
    if tuned.tokenizer is None:  # a tiny random model: no prompts of text
        return None
    file = folder / "calibration.npz"
    calibrate(spec, tuned, heads_file=heads, calibration_file=file, work=work, console=console)
    return file
