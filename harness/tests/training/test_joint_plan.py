"""The least memory of joint training against what real trainings hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harness.training.joint
from harness.errors import UserError
from harness.specs.recipe import recipe_of
from harness.tests.tiny_suite import QUIET
from harness.tests.tiny_training import recipe_data
from harness.training.joint import train_both
from harness.training.joint_plan import joint_bytes
from harness.training.plan import DeviceRoom
from medusa_impl.recipes import LoraSettings, Medusa2Settings
from medusa_impl.tests.conftest import tiny_llama
from medusa_impl.tests.training.test_trainer import make_trainer


def _meta() -> Any:
    model: Any = tiny_llama()
    return model.to("meta")


@pytest.mark.parametrize("backbone", ["lora", "full", "frozen"])
def test_all_that_is_held_is_counted_to_the_byte(tmp_path: Path, backbone: Any) -> None:
    """But for AdamW's count of steps, four bytes a tensor. A full training keeps the original as well."""
    changes: dict[str, Any] = {
        "backbone": backbone,
        "lora": LoraSettings(rank=2, alpha=4),
        "num_steps": 2,
        "warmup": "none",
        "lambda_0": 1.0,
    }
    recipe = Medusa2Settings(**{"num_heads": 3, **changes})
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    model, optimizer = trainer._training_model, trainer.optimizer
    assert optimizer is not None
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}.values()
    moments = [
        value
        for state in getattr(optimizer, "optimizer", optimizer).state.values()
        for value in state.values()
        if value.dim()
    ]
    plan = joint_bytes(_meta(), recipe, dtype=torch.float32)
    held = sum(one.numel() * one.element_size() for one in tensors)
    assert plan["weights"] + plan["heads"] + plan["adapter"] == held
    assert plan["optimiser"] == sum(one.numel() * one.element_size() for one in moments)
    learning = [one for one in model.parameters() if one.requires_grad]
    assert plan["gradients"] == sum(one.numel() * one.element_size() for one in learning)


def test_own_unembeddings_are_counted() -> None:
    shared = Medusa2Settings(num_heads=3, num_steps=1, lora=LoraSettings(rank=2))
    own = shared.model_copy(update={"architecture": "own"})
    more, less = (joint_bytes(_meta(), recipe, dtype=torch.bfloat16) for recipe in (own, shared))
    size = 3 * tiny_llama().get_output_embeddings().weight.numel()  # in float32, whatever the backbone's
    assert more["heads"] - less["heads"] == more["gradients"] - less["gradients"] == 4 * size
    assert more["optimiser"] - less["optimiser"] == 8 * size and more["weights"] == less["weights"]


def test_four_bits_and_eight_are_less() -> None:
    plain = Medusa2Settings(num_steps=1, lora=LoraSettings(rank=2))
    small = plain.model_copy(update={"quantisation": "4bit", "optimizer": "adamw_8bit"})
    more, less = (joint_bytes(_meta(), recipe, dtype=torch.bfloat16) for recipe in (plain, small))
    assert more["optimiser"] == 4 * less["optimiser"] and more["heads"] == less["heads"]
    model = tiny_llama()
    linear = sum(
        module.weight.numel()
        for module in model.get_decoder().modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert more["weights"] - less["weights"] == 2 * linear - linear // 2


def test_a_device_too_small_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe_of(recipe_data(tmp_path))
    monkeypatch.setattr(
        harness.training.joint, "room_here", lambda device, work: DeviceRoom("a small card", 1000)
    )
    monkeypatch.setattr(harness.training.joint, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert spec.trains == "heads_and_backbone"
    with pytest.raises(UserError, match="of a small card"):
        train_both(spec, work=tmp_path, target=tmp_path, console=QUIET)
