"""The profile of training steps: counts against counts by hand, shares on known clocks, and the command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import optimizer

import harness.measure.profiles.training
import medusa_impl.training.medusa1
from harness.device.engine import Engine
from harness.errors import ExitCode, UserError
from harness.measure.profiles.training import heads_stages, joint_stages, one_batch, profile_training
from harness.measure.watch import BACKBONE, HEADS_PARTS, OTHER, PartClock, ProductCounter, StepWatch
from harness.paths import holds_absolute_path
from harness.records.profiles.training import (
    MatrixThroughput,
    PartProfile,
    StageProfile,
    TrainingProfile,
    read_training_profile,
)
from harness.report.profiles import training_headline
from harness.specs.recipe import recipe_of
from harness.specs.suite import TinyModelSpec
from harness.tests.tiny_suite import QUIET, command, small_device_limits, smoke_suite
from harness.tests.tiny_training import ANSWER_TOKENS, recipe_data, write_corpus
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.distill import unpack_corpus
from medusa_impl.training.losses import TokenSubset
from medusa_impl.training.sequences import TrainingSequence
from medusa_impl.training.states import BackboneStates

NUM_HEADS, NUM_LAYERS, SUBSET = 3, 2, 32
ANSWERS = 9  # that a batch of heads alone is made of
POSITIONS = ANSWERS * (ANSWER_TOKENS - 1)
SEQUENCES, RANK = 4, 2


def tiny_spec() -> TinyModelSpec:
    spec = smoke_suite().model.tiny
    assert spec is not None
    return spec


@pytest.fixture(scope="module")
def folder(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("profile")
    write_corpus(place / "corpus.safetensors", engine)
    return place


def heads_data(folder: Path, **recipe: Any) -> dict[str, Any]:
    table = {
        "num_heads": NUM_HEADS,
        "num_layers": NUM_LAYERS,
        "num_epochs": 4.0,
        "batch_positions": POSITIONS,
        "subset_size": SUBSET,
        "full_vocabulary_rate": 0.25,
        "matmul_dtype": "bfloat16",
        **recipe,
    }
    data = recipe_data(folder)
    return {
        **data,
        "kind": "recipe",
        "trains": "heads",
        "name": "tiny_heads",
        "corpus": {"num_samples": 60},
        "recipe": table,
    }


def profiled(data: dict[str, Any], *, num_steps: int = 1) -> TrainingProfile:
    with small_device_limits():
        return profile_training(
            recipe_of(data),
            num_steps=num_steps,
            allow_hub=False,
            command="medusa-repro profile-training",
            console=QUIET,
        )


@pytest.fixture(scope="module")
def heads_profile(folder: Path) -> TrainingProfile:
    with pytest.MonkeyPatch.context() as patch:
        # one batch is all there is: its targets are known
        patch.setattr(harness.measure.profiles.training, "_STATE_BATCHES", 1)
        return profiled(heads_data(folder), num_steps=2)


def stage_of(profile: TrainingProfile, name: str) -> dict[str, dict[str, int]]:
    """A stage's operations by part, without the parts that have none."""
    (stage,) = (stage for stage in profile.stages if stage.name == name)
    return {part.name: part.flops for part in stage.parts if part.flops}


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def test_linear_layers_cost_two_four_and_two_operations_a_weight() -> None:
    """Forward 2 m n k; backward as much for the weight and as much for the input, which the first layer does
    without.
    """
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    parts = PartClock(lambda: 0.0)
    with ProductCounter(parts) as counter:
        with parts("forward"):
            loss = model(torch.ones(4, 5)).sum()
        with parts("backward"):
            loss.backward()
        with parts("half"), torch.inference_mode():
            model.bfloat16()(torch.ones(4, 5, dtype=torch.bfloat16))
    first, second = linear_flops(4, 5, 7), linear_flops(4, 7, 3)
    assert counter.flops == {
        "forward": {"float32": first + second},
        "backward": {"float32": first + 2 * second},
        "half": {"bfloat16": first + second},
    }


def test_heads_alone_are_counted_as_by_hand(heads_profile: TrainingProfile, folder: Path) -> None:
    """Blocks in float32, twice without the first block's input; both products with the unembedding, forward,
    in bfloat16.
    """
    width, vocab_size = tiny_spec().hidden_size, tiny_spec().vocab_size
    answers = [
        sample.token_ids
        for sample in list(unpack_corpus(folder / "corpus.safetensors", backbone_sha256=None))[:ANSWERS]
    ]
    first_targets = torch.tensor([token for ids in answers for token in ids[1:]])
    subset = set(
        TokenSubset.most_frequent(
            torch.bincount(first_targets, minlength=vocab_size), size=SUBSET
        ).token_ids.tolist()
    )
    targets = [
        ids[place + head]
        for ids in answers
        for head in range(1, NUM_HEADS + 1)
        for place in range(len(ids) - head)
    ]
    inside = sum(token in subset for token in targets)
    assert 0 < inside < len(targets)
    block = linear_flops(POSITIONS, width, width)
    for name, rows, size in (("subset", inside, SUBSET), ("full", len(targets), vocab_size)):
        assert stage_of(heads_profile, name) == {
            "states": {"float32": NUM_HEADS * NUM_LAYERS * block},
            "logits_loss": {"bfloat16": 2 * linear_flops(rows, width, size)},
            "backward": {"float32": NUM_HEADS * (2 * NUM_LAYERS - 1) * block},
        }


def test_a_backbone_that_runs_with_the_heads_is_a_part_of_its_own(folder: Path) -> None:
    """Where no states are kept; the heads' parts are those that they have without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.measure.profiles.training, "_STATE_BATCHES", 1)
        profile = profiled(heads_data(folder, features="none"))
    for stage in profile.stages:
        assert [part.name for part in stage.parts] == [BACKBONE, *HEADS_PARTS]
        assert stage.num_positions == POSITIONS  # one batch is all there is
    subset, full = (stage_of(profile, stage.name) for stage in profile.stages)
    assert subset[BACKBONE] == full[BACKBONE] and subset[BACKBONE]["float32"] > 0
    block = linear_flops(POSITIONS, tiny_spec().hidden_size, tiny_spec().hidden_size)
    assert full["states"] == {"float32": NUM_HEADS * NUM_LAYERS * block}
    assert BackboneStates.read.__name__ == "read"  # the mark is gone


def test_every_part_of_heads_alone_takes_time(heads_profile: TrainingProfile) -> None:
    assert [(stage.name, stage.step_rate, stage.num_positions) for stage in heads_profile.stages] == [
        ("subset", 0.75, POSITIONS),
        ("full", 0.25, POSITIONS),
    ]
    for stage in heads_profile.stages:
        assert [part.name for part in stage.parts] == list(HEADS_PARTS) and len(stage.step_s) == 2
        assert all(len(part.seconds) == 2 and min(part.seconds) > 0 for part in stage.parts)
    assert [limit.dtype for limit in heads_profile.throughput] == ["bfloat16", "float32"]


def test_a_step_is_left_as_it_was(heads_profile: TrainingProfile) -> None:
    """Marks stand in other functions' places for marked steps only."""
    assert heads_profile.stages
    for owner, name in (
        (medusa_impl.training.medusa1, "medusa1_loss"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
    ):
        assert getattr(owner, name).__name__ == name
    assert not optimizer._global_optimizer_pre_hooks and not optimizer._global_optimizer_post_hooks


def joint_counts() -> dict[str, int]:
    """What one joint step of `SEQUENCES` answers to prompts of six tokens costs by hand, LoRA on every layer
    but the LM head.
    """
    model = tiny_spec()
    width, length = model.hidden_size, 6 + ANSWER_TOKENS
    rows, tokens = SEQUENCES * ANSWER_TOKENS, SEQUENCES * length
    head_size = width // model.num_attention_heads
    narrow = model.num_key_value_heads * head_size
    from_states = [(width, width), (width, narrow), (width, narrow)]
    layer = [
        *from_states,
        (width, width),
        (width, model.intermediate_size),
        (width, model.intermediate_size),
        (model.intermediate_size, width),
    ]
    linears = model.num_layers * sum(linear_flops(tokens, *sizes) for sizes in layer)
    adapters = model.num_layers * sum(
        linear_flops(tokens, RANK, inputs + outputs) for inputs, outputs in layer
    )
    attention = (
        model.num_layers * 2 * linear_flops(SEQUENCES * model.num_attention_heads * length, head_size, length)
    )
    lm_head = linear_flops(rows, width, model.vocab_size)
    blocks = 4 * linear_flops(rows, width, width)
    head_rows = SEQUENCES * sum(ANSWER_TOKENS - head for head in range(1, 5))
    # what reads the embedding passes no gradient on
    embedded = sum(linear_flops(tokens, *sizes) for sizes in from_states)
    embedded += sum(linear_flops(tokens, RANK, inputs) for inputs, _ in from_states)
    return {
        "teacher": linears + attention,
        "student": linears + adapters + attention,
        "backbone_loss": 2 * lm_head,  # both laws
        "heads_loss": blocks + 2 * linear_flops(head_rows, width, model.vocab_size),
        # both laws' logits again, one's gradient; the blocks' two; layers' inputs, adapters' weights and
        # inputs; five of attention
        "backward": 3 * lm_head + 2 * blocks + linears + 2 * adapters - embedded + attention // 2 * 5,
    }


def without_rotary(stage: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Drop the rotary embedding's outer product: it stays in float32, and some versions of PyTorch run it as
    a multiplication.
    """
    model = tiny_spec()
    rotary = linear_flops(6 + ANSWER_TOKENS, 1, model.hidden_size // model.num_attention_heads // 2)
    without = {part: dict(flops) for part, flops in stage.items()}
    for part in ("teacher", "student"):
        if without.get(part, {}).get("float32", 0) % (2 * rotary) == rotary:
            without[part]["float32"] -= rotary
    return {
        part: {dtype: count for dtype, count in flops.items() if count} for part, flops in without.items()
    }


def joint_data(folder: Path, **recipe: Any) -> dict[str, Any]:
    lora = {"rank": RANK, "alpha": 4, "dropout": 0.05, "lm_head": False}
    return recipe_data(folder, batch_sequences=SEQUENCES, lora=lora, target="original", **recipe)


def test_joint_training_is_counted_as_by_hand(folder: Path) -> None:
    profile = profiled(joint_data(folder, warmup="ramped"))
    counted = without_rotary(stage_of(profile, "both"))
    assert counted == {part: {"float32": flops} for part, flops in joint_counts().items()}
    assert profile.stages[0].num_positions == SEQUENCES * ANSWER_TOKENS


def test_two_stages_under_autocast_are_counted_by_dtype(folder: Path) -> None:
    """Autocast takes all products but the rotary embedding's; with the heads alone the backbone runs once and
    learns nothing.
    """
    by_hand = joint_counts()
    profile = profiled(joint_data(folder, warmup="two_stage", stage_rate=0.25, autocast="bfloat16"))
    assert [(stage.name, stage.step_rate) for stage in profile.stages] == [("heads", 0.25), ("both", 0.75)]
    heads, both = (without_rotary(stage_of(profile, name)) for name in ("heads", "both"))
    assert both == {part: {"bfloat16": flops} for part, flops in by_hand.items()}
    assert set(heads) == {"student", "heads_loss", "backward"} and heads["student"] == both["student"]
    assert (
        heads["heads_loss"] == both["heads_loss"]
        and heads["backward"]["bfloat16"] < both["backward"]["bfloat16"]
    )


class Hand:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_steps_take_turns_and_parts_own_their_own_time() -> None:
    clock, marked = Hand(), list[PartClock]()

    def marks(parts: PartClock) -> Any:
        marked.append(parts)
        clock.now_s += 100  # setting marks is on no step's time
        return contextlib.nullcontext()

    with StepWatch(("one", "two"), num_steps=2, clock=clock, marks=marks) as watch:
        assert watch.num_steps == 2 * (1 + 2 * 2 + 1)
        for number in range(watch.num_steps):
            clock.now_s += 10 * number
            if number == 2:
                with marked[-1]("outer"):
                    clock.now_s += 3
                    with marked[-1]("inner"):
                        clock.now_s += 1
            watch(7)
    assert watch.step_s == {"one": [10.0, 30.0], "two": [70.0, 90.0]}
    assert len(marked) == 6
    first = watch.part_s["one"][0]
    assert (first["outer"], first["inner"], first[OTHER]) == (3.0, 1.0, 20.0)
    (one, _) = watch.profiles({"one": 0.5, "two": 0.5}, parts=("outer", "absent", OTHER))
    assert [part.seconds for part in one.parts] == [
        (3.0, 0.0),
        (0.0, 0.0),
        (20.0, 40.0),
    ] and one.num_positions == 7


def hand_made(environment: Any, *, stages: tuple[StageProfile, ...]) -> TrainingProfile:
    limits = (("float32", 80.0, 100.0), ("bfloat16", 400.0, 300.0))
    throughput = tuple(
        MatrixThroughput(dtype=name, before_flop_per_s=a, after_flop_per_s=b, method="by hand")
        for name, a, b in limits
    )
    return TrainingProfile(
        recipe="r", kind="heads", environment=environment, throughput=throughput, stages=stages
    )


def stage(
    name: str, rate: float, step_s: tuple[float, ...], **parts: tuple[float, dict[str, int]]
) -> StageProfile:
    made = tuple(
        PartProfile(name=part, seconds=(seconds,), flops=flops) for part, (seconds, flops) in parts.items()
    )
    return StageProfile(name=name, step_rate=rate, num_positions=10, step_s=step_s, parts=made)


def test_shares_are_least_time_over_time(heads_profile: TrainingProfile) -> None:
    """100 operations a second in float32 and 400 in bfloat16: 100 and 400 operations take two seconds at
    least.
    """
    subset = stage(
        "subset",
        0.75,
        (4.0, 9.0, 3.0),
        a=(2.0, {"float32": 100}),
        b=(2.5, {"bfloat16": 400}),
        other=(0.0, {}),
    )
    full = stage("full", 0.25, (8.0,), a=(8.0, {"bfloat16": 800}))
    profile = hand_made(heads_profile.environment, stages=(subset, full))
    assert subset.flops == {"float32": 100, "bfloat16": 400}
    assert profile.stage_share(subset) == 2 / 4 and profile.stage_share(full) == 2 / 8
    assert [profile.part_share(part) for part in subset.parts] == [0.5, 0.4, None]
    assert profile.share == pytest.approx((0.75 * 2 + 0.25 * 2) / (0.75 * 4 + 0.25 * 8))
    headline = training_headline(profile)
    assert headline["share"] == profile.share and headline["stages"][0]["positions_per_s"] == 2.5
    assert "other" not in headline["stages"][0]["parts"] and headline["gflop_per_s"]["float32"] == 1e-7


def test_a_count_without_its_throughput_is_no_record(heads_profile: TrainingProfile) -> None:
    with pytest.raises(ValidationError, match="float16"):
        hand_made(heads_profile.environment, stages=(stage("full", 1.0, (1.0,), a=(1.0, {"float16": 1})),))
    parts = (
        PartProfile(name="a", seconds=(1.0,), flops={}),
        PartProfile(name="b", seconds=(1.0, 2.0), flops={}),
    )
    with pytest.raises(ValidationError, match="another number of steps"):
        StageProfile(name="full", step_rate=1.0, num_positions=1, step_s=(1.0,), parts=parts)


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ({}, {"subset": 0.75, "full": 0.25}),
        ({"full_vocabulary_rate": 0.0}, {"subset": 1.0}),
        ({"full_vocabulary_rate": 1.0}, {"full": 1.0}),
        ({"subset_size": 128}, {"full": 1.0}),
    ],
)
def test_stages_are_those_of_the_recipe(
    recipe: dict[str, Any], stages: dict[str, float], folder: Path
) -> None:
    assert (
        heads_stages(Medusa1Settings.model_validate(heads_data(folder, **recipe)["recipe"]), vocab_size=128)
        == stages
    )
    frozen = recipe_of(recipe_data(folder, backbone="frozen"))
    assert frozen.trains == "heads_and_backbone" and joint_stages(frozen) == {"heads": 1.0}


def test_a_batch_is_drawn_by_the_seed() -> None:
    sequences = [TrainingSequence(token_ids=(1, 2, number), answers=((1, 3),)) for number in range(9)]
    one, again, other = (one_batch(sequences, size=4, seed=seed) for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == 4
    with pytest.raises(UserError, match="9 sequences"):
        one_batch(sequences, size=10, seed=0)


def test_the_command_writes_its_record_and_ends_with_one_json_object(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny_heads.toml"
    recipe.write_text(tomli_w.dumps(heads_data(folder, batch_positions=20)))
    target = tmp_path / "out" / "profile.json"
    ran = command("profile-training", recipe, "--steps", "1", "--output", target)
    assert ran.code == ExitCode.OK, ran.err
    profile = read_training_profile(target)
    assert json.loads(ran.out.splitlines()[-1]) == json.loads(json.dumps(training_headline(profile)))
    assert (
        profile.environment.command
        == "medusa-repro profile-training tiny_heads.toml --steps 1 --output profile.json"
    )
    assert TrainingProfile.model_validate_json(profile.model_dump_json()) == profile
    assert not holds_absolute_path(target.read_text())
    assert "logits_loss" in ran.out and "at least 60.0 % are needed" in " ".join(ran.out.split())


def test_what_cannot_be_profiled_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    ran = command("profile-training", "no_such_recipe")
    assert ran.code == ExitCode.USER_ERROR and "no recipe 'no_such_recipe'" in ran.error_line
    data = heads_data(folder)
    del data["packed_corpus"]
    with pytest.raises(UserError, match="text is still to be made"):
        profiled(data)
    with pytest.raises(UserError, match="a batch of 1000"):
        profiled(heads_data(folder, batch_positions=1000))
    for name, text, message in (
        ("absent.json", None, "no readable absent.json"),
        ("other.json", "{}", "need a TrainingProfile record"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_training_profile(tmp_path / name)
