"""Joint training on the Trainer: what moves, what stays, the log, a resumed run, and two processes against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from medusa_impl.errors import UserError
from medusa_impl.medusa2 import Medusa2Recipe, MedusaTrainingModel
from medusa_impl.medusa2_trainer import STEP_LOG, JointStep, MedusaTrainer, read_step_log, shared_batch, training_arguments
from medusa_impl.sequences import TrainingSequence
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tests.test_medusa2 import LORA, make_heads, tied_llama

ROOT = Path(__file__).resolve().parents[2]


def some_sequences(count: int = 12) -> tuple[TrainingSequence, ...]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for index in range(count):
        ids = torch.randint(1, TINY_VOCAB, (6 + index % 5,), generator=generator).tolist()
        made.append(TrainingSequence(token_ids=tuple(ids), answers=((2, len(ids)),)))
    return tuple(made)


def long_run() -> dict[str, Any]:
    """Two epochs of four steps, each of two parts, the last of an epoch of one; no dropout, which each process would draw for itself."""
    lora = LORA.model_copy(update={"dropout": 0.0})
    return {"sequences": some_sequences(14), "lora": lora, "num_steps": None, "num_epochs": 2.0, "accumulation_steps": 2, "save_steps": 5}


def make_trainer(
    folder: Path,
    *,
    save_steps: int = 100,
    sequences: tuple[TrainingSequence, ...] | None = None,
    backbone_model: LlamaForCausalLM | None = None,
    **changes: Any,
) -> MedusaTrainer:
    recipe = Medusa2Recipe(
        **{
            "num_heads": 3,
            "lora": LORA,
            "num_steps": 6,
            "batch_sequences": 2,
            "warmup_steps": 1,
            "warmup": "ramped",
            "heads_learning_rate": 2e-3,
            "backbone_learning_rate": 1e-3,
            **changes,
        }
    )
    torch.manual_seed(recipe.seed)
    model = MedusaTrainingModel(backbone_model or tiny_llama(), make_heads(), recipe=recipe)
    arguments = training_arguments(recipe, folder=folder, save_steps=save_steps, use_cpu=True)
    return MedusaTrainer(model, sequences=some_sequences() if sequences is None else sequences, arguments=arguments)


def state_of(trainer: MedusaTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer._training_model.named_parameters()}


def test_what_learns_moves_and_the_rest_is_bit_identical(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = state_of(trainer)
    trainer.train()
    after = state_of(trainer)
    for name, value in before.items():
        learns = "lora_" in name or name.startswith("heads.")
        assert torch.equal(value, after[name]) != learns, name


def test_a_frozen_backbone_stays_bit_identical(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, backbone="frozen")
    trainer.train()
    for name, parameter in trainer._training_model.model.named_parameters():
        assert torch.equal(parameter, tiny_llama().get_parameter(name)), name


def test_stages_hold_the_backbone_still_then_let_it_go(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, warmup="two_stage", stage_rate=0.5)
    seen: list[bool] = []
    adapters = [value for name, value in trainer._training_model.named_parameters() if "lora_B" in name]
    trainer._on_step = lambda step: seen.append(any(bool(value.any()) for value in adapters))
    trainer.train()
    assert seen == [False, False, False, True, True, True]
    steps = read_step_log(tmp_path / STEP_LOG)
    assert [step.backbone_loss is None for step in steps] == [True, True, True, False, False, False]
    assert [step.lambda_0 for step in steps] == [1, 1, 1, 0.2, 0.2, 0.2]


def test_the_log_says_what_each_step_ran_under(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    steps = read_step_log(tmp_path / STEP_LOG)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6] and {step.num_steps for step in steps} == {6}
    recipe = trainer.recipe
    for index, step in enumerate(steps):
        assert (step.backbone_weight, step.lambda_0) == recipe.loss_weights(index, num_steps=6)
        assert (step.heads_learning_rate, step.backbone_learning_rate) == recipe.learning_rates(index, num_steps=6)
        weights = [step.lambda_0 * 0.8 ** (head + 1) for head in range(3)]
        assert step.backbone_loss is not None and step.num_positions > 0 and step.memory_bytes > 0
        share = [None if step.head_losses[head] is None else step.head_losses[head] for head in range(3)]
        assert step.loss < step.backbone_loss + sum(weight * (loss or 0) for weight, loss in zip(weights, share, strict=True)) + 1e-4
        assert all(0 <= (row[0] or 0) <= (row[-1] or 0) <= 1 for row in step.head_accuracies)
    assert steps[0].backbone_loss == 0.0 and steps[0].agreement_rate == 1.0
    assert (steps[-1].backbone_loss or 0) > 0


def test_the_optimiser_holds_two_groups_at_two_rates(tmp_path: Path) -> None:
    """All of the heads in the first, biases too: once, a filter by name left some at the backbone's rate."""
    trainer = make_trainer(tmp_path)
    model = trainer._training_model
    groups = trainer.create_optimizer().param_groups
    assert [{id(one) for one in group["params"]} for group in groups] == [
        {id(one) for one in model.heads.parameters()},
        {id(one) for name, one in model.backbone.named_parameters() if "lora_" in name},
    ]
    assert any(one.dim() == 1 for one in groups[0]["params"]), "biases"


@pytest.mark.parametrize(("schedule", "held"), [("whole", [0, 6, 6, 6, 36, 36]), ("each_stage", [0, 6, 6, 0, 36, 36])])
def test_a_second_stage_that_begins_anew_forgets_the_first_ones_moments(tmp_path: Path, schedule: str, held: list[int]) -> None:
    """Regression: the heads' weight falls by a factor where the stages meet, and moments of the first held their steps back."""
    trainer = make_trainer(tmp_path, warmup="two_stage", stage_rate=0.5, schedule=schedule)
    seen: list[int] = []
    begin = trainer.begin_step

    def note() -> None:
        begin()
        optimizer: Any = trainer.optimizer
        seen.append(len(optimizer.optimizer.state))

    trainer.begin_step = note  # type: ignore[method-assign]
    trainer.train()
    assert seen == held


@pytest.mark.parametrize("changes", [{}, {"backbone": "full", "heads_lm_head": "adapted", "target": "tokens"}], ids=["lora", "full"])
def test_a_tied_model_is_saved_and_resumed(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The names of tensors that share memory are many; what learns is saved once, and found again."""
    whole = make_trainer(tmp_path / "whole", save_steps=3, backbone_model=tied_llama(), **changes)
    whole.train()
    cut = make_trainer(tmp_path / "cut", save_steps=3, backbone_model=tied_llama(), **changes)
    cut._on_step = lambda step: setattr(cut.control, "should_training_stop", step.step == 4)
    cut.train()
    again = make_trainer(tmp_path / "cut", save_steps=3, backbone_model=tied_llama(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(again)[name]), name
    is_tied = again._training_model.model.lm_head.weight is again._training_model.model.model.embed_tokens.weight
    assert is_tied == (changes != {}), "an adapter on the LM head unties it, full training leaves it tied"


@pytest.mark.parametrize(("processes", "shared"), [(1, (6, 4)), (2, (3, 4)), (4, (6, 1))])
def test_a_batch_stays_the_recipes_whatever_the_processes(processes: int, shared: tuple[int, int]) -> None:
    recipe = Medusa2Recipe(num_steps=1, batch_sequences=6, accumulation_steps=4)
    assert shared_batch(recipe, num_processes=processes) == shared
    with pytest.raises(UserError, match="found 4 times 6 sequences for 5 processes"):
        shared_batch(recipe, num_processes=5)


def test_a_resumed_run_goes_through_the_same_losses(tmp_path: Path) -> None:
    """Dropout, data order, optimiser, rates and the ramp all come back: from step 4 on, the losses are equal to the last bit."""
    whole = make_trainer(tmp_path / "whole", save_steps=3)
    whole.train()
    first = make_trainer(tmp_path / "cut", save_steps=3)
    first._on_step = lambda step: setattr(first.control, "should_training_stop", step.step == 4)
    first.train()
    assert [step.step for step in read_step_log(tmp_path / "cut" / STEP_LOG)] == [1, 2, 3, 4]
    again = make_trainer(tmp_path / "cut", save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    expected, got = (read_step_log(tmp_path / name / STEP_LOG) for name in ("whole", "cut"))
    assert [step.step for step in got] == [1, 2, 3, 4, 5, 6], "the step behind the checkpoint is logged once"
    assert [step.loss for step in got] == [step.loss for step in expected]
    for name, value in state_of(whole).items():
        assert torch.equal(value, state_of(again)[name]), name


def test_a_run_resumed_in_its_second_epoch_sees_the_sequences_in_that_epochs_order(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_steps": 8, "num_steps": None, "num_epochs": 2.0}
    make_trainer(tmp_path / "whole", **changes).train()
    first = make_trainer(tmp_path / "cut", **changes)
    first._on_step = lambda step: setattr(first.control, "should_training_stop", step.step == 9)
    first.train()
    make_trainer(tmp_path / "cut", **changes).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    expected, got = (read_step_log(tmp_path / name / STEP_LOG) for name in ("whole", "cut"))
    assert [step.loss for step in got] == [step.loss for step in expected]
    positions = [step.num_positions for step in expected]
    assert sum(positions[:6]) == sum(positions[6:]) and positions[:6] != positions[6:], "each epoch has its own batches"


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Two gloo processes with a sequence each make the losses and gradients of one with both: over two epochs, in parts, and resumed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "medusa_impl.tests.two_processes"]

    def train(*arguments: Path) -> list[JointStep]:
        done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return list(read_step_log(tmp_path / "two" / STEP_LOG))

    whole = train(tmp_path / "two")
    make_trainer(tmp_path / "one", **long_run()).train()
    expected = read_step_log(tmp_path / "one" / STEP_LOG)
    assert [step.num_positions for step in whole] == [step.num_positions for step in expected]
    for left, right in zip(whole, expected, strict=True):
        rel = 1e-6 if left.step == 1 else 1e-3  # from the second step on, Adam's division by small gradients magnifies rounding
        assert left.loss == pytest.approx(right.loss, rel=rel)
        assert left.head_losses == pytest.approx(right.head_losses, rel=rel)
        # Adam would hide a wrong scale; before the first step model and teacher are one, and the gradient is rounding
        assert left.gradient_norm == pytest.approx(right.gradient_norm, rel=1e-2, abs=1e-6)
        assert left.step == 1 or (left.gradient_norm or 0) > 1e-3
    again = train(tmp_path / "two", tmp_path / "two" / "checkpoint-5")  # in the second epoch, whose order is another
    assert [step.loss for step in again] == pytest.approx([step.loss for step in whole], rel=1e-6)
    assert [step.num_positions for step in again] == [step.num_positions for step in whole]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "one", save_steps=3).train()
    other = make_trainer(tmp_path / "two", lora=LORA.model_copy(update={"lm_head": False}))
    with pytest.raises(UserError, match="2 tensors that only one side has"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answer to train on"):
        make_trainer(tmp_path, sequences=(TrainingSequence(token_ids=(1, 2), answers=()),))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        next(trainer._training_model.heads.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="a loss of nan at step 0"):
        trainer.train()


def test_missing_optimiser_is_named(tmp_path: Path) -> None:
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="no bitsandbytes"):
            make_trainer(tmp_path, optimizer="adamw_8bit").train()
    else:
        pytest.skip("bitsandbytes is installed")
