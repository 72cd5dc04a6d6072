"""`medusa-repro distill`: the model's own answers to a recipe's prompts, of one turn or several, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from harness.conversations import conversation_and_turn
from harness.specs.recipe import AnySuite, needed_corpus
from harness.training_run import check_overlap, corpus_backbone, fill_corpus
from medusa_impl.distill import CorpusStore, pack_corpus


@dataclass(frozen=True)
class DistilledCorpus:
    """A corpus on disk and what it holds."""

    file: Path
    num_answers: int
    num_second_turns: int
    num_tokens: int


def distill_suite(spec: AnySuite, *, work: Path, target: Path, console: Console, allow_hub: bool = False) -> DistilledCorpus:
    """Answer a recipe's prompts until its goal is met and pack the answers; shards in `work` are kept and added to.

    Raises: UserError for a recipe without a [corpus], prompts that overlap with a benchmark's, a prompt that leaves no room for its answer,
    or a work folder of another model.
    """
    needed_corpus(spec)
    check_overlap(spec, allow_hub=allow_hub)
    fill_corpus(spec, work=work, console=console, allow_hub=allow_hub)
    store = CorpusStore(work / "corpus")
    samples = list(store.samples(with_states=False))
    target.mkdir(parents=True, exist_ok=True)
    file = target / "corpus.safetensors"
    pack_corpus(samples, file, backbone_sha256=corpus_backbone(store))
    return DistilledCorpus(
        file=file,
        num_answers=len(samples),
        num_second_turns=sum(conversation_and_turn(sample.key)[1] == 2 for sample in samples),
        num_tokens=sum(len(sample.token_ids) for sample in samples),
    )
