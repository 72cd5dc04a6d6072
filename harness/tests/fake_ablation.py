"""A complete, sealed ablation record with known right answers, made without a model.

Two heads, a chain of two as the one tree, prompts of 41 tokens: of every ten rows of an arm's trace, `hits`
are right in both heads (three tokens a step), the others beyond what a tree may hold (one). KL, likelihood
and memory are set by arm; seed 1 has a tenth more KL than seed 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from harness.files import file_sha256, write_bytes, write_json
from harness.records.ablation import (
    ARMS_FILE,
    AblationManifest,
    AblationRecord,
    ArmResult,
    GreedyText,
    HeadText,
    TextChange,
    original_text_file,
    steps_file,
    trace_file,
)
from harness.records.run import ArmTree
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.specs.ablation import AblationSpec
from harness.tests.fake_latency import fake_environment
from medusa_impl.tree import DraftTree

NUM_PROMPTS, NUM_TOKENS, NUM_HEADS = 24, 41, 2
ORIGINAL_NLL = 0.5  # nats a token


@dataclass(frozen=True)
class FakeArm:
    """What an arm's figures are made from."""

    hits: float
    kl: float
    memory_mb: int = 1000
    original_hits: float | None = None  # on the original's text, where it is another than its own
    seed_hits: float | None = None  # of seed 1, where its training came out otherwise
    target: str = "original"
    num_layers: int = 1
    changed: bool = False  # a tensor of a frozen backbone
    reference_nll: float | None = (
        None  # nats a token on texts that neither model wrote, where it does not follow from KL
    )
    rise: float = 0.5  # nats that each head loses more than the one before it, on the arm's own text
    last_hits: float = 10.0  # of the rows that are right: those where the last head is right too


ARMS: Mapping[str, FakeArm] = {
    "start": FakeArm(hits=4, kl=0.0),
    "medusa1": FakeArm(hits=5, kl=0.0),
    "two_stage": FakeArm(hits=7, kl=0.008),
    "ramped": FakeArm(hits=8, kl=0.01, memory_mb=1040),
    "no_warmup": FakeArm(hits=8, kl=0.02),
    "direct": FakeArm(hits=8, kl=0.05),
    "hard_labels": FakeArm(hits=8, kl=0.08, target="tokens"),
}


def spec_data(**changes: Any) -> dict[str, Any]:
    """A suite of all arms but the start, two seeds."""
    data = {
        "schema_version": 1,
        "kind": "ablation",
        "name": "fake_training",
        "description": "A made-up ablation with known right answers.",
        "decides_claims": True,
        "answer_tokens": 50_000,
        "seeds": [0, 1],
        "packed_corpus": "embedded/corpus.safetensors",
        "start_heads": "embedded/medusa1.safetensors",
        "expected_tokens_per_s": 40.0,
        "best_tree_nodes": 3,
        "model": {"asset": "smollm2-135m-instruct"},
        "tree": {"kind": "chain", "depth": 2},
        "held_out": {"num_prompts": NUM_PROMPTS, "max_new_tokens": NUM_TOKENS, "seed": 11},
        "interval": {"num_resamples": 500},
        "arms": [{"name": name, "recipe": f"embedded_{name}"} for name in ARMS if name != "start"],
        **changes,
    }
    return {name: value for name, value in data.items() if value is not None}


def fake_trace(
    hits: float, *, rise: float = 0.5, num_heads: int = NUM_HEADS, last_hits: float = 10.0
) -> Trace:
    """Traces whose rows are right in all heads for `hits` of every ten positions, drawn by a fixed seed.

    In the last head that is so for `last_hits` of every ten of these rows.
    """
    prompts = []
    for number in range(NUM_PROMPTS):
        rng = np.random.default_rng(number)  # the same for every arm: texts pair
        right = rng.random(NUM_TOKENS) < hits / 10
        ranks = np.where(right[:, None], 0, 999) * np.ones((1, num_heads), dtype=np.int32)
        ranks[rng.random(NUM_TOKENS) >= last_hits / 10, -1] = 999
        beyond = np.arange(1, NUM_TOKENS + 1)[:, None] + np.arange(1, num_heads + 1) > NUM_TOKENS
        nll = np.where(right[:, None], 0.2, 2.0) + rise * np.arange(num_heads)
        prompts.append(
            PromptTrace(
                key=f"p{number:02d}",
                category="writing",
                prompt_tokens=9,
                tokens=np.arange(NUM_TOKENS) + 1,
                ended_by="budget",
                ranks=np.where(beyond, -1, ranks).astype(np.int32),
                nll=np.where(beyond, np.nan, nll).astype(np.float32),
            )
        )
    provenance = TraceProvenance(
        model_hash="b" * 64, heads_hash="c" * 64, dtype="float32", max_new_tokens=NUM_TOKENS
    )
    return Trace(provenance=provenance, prompts=tuple(prompts))


def fake_result(name: str, arm: FakeArm, *, seed: int | None) -> ArmResult:
    """One arm's line."""
    kl = arm.kl * (1.1 if seed == 1 else 1.0)
    texts = tuple(
        _change(f"p{number:02d}", "writing", kl * (0.8 + 0.4 * (number % 2)), 40)
        for number in range(NUM_PROMPTS)
    )
    references = tuple(
        _change(f"r{number}", ("math", "coding")[number % 2], 2 * kl, 100, nll=arm.reference_nll)
        for number in range(8)
    )
    recipe = {"num_layers": arm.num_layers, "target": arm.target, "seed": seed}
    hits = tuple((8 - 2 * head, 2, *([0] * 8)) for head in range(NUM_HEADS))
    return ArmResult(
        arm=name,
        seed=seed,
        recipe_name=f"embedded_{name}" if seed is not None else None,
        recipe=recipe if seed is not None else None,
        backbone_sha256s=("b" * 64, ("d" if arm.changed else "b") * 64) if name == "medusa1" else None,
        num_steps=3 if seed is not None else 0,
        num_sequences=400 if seed is not None else 0,
        num_answer_tokens=50_000 if seed is not None else 0,
        train_s=1000.0 if seed is not None else 0.0,
        evaluate_s=60.0,
        memory_bytes=arm.memory_mb * 10**6 if seed is not None else None,
        heads_sha256="e" * 64,
        adapter_sha256="f" * 64 if arm.kl else None,
        held_out=texts,
        references=references,
        greedy=tuple(
            GreedyText(
                key=f"p{number:02d}",
                num_tokens=41,
                num_original_tokens=41,
                num_shared=41 if number % 4 or not arm.kl else 7,
            )
            for number in range(NUM_PROMPTS)
        ),
        heads=tuple(
            HeadText(key=text.key, loss_sums=(5.0, 9.0), num_targets=(10, 10), rank_hits=hits)
            for text in texts
        ),
    )


def write_fake_ablation(
    folder: Path,
    *,
    arms: Mapping[str, FakeArm] = ARMS,
    seal: bool = True,
    num_heads: int = NUM_HEADS,
    **changes: Any,
) -> AblationRecord:
    """Write the whole record; `num_heads` is that of its traces, `changes` go into its suite."""
    folder.mkdir(parents=True)
    data = spec_data(
        **{
            "arms": [{"name": name, "recipe": f"embedded_{name}"} for name in arms if name != "start"],
            **changes,
        }
    )
    spec = AblationSpec.model_validate(data)
    write_bytes(folder / "suite.toml", tomli_w.dumps(data).encode())
    write_json(folder / "environment.json", fake_environment())
    write_json(folder / "tree.json", ArmTree(paths=DraftTree.chain(2).paths, origin="chain of 2"))
    lines = []
    for name, seed in spec.plan():
        result = fake_result(name, arms[name], seed=seed)
        lines.append(result.model_dump_json() + "\n")
        arm = arms[name]
        own = arm.seed_hits if seed == 1 else None
        made = partial(fake_trace, num_heads=num_heads, last_hits=arm.last_hits)
        made(arm.hits if own is None else own, rise=arm.rise).save(folder / trace_file(result.label))
        if result.adapter_sha256 is not None:
            made(arm.hits if arm.original_hits is None else arm.original_hits).save(
                folder / original_text_file(result.label)
            )
        if seed is not None:
            steps = [
                f'{{"step": {step}, "loss": 1.0, "backbone_loss": {0.01 * step}, "head_losses": [1.0, '
                f'{2.0 + seed}], "lambda_0": 0.1, '
                f'"memory_bytes": 1}}\n'
                for step in (1, 2, 3)
            ]
            (folder / steps_file(result.label)).write_text("".join(steps))
    (folder / ARMS_FILE).write_text("".join(lines))
    if seal:
        manifest = AblationManifest(
            suite=spec.name,
            num_planned=len(spec.plan()),
            num_arms=len(lines),
            finished_utc="2024-01-19T12:00:00Z",
            elapsed_s=3600.0,
            sha256={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
        )
        write_json(folder / "manifest.json", manifest)
    return AblationRecord(folder)


def _change(key: str, category: str, kl: float, count: int, *, nll: float | None = None) -> TextChange:
    return TextChange(
        key=key,
        category=category,
        num_positions=count,
        kl_sum=kl * count,
        original_nll_sum=ORIGINAL_NLL * count,
        tuned_nll_sum=(ORIGINAL_NLL + kl if nll is None else nll) * count,
        num_agreements=count - (2 if kl else 0),
    )
