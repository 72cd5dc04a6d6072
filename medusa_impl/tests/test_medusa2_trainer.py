"""Joint training on the Trainer: what moves, what stays, the log, a resumed run, and two processes, sharded or not, against one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from pytest import MonkeyPatch
from transformers import LlamaForCausalLM

from medusa_impl.errors import UserError
from medusa_impl.medusa2 import Medusa2Recipe, MedusaTrainingModel
from medusa_impl.medusa2_trainer import STEP_LOG, JointStep, MedusaTrainer, read_step_log, shared_batch, training_arguments
from medusa_impl.sequences import TrainingSequence
from medusa_impl.sharding import check_launcher
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tests.test_medusa2 import LORA, make_heads, tied_llama

ROOT = Path(__file__).resolve().parents[2]
SHARE, WEIGHTS = "share.json", "weights.pt"
SHARDED = ["-m", "accelerate.commands.launch", "--config_file", "suites/recipes/fsdp.yaml", "--num_processes", "2"]
SHARDED += ["--main_process_port", "0", "-m", "medusa_impl.tests.pretend_gpus"]
DATA_PARALLEL = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
DATA_PARALLEL += ["--rdzv_endpoint", "localhost:0", "-m"]


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


def train_together(launcher: list[str], jobs: list[dict[str, Any]]) -> None:
    """Have two processes do some jobs, one after another, each in its folder."""
    command = [sys.executable, *launcher, "medusa_impl.tests.two_processes", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_steps(got: tuple[JointStep, ...], expected: tuple[JointStep, ...], *, rel: float = 1e-3) -> None:
    """Losses, counts and gradients of two runs agree; from the second step on, Adam's division by small gradients magnifies rounding."""
    assert [step.num_positions for step in got] == [step.num_positions for step in expected]
    for left, right in zip(got, expected, strict=True):
        close = 1e-6 if left.step == 1 else rel
        assert left.loss == pytest.approx(right.loss, rel=close)
        assert left.head_losses == pytest.approx(right.head_losses, rel=close)
        # Adam would hide a wrong scale; before the first step model and teacher are one, and the gradient is rounding
        assert left.gradient_norm == pytest.approx(right.gradient_norm, rel=10 * rel, abs=1e-6)
        assert left.step == 1 or (left.gradient_norm or 0) > 1e-3


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Two gloo processes with a sequence each make the losses and gradients of one with both: over two epochs, in parts, and resumed."""
    folder = tmp_path / "two"
    train_together(DATA_PARALLEL, [{"folder": str(folder)}])
    whole = read_step_log(folder / STEP_LOG)
    make_trainer(tmp_path / "one", **long_run()).train()
    assert_same_steps(whole, read_step_log(tmp_path / "one" / STEP_LOG))
    train_together(DATA_PARALLEL, [{"folder": str(folder), "checkpoint": str(folder / "checkpoint-5")}])  # in the second epoch
    again = read_step_log(folder / STEP_LOG)
    assert [step.loss for step in again] == pytest.approx([step.loss for step in whole], rel=1e-6)
    assert [step.num_positions for step in again] == [step.num_positions for step in whole]
    assert json.loads((folder / SHARE).read_text()) == [1, 0]


SHARDED_CASES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "autocast": {"autocast": "bfloat16"},
    "heads_alone": {"backbone": "frozen"},
    "two_stages": {"warmup": "two_stage", "schedule": "each_stage"},
    "tied": {"tied": True},
    "everything": {"tied": True, "backbone": "full", "heads_lm_head": "adapted", "target": "original", "backbone_learning_rate": 1e-5},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes that hold half of the weights each, and one of them cut off and resumed; beside them runs of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, changes in SHARDED_CASES.items():
        changes = {**changes, "backbone_model": tied_llama() if changes.get("tied") else None}
        changes.pop("tied", None)
        trainer = make_trainer(folder / "one" / name, **{**long_run(), **changes})
        trainer.args.save_total_limit = None
        trainer.train()
        torch.save({key: parameter.detach() for key, parameter in trainer._learning().items()}, folder / "one" / name / WEIGHTS)
    jobs = [{"folder": str(folder / "two" / name), **changes} for name, changes in SHARDED_CASES.items()]
    for name, begun in (("resumed", "two"), ("taken_up", "one")):
        for case in ("adapter", "two_stages"):
            checkpoint = str(folder / begun / case / "checkpoint-5")
            jobs.append({"folder": str(folder / name / case), "checkpoint": checkpoint, **SHARDED_CASES[case]})
    train_together(SHARDED, jobs)
    return folder


@pytest.mark.parametrize("name", SHARDED_CASES)
def test_sharded_processes_take_the_steps_of_one(sharded: Path, name: str) -> None:
    """Under FSDP each process holds half of the weights, and losses, gradients and what is learnt are those of one that holds all.

    Regression: accelerate would hand out losses and sums in the autocast's dtype, and leave autocast itself out.
    """
    one, two = sharded / "one" / name, sharded / "two" / name
    held, num_units = json.loads((two / SHARE).read_text())
    layers = tiny_llama().config.num_hidden_layers * (2 if name == "everything" else 1)  # the original beside the model in training
    assert 0.45 < held < 0.6 and num_units == layers + 1
    assert_same_steps(
        read_step_log(two / STEP_LOG), read_step_log(one / STEP_LOG), rel=4e-3 if name in ("autocast", "everything") else 1e-3
    )
    expected, got = torch.load(one / WEIGHTS), torch.load(two / WEIGHTS)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, atol=5e-3, rtol=0.05, msg=key)


@pytest.mark.parametrize("name", ["adapter", "two_stages"])
@pytest.mark.parametrize(("begun", "resumed"), [("two", "resumed"), ("one", "taken_up")])
def test_a_sharded_run_goes_on_from_its_own_checkpoint_and_from_that_of_one_process(
    sharded: Path, name: str, begun: str, resumed: str
) -> None:
    """Weights, moments and rates come back cut in two; in the two stages the optimiser knows the heads alone until the second begins."""
    expected, got = (read_step_log(sharded / folder / name / STEP_LOG) for folder in (begun, resumed))
    assert [step.step for step in got] == [6, 7, 8]
    assert [step.loss for step in got] == pytest.approx([step.loss for step in expected[5:]], rel=1e-6 if begun == "two" else 1e-4)
    whole, again = (torch.load(sharded / folder / name / WEIGHTS) for folder in (begun, resumed))
    for key, tensor in whole.items():
        torch.testing.assert_close(again[key], tensor, atol=1e-6 if begun == "two" else 1e-4, rtol=1e-3, msg=key)


def test_one_process_goes_on_where_sharded_ones_stopped(sharded: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **long_run())
    trainer.train(resume_from_checkpoint=str(sharded / "two" / "adapter" / "checkpoint-5"))
    expected, got = read_step_log(sharded / "two" / "adapter" / STEP_LOG), read_step_log(tmp_path / STEP_LOG)
    assert [step.loss for step in got] == pytest.approx([step.loss for step in expected[5:]], rel=1e-4)


@pytest.mark.parametrize(
    ("variables", "cpus", "found"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "found DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True, "found FSDP on CPUs"),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "found fsdp_version 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "True"},
            False,
            "found fsdp_cpu_ram_efficient_loading",
        ),
    ],
)
def test_a_launcher_that_would_train_something_else_is_refused(
    monkeypatch: MonkeyPatch, variables: dict[str, str], cpus: bool, found: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    state: Any = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU if cpus else DistributedType.MULTI_GPU)
    with pytest.raises(UserError, match=found):
        check_launcher(state)


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
