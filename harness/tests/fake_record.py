"""A complete, sealed record folder with known right answers, made without a model or a clock, and the means
to spoil any part of it.

The made-up world: on prompt p head k's best token is right with probability HEAD_HITS[k - 1], less on hard
prompts; a step of arm a takes STEP_S[a] seconds. So acceleration rates are those of a replay of `trace.npz`,
overheads are STEP_S[a] / STEP_S["vanilla"] (exactly with `jitter=0`), and a step of N nodes costs
`node_cost(N)`. Every claim's transfer form that the embedded suite decides holds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.compose.replay import replay
from harness.files import file_sha256, write_bytes, write_json
from harness.records.probes import (
    DeviceLimits,
    HeadsControl,
    Profile,
    ProfileRow,
    Rounding,
    ShapeShift,
    StepCost,
    StepCosts,
)
from harness.records.provenance import DeviceInfo, Environment
from harness.records.run import ArmTree, ArmTrees, Likelihood, Likelihoods, RunRecord
from harness.records.trace import PromptTrace, Trace, TraceProvenance
from harness.records.trials import Failure, Generation, TrialKey
from harness.specs.suite import RejectionAcceptance, SuiteSpec, parse_suite
from medusa_impl.tree import DraftTree
from medusa_impl.tree_search import grow_by_joint_hits

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
HEAD_HITS = (0.62, 0.50, 0.42, 0.37, 0.34)
STEP_S = {
    "vanilla": 0.020,
    "chain": 0.0215,
    "cartesian": 0.0235,
    "optimised_64": 0.0240,
    "hf_greedy": 0.0280,
    "vanilla_sampled": 0.0205,
    "typical": 0.0246,
    "rejection": 0.0246,
}
SAMPLED_RATES = {"typical": 0.55, "rejection": 0.40}  # the chance that a drafted token is kept
MEAN_LOG_LIKELIHOODS = {"vanilla_sampled": -1.20, "typical": -1.10, "rejection": -1.20}
EOS_ID = 2
VOCAB_SIZE = 500
MAX_NEW_TOKENS = 40
BACKBONE_ONE_NODE_S = 0.0196
PROCESSOR_SHARE = 0.98
VANILLA_BANDWIDTH_SHARE = 0.8
WEIGHT_BYTES = 540_000_000
HEADS_BYTES = 6_600_000
SUITE_TOML = """schema_version = 1
kind = "suite"
name = "fake"
description = "A made-up run with known right answers."
reports_speed = {reports_speed}
max_new_tokens = {max_new_tokens}
rounds = {rounds}
headline_arm = "optimised_64"

[model]
dtype = "{dtype}"
asset = "smollm2-135m-instruct"

[heads]
path = "heads"

[prompts]
source = "mt_bench"
per_category = 2

[interval]
num_resamples = 1000

[[arms]]
name = "vanilla"
method = "vanilla"

[[arms]]
name = "chain"
method = "medusa"
baseline = "vanilla"
tree = {{ kind = "chain", depth = 5 }}
acceptance = {{ rule = "greedy" }}

[[arms]]
name = "cartesian"
method = "medusa"
baseline = "vanilla"
tree = {{ kind = "cartesian", max_nodes = 64 }}
acceptance = {{ rule = "greedy" }}

[[arms]]
name = "optimised_64"
method = "medusa"
baseline = "vanilla"
tree = {{ kind = "searched", num_nodes = 64, values = "joint" }}
acceptance = {{ rule = "greedy" }}

[[arms]]
name = "hf_greedy"
method = "hf_greedy"
baseline = "vanilla"

[[arms]]
name = "vanilla_sampled"
method = "vanilla"
temperature = 0.7
seeds = [1, 2]

[[arms]]
name = "typical"
method = "medusa"
baseline = "vanilla_sampled"
tree = {{ kind = "searched", num_nodes = 64, values = "joint" }}
acceptance = {{ rule = "typical", temperature = 0.7, epsilon = 0.3, delta = 0.09 }}
seeds = [1, 2]

[[arms]]
name = "rejection"
method = "medusa"
baseline = "vanilla_sampled"
tree = {{ kind = "searched", num_nodes = 64, values = "joint" }}
acceptance = {{ rule = "rejection", temperature = 0.7 }}
seeds = [1, 2]
"""


def fake_rounding(largest: float, *, dtype: str = "bfloat16") -> Rounding:
    """A measured rounding whose largest shift is known, of gaps and of heads; smaller in vanilla's shape."""
    small = ShapeShift(
        arms=("vanilla",),
        num_nodes=1,
        num_positions=252,
        p50=0.0,
        p90=0.0,
        p99=largest / 4,
        largest=largest / 2,
    )
    large = ShapeShift(
        arms=("optimised_64",),
        num_nodes=64,
        num_positions=252,
        p50=0.0,
        p90=0.0,
        p99=largest / 2,
        largest=largest,
    )
    return Rounding(dtype=dtype, num_texts=4, num_candidates=33, gaps=(small, large), heads=(large,))


def node_cost(num_nodes: int) -> float:
    """The true step cost of the fake device: a backbone step at so many nodes over one node."""
    return 1 + 0.0025 * (num_nodes - 1)


@dataclass
class FakeParts:
    """Everything that goes into the folder; `spoil` changes it before it is written and sealed."""

    suite_text: str
    environment: Environment
    trees: dict[str, ArmTree]
    outcomes: list[Generation | Failure]
    step_costs: StepCosts | None
    profile: Profile | None
    device_limits: DeviceLimits | None
    heads_control: HeadsControl | None
    likelihoods: Likelihoods | None
    trace: Trace | None
    rounding: Rounding | None = None
    manifest_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def suite(self) -> SuiteSpec:
        """The suite as its text says now."""
        return parse_suite(self.suite_text, where="suite.toml")

    def edit(
        self,
        change: Callable[[Generation], Mapping[str, Any]],
        *,
        arm: str | None = None,
        prompt_key: str | None = None,
        limit: int | None = None,
    ) -> int:
        """Replace fields of the chosen generations, at most `limit` of them, by what `change` returns; say
        how many were chosen.
        """
        edited = 0
        for index, outcome in enumerate(self.outcomes):
            chosen = (
                isinstance(outcome, Generation)
                and arm in (None, outcome.trial.arm)
                and prompt_key in (None, outcome.trial.prompt_key)
            )
            if chosen and isinstance(outcome, Generation) and (limit is None or edited < limit):
                self.outcomes[index] = outcome.model_copy(update=dict(change(outcome)))
                edited += 1
        return edited


def write_fake_record(
    folder: Path,
    *,
    spoil: Callable[[FakeParts], object] | None = None,
    omit: Collection[str] = (),
    reports_speed: bool = True,
    rounds: int = 2,
    num_prompts: int = 16,
    jitter: float = 0.02,
    dtype: str = "float32",
    step_s: Mapping[str, float] | None = None,
    head_hits: tuple[float, ...] = HEAD_HITS,
    seed: int = 0,
) -> RunRecord:
    """Write a record folder and return it; with the defaults it passes every validity check.

    `spoil` changes the parts before they are written and sealed; `omit` names files to leave out
    (`manifest.json` among them); `step_s` overrides STEP_S arm by arm; `jitter` is the standard deviation of
    the log of a trial's speed; `head_hits` are the chances that each head's best token is right. To damage a
    sealed file, change it in the folder afterwards.
    """
    unspoilt = fake_parts(
        reports_speed=reports_speed,
        rounds=rounds,
        num_prompts=num_prompts,
        jitter=jitter,
        dtype=dtype,
        step_s=tuple({**STEP_S, **(step_s or {})}.items()),
        head_hits=head_hits,
        seed=seed,
    )
    parts = replace(
        unspoilt, outcomes=list(unspoilt.outcomes), trees=dict(unspoilt.trees), manifest_changes={}
    )
    if spoil is not None:
        spoil(parts)
    write_parts(folder, parts, omit=omit)
    return RunRecord(folder)


@cache
def fake_parts(
    *,
    reports_speed: bool,
    rounds: int,
    num_prompts: int,
    jitter: float,
    dtype: str,
    step_s: tuple[tuple[str, float], ...],
    head_hits: tuple[float, ...],
    seed: int,
) -> FakeParts:
    """Make all parts of an unspoilt record in memory, once for each set of arguments; copy before changing
    them.
    """
    rng = np.random.default_rng(seed)
    suite_text = SUITE_TOML.format(
        reports_speed=str(reports_speed).lower(), max_new_tokens=MAX_NEW_TOKENS, rounds=rounds, dtype=dtype
    )
    suite = parse_suite(suite_text, where="suite.toml")
    trace = _trace(rng, num_prompts=num_prompts, head_hits=head_hits, dtype=dtype)
    calibration = _trace(rng, num_prompts=4 * num_prompts, head_hits=head_hits, dtype=dtype)
    trees = _trees(suite, calibration)
    outcomes = _outcomes(suite, trace, trees=trees, rng=rng, jitter=jitter, step_s=dict(step_s))
    scores = [
        (outcome.trial, float(rng.normal(0, 0.05)))
        for outcome in outcomes
        if outcome.trial.arm in MEAN_LOG_LIKELIHOODS
    ]
    return FakeParts(
        suite_text=suite_text,
        environment=_environment(dtype),
        trees=trees,
        outcomes=list(outcomes),
        step_costs=_step_costs(suite, trees=trees, step_s=dict(step_s)),
        profile=_profile(trees, step_s=dict(step_s)),
        device_limits=DeviceLimits(
            read_bandwidth_bytes_per_s=WEIGHT_BYTES / (STEP_S["vanilla"] * VANILLA_BANDWIDTH_SHARE),
            matmul_flop_per_s=4e12,
            row_product_bytes_per_s=WEIGHT_BYTES / STEP_S["vanilla"],
            method="made up",
        ),
        heads_control=HeadsControl(
            num_positions=640,
            trained_top1=head_hits,
            random_top1=tuple(0.002 for _ in head_hits),
            identity_top1=tuple(0.05 for _ in head_hits),
        ),
        likelihoods=Likelihoods(
            rows=tuple(
                Likelihood(trial=trial, mean_log_likelihood=MEAN_LOG_LIKELIHOODS[trial.arm] + noise)
                for trial, noise in scores
            )
        ),
        trace=trace,
    )


def write_parts(folder: Path, parts: FakeParts, *, omit: Collection[str] = ()) -> None:
    """Write the parts, then the manifest that seals them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "suite.toml", parts.suite_text.encode())
    write_bytes(
        folder / "generations.jsonl",
        "".join(outcome.model_dump_json() + "\n" for outcome in parts.outcomes).encode(),
    )
    models = {
        "environment": parts.environment,
        "trees": ArmTrees(trees=parts.trees),
        "step_costs": parts.step_costs,
        "profile": parts.profile,
        "device_limits": parts.device_limits,
        "heads_control": parts.heads_control,
        "likelihoods": parts.likelihoods,
        "rounding": parts.rounding,
    }
    for name, model in models.items():
        if model is not None:
            write_json(folder / f"{name}.json", model)
    if parts.trace is not None:
        parts.trace.save(folder / "trace.npz")
    for name in omit:
        (folder / name).unlink(missing_ok=True)
    if "manifest.json" not in omit:
        write_bytes(folder / "manifest.json", _manifest(folder, parts).encode())


def _manifest(folder: Path, parts: FakeParts) -> str:
    finished = {outcome.trial for outcome in parts.outcomes if isinstance(outcome, Generation)}
    failed = {outcome.trial for outcome in parts.outcomes if isinstance(outcome, Failure)} - finished
    prompts = {outcome.trial.prompt_key for outcome in parts.outcomes}
    content = {
        "schema_version": 1,
        "suite": parts.suite.name,
        "num_planned": len(prompts)
        * parts.suite.rounds
        * sum(max(1, len(arm.seeds)) for arm in parts.suite.arms),
        "num_generations": len(finished),
        "num_failures": len(failed),
        "finished_utc": "2024-01-19T12:00:00Z",
        "elapsed_s": 600.0,
        "peak_memory_bytes": 2_000_000_000,
        "sha256": {
            path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"
        },
    }
    return json.dumps(content | parts.manifest_changes, indent=1) + "\n"


def _trace(rng: np.random.Generator, *, num_prompts: int, head_hits: tuple[float, ...], dtype: str) -> Trace:
    prompts = []
    for number in range(num_prompts):
        ends_early = number % 4 == 3
        num_tokens = int(rng.integers(MAX_NEW_TOKENS // 2, MAX_NEW_TOKENS)) if ends_early else MAX_NEW_TOKENS
        tokens = rng.integers(EOS_ID + 1, VOCAB_SIZE, size=num_tokens)
        if ends_early:
            tokens[-1] = EOS_ID
        ease = float(np.exp(rng.normal(0, 0.15)))
        hits = np.clip(np.array(head_hits) * ease, 0.02, 0.97)
        shape = (num_tokens, len(head_hits))
        # shared by the heads of a row, so that they are right and wrong together
        easy = rng.random((num_tokens, 1))
        best = (easy + rng.random(shape)) / 2 < _quantile_of_mean(hits)
        ranks = np.where(best, 0, rng.geometric(0.25, size=shape))
        beyond = np.arange(1, num_tokens + 1)[:, None] + np.arange(1, len(head_hits) + 1) > num_tokens
        nll = 1.2 + 0.6 * np.arange(len(head_hits)) + rng.normal(0, 0.2, size=shape)
        prompts.append(
            PromptTrace(
                key=f"mt_bench-{81 + number}",
                category=CATEGORIES[number * len(CATEGORIES) // num_prompts],
                prompt_tokens=30 + number,
                tokens=tokens.astype(np.int64),
                ended_by="eos" if ends_early else "budget",
                ranks=np.where(beyond, -1, ranks).astype(np.int32),
                gaps=(0.05 + rng.exponential(2.0, size=num_tokens)).astype(np.float32),
                nll=np.where(beyond, np.nan, nll).astype(np.float32),
            )
        )
    provenance = TraceProvenance(
        model_hash="b" * 64, heads_hash="c" * 64, dtype=dtype, max_new_tokens=MAX_NEW_TOKENS
    )
    return Trace(provenance=provenance, prompts=tuple(prompts))


def _quantile_of_mean(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quantile of the mean of two uniform numbers."""
    return np.where(share < 0.5, np.sqrt(share / 2), 1 - np.sqrt((1 - share) / 2))


def _trees(suite: SuiteSpec, calibration: Trace) -> dict[str, ArmTree]:
    made = {
        "chain": DraftTree.chain(calibration.num_heads),
        "cartesian": DraftTree.cartesian((3, 2, 2, 2)),
        "searched": grow_by_joint_hits(calibration.ranks, num_nodes=64, max_rank=10, max_depth=4).tree,
    }
    return {
        arm.name: ArmTree(
            paths=made[arm.tree.kind].paths,
            origin=f"{arm.tree.kind}, made up",
            predicted_tokens_per_step=replay(calibration, made[arm.tree.kind]).tokens_per_step,
        )
        for arm in suite.arms
        if arm.tree is not None
    }


def _outcomes(
    suite: SuiteSpec,
    trace: Trace,
    *,
    trees: Mapping[str, ArmTree],
    rng: np.random.Generator,
    jitter: float,
    step_s: Mapping[str, float],
) -> list[Generation]:
    greedy_steps = {
        arm.name: _greedy_steps(trace, trees[arm.name].tree())
        for arm in suite.arms
        if arm.name in trees and not arm.stochastic
    }
    sampled = {
        (arm.name, prompt.key, seed): _sampled(rng, arm=arm.name, tree=trees.get(arm.name))
        for arm in suite.arms
        for prompt in trace.prompts
        for seed in arm.seeds
    }
    for arm_name, key, seed in sampled:  # rejection keeps to its baseline's law, draw for draw
        arm = suite.arm(arm_name)
        if arm.method == "medusa" and isinstance(arm.acceptance, RejectionAcceptance) and arm.baseline:
            tokens, _ = sampled[arm.baseline, key, seed]
            sampled[arm_name, key, seed] = (tokens, sampled[arm_name, key, seed][1])
    generations: list[Generation] = []
    for round_number in range(suite.rounds):
        for number, prompt in enumerate(trace.prompts):
            block = [(arm, seed) for arm in suite.arms for seed in (arm.seeds or (None,))]
            for index in rng.permutation(len(block)):
                arm, seed = block[index]
                if seed is not None:
                    tokens, steps = sampled[arm.name, prompt.key, seed]
                else:
                    tokens = tuple(prompt.tokens.tolist())
                    steps = (
                        greedy_steps[arm.name][number]
                        if arm.name in greedy_steps
                        else (1,) * (len(tokens) - 1)
                    )
                time = step_s[arm.name] * float(np.exp(rng.normal(0, jitter)))
                generations.append(
                    Generation(
                        trial=TrialKey(arm=arm.name, prompt_key=prompt.key, round=round_number, seed=seed),
                        order=len(generations),
                        category=prompt.category,
                        prompt_tokens=prompt.prompt_tokens,
                        token_ids=tokens,
                        ended_by="eos" if tokens[-1] == EOS_ID else "budget",
                        step_tokens=steps,
                        step_times_s=(time,) * len(steps),
                        prefill_s=3 * STEP_S["vanilla"],
                        peak_memory_bytes=1_500_000_000,
                        cache_bytes=20_000_000,
                        load_average=2.0,
                        processor_s=PROCESSOR_SHARE * (3 * STEP_S["vanilla"] + time * len(steps)),
                    )
                )
    return generations


def _greedy_steps(trace: Trace, tree: DraftTree) -> list[tuple[int, ...]]:
    replayed = replay(trace, tree)
    cuts = replayed.offsets.tolist()
    return [
        tuple(replayed.acceptance_lengths[start:stop].tolist()) for start, stop in itertools.pairwise(cuts)
    ]


def _sampled(
    rng: np.random.Generator, *, arm: str, tree: ArmTree | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokens = tuple(rng.integers(EOS_ID + 1, VOCAB_SIZE, size=MAX_NEW_TOKENS).tolist())
    left, steps = MAX_NEW_TOKENS - 1, []
    longest = 1 if tree is None else tree.tree().depth + 1
    while left:
        kept = 1
        while kept < min(longest, left) and rng.random() < SAMPLED_RATES[arm]:
            kept += 1
        steps.append(kept)
        left -= kept
    return tokens, tuple(steps)


def _environment(dtype: str) -> Environment:
    return Environment(
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        command="medusa-repro run suites/fake.toml",
        python="3.11.9",
        packages={"torch": "2.13.0", "transformers": "5.23.0"},
        device=DeviceInfo(
            kind="cpu", name="made-up CPU", num_cores=2, num_threads=2, memory_bytes=8_000_000_000
        ),
        engine="eager",
        dtype=dtype,
        blas="mkl",
        variables={"OMP_NUM_THREADS": "2"},
        backbone_sha256="b" * 64,
        heads_sha256="c" * 64,
        prompts_sha256="d" * 64,
        model_name="made-up model",
        weight_bytes=WEIGHT_BYTES,
        heads_bytes=HEADS_BYTES,
        started_utc="2024-01-19T11:50:00Z",
    )


def _step_costs(suite: SuiteSpec, *, trees: Mapping[str, ArmTree], step_s: Mapping[str, float]) -> StepCosts:
    spread = (0.99, 1.0, 1.01)

    def row(num_nodes: int, *, arm: str | None, num_heads: int) -> StepCost:
        return StepCost(
            arm=arm,
            num_nodes=num_nodes,
            num_heads=num_heads,
            context_tokens=suite.probes.step_context_tokens,
            backbone_s=tuple(BACKBONE_ONE_NODE_S * node_cost(num_nodes) * factor for factor in spread),
            step_s=() if arm is None else tuple(step_s[arm] * factor for factor in spread),
        )

    generic = [row(num_nodes, arm=None, num_heads=0) for num_nodes in suite.probes.step_nodes]
    vanilla = [row(1, arm=arm.name, num_heads=0) for arm in suite.arms if arm.method == "vanilla"]
    medusa = [row(len(tree.paths), arm=name, num_heads=tree.tree().depth) for name, tree in trees.items()]
    return StepCosts(costs=tuple(generic + vanilla + medusa))


def _profile(trees: Mapping[str, ArmTree], *, step_s: Mapping[str, float]) -> Profile:
    def row(arm: str, *, heads_share: float) -> ProfileRow:
        total = 100 * step_s[arm]
        return ProfileRow(
            arm=arm,
            num_steps=100,
            step_s=total,
            backbone_s=(0.97 - heads_share) * total,
            heads_s=heads_share * total,
            candidates_s=0.01 * total,
            acceptance_s=0.01 * total,
            cache_s=0.01 * total,
        )

    return Profile(rows=(row("vanilla", heads_share=0.0), *(row(arm, heads_share=0.04) for arm in trees)))
