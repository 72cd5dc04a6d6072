"""`medusa-repro train` for heads and backbone together.

Text, training on the Trainer, held-out figures, then heads, adapter and step log.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments

from harness.assets.hashes import tensors_sha256
from harness.device.engine import LoadedModel, best_device, heads_for, load_model, new_heads
from harness.device.loading.behaviour import adapter_behaviour
from harness.device.machine import checkout_state
from harness.device.progress import progress_bar
from harness.errors import UserError
from harness.files import canonical_sha256, file_sha256
from harness.paths import resolve_path
from harness.specs.recipe import JointRecipe
from harness.training.calibration import calibrate_folder
from harness.training.corpus import check_overlap, check_same_behaviour, keep_date
from harness.training.held_out import evaluate_joint, print_joint_figures
from harness.training.joint_plan import joint_bytes
from harness.training.plan import check_memory, planned_model
from harness.training.resume import check_same_run
from harness.training.room import model_name, room_here
from harness.training.text import JointText, read_text, token_subset
from harness.training.workers import fill_corpus
from medusa_impl.checkpoints.adapter import save_adapter
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.checkpoints.released import PublishedProvenance
from medusa_impl.checkpoints.tensors import backbone_sha256, share_like
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sharding import check_launcher, under_fsdp
from medusa_impl.training.trainer import MedusaTrainer, process_state, training_arguments
from medusa_impl.training.whole_checkpoints import last_checkpoint
from medusa_impl.training_log import STEP_LOG, JointFigures, JointStep, read_step_log

MAX_HELD_OUT = 64  # held-out sequences that the figures at the end are taken on
_SAVE_STEPS = 10


@dataclass(frozen=True)
class JointFiles:
    """What joint training writes.

    An adapter, or a whole model where that was trained in full, or neither for a frozen backbone.
    """

    heads: Path
    adapter: Path | None
    model: Path | None
    step_log: Path
    calibration: Path | None
    figures: JointFigures


def train_both(
    spec: JointRecipe,
    *,
    work: Path,
    target: Path,
    console: Console,
    from_scratch: bool = False,
    allow_hub: bool = False,
) -> JointFiles:
    """Make or read the text, train heads and backbone, and write what learnt and its calibration trace.

    Raises: UserError for a recipe that cannot run here, text that overlaps with a benchmark, or data that
    cannot train.
    """
    check_runnable(spec.recipe)
    _check_memory(spec, work=work, allow_hub=allow_hub)
    check_overlap(spec, allow_hub=allow_hub)
    if spec.conversations is None and (from_scratch or spec.packed_corpus is None):
        if process_state().num_processes > 1:
            raise UserError(
                found=f"a corpus to be made by {process_state().num_processes} processes that train",
                need="a corpus that is there already",
                where=f"{spec.name}.toml",
                do="make it first with medusa-repro distill, and name its file in packed_corpus",
            )
        fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    loaded = load_model(
        spec.model, device=_loading_device(), allow_hub=allow_hub, quantisation=spec.recipe.quantisation
    )
    keep_date(spec.model, loaded, work=work)
    text = read_text(spec, loaded, work=work, from_scratch=from_scratch)
    start = resolve_path(spec.start_heads, base_folder=None) if spec.start_heads is not None else None
    files = train_joint(
        loaded, spec.recipe, text=text, start_heads=start, work=work / "joint", target=target, console=console
    )
    if not process_state().is_main_process:
        return files
    if (reason := _too_large(spec.recipe)) is not None:
        console.print(
            f"no calibration trace for {reason}: record one with medusa-repro calibrate, where the tuned "
            "model fits"
        )
        return files
    del loaded
    calibration = calibrate_folder(spec, target, work=work, console=console, allow_hub=allow_hub)
    return JointFiles(**{**files.__dict__, "calibration": calibration})


def _check_memory(spec: JointRecipe, *, work: Path, allow_hub: bool) -> None:
    """Refuse, before anything is loaded, what one device cannot hold; launchers may share it among several.

    Raises: UserError in one line.
    """
    if under_fsdp() or process_state().num_processes > 1:
        return
    model = planned_model(spec.model, allow_hub=allow_hub)
    check_memory(
        joint_bytes(model, spec.recipe, dtype=getattr(torch, spec.model.dtype)),
        room_here(best_device(), work=work),
        model=model_name(spec.model),
        do="take a device with more memory, or share it among several by FSDP (suites/README.md)",
    )


def _too_large(recipe: Medusa2Settings) -> str | None:
    """Return why no trace is recorded after training, or None where one is.

    A trace needs the tuned model whole, and on one device.
    """
    if recipe.backbone == "full":
        return "a model trained in full"
    if recipe.quantisation is not None:
        return "an adapter trained on a 4-bit backbone"
    return "a model that was trained in parts (FSDP)" if under_fsdp() else None


def _loading_device() -> torch.device:
    """Return where the model is loaded: under FSDP on the host, from where each GPU takes its part."""
    return torch.device("cpu") if under_fsdp() else best_device()


def train_joint(
    loaded: LoadedModel,
    recipe: Medusa2Settings,
    *,
    text: JointText,
    start_heads: Path | None,
    work: Path,
    target: Path,
    console: Console,
    save_steps: int = _SAVE_STEPS,
) -> JointFiles:
    """Train on the text, and write heads, adapter or model, and step log.

    A run that was cut off goes on from its last checkpoint.
    The loaded model is changed: its adapter stays on it.
    Raises: UserError where the work folder holds another run, the heads to start from do not fit, or a loss
    is not finite.
    """
    check_runnable(recipe)
    _check_one_dtype(loaded, recipe)
    heads, origin = first_heads(loaded, recipe, start_heads=start_heads)
    check_same_behaviour(work, loaded.behaviour)
    check_same_run(work, recipe=recipe, text=text, backbone_sha256=loaded.sha256, heads_sha256=origin)
    was = backbone_sha256(loaded.model) if recipe.backbone == "frozen" else None
    torch.manual_seed(recipe.seed)  # the adapter's first weights
    model = MedusaTrainingModel(
        loaded.model,
        heads,
        recipe=recipe,
        subset=token_subset(text.train, recipe, vocab_size=heads.vocab_size),
    )
    device = best_device() if under_fsdp() else loaded.model.device
    arguments = training_arguments(recipe, folder=work, save_steps=save_steps, use_cpu=device.type == "cpu")
    trainer = _learn(model, text, arguments=arguments, work=work, console=console)
    held_out = evaluate_joint(model, text.held_out[:MAX_HELD_OUT])
    trainer.make_whole()
    writes = process_state().is_main_process  # the others may hold a part of the weights
    steps = read_step_log(work / STEP_LOG)
    figures = JointFigures(
        num_steps=len(steps),
        num_sequences=len(text.train),
        num_answer_tokens=sum(sequence.num_targets for sequence in text.train),
        num_positions_seen=sum(step.num_positions for step in steps),
        final_loss=steps[-1].loss,
        held_out=held_out,
        backbone_sha256s=(was, backbone_sha256(loaded.model)) if was is not None and writes else None,
    )
    print_joint_figures(console, figures, recipe=recipe)
    return _write(loaded, model, figures, text=text, work=work, target=target)


def _check_one_dtype(loaded: LoadedModel, recipe: Medusa2Settings) -> None:
    if under_fsdp() and recipe.backbone == "full" and loaded.model.dtype != torch.float32:
        raise UserError(
            found=f"a backbone of {str(loaded.model.dtype).removeprefix('torch.')} trained in full under "
            "FSDP, with heads of float32",
            need="one dtype for all that learns: [model] dtype = 'float32', and the recipe's autocast",
            where="the recipe",
            do="set both, or train the backbone as an adapter (backbone = 'lora')",
        )


def _learn(
    model: MedusaTrainingModel, text: JointText, *, arguments: TrainingArguments, work: Path, console: Console
) -> MedusaTrainer:
    """Train to the last step, from the last checkpoint of the work folder where there is one."""
    with progress_bar(console) as progress:
        task = progress.add_task("joint training", total=model.recipe.num_steps)

        def show(step: JointStep) -> None:
            rate = f", {step.positions_per_s:.0f} tokens/s" if step.positions_per_s else ""
            progress.update(
                task,
                total=step.num_steps,
                completed=step.step,
                description=f"joint training, loss {step.loss:.3f}{rate}",
            )

        trainer = MedusaTrainer(model, sequences=text.train, arguments=arguments, on_step=show)
        trainer.remove_callback(PrinterCallback)  # what it would print on stdout is in the step log
        last = last_checkpoint(work)
        if last is not None and last.is_finished:
            trainer.load_finished(last.folder)
        else:
            trainer.train(resume_from_checkpoint=str(last.folder) if last is not None else None)
    return trainer


def first_heads(
    loaded: LoadedModel, recipe: Medusa2Settings, *, start_heads: Path | None
) -> tuple[MedusaHeads, str]:
    """Return the heads that training starts from, trained or fresh, and a word that tells them apart.

    Raises: UserError for trained heads of another form than the recipe's.
    """
    if start_heads is None:
        return new_heads(loaded, recipe).to(loaded.model.device), "fresh"
    heads, origin = heads_for(loaded, start_heads)
    found, need = ((one.num_heads, one.num_layers, one.architecture) for one in (heads, recipe))
    if found != need:
        raise UserError(
            found=f"a file of {found[0]} heads, {found[1]} layers and {found[2]} unembedding to start from",
            need=f"{need[0]} heads, {need[1]} layers and {need[2]} unembedding, as the recipe says",
            where=start_heads.name,
            do="change the recipe, or start from other heads",
        )
    # Published heads may lie in a folder of several files.
    files = origin.files if isinstance(origin, PublishedProvenance) else None
    word = canonical_sha256(files) if files is not None else file_sha256(start_heads)
    return heads.to(loaded.model.device).train(), word


def check_runnable(recipe: Medusa2Settings) -> None:
    """Refuse, before anything is made or fetched, a recipe that cannot be trained on this machine.

    It needs what the machine lacks, or the launcher would train another recipe.
    Raises: UserError for 4-bit weights or an 8-bit optimiser without bitsandbytes and a CUDA device, or under
    FSDP, and as `check_launcher` does.
    """
    check_launcher(process_state())
    if recipe.quantisation is not None or recipe.optimizer == "adamw_8bit":
        if under_fsdp():
            raise UserError(
                found="a 4-bit backbone or an 8-bit optimiser under FSDP, which can part neither",
                need="optimizer = 'adamw' and no quantisation",
                where="the recipe",
                do="change the recipe, or train data parallel",
            )
        there = {
            "bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None,
            "a CUDA device": torch.cuda.is_available(),
        }
        if missing := [name for name, found in there.items() if not found]:
            raise UserError(
                found=f"no {' and no '.join(missing)}",
                need="both for a 4-bit backbone or an 8-bit optimiser",
                where="the recipe",
                do="train where they are, or take quantisation out and set optimizer = 'adamw'",
            )
    if recipe.backbone == "full" and recipe.architecture == "shared" and recipe.heads_lm_head == "original":
        raise UserError(
            found="shared heads that read the original LM head of a backbone trained in full",
            need="heads_lm_head = 'adapted', since the tuned model keeps one LM head only",
            where="the recipe",
        )


def _write(
    loaded: LoadedModel,
    model: MedusaTrainingModel,
    figures: JointFigures,
    *,
    text: JointText,
    work: Path,
    target: Path,
) -> JointFiles:
    recipe, backbone = model.recipe, model.recipe.backbone
    files = JointFiles(
        heads=target / "heads.safetensors",
        adapter=target / "adapter" if backbone == "lora" else None,
        model=target / "model" if backbone == "full" else None,
        step_log=target / STEP_LOG,
        calibration=None,
        figures=figures,
    )
    if not process_state().is_main_process:
        return files
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / STEP_LOG, files.step_log)
    adapter_sha256, behaviour = None, dict(loaded.behaviour)
    if files.adapter is not None:
        adapter_sha256 = save_adapter(files.adapter, model.backbone)
        behaviour = behaviour and {**behaviour, "adapter": adapter_behaviour(files.adapter)}
    backbone_sha256 = loaded.sha256
    if files.model is not None:
        model.model.save_pretrained(str(files.model))
        share_like(files.model / "config.json")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(str(files.model))
        backbone_sha256 = tensors_sha256(files.model)
    commit, dirty = checkout_state()
    provenance = HeadsProvenance(
        backbone_name=loaded.name,
        backbone_sha256=backbone_sha256,
        recipe=recipe,
        training=figures,
        adapter_sha256=adapter_sha256,
        lm_head_read=recipe.heads_lm_head if backbone != "frozen" else "original",
        lm_head_adapted=backbone == "full" or (backbone == "lora" and recipe.lora.lm_head),
        corpus_sha256=text.fingerprint(),
        behaviour=behaviour or None,
        commit=commit,
        dirty=dirty,
    )
    save_heads(files.heads, model.heads, provenance=provenance)
    return files
