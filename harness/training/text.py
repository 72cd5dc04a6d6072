"""A corpus as sequences, split into training and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from harness.device.engine import LoadedModel
from harness.device.progress import progress_bar
from harness.errors import UserError
from harness.files import DataPath, canonical_sha256
from harness.paths import resolve_path
from harness.specs.recipe import HeadsRecipe, JointRecipe
from harness.training.conversations import (
    check_has_template,
    conversation_sequence,
    load_conversations,
    turn_sequences,
)
from harness.training.workers import corpus_store
from medusa_impl.engine.families import has_learned_positions, position_limit
from medusa_impl.engine.runner import StepRunner
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.distill import CorpusSample, CorpusStore, unpack_corpus
from medusa_impl.training.features import add_states, is_held_out
from medusa_impl.training.losses import TokenSubset
from medusa_impl.training.sequences import TrainingSequence

HELD_OUT_RATE = 0.03  # of the prompts, as in Medusa-1's features: those that heads of that run never saw


def packed_samples(spec: HeadsRecipe, loaded: LoadedModel) -> list[CorpusSample]:
    """Return the answers of the shipped corpus, without states.

    Raises: UserError for a file that cannot be read, or another model's answers.
    """
    assert spec.packed_corpus is not None
    file = resolve_path(spec.packed_corpus, base_folder=None)
    return list(unpack_corpus(file, backbone_sha256=loaded.sha256))


def unpacked_corpus(spec: HeadsRecipe, loaded: LoadedModel, *, work: Path, console: Console) -> CorpusStore:
    """Return the shipped corpus with the states of this backbone, one forward pass an answer.

    Goes on where it stopped.
    """
    samples = packed_samples(spec, loaded)
    runner = StepRunner(loaded.model, None)
    with progress_bar(console) as progress:
        task = progress.add_task("states", total=len(samples))
        return add_states(
            runner.backbone,
            samples,
            cache_folder=work,
            backbone_sha256=loaded.sha256,
            on_sample=lambda sample: progress.advance(task),
        )


@dataclass(frozen=True)
class JointText:
    """Sequences to train on and sequences to keep out."""

    train: tuple[TrainingSequence, ...]
    held_out: tuple[TrainingSequence, ...]

    def fingerprint(self) -> str:
        """Return a hash that changes with any token of the training text, or with its order."""
        return canonical_sha256([[sequence.token_ids, sequence.answers] for sequence in self.train])


def read_text(spec: JointRecipe, loaded: LoadedModel, *, work: Path, from_scratch: bool = False) -> JointText:
    """Return a recipe's text as sequences, split by the tokens of the first prompt.

    Raises: UserError for a text that the model cannot read: unknown tokens, or more than its table of
    positions holds.
    """
    text = _read_text(spec, loaded, work=work, from_scratch=from_scratch)
    limit = position_limit(loaded.model.config)
    for sequence in (*text.train, *text.held_out):
        loaded.require_known_ids(sequence.token_ids, where="the training text")
    longest = max((len(sequence.token_ids) for sequence in (*text.train, *text.held_out)), default=0)
    if limit is not None and longest > limit and has_learned_positions(loaded.model, limit):
        raise UserError(
            found=f"a training text of {longest} tokens",
            need=f"at most {limit}, the positions of {loaded.name}",
            where=f"{spec.name}.toml",
            do=f"set max_length = {limit}",
        )
    return text


def conversation_texts(
    file: DataPath, loaded: LoadedModel, *, max_length: int, where: str
) -> list[tuple[str, TrainingSequence]]:
    """Return the conversations of a file as sequences, each with its key.

    Raises: UserError for a model without a tokenizer or a template, or a file that cannot be read.
    """
    if loaded.tokenizer is None:
        raise UserError(
            found="conversations for a tiny random model, which reads no text",
            need="a model with a tokenizer",
            where=where,
            do="name a model by asset or path in [model]",
        )
    check_has_template(loaded.tokenizer, where=where)
    conversations = load_conversations(resolve_path(file, base_folder=None))
    made = [
        (
            conversation.key,
            conversation_sequence(loaded.tokenizer, conversation.turns, max_length=max_length),
        )
        for conversation in conversations
    ]
    return [(key, sequence) for key, sequence in made if sequence is not None]


def _read_text(spec: JointRecipe, loaded: LoadedModel, *, work: Path, from_scratch: bool) -> JointText:
    length = spec.recipe.max_length
    if spec.conversations is not None:
        made = conversation_texts(spec.conversations, loaded, max_length=length, where=f"{spec.name}.toml")
        return split_text([sequence for _, sequence in made])
    if from_scratch or spec.packed_corpus is None or CorpusStore(work / "corpus").shard_files():
        store = corpus_store(work, backbone_sha256=loaded.sha256)
        return corpus_text(list(store.samples(with_states=False)), max_length=length)
    return corpus_text(
        list(
            unpack_corpus(resolve_path(spec.packed_corpus, base_folder=None), backbone_sha256=loaded.sha256)
        ),
        max_length=length,
    )


def corpus_text(samples: Sequence[CorpusSample], *, max_length: int) -> JointText:
    """Return a corpus' conversations as sequences, split, in an order that no shard decides."""
    made = sorted(turn_sequences(samples, max_length=max_length))
    return split_text([sequence for _, sequence in made])


def split_text(sequences: Sequence[TrainingSequence]) -> JointText:
    """Split by each sequence's first prompt."""
    kept: dict[bool, list[TrainingSequence]] = {True: [], False: []}
    for sequence in sequences:
        kept[is_held_out(sequence.token_ids[: sequence.answers[0][0]], rate=HELD_OUT_RATE)].append(sequence)
    return JointText(train=tuple(kept[False]), held_out=tuple(kept[True]))


def token_subset(
    sequences: Sequence[TrainingSequence], recipe: Medusa2Settings, *, vocab_size: int
) -> TokenSubset | None:
    """Return the most frequent answer tokens where the recipe restricts the heads' vocabulary."""
    if recipe.subset_size is None or recipe.subset_size >= vocab_size:
        return None
    targets = [
        token
        for sequence in sequences
        for start, end in sequence.answers
        for token in sequence.token_ids[start:end]
    ]
    return TokenSubset.most_frequent(
        torch.bincount(torch.tensor(targets), minlength=vocab_size), size=recipe.subset_size
    )
