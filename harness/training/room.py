"""Which way a recipe's heads learn here: its plan against this machine, or against a device by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from harness.device.engine import best_device
from harness.device.machine import device_info, free_bytes
from harness.errors import UserError
from harness.paths import resolve_path
from harness.specs.hardware import DeviceSpec
from harness.specs.recipe import HeadsRecipe, needed_corpus
from harness.specs.suite import ModelSpec
from harness.training.conversations import load_conversations
from harness.training.plan import (
    CorpusSize,
    DeviceRoom,
    HeadsPlan,
    check_fits,
    choose_way,
    plan_heads,
    planned_model,
)
from medusa_impl.recipes import FeaturesWay, Medusa1Settings

_CHARACTERS_A_TOKEN = 4  # of English text, roughly; it decides no result, only the time that is told
WAYS: tuple[FeaturesWay, ...] = ("device", "file", "none")
_TOLD = {
    "device": "the backbone's states of all answers stay on the device",
    "file": "the backbone's states are read from a file, step by step",
    "none": "no states are kept: the frozen backbone runs with the heads in each step, on whole answers",
}


def heads_device(recipe: Medusa1Settings) -> torch.device:
    """Return where a recipe's heads learn.

    Raises: UserError for a recipe that asks for a GPU where there is none.
    """
    best = best_device()
    if recipe.device == "cuda" and best.type != "cuda":
        raise UserError(
            found='device = "cuda" and no CUDA device',
            need="a GPU that PyTorch sees",
            where="the recipe",
            do='train on a machine with one, or set device = "auto" or "cpu"',
        )
    return torch.device("cpu") if recipe.device == "cpu" else best


def room_here(device: torch.device, *, work: Path) -> DeviceRoom:
    """Return what this machine's device, and the disk of the work folder, can hold.

    Memory that others use is not there to be planned with. States that the work folder holds already have
    their place.
    """
    info = device_info(device)
    there = next(folder for folder in (work, *work.absolute().parents) if folder.exists())
    kept = sum(file.stat().st_size for file in work.rglob("states*") if file.is_file())
    return DeviceRoom(
        name=info.name,
        memory_bytes=min(info.memory_bytes, free_bytes(device)),
        disk_bytes=shutil.disk_usage(there).free + kept,
    )


def room_of(device: DeviceSpec) -> DeviceRoom:
    """Return what a device holds by its published figures; nothing is known of a disk."""
    return DeviceRoom(name=device.name, memory_bytes=int(device.memory_gb * 1e9))


def corpus_size(spec: HeadsRecipe) -> CorpusSize:
    """Return how much text a recipe learns from: that of its packed corpus, or at most what is to be made.

    Raises: UserError for a packed corpus that cannot be read.
    """
    if spec.packed_corpus is not None:
        return _packed_size(resolve_path(spec.packed_corpus, base_folder=None))
    if spec.conversations is not None:
        return _conversations_size(resolve_path(spec.conversations, base_folder=None), spec.recipe)
    corpus = needed_corpus(spec)
    answers = corpus.num_samples or -(-(corpus.num_tokens or 0) // corpus.max_new_tokens)
    tokens = corpus.num_tokens or answers * corpus.max_new_tokens
    return CorpusSize(
        num_answers=answers, num_answer_tokens=tokens, num_tokens=tokens + answers * corpus.max_prompt_tokens
    )


def _conversations_size(path: Path, recipe: Medusa1Settings) -> CorpusSize:
    """Return an estimate of a file's text, a token for four characters, cut at the recipe's length.

    Raises: UserError for a file that cannot be read.
    """
    answered = tokens = num_answers = 0
    for conversation in load_conversations(path):
        left = recipe.max_length
        for question, answer in conversation.turns:
            asked, said = (-(-len(text) // _CHARACTERS_A_TOKEN) for text in (question, answer))
            taken = max(0, min(said, left - asked))
            left, tokens = left - asked - taken, tokens + min(left, asked + taken)
            if taken:
                answered, num_answers = answered + taken, num_answers + 1
            if left <= 0:
                break
    return CorpusSize(num_answers=num_answers, num_answer_tokens=answered, num_tokens=tokens)


def _packed_size(path: Path) -> CorpusSize:
    try:
        with safe_open(path, framework="pt") as file:
            lengths, prompts = (file.get_tensor(name) for name in ("lengths", "prompt_lengths"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            found=f"an unreadable corpus ({error})", need="a file of pack_corpus", where=path.name
        ) from error
    answers = int(lengths.sum())
    return CorpusSize(
        num_answers=len(lengths), num_answer_tokens=answers, num_tokens=answers + int(prompts.sum())
    )


def size_of_one_step(recipe: Medusa1Settings) -> CorpusSize:
    """Return what stands for a text that is not there: one step's, half of whose tokens are answers'."""
    answers = recipe.batch_positions + 1
    return CorpusSize(num_answers=1, num_answer_tokens=answers, num_tokens=2 * answers, is_there=False)


def plans_of(
    spec: HeadsRecipe,
    *,
    device: torch.device,
    corpus: CorpusSize,
    shape: str | None = None,
    allow_hub: bool = False,
) -> dict[FeaturesWay, HeadsPlan]:
    """Return the plan of each way, for the recipe's model or one of a published shape.

    Raises: UserError as `planned_model` does.
    """
    model = planned_model(spec.model, shape=shape, allow_hub=allow_hub)
    name = shape or model_name(spec.model)
    # Of conversations no states are kept.
    ways = WAYS if spec.conversations is None else WAYS[-1:]
    return {
        way: plan_heads(
            model,
            spec.recipe,
            name=name,
            dtype=getattr(torch, spec.model.dtype),
            corpus=corpus,
            way=way,
            device=device,
        )
        for way in ways
    }


def model_name(spec: ModelSpec) -> str:
    """Return a model's name as its recipe gives it."""
    return spec.asset or (Path(spec.path).name if spec.path is not None else "a tiny model")


def chosen_plan(
    spec: HeadsRecipe, plans: dict[FeaturesWay, HeadsPlan], room: DeviceRoom, *, work: Path | None = None
) -> HeadsPlan:
    """Return the plan of the way that the recipe names, or of the first that fits.

    A work folder whose answers have no states goes on without them.
    Raises: UserError in one line, before anything is loaded, where it does not fit.
    """
    way = spec.recipe.features
    kept = spec.conversations is None and (work is None or not _answers_without_states(work))
    if way == "auto" and not kept:
        way = "none"
    if way == "auto":
        return plans[choose_way(plans, room)]
    check_fits(plans[way], room)
    return plans[way]


def _answers_without_states(work: Path) -> bool:
    corpus = work / "corpus"
    return any(corpus.glob("corpus-*.jsonl")) and not any(corpus.glob("states-*.safetensors"))


def told(plan: HeadsPlan, *, asked: str) -> str:
    """Return one sentence that says where the states are, and who chose that."""
    reason = "chosen by the plan" if asked == "auto" else "as the recipe says"
    return f'features = "{plan.way}" ({reason}): {_TOLD[plan.way]}; {plan.device_bytes / 1e9:.2f} GB in all'
