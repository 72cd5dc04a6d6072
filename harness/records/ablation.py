"""The record of an ablation: what every arm did, by text, in sums; no torch, no clock, no device.

A record folder holds `suite.toml`, `environment.json`, `tree.json`, `arms.jsonl` (one line an arm and seed,
appended when it is done), for each line a trace `trace-ARM-SEED.npz` of the arm's own greedy text, for a
tuned backbone `trace-original-text-ARM-SEED.npz` of the original model's text, and, but for the start, the
log `steps-ARM-SEED.jsonl`, and, last, `manifest.json`, which seals it with the SHA-256 of every other file.
Ratios are formed in `ablation_figures.py`, each time anew.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError
from harness.files import Frozen, read_lines
from harness.records.folder import RecordFolder
from harness.records.provenance import ENGINE_IDENTITY, Environment
from harness.records.run import ArmTree
from harness.records.store import MANIFEST_FILE, REPORT_FILE, LineFile, StoreKind
from harness.records.trace import Trace
from harness.specs.ablation import AblationSpec, parse_ablation

ARMS_FILE, TREE_FILE = "arms.jsonl", "tree.json"


class TextChange(Frozen):
    """One text under the original and the tuned model: sums over the positions that its answers' tokens were
    read at.

    Units: nats. `kl_sum` is KL(original || tuned); the likelihoods are of the text's own tokens;
    `num_agreements` counts equal first choices.
    """

    key: str
    category: str | None
    num_positions: int
    kl_sum: float
    original_nll_sum: float
    tuned_nll_sum: float
    num_agreements: int


class GreedyText(Frozen):
    """One prompt's greedy answers: lengths, and how many tokens they share before they part (all of them
    where they are equal).
    """

    key: str
    num_tokens: int
    num_original_tokens: int
    num_shared: int

    @property
    def is_equal(self) -> bool:
        """Whether the two answers are the same."""
        return self.num_tokens == self.num_original_tokens == self.num_shared


class HeadText(Frozen):
    """The heads on one held-out text, whole vocabulary: sums over their targets.

    Shapes: loss_sums (nats) and num_targets `[K]`; rank_hits `[K, 10]`, targets at rank 0..9 of each head.
    """

    key: str
    loss_sums: tuple[float, ...]
    num_targets: tuple[int, ...]
    rank_hits: tuple[tuple[int, ...], ...]


class ArmResult(Frozen):
    """One arm with one seed: what it trained on, and what came of backbone and heads.

    `recipe` is the [recipe] table as it ran, None for the start. `held_out` are the original model's own
    greedy answers, `references` texts of another hand. `memory_bytes` is the most that a step of training
    held (on a CPU: of its process). `backbone_sha256s` are the hashes of a frozen backbone's tensors in
    memory before and behind its training.
    """

    schema_version: Literal[1] = 1
    arm: str
    seed: int | None
    recipe_name: str | None
    recipe: dict[str, Any] | None
    num_steps: int
    num_sequences: int
    num_answer_tokens: int
    train_s: float
    evaluate_s: float
    memory_bytes: int | None
    backbone_sha256s: tuple[str, str] | None = None
    heads_sha256: str
    adapter_sha256: str | None
    held_out: tuple[TextChange, ...]
    references: tuple[TextChange, ...]
    greedy: tuple[GreedyText, ...]
    heads: tuple[HeadText, ...]

    @property
    def label(self) -> str:
        """What the arm's files are called."""
        return self.arm if self.seed is None else f"{self.arm}-{self.seed}"


class StepPoint(BaseModel):
    """What the curves show of one training step; the log holds more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    loss: float
    backbone_loss: float | None
    head_losses: tuple[float | None, ...]
    lambda_0: float
    memory_bytes: int


class AblationManifest(Frozen):
    """Written last: a folder without it is an unfinished run."""

    schema_version: Literal[1] = 1
    suite: str
    num_planned: int
    num_arms: int
    finished_utc: str
    elapsed_s: float
    sha256: dict[str, str]


class AblationRecord(RecordFolder):
    """A record folder, read lazily and validated.

    Raises: UserError for a missing, truncated, altered or unreadable file.
    """

    @cached_property
    def spec(self) -> AblationSpec:
        return parse_ablation(self._text("suite.toml"), where="suite.toml")

    @cached_property
    def environment(self) -> Environment:
        return self._read("environment.json", Environment)

    @cached_property
    def manifest(self) -> AblationManifest | None:
        return (
            self._read("manifest.json", AblationManifest)
            if (self.folder / "manifest.json").exists()
            else None
        )

    @cached_property
    def tree(self) -> ArmTree:
        """The one tree that all arms are compared at."""
        return self._read(TREE_FILE, ArmTree)

    @cached_property
    def results(self) -> tuple[ArmResult, ...]:
        return read_results(self.folder / ARMS_FILE)

    def of(self, arm: str) -> tuple[ArmResult, ...]:
        """Return an arm's results, one a seed; none where it was not run."""
        return tuple(result for result in self.results if result.arm == arm)

    def trace(self, result: ArmResult) -> Trace:
        """Return the trace of the greedy text that an arm wrote itself."""
        return Trace.load(self.folder / trace_file(result.label))

    def original_text_trace(self, result: ArmResult) -> Trace | None:
        """Return the trace of the original model's greedy answers as this arm reads them; a frozen backbone's
        own text is that text.

        None in a record from before it was taken.
        """
        if result.adapter_sha256 is None:
            return self.trace(result)
        path = self.folder / original_text_file(result.label)
        return Trace.load(path) if path.exists() else None

    def steps(self, result: ArmResult) -> tuple[StepPoint, ...]:
        """Return the training steps of an arm; none for the start."""
        path = self.folder / steps_file(result.label)
        try:
            return (
                tuple(StepPoint.model_validate_json(line) for line in path.read_text().splitlines())
                if path.exists()
                else ()
            )
        except (OSError, ValidationError) as error:
            raise UserError(
                found="an unreadable step log", need="one step a line", where=path.name
            ) from error


def newest_ablations(results: Path) -> tuple[AblationRecord, ...]:
    """Return the newest finished record of every ablation in a folder of results."""
    newest: dict[str, Path] = {}
    for manifest in sorted(results.glob("*/*/*/manifest.json"), key=lambda path: path.parent.name):
        if (manifest.parent / ARMS_FILE).exists():
            newest[manifest.parents[2].name] = manifest.parent
    return tuple(AblationRecord(newest[suite]) for suite in sorted(newest))


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
    """Read an `arms.jsonl` as `files.read_lines` does."""
    return read_lines(path, ArmResult.model_validate_json, holds="one arm", allow_torn_tail=allow_torn_tail)


ABLATION = StoreKind(
    noun="run",
    spec_noun="suite",
    spec_file="suite.toml",
    provenance_file="environment.json",
    lines=LineFile[ArmResult](ARMS_FILE, read_results),
    begun=lambda folder: (AblationRecord(folder).spec, AblationRecord(folder).environment),
    identity=ENGINE_IDENTITY,
    unsealed=(MANIFEST_FILE, REPORT_FILE, "curves.png"),
)
