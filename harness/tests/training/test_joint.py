"""Joint training from a recipe file on a tiny model: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pytest import MonkeyPatch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import harness.training.joint
from harness.assets.hashes import tensors_sha256
from harness.device.engine import Engine, LoadedModel, heads_for, load_model
from harness.errors import ExitCode, UserError
from harness.specs.recipe import JointRecipe
from harness.tests.tiny_suite import QUIET, command, smoke_suite
from harness.tests.tiny_training import NUM_ANSWERS, recipe_data, write_corpus, write_recipe
from harness.training.joint import (
    JointFiles,
    check_runnable,
    first_heads,
    train_both,
    train_joint,
)
from harness.training.text import read_text
from medusa_impl.checkpoints.heads import HeadsProvenance, load_heads
from medusa_impl.tests.training.test_trainer import DATA_PARALLEL, DEEPSPEED, FSDP, SHARDED, needs_deepspeed
from medusa_impl.training.trainer import MedusaTrainer
from medusa_impl.training.whole_checkpoints import last_checkpoint
from medusa_impl.training_log import JointFigures, JointStep, read_step_log

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("joint")
    write_corpus(place / "corpus.safetensors", engine)
    return place


def train(folder: Path, place: Path, *, heads: Path | None = None, **recipe: Any) -> JointFiles:
    data = {**recipe_data(folder, **recipe), **({"start_heads": str(heads)} if heads is not None else {})}
    return train_both(
        JointRecipe.model_validate(data), work=place / "work", target=place / "out", console=QUIET
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_recipe_runs_from_the_command_line(folder: Path, heads_file: Path, tmp_path: Path) -> None:
    """The thin slice: file to heads, adapter and step log, and back to a model that decodes."""
    path = write_recipe(folder, "cli")
    path.write_text(
        path.read_text().replace('kind = "recipe"', f'kind = "recipe"\nstart_heads = "{heads_file}"')
    )
    ran = command("train", path, "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert ran.code == ExitCode.OK, ran.err
    told = json.loads(ran.out.splitlines()[-1])
    assert {name: told[name] for name in ("recipe", "heads", "adapter")} == {
        "recipe": "cli",
        "heads": "heads.safetensors",
        "adapter": "adapter",
    }
    if "curves" in told:  # without matplotlib it says so instead
        assert (tmp_path / "out" / told["curves"]).read_bytes().startswith(b"\x89PNG")
    assert ("curves" in told) != ("no picture" in ran.err)
    assert "held-out KL from the original" in ran.err and "head 4: held-out top-1" in ran.err
    assert "heads read the original LM head" in " ".join(ran.err.split())
    steps = read_step_log(tmp_path / "out" / "steps.jsonl")
    assert [step.step for step in steps] == [1, 2, 3, 4, 5] and steps[0].backbone_loss == 0.0
    model = smoke_suite().model.model_copy(update={"adapter": str(tmp_path / "out" / "adapter")})
    tuned, bare = load_model(model, device=CPU), load_model(smoke_suite().model, device=CPU)
    heads, provenance = heads_for(tuned, tmp_path / "out" / "heads.safetensors")
    assert isinstance(provenance, HeadsProvenance)
    assert (
        heads.num_heads == 4
        and provenance.adapter_sha256 == tuned.adapter_sha256
        and provenance.backbone_sha256 == bare.sha256
    )
    assert (provenance.lm_head_read, provenance.lm_head_adapted) == ("original", False)
    assert tuned.sha256 != bare.sha256 == tuned.base_sha256
    figures = provenance.training
    assert isinstance(figures, JointFigures) and figures.num_steps == 5 and figures.held_out is not None
    assert NUM_ANSWERS / 2 < figures.num_sequences < NUM_ANSWERS
    assert figures.num_positions_seen == sum(step.num_positions for step in steps)
    with pytest.raises(UserError, match="heads trained with the adapter"):
        heads_for(bare, tmp_path / "out" / "heads.safetensors")


def test_what_a_training_left_is_calibrated_apart(folder: Path, tmp_path: Path) -> None:
    """Where the tuned model could not be loaded whole after its training."""
    path = write_recipe(folder, "apart")
    train(folder, tmp_path / "one")
    ran = command("calibrate", path, tmp_path / "one" / "out")
    assert ran.code == ExitCode.OK and json.loads(ran.out) == {"recipe": "apart", "calibration": None}, (
        "a tiny model has no prompts of text"
    )
    ran = command("calibrate", path, tmp_path)
    assert ran.code == ExitCode.USER_ERROR and "found no heads.safetensors" in ran.error_line
    ran = command("calibrate", "embedded_medusa1", tmp_path)
    assert ran.code == ExitCode.USER_ERROR and "which trains heads alone" in ran.error_line


def train_together(path: Path, launcher: list[str], *, work: Path, out: Path) -> dict[str, Any]:
    """Run the command under a launcher and return the one line that it prints."""
    arguments = [
        sys.executable,
        *launcher,
        "harness",
        "train",
        str(path),
        "--work",
        str(work),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (told,) = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{") and '"recipe"' in line
    ]
    return dict(told)


def assert_like(ours: Path, theirs: Path) -> None:
    """The tensors of two files are those of one training but for rounding."""
    expected, got = tensors(ours), tensors(theirs)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].float(), tensor.float(), atol=2e-3, rtol=0.05, msg=name)


@pytest.mark.parametrize(
    "launcher",
    [DATA_PARALLEL, SHARDED, pytest.param(DEEPSPEED, marks=needs_deepspeed)],
    ids=["data_parallel", "sharded", "deepspeed"],
)
def test_two_processes_train_the_heads_and_adapter_of_one(
    folder: Path, tmp_path: Path, launcher: list[str]
) -> None:
    """The command under a launcher: the same batches, one process that writes, and an end from which it goes
    on.
    """
    recipe: dict[str, Any] = {
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "lm_head": False},
        "warmup": "two_stage",
        "schedule": "each_stage",
        "num_steps": 4,
    }
    path = write_recipe(folder, "shared", **recipe)
    one = train(folder, tmp_path / "one", **recipe)
    assert one.adapter is not None
    # The second time, training is over, and weights that no process holds whole are loaded. Where each holds
    # them, one process does the same below.
    for _ in range(1 if launcher is DATA_PARALLEL else 2):
        told = train_together(path, launcher, work=tmp_path / "work", out=tmp_path / "two")
        assert told["heads"] == "heads.safetensors" and told["adapter"] == "adapter"
        assert_like(one.heads, tmp_path / "two" / "heads.safetensors")
        assert_like(
            one.adapter / "adapter_model.safetensors",
            tmp_path / "two" / "adapter" / "adapter_model.safetensors",
        )
    _, provenance = load_heads(tmp_path / "two" / "heads.safetensors", backbone_sha256=None)
    assert (
        isinstance(provenance.training, JointFigures)
        and provenance.training.held_out is not None
        and one.figures.held_out is not None
    )
    assert provenance.training.held_out.head_loss_sums == pytest.approx(
        one.figures.held_out.head_loss_sums, rel=1e-3
    )
    steps = read_step_log(tmp_path / "two" / "steps.jsonl")
    assert [step.num_positions for step in steps] == [
        step.num_positions for step in read_step_log(one.step_log)
    ]
    alone = train(folder, tmp_path, **recipe)
    ours, theirs = tensors(alone.heads), tensors(tmp_path / "two" / "heads.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), (
        "what two processes began, one takes up: the batch is the recipe's"
    )


@pytest.mark.parametrize(
    "recipe",
    [{"backbone": "frozen"}, {"backbone": "full", "heads_lm_head": "adapted", "target": "tokens"}],
    ids=["frozen", "full"],
)
def test_sharded_processes_write_whole_models(folder: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """A frozen backbone is hashed after its training, one trained in full is written: both need weights that
    no process holds.
    """
    path = write_recipe(folder, f"sharded_{recipe['backbone']}", num_steps=2, **recipe)
    one = train(folder, tmp_path / "one", num_steps=2, **recipe)
    train_together(path, SHARDED, work=tmp_path / "work", out=tmp_path / "two")
    assert_like(one.heads, tmp_path / "two" / "heads.safetensors")
    _, provenance = load_heads(tmp_path / "two" / "heads.safetensors", backbone_sha256=None)
    assert isinstance(provenance.training, JointFigures)
    if one.model is None:
        assert one.figures.backbone_sha256s == provenance.training.backbone_sha256s
        assert len(set(provenance.training.backbone_sha256s or ())) == 1
    else:
        assert_like(one.model / "model.safetensors", tmp_path / "two" / "model" / "model.safetensors")
        assert (one.model / "config.json").read_text() == (
            tmp_path / "two" / "model" / "config.json"
        ).read_text()


def test_another_models_answers_are_refused(folder: Path, tmp_path: Path) -> None:
    """Its token ids may be other words, and nothing else would tell."""
    data = recipe_data(folder)
    data["model"]["tiny"]["seed"] += 1
    with pytest.raises(UserError, match="the answers of a model with tensors"):
        train_both(
            JointRecipe.model_validate(data), work=tmp_path / "work", target=tmp_path / "out", console=QUIET
        )


def test_a_run_begun_under_another_order_of_the_text_is_refused(folder: Path, tmp_path: Path) -> None:
    """To skip the first batches of one order in another would show some answers twice and some never."""
    train(folder, tmp_path)
    path = tmp_path / "work" / "joint" / "run.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "order"})
    )
    with pytest.raises(UserError, match="a training of another order"):
        train(folder, tmp_path)


def test_the_same_seed_gives_the_same_files_and_another_does_not(folder: Path, tmp_path: Path) -> None:
    one, two, other = (
        train(folder, tmp_path / name, seed=seed, num_steps=3)
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one.adapter is not None and two.adapter is not None and other.adapter is not None
    for left, right, same in ((one, two, True), (one, other, False)):
        assert left.adapter is not None and right.adapter is not None
        for name in ("adapter_model.safetensors",):
            ours, theirs = tensors(left.adapter / name), tensors(right.adapter / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours) == same
        assert (left.heads.read_bytes() == right.heads.read_bytes()) == same, (
            "weights, figures and provenance"
        )


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_run_that_was_cut_off_ends_where_an_unbroken_one_does(
    folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch, autocast: str | None
) -> None:
    """Regression: under autocast, the held-out figures of a run found finished were taken without it."""
    whole = train(folder, tmp_path / "whole", num_steps=5, autocast=autocast)

    def cut(step: JointStep) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    spec = JointRecipe.model_validate(recipe_data(folder, num_steps=5, autocast=autocast))
    loaded = load_model(spec.model, device=CPU)

    class Cut(MedusaTrainer):
        def __init__(self, *arguments: Any, on_step: Any, **options: Any) -> None:
            super().__init__(*arguments, on_step=cut, **options)

    monkeypatch.setattr(harness.training.joint, "MedusaTrainer", Cut)
    text = read_text(spec, loaded, work=tmp_path)
    places = {"work": tmp_path / "cut" / "work" / "joint", "target": tmp_path / "cut" / "out"}
    with pytest.raises(KeyboardInterrupt):
        train_joint(loaded, spec.recipe, text=text, start_heads=None, console=QUIET, save_steps=2, **places)
    left = last_checkpoint(places["work"])
    assert left is not None and left.step == 2 and not left.is_finished
    (left.folder.parent / "checkpoint-4").mkdir()  # begun and not ended: no trainer_state.json in it
    monkeypatch.undo()
    for _ in range(2):  # the second time, training is over: files are written again from the last checkpoint
        again = train(folder, tmp_path / "cut", num_steps=5, autocast=autocast)
        assert [step.loss for step in read_step_log(again.step_log)] == [
            step.loss for step in read_step_log(whole.step_log)
        ]
        expected, got = tensors(whole.heads), tensors(again.heads)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert again.figures == whole.figures


def test_a_process_that_is_killed_goes_on_to_the_same_end(folder: Path, tmp_path: Path) -> None:
    """By the signal that no process can handle, between two checkpoints, and wherever in a step or in a write
    it strikes.
    """
    recipe: dict[str, Any] = {"num_steps": 45, "autocast": "bfloat16"}
    path = write_recipe(folder, "killed", **recipe)
    log = tmp_path / "cut" / "work" / "joint" / "steps.jsonl"
    arguments = [
        sys.executable,
        "-m",
        "harness",
        "train",
        str(path),
        "--work",
        str(tmp_path / "cut" / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 13):
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before"
    left = last_checkpoint(log.parent)
    assert left is not None and 10 <= left.step < 45
    whole, again = (
        train(folder, tmp_path / "whole", name="killed", **recipe),
        train(folder, tmp_path / "cut", name="killed", **recipe),
    )
    assert [step.loss for step in read_step_log(again.step_log)] == [
        step.loss for step in read_step_log(whole.step_log)
    ]
    assert again.heads.read_bytes() == whole.heads.read_bytes()


def test_a_frozen_backbone_writes_heads_alone(folder: Path, heads_file: Path, tmp_path: Path) -> None:
    files = train(folder, tmp_path, heads=heads_file, backbone="frozen", num_steps=2)
    assert files.adapter is None and files.model is None and not (tmp_path / "out" / "adapter").exists()
    bare = load_model(smoke_suite().model, device=CPU)
    heads, provenance = heads_for(bare, files.heads)
    assert isinstance(provenance, HeadsProvenance)
    before, _ = heads_for(bare, heads_file)
    assert (
        provenance.adapter_sha256 is None
        and files.figures.held_out is not None
        and files.figures.held_out.backbone_loss_sum is None
    )
    assert any(
        not torch.equal(heads.state_dict()[name], tensor) for name, tensor in before.state_dict().items()
    )


def test_full_fine_tuning_writes_the_whole_model(folder: Path, tmp_path: Path) -> None:
    files = train(folder, tmp_path, backbone="full", heads_lm_head="adapted", target="tokens", num_steps=2)
    assert files.model is not None and (files.model / "config.json").exists() and files.adapter is None
    written: Any = AutoModelForCausalLM.from_pretrained(files.model)
    bare: Any = load_model(smoke_suite().model, device=CPU).model
    assert not torch.equal(written.lm_head.weight, bare.lm_head.weight)
    heads, provenance = load_heads(files.heads, backbone_sha256=tensors_sha256(files.model))
    assert heads.num_heads == 4 and (provenance.lm_head_read, provenance.lm_head_adapted) == ("adapted", True)
    with pytest.raises(UserError, match="one LM head only"):
        train(folder, tmp_path / "other", backbone="full")


@pytest.mark.parametrize("recipe", [{"optimizer": "adamw_8bit"}, {"quantisation": "4bit"}])
def test_what_fsdp_cannot_cut_is_refused(
    folder: Path, monkeypatch: MonkeyPatch, recipe: dict[str, str]
) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="under FSDP, which can part neither"):
        check_runnable(JointRecipe.model_validate(recipe_data(folder, **recipe)).recipe)


def test_one_dtype_for_all_that_learns_is_asked_for_under_fsdp(
    folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """FSDP gathers heads and LM head together, and raises from within where their dtypes differ."""
    spec = JointRecipe.model_validate(
        recipe_data(folder, backbone="full", heads_lm_head="adapted", target="tokens")
    )
    loaded = load_model(spec.model, device=CPU)
    cast(torch.nn.Module, loaded.model).to(torch.bfloat16)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    text = read_text(spec, loaded, work=tmp_path)
    with pytest.raises(UserError, match="found a backbone of bfloat16 trained in full under FSDP"):
        train_joint(
            loaded, spec.recipe, text=text, start_heads=None, work=tmp_path, target=tmp_path, console=QUIET
        )


def test_another_recipe_does_not_go_on_from_this_ones_state(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path, num_steps=2)
    with pytest.raises(UserError, match="another recipe"):
        train(folder, tmp_path, num_steps=3)


def test_heads_of_another_form_are_no_start(
    tiny: tuple[LoadedModel, Engine], folder: Path, heads_file: Path
) -> None:
    recipe = JointRecipe.model_validate(recipe_data(folder, num_heads=3)).recipe
    with pytest.raises(UserError, match=r"found a file of 4 heads, 1 layers and shared.*; need 3 heads"):
        first_heads(tiny[0], recipe, start_heads=heads_file)
    fresh, word = first_heads(tiny[0], recipe, start_heads=None)
    assert word == "fresh" and fresh.num_heads == 3
