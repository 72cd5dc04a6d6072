"""The plan of training heads alone: against the bytes and the operations of real steps, and its refusals."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import medusa_impl.training.losses
from harness.device.random_model import random_model, shape_without_weights, transformers_config
from harness.errors import UserError
from harness.measure.watch import OTHER, PartClock, ProductCounter
from harness.specs.hardware import load_hardware
from harness.specs.shapes import ShapeSpec, load_shapes
from harness.training.plan import (
    MEMORY_SHARE,
    CorpusSize,
    DeviceRoom,
    HeadsPlan,
    activation_bytes,
    backbone_flops,
    check_fits,
    choose_way,
    device_flop_per_s,
    heads_flops,
    plan_heads,
)
from harness.training.room import WAYS, room_of
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import FeaturesWay, HeadArchitecture, Medusa1Settings
from medusa_impl.training.batches import AnswerBatches
from medusa_impl.training.features import AnswerSet, FeatureSet
from medusa_impl.training.losses import NO_TARGET
from medusa_impl.training.medusa1 import HeadsTrainingModel, train_medusa1
from medusa_impl.training.sequences import TrainingSequence
from medusa_impl.training.states import BackboneStates, DeviceStates

CPU = torch.device("cpu")
SHAPE = ShapeSpec.model_validate(
    {
        "name": "small",
        "model_type": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,
        "intermediate_size": 96,
        "vocab_size": 512,
        "tie_word_embeddings": False,
        "max_positions": 512,
        "rope_theta": 10000.0,
        "source": "a test",
    }
)
POSITIONS, ANSWERS, LENGTH, PROMPT = 220, 40, 12, 6
CORPUS = CorpusSize(ANSWERS, ANSWERS * LENGTH, ANSWERS * (LENGTH + PROMPT))


def _recipe(architecture: HeadArchitecture, *, num_layers: int = 1) -> Medusa1Settings:
    return Medusa1Settings(
        num_heads=3,
        num_layers=num_layers,
        architecture=architecture,
        num_epochs=None,
        num_steps=2,
        batch_positions=POSITIONS,
        subset_size=None,
    )


def _plan(recipe: Medusa1Settings, way: FeaturesWay, *, dtype: torch.dtype = torch.float32) -> HeadsPlan:
    return plan_heads(
        shape_without_weights(SHAPE), recipe, name="small", dtype=dtype, corpus=CORPUS, way=way, device=CPU
    )


def _heads(recipe: Medusa1Settings, model: Any) -> MedusaHeads:
    return MedusaHeads(
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        hidden_size=SHAPE.hidden_size,
        vocab_size=SHAPE.vocab_size,
        architecture=recipe.architecture,
        lm_head=model.get_output_embeddings(),
    )


def _tables(num_heads: int) -> tuple[FeatureSet, AnswerSet]:
    """Answers of random tokens, with random states."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE.vocab_size, (ANSWERS, PROMPT + LENGTH), generator=generator).tolist()
    rows = [
        [row[PROMPT + i + k] if i + k < LENGTH else NO_TARGET for k in range(1, num_heads + 1)]
        for row in tokens
        for i in range(LENGTH - 1)
    ]
    table: dict[str, Any] = {
        "targets": torch.tensor(rows, dtype=torch.int32),
        "sample_index": torch.arange(ANSWERS, dtype=torch.int32).repeat_interleave(LENGTH - 1),
        "held_out": torch.zeros(ANSWERS, dtype=torch.bool),
        "keys": tuple(map(str, range(ANSWERS))),
        "num_tokens": CORPUS.num_answer_tokens,
    }
    states = torch.randn(len(rows), SHAPE.hidden_size, generator=generator).half()
    texts = tuple(TrainingSequence(tuple(row), ((PROMPT, PROMPT + LENGTH),)) for row in tokens)
    return FeatureSet(**table, states=states), AnswerSet(**table, texts=texts)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)
        }  # an operation in place makes nothing
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata in before or storage._cdata in self._known:
                continue
            size, key = storage.nbytes(), storage._cdata
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_to_the_byte(tied: bool, dtype: torch.dtype) -> None:
    shape = SHAPE.model_copy(update={"tie_word_embeddings": tied})
    real = random_model(shape, dtype=dtype, device=CPU)
    held = sum(one.numel() * one.element_size() for one in (*real.parameters(), *real.buffers()))
    planned = plan_heads(
        shape_without_weights(shape),
        _recipe("shared"),
        name="small",
        dtype=dtype,
        corpus=CORPUS,
        way="none",
        device=CPU,
    )
    assert planned.device["weights"] == held
    assert shape.num_parameters * torch.empty(0, dtype=dtype).element_size() <= held


@pytest.mark.parametrize("architecture", ["shared", "own"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_heads_gradients_and_optimiser_are_counted_to_the_byte(
    tmp_path: Path, architecture: HeadArchitecture, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what AdamW holds at the end of a real training."""
    recipe, model = (
        _recipe(architecture, num_layers=num_layers),
        random_model(SHAPE, dtype=torch.float32, device=CPU),
    )
    heads, optimizers = _heads(recipe, model), list[Any]()
    made = torch.optim.AdamW.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        optimizers.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    weight = model.get_output_embeddings().get_parameter("weight").detach()
    train_medusa1(_tables(recipe.num_heads)[0], heads, weight, recipe=recipe, checkpoint_dir=tmp_path)
    (optimizer,) = optimizers
    moments = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
    plan = _plan(recipe, "device")
    assert plan.device["heads"] == sum(one.numel() * one.element_size() for one in heads.parameters())
    assert plan.device["gradients"] == plan.device["heads"]
    assert plan.device["optimiser"] == moments
    assert plan.num_steps == 2


@pytest.mark.parametrize("architecture", ["shared", "own"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("way", ["device", "none"])
def test_activations_are_bounded_and_not_by_far(
    architecture: HeadArchitecture, num_layers: int, way: FeaturesWay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that a step makes, live at the same time: at most the plan, and at least 0.4 of it."""
    monkeypatch.setattr(medusa_impl.training.losses, "DEFAULT_LOGITS_BYTES", 100_000)
    recipe, model = (
        _recipe(architecture, num_layers=num_layers),
        random_model(SHAPE, dtype=torch.float32, device=CPU),
    )
    features, answers = _tables(recipe.num_heads)
    source = (
        BackboneStates(answers, model.get_decoder(), pass_tokens=400)
        if way == "none"
        else DeviceStates(features, device=CPU)
    )
    monkeypatch.setattr("harness.training.plan.PASS_TOKENS", 400)
    trained = HeadsTrainingModel(
        _heads(recipe, model),
        model.get_output_embeddings().get_parameter("weight").detach(),
        source=source,
        recipe=recipe,
        num_steps=2,
        subset=None,
    )
    rows = AnswerBatches(answers, batch_positions=POSITIONS, seed=0).rows(0)
    assert len(rows) <= POSITIONS
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)  # counted as gradients
    item = source.item(rows)
    with _LiveBytes() as live:
        trained(item, vocabulary="full").loss.backward()
    bound = activation_bytes(
        shape_without_weights(SHAPE), trained.heads, recipe, dtype=torch.float32, way=way, device=CPU
    )
    assert 0.4 * bound < live.peak <= bound


@pytest.mark.parametrize("architecture", ["shared", "own"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_operations_are_those_that_a_step_makes(architecture: HeadArchitecture, num_layers: int) -> None:
    """Against PyTorch's own formulas on a real step, whose every target is there."""
    recipe, model = (
        _recipe(architecture, num_layers=num_layers),
        random_model(SHAPE, dtype=torch.float32, device=CPU),
    )
    features, answers = _tables(recipe.num_heads)
    features = dataclasses.replace(features, targets=features.targets.clamp_min(1))
    trained = HeadsTrainingModel(
        _heads(recipe, model),
        model.get_output_embeddings().get_parameter("weight").detach(),
        source=DeviceStates(features, device=CPU),
        recipe=recipe,
        num_steps=2,
        subset=None,
    )
    with ProductCounter(PartClock(lambda: 0.0)) as counter:
        trained({"rows": torch.arange(POSITIONS)}, vocabulary="full").loss.backward()
    assert dict(counter.flops[OTHER]) == _plan(recipe, "device").step_flops
    reader = BackboneStates(answers, model.get_decoder())
    item = reader.item(AnswerBatches(answers, batch_positions=POSITIONS, seed=0).rows(0))
    tokens = sum(part["input_ids"].numel() for part in item["parts"])
    with ProductCounter(PartClock(lambda: 0.0)) as counter:
        reader.read(item)
    per_token = 2 * 2 * SHAPE.num_layers * SHAPE.num_attention_heads * SHAPE.head_size
    scores = per_token * tokens * (PROMPT + LENGTH - 2)
    left = counter.flops[OTHER]["float32"] - backbone_flops(shape_without_weights(SHAPE), tokens) - scores
    # Some versions compute the rotary embedding's angles as a product.
    assert left in (0, 2 * (PROMPT + LENGTH - 2) * SHAPE.head_size // 2)


PAPER = ("vicuna-7b-v1.5", "vicuna-13b-v1.5", "vicuna-33b-v1.3")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_shapes_with_own_heads(name: str) -> None:
    """By hand: two bytes a parameter of the backbone; sixteen a parameter of five heads."""
    shape = load_shapes()[name]
    recipe = Medusa1Settings(
        architecture="own", batch_positions=8192, matmul_dtype="bfloat16", subset_size=None
    )
    corpus = CorpusSize(num_answers=10**5, num_answer_tokens=10**8, num_tokens=15 * 10**7)
    plans = {
        way: plan_heads(
            shape_without_weights(shape),
            recipe,
            name=name,
            dtype=torch.bfloat16,
            corpus=corpus,
            way=way,
            device=CPU,
        )
        for way in WAYS
    }
    hidden, vocab = shape.hidden_size, shape.vocab_size
    heads = 5 * (hidden * hidden + hidden + vocab * hidden)
    for plan in plans.values():
        assert 0 <= plan.device["weights"] - 2 * shape.num_parameters < 1e6  # the rotary frequencies
        assert (
            plan.device["heads"] + plan.device["gradients"] + plan.device["optimiser"] == 16 * heads + 4 * 15
        )
    rows = corpus.num_rows
    assert plans["device"].device["states"] == rows * (2 * hidden + 4 * 5)
    assert plans["file"].disk_bytes == 2 * hidden * (rows + corpus.num_answer_tokens)
    assert plans["none"].disk_bytes == 0
    # A whole H200 would not hold the states; one H100 holds the third way up to 13B.
    h100 = room_of(load_hardware()["h100-80gb-sxm"])
    if name == "vicuna-33b-v1.3":
        with pytest.raises(UserError, match=r"needs \d+\.\d GB \(weights 65\.\d"):
            choose_way(plans, h100)
        assert (
            choose_way(plans, room_of(load_hardware()["h200-sxm"])) == "none"
            or plans["none"].device_bytes > 0
        )
    else:
        assert choose_way(plans, DeviceRoom("h100", h100.memory_bytes, disk_bytes=10**12 // 2)) == "none"
    rates = device_flop_per_s(load_hardware()["h100-80gb-sxm"])
    seconds = plans["none"].seconds(rates)
    total = sum(plans["none"].total_flops().values())
    assert seconds == pytest.approx(total / rates["bfloat16"])
    assert (
        total >= 2 * (shape.num_parameters - 2 * vocab * hidden) * corpus.num_tokens * 6 * 0.99
    )  # six epochs
    assert plans["none"].seconds({}) is None


def test_steps_over_a_subset_are_cheaper_and_as_many_as_the_recipe_says() -> None:
    recipe = _recipe("shared").model_copy(
        update={"subset_size": 128, "full_vocabulary_rate": 0.25, "num_steps": 10}
    )
    plan = _plan(recipe, "device")
    assert (plan.num_steps, plan.num_subset_steps) == (10, 7)  # three of ten, rounded up, take all of it
    blocks = heads_flops(
        _heads(recipe, random_model(SHAPE, dtype=torch.float32, device=CPU)), recipe, vocab_size=0
    )
    products, cheaper = (
        flops["float32"] - blocks["float32"] for flops in (plan.step_flops, plan.subset_flops)
    )
    assert products == cheaper * SHAPE.vocab_size // 128
    once = plan.once_flops["float32"]
    assert plan.total_flops() == {
        "float32": 3 * plan.step_flops["float32"] + 7 * plan.subset_flops["float32"] + once
    }


def test_the_first_way_that_fits_is_taken() -> None:
    recipe = _recipe("shared")
    plans = {way: _plan(recipe, way) for way in WAYS}
    enough = {way: int(plan.device_bytes / MEMORY_SHARE) + 1 for way, plan in plans.items()}
    disk = plans["file"].disk_bytes
    assert plans["device"].device_bytes - plans["file"].device_bytes == plans["device"].device["states"] > 0
    big = enough["none"] * 100
    assert choose_way(plans, DeviceRoom("d", big, disk)) == "device"
    assert choose_way(plans, DeviceRoom("d", enough["file"], disk)) == "file"
    # the third way needs no disk, but room for the backbone's pass
    assert choose_way(plans, DeviceRoom("d", big, 0)) == "none"
    with pytest.raises(UserError, match="which needs"):
        choose_way(plans, DeviceRoom("d", enough["file"] - 10_000, disk))


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    plan = _plan(_recipe("shared"), "device")
    check_fits(plan, DeviceRoom("a card", int(plan.device_bytes / MEMORY_SHARE) + 1, plan.disk_bytes))
    with pytest.raises(UserError) as caught:
        check_fits(plan, DeviceRoom("a card", plan.device_bytes))
    assert "a card" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="free on the disk"):
        check_fits(plan, DeviceRoom("a card", 10**12, plan.disk_bytes - 1))


def test_a_shape_stands_for_its_model() -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(transformers_config(SHAPE))
    assert {one.device.type for one in made.parameters()} == {"meta"}
    assert sum(one.numel() for one in shape_without_weights(SHAPE).parameters()) == SHAPE.num_parameters
