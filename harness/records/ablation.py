"""The record of an ablation: what every arm did, by text, in sums.

A record folder holds `suite.toml`, `environment.json`, `tree.json`, `arms.jsonl` (one line an arm and seed,
appended when it is done), for each line a trace `trace-ARM-SEED.npz` of the arm's own greedy text, for a
tuned backbone `trace-original-text-ARM-SEED.npz` of the original model's text, and, but for the start, the
log `steps-ARM-SEED.jsonl`, and, last, `manifest.json`, which seals it with the SHA-256 of every other file.
Ratios are formed in `judge/ablation.py`, each time anew. No torch, clock or device is needed to read one.
"""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from harness.bounds import Count, FileName, Finite, Seconds, Sha256, Utc, Whole
from harness.errors import UserError
from harness.files import Frozen, lines_of, read_text
from harness.records.folder import ELAPSED_S, FILE_HASHES, FINISHED_UTC, KIND, RecordFolder, kind_of
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.run import ArmTree
from harness.records.store import UNSEALED, LineFile, StoreKind
from harness.records.trace import Trace
from harness.specs.ablation import AblationSpec, parse_ablation
from harness.versions import VERSION, ReadFrom, Versioned, read_versioned_lines

ARMS_FILE, TREE_FILE = "arms.jsonl", "tree.json"


class TextChange(Frozen):
    """One text under the original and the tuned model: sums over the tokens of its answers."""

    key: str = Field(description="which text")
    category: str | None = Field(description="category of its prompt; null where it has none")
    num_positions: Count = Field(description="tokens of the text's answers, which the sums run over")
    kl_sum: Finite = Field(description="summed KL(original || tuned) of the next token, nats")
    original_nll_sum: Finite = Field(
        description="summed negative log-likelihood of the text's tokens under the original model, nats"
    )
    tuned_nll_sum: Finite = Field(
        description="summed negative log-likelihood of the text's tokens under the tuned model, nats"
    )
    num_agreements: Count = Field(description="positions at which both models have the same first choice")


class GreedyText(Frozen):
    """One prompt's greedy answers by the tuned and by the original model."""

    key: str = Field(description="which prompt")
    num_tokens: Count = Field(description="tokens of the tuned model's answer")
    num_original_tokens: Count = Field(description="tokens of the original model's answer")
    num_shared: Count = Field(description="tokens before the answers part; all of them where they are equal")

    @property
    def is_equal(self) -> bool:
        """Return whether the two answers are the same."""
        return self.num_tokens == self.num_original_tokens == self.num_shared


class HeadText(Frozen):
    """The heads on one held-out text, over the whole vocabulary: sums over their targets."""

    key: str = Field(description="which text")
    loss_sums: tuple[Finite, ...] = Field(
        description="summed negative log-likelihood of its targets, nats, one entry a head"
    )
    num_targets: tuple[Count, ...] = Field(description="targets of each head")
    rank_hits: tuple[tuple[Count, ...], ...] = Field(
        description="of each head, the number of targets that it ranks at 0, 1, .., 9"
    )


class ArmResult(Versioned):
    """One arm with one seed: what it trained on, and what came of backbone and heads."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    arm: str = Field(description="name that the suite gives the arm; start is the untouched model")
    seed: Whole | None = Field(description="seed of its training; null for the start")
    recipe_name: str | None = Field(description="name of its recipe; null for the start")
    recipe: dict[str, Any] | None = Field(description="the [recipe] table as it ran; null for the start")
    num_steps: Count = Field(description="optimiser steps")
    num_sequences: Count = Field(description="sequences that it trained on")
    num_answer_tokens: Count = Field(description="answer tokens that it learned from")
    train_s: Seconds = Field(description="seconds of its training steps")
    evaluate_s: Seconds = Field(description="seconds that its measurement took")
    memory_bytes: Count | None = Field(
        description="most bytes that a step of training held (on a CPU: resident); null for the start"
    )
    backbone_sha256s: tuple[str, str] | None = Field(
        default=None,
        description="hashes of a frozen backbone's tensors in memory, before and after training; null for a "
        "tuned one",
    )
    heads_sha256: str = Field(description="SHA-256 of the heads' tensors")
    adapter_sha256: str | None = Field(
        description="SHA-256 of the adapter's tensors; null where the backbone is the original"
    )
    held_out: tuple[TextChange, ...] = Field(description="the original model's own greedy answers")
    references: tuple[TextChange, ...] = Field(description="texts that neither model wrote")
    greedy: tuple[GreedyText, ...] = Field(description="one entry a held-out prompt")
    heads: tuple[HeadText, ...] = Field(description="one entry a held-out text")

    @property
    def label(self) -> str:
        """Return what the arm's files are called."""
        return self.arm if self.seed is None else f"{self.arm}-{self.seed}"


class StepPoint(Versioned):
    """What the curves show of one training step; the log holds more."""

    model_config = ConfigDict(extra="ignore")

    step: Count = Field(description="optimiser step, from 1")
    loss: Finite = Field(description="the training's loss, nats a position")
    backbone_loss: Finite | None = Field(
        description="mean loss of the backbone, nats; null where it did not learn"
    )
    head_losses: tuple[Finite | None, ...] = Field(
        description="mean loss of each head over its own targets, nats; null where it had none"
    )
    lambda_0: Finite = Field(description="weight of the heads' losses in the whole loss")
    memory_bytes: Count = Field(
        description="most bytes held since training began: of the GPU's allocator, else resident in memory"
    )


class AblationManifest(Versioned):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    kind: Annotated[Literal["ablation"] | None, KIND] = None
    suite: str = Field(description="name of the ablation")
    num_planned: Count = Field(description="arms times seeds that were to be run, the start included")
    num_arms: Count = Field(description="arms times seeds that are done")
    finished_utc: Annotated[Utc, FINISHED_UTC]
    elapsed_s: Annotated[Seconds, ELAPSED_S]
    sha256: Annotated[dict[FileName, Sha256], FILE_HASHES]


class AblationRecord(RecordFolder):
    """A record folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    noun = "an ablation's record"
    core = ("suite.toml", "environment.json", TREE_FILE, ARMS_FILE)

    @cached_property
    def spec(self) -> AblationSpec:
        return self._spec("suite.toml", AblationSpec, parse_ablation)

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def manifest(self) -> AblationManifest | None:
        return self._optional("manifest.json", AblationManifest)

    @cached_property
    def tree(self) -> ArmTree:
        """Return the one tree that all arms are compared at."""
        return self._read(TREE_FILE, ArmTree)

    @cached_property
    def results(self) -> tuple[ArmResult, ...]:
        return read_results(self.file(ARMS_FILE), allow_torn_tail=self.unsealed is not None)

    def of(self, arm: str) -> tuple[ArmResult, ...]:
        """Return an arm's results, one a seed; none where it was not run."""
        return tuple(result for result in self.results if result.arm == arm)

    def trace(self, result: ArmResult) -> Trace:
        """Return the trace of the greedy text that an arm wrote itself."""
        return Trace.load(self.file(trace_file(result.label)))

    def original_text_trace(self, result: ArmResult) -> Trace | None:
        """Return the trace of the original model's greedy answers as this arm reads them.

        A frozen backbone's own text is that text. None in a record from before it was taken.
        """
        if result.adapter_sha256 is None:
            return self.trace(result)
        path = self.file(original_text_file(result.label))
        return Trace.load(path) if path.exists() else None

    def steps(self, result: ArmResult) -> tuple[StepPoint, ...]:
        """Return the training steps of an arm; none for the start."""
        path = self.file(steps_file(result.label))
        lines = lines_of(read_text(path)) if path.exists() else []
        try:
            context = ReadFrom(path.name)
            return tuple(StepPoint.model_validate_json(line, context=context) for line in lines)
        except ValidationError as error:
            raise UserError(
                found="an unreadable step log", need="one step a line", where=path.name
            ) from error


def newest_ablations(results: Path) -> tuple[AblationRecord, ...]:
    """Return the newest finished record of every ablation in a folder of results."""
    newest: dict[str, Path] = {}
    for manifest in sorted(results.glob("*/*/*/manifest.json"), key=lambda path: path.parent.name):
        with contextlib.suppress(UserError):  # a folder of something else, or of a kind yet to come
            if kind_of(manifest.parent) == "ablation":
                newest[manifest.parents[2].name] = manifest.parent
    return tuple(AblationRecord.open(newest[suite]) for suite in sorted(newest))


def trace_file(label: str) -> str:
    """Return the name of an arm's trace."""
    return f"trace-{label}.npz"


def original_text_file(label: str) -> str:
    """Return the name of an arm's trace of the original model's text."""
    return f"trace-original-text-{label}.npz"


def steps_file(label: str) -> str:
    """Return the name of an arm's step log."""
    return f"steps-{label}.jsonl"


def read_results(path: Path, *, allow_torn_tail: bool = False) -> tuple[ArmResult, ...]:
    """Return the arms of an `arms.jsonl`, read as `files.read_lines` does."""
    return read_versioned_lines(
        path, ArmResult.model_validate_json, holds="one arm", allow_torn_tail=allow_torn_tail
    )


ABLATION = StoreKind(
    record_kind="ablation",
    noun="run",
    spec_noun="suite",
    spec_file="suite.toml",
    provenance_file="environment.json",
    lines=LineFile[ArmResult](ARMS_FILE, read_results),
    begun=lambda folder: (AblationRecord(folder).spec, AblationRecord(folder).environment),
    identity=ENGINE_IDENTITY,
    unsealed=(*UNSEALED, "curves.png"),
)
