"""Arms on a clock whose right answers are known: one second for every token that goes through the
backbone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from harness.device.arms import ArmRunner, TimedGeneration, acceptance_rule, timed
from harness.device.clock import Clock, SectionTimer, device_clock
from harness.device.engine import Engine
from harness.device.prompts import suite_prompts
from harness.errors import UserError
from harness.specs.suite import ArmSpec
from harness.tests.tiny_suite import TickClock, WorkClock, smoke_suite
from medusa_impl.acceptance import GreedyRule, RejectionRule, TypicalRule
from medusa_impl.decode import DecodingStep
from medusa_impl.tree import DraftTree

BUDGET = 32
TREE = DraftTree.cartesian((3, 2, 1))


def runner(
    engine: Engine,
    arm: str | ArmSpec,
    clock: Clock,
    *,
    tree: DraftTree | None = None,
    max_prompt_tokens: int = 64,
) -> ArmRunner:
    spec = smoke_suite().arm(arm) if isinstance(arm, str) else arm
    return ArmRunner(
        engine, spec, tree=tree, max_new_tokens=BUDGET, max_prompt_tokens=max_prompt_tokens, clock=clock
    )


def on_work_clock(
    engine: Engine, arm: str, prompt_ids: tuple[int, ...], *, tree: DraftTree | None = None
) -> TimedGeneration:
    seed = (smoke_suite().arm(arm).seeds or (None,))[0]
    with WorkClock(engine.loaded.model) as clock:
        return runner(engine, arm, clock, tree=tree, max_prompt_tokens=len(prompt_ids)).generate(
            prompt_ids, seed=seed
        )


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt.prompt_ids for prompt in suite_prompts(smoke_suite(), engine.loaded))


@pytest.fixture(scope="module")
def vanilla(engine: Engine, prompts: tuple[tuple[int, ...], ...]) -> list[TimedGeneration]:
    return [on_work_clock(engine, "vanilla", prompt) for prompt in prompts]


def test_vanilla_takes_one_step_a_token_after_the_first(
    prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    for prompt, result in zip(prompts, vanilla, strict=True):
        assert len(result.token_ids) == BUDGET and result.ended_by == "budget"
        assert result.prefill_s == len(prompt)
        assert result.step_tokens == (1,) * (BUDGET - 1)
        assert result.step_times_s == (1.0,) * (BUDGET - 1)
        assert result.cache_bytes


def test_medusa_steps_cost_their_nodes_and_yield_the_same_text(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    for prompt, reference in zip(prompts, vanilla, strict=True):
        result = on_work_clock(engine, "cartesian", prompt, tree=TREE)
        assert result.token_ids == reference.token_ids
        assert result.prefill_s == len(prompt)
        assert sum(result.step_tokens) == BUDGET - 1 and max(result.step_tokens) <= 1 + TREE.depth
        assert result.step_times_s == (float(TREE.num_nodes),) * len(result.step_tokens)
        assert len(result.step_tokens) < BUDGET - 1


def test_stock_greedy_decoding_writes_the_same_text_on_the_same_clock(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    for prompt, reference in zip(prompts, vanilla, strict=True):
        result = on_work_clock(engine, "hf_greedy", prompt)
        assert (result.token_ids, result.ended_by, result.prefill_s) == (
            reference.token_ids,
            "budget",
            reference.prefill_s,
        )
        assert (result.step_tokens, result.step_times_s) == (reference.step_tokens, reference.step_times_s)


class _Poison:
    """A value that is right for no field."""


@pytest.mark.parametrize("arm", ["hf_greedy", "hf_prompt_lookup"])
def test_generate_takes_no_field_from_the_models_own_configuration(
    arm: str, engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    """Qwen2.5's folder asks for a repetition penalty, which made a right engine look wrong."""
    model: Any = engine.loaded.model
    own = model.generation_config
    fields = set(GenerationConfig().to_dict()) - {"transformers_version"}
    assert {
        "repetition_penalty",
        "suppress_tokens",
        "min_new_tokens",
        "stop_strings",
        "cache_config",
    } <= fields
    try:
        model.generation_config = GenerationConfig()
        for field in fields:
            setattr(model.generation_config, field, _Poison())
        poisoned = model.generation_config
        assert on_work_clock(engine, arm, prompts[0]).token_ids == vanilla[0].token_ids
        assert model.generation_config is poisoned
        model.generation_config = GenerationConfig(repetition_penalty=1.8)
        ids = torch.tensor([list(prompts[0])])
        asked = GenerationConfig(max_new_tokens=BUDGET, do_sample=False, pad_token_id=0)
        inherited = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=asked)
        assert tuple(inherited[0, ids.shape[1] :].tolist()) != vanilla[0].token_ids  # so it matters
    finally:
        model.generation_config = own


def test_prompt_lookup_counts_the_tokens_of_each_pass(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    """Transformers 5.17 asks stopping criteria about drafts, too: counted by one, every second step took no
    time and gained nothing.
    """
    longest = 0
    for prompt, reference in zip(prompts, vanilla, strict=True):
        result = on_work_clock(engine, "hf_prompt_lookup", prompt)
        assert result.token_ids == reference.token_ids
        assert sum(result.step_tokens) == BUDGET - 1 and len(result.step_times_s) == len(result.step_tokens)
        assert min(result.step_tokens) >= 1 and min(result.step_times_s) >= 1
        longest = max(longest, *result.step_tokens)
    assert longest > 1


def test_tokens_that_prompt_lookup_finds_with_the_first_one_are_counted_in_a_step_with_time(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    """They were once a step of no time, which made every record with one invalid."""
    seen = 0
    for prompt, reference in zip(prompts, vanilla, strict=True):
        repeated = (*prompt, *reference.token_ids, *prompt)
        with WorkClock(engine.loaded.model) as clock:
            lookup = runner(engine, "hf_prompt_lookup", clock).generate(repeated, seed=None)
        greedy = on_work_clock(engine, "vanilla", repeated)
        assert lookup.token_ids == greedy.token_ids
        assert sum(lookup.step_tokens) == BUDGET - 1 and all(
            seconds > 0 for seconds in (lookup.prefill_s, *lookup.step_times_s)
        )
        seen += lookup.step_tokens[0] > 11  # more than one pass can look up: some came with the first token
    assert seen


@pytest.mark.parametrize("arm", ["vanilla", "cartesian", "hf_greedy", "hf_prompt_lookup"])
def test_every_arm_stops_at_the_first_end_of_sequence(
    arm: str, engine: Engine, prompts: tuple[tuple[int, ...], ...]
) -> None:
    reference = on_work_clock(engine, "vanilla", prompts[0]).token_ids
    end = reference[11]
    length = reference.index(end) + 1
    loaded = type(engine.loaded)(**{**vars(engine.loaded), "eos_ids": frozenset({end})})
    stopping = type(engine)(**{**vars(engine), "loaded": loaded})
    result = on_work_clock(stopping, arm, prompts[0], tree=TREE if arm == "cartesian" else None)
    assert result.token_ids == reference[:length] and result.ended_by == "eos"
    assert sum(result.step_tokens) == length - 1


@pytest.mark.parametrize("arm", ["vanilla", "cartesian"])
def test_a_runner_repeats_itself_and_leaves_nothing_behind(
    arm: str, engine: Engine, prompts: tuple[tuple[int, ...], ...]
) -> None:
    with WorkClock(engine.loaded.model) as clock:
        one = runner(engine, arm, clock, tree=TREE if arm == "cartesian" else None)
        first = one.generate(prompts[0], seed=None)
        other = one.generate(prompts[1], seed=None)
        assert one.generate(prompts[0], seed=None) == first and other.token_ids != first.token_ids


@pytest.mark.parametrize("arm", ["vanilla_sampled", "typical", "rejection"])
def test_seed_decides_a_sampled_text(arm: str, engine: Engine, prompts: tuple[tuple[int, ...], ...]) -> None:
    with WorkClock(engine.loaded.model) as clock:
        one = runner(engine, arm, clock, tree=None if arm == "vanilla_sampled" else DraftTree.chain(4))
        texts = [one.generate(prompts[0], seed=seed).token_ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stock_model_is_given_back_as_it_was(
    engine: Engine, prompts: tuple[tuple[int, ...], ...], vanilla: list[TimedGeneration]
) -> None:
    attention = engine.loaded.model.config._attn_implementation
    on_work_clock(engine, "hf_greedy", prompts[0])
    assert engine.loaded.model.config._attn_implementation == attention
    assert on_work_clock(engine, "vanilla", prompts[0]) == vanilla[0]


def test_decode_clock_starts_with_the_first_token() -> None:
    steps = [
        DecodingStep(tokens=((7,),), ended=(None,)),
        DecodingStep(tokens=((8, 9, 7),), ended=(None,)),
        DecodingStep(((3,),), ("eos",)),
    ]
    clock = TickClock()
    result = timed(iter(steps), clock=clock)
    assert result == TimedGeneration(
        (7, 8, 9, 7, 3), "eos", prefill_s=1.0, step_tokens=(3, 1), step_times_s=(1.0, 1.0), cache_bytes=None
    )
    assert clock.reads == 4  # once before, then once a step: nothing else is timed


def test_acceptance_rules_follow_the_arm() -> None:
    suite, device = smoke_suite(), torch.device("cpu")
    assert isinstance(acceptance_rule(suite.arm("chain"), seed=None, device=device), GreedyRule)
    assert isinstance(acceptance_rule(suite.arm("vanilla"), seed=None, device=device), GreedyRule)
    sampled = acceptance_rule(suite.arm("vanilla_sampled"), seed=3, device=device)
    assert isinstance(sampled, RejectionRule) and sampled.temperature == 0.7
    typical = acceptance_rule(suite.arm("typical"), seed=3, device=device)
    assert isinstance(typical, TypicalRule) and (typical.epsilon, typical.delta, typical.root_rule) == (
        0.09,
        0.3,
        "sampled",
    )


def test_trees_that_do_not_fit_are_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="without a tree"):
        runner(engine, "chain", TickClock())
    with pytest.raises(UserError, match="a tree of depth 4 or less"):
        runner(engine, "chain", TickClock(), tree=DraftTree.chain(5))
    with pytest.raises(UserError, match="a rank below the vocabulary size 128"):
        runner(engine, "chain", TickClock(), tree=DraftTree.cartesian((129,)))
    fewer = smoke_suite().arm("chain").model_copy(update={"num_heads": 2})
    with pytest.raises(UserError, match="a tree of depth 2 or less"):
        runner(engine, fewer, TickClock(), tree=DraftTree.chain(3))


def test_section_timer_adds_up_and_remembers_the_last() -> None:
    timer = SectionTimer(TickClock())
    for name in ("backbone", "heads", "backbone"):
        with timer(name):
            pass
    assert dict(timer.seconds) == {"backbone": 2.0, "heads": 1.0} and timer.last == {
        "backbone": 1.0,
        "heads": 1.0,
    }


def test_device_clock_never_goes_back() -> None:
    clock = device_clock(torch.device("cpu"))
    times = [clock() for _ in range(100)]
    assert times == sorted(times)
