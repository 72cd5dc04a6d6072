"""Heads alone from a recipe to their files: where they learn, which way their states come, and the plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import tomli_w
import torch
from rich.console import Console

import harness.training.heads
import harness.training.room
from harness.errors import ExitCode, UserError
from harness.files import ModelFolder
from harness.specs.recipe import HeadsRecipe
from harness.tests.tiny_suite import QUIET, command
from harness.tests.training.test_workers import model_folder, words
from harness.training.heads import train_heads
from harness.training.plan import DeviceRoom
from harness.training.room import corpus_size, heads_device, room_here, size_of_one_step
from medusa_impl.checkpoints.heads import load_heads
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.distill import CorpusStore

__all__ = ["model_folder"]  # a fixture
SETTINGS: dict[str, Any] = {
    "num_heads": 2,
    "num_epochs": None,
    "num_steps": 4,
    "batch_positions": 60,
    "subset_size": None,
}


def spec_of(
    folder: Path | ModelFolder, *, recipe: dict[str, Any] | None = None, **changes: Any
) -> HeadsRecipe:
    corpus = {"num_samples": 40, "max_new_tokens": 12, "temperature": 1.0, "num_rows": 8}
    data = {
        "schema_version": 1,
        "kind": "recipe",
        "name": "tiny_heads",
        "description": "-",
        "num_workers": 1,
        "model": {"path": str(folder)},
        "corpus": corpus,
        "recipe": {**SETTINGS, **(recipe or {})},
        "calibration": {"num_prompts": 3, "max_new_tokens": 6},
        **changes,
    }
    return HeadsRecipe.model_validate({key: value for key, value in data.items() if value is not None})


def trained(spec: HeadsRecipe, folder: Path, **options: Any) -> tuple[Any, Any, str]:
    """Train and return the heads, their provenance, and what was told."""
    console = Console(record=True, width=400, quiet=False, file=(folder.parent / "told.txt").open("w"))
    with (
        patch.object(harness.training.heads, "check_overlap"),
        patch("harness.training.workers.check_overlap"),
    ):
        files = train_heads(spec, work=folder / "work", target=folder / "out", console=console, **options)
    heads, provenance = load_heads(files.heads, backbone_sha256=None)
    assert files.calibration.exists()
    return heads, provenance, console.export_text()


@pytest.fixture(scope="module")
def packed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus made from scratch, which the plan keeps the states of, packed by a first training."""
    folder = tmp_path_factory.mktemp("heads") / "first"
    folder.mkdir()
    _, provenance, told = trained(spec_of(model_folder), folder, from_scratch=True)
    assert provenance.recipe.features == "device" and 'features = "device" (chosen by the plan)' in told
    assert any((folder / "work" / "corpus").glob("states-*.safetensors"))
    return folder / "out" / "corpus.safetensors"


def test_heads_of_a_packed_corpus_in_three_ways(model_folder: Path, packed: Path, tmp_path: Path) -> None:
    """The states lie in memory, in a file, or nowhere; the heads say which way it was."""
    made = {}
    for way in ("device", "file", "none"):
        folder = tmp_path / way
        folder.mkdir()
        spec = spec_of(model_folder, recipe={"features": way}, packed_corpus=str(packed))
        heads, provenance, told = trained(spec, folder)
        assert provenance.recipe.features == way and f'features = "{way}" (as the recipe says)' in told
        assert (folder / "work" / "states.table").exists() == (way == "file")
        assert bool(list((folder / "work").glob("states-of-*"))) == (way != "none")
        made[way] = heads, provenance
    for ours, theirs in zip(made["device"][0].parameters(), made["file"][0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    counts = {way: provenance.training for way, (_, provenance) in made.items()}
    assert counts["device"] == counts["file"]
    for name in ("num_train_rows", "num_held_out_rows", "num_corpus_tokens", "num_steps"):
        assert len({getattr(figures, name) for figures in counts.values()}) == 1


def test_answers_made_without_states_go_on_without_them(model_folder: Path, tmp_path: Path) -> None:
    """A recipe that keeps none makes a corpus of text alone; the plan's own choice does not undo that."""
    spec = spec_of(model_folder, recipe={"features": "none"})
    _, _, _ = trained(spec, tmp_path, from_scratch=True)
    store = CorpusStore(tmp_path / "work" / "corpus")
    assert all(sample.states is None for sample in store.samples())
    _, provenance, told = trained(spec_of(model_folder), tmp_path, from_scratch=True)
    assert provenance.recipe.features == "none" and 'features = "none" (chosen by the plan)' in told


def test_conversations_train_heads_alone(model_folder: Path, tmp_path: Path) -> None:
    """Text of several turns, whose states are not kept, and no corpus is packed."""
    talk = [
        {
            "id": f"c{number}",
            "conversations": [
                {"from": speaker, "value": words(9, seed=10 * number + turn)}
                for turn, speaker in enumerate(("human", "gpt") * (1 + number % 3))
            ],
        }
        for number in range(30)
    ]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    spec = spec_of(
        model_folder, recipe={"max_length": 48}, corpus=None, conversations=str(tmp_path / "talk.json")
    )
    size = corpus_size(spec)
    assert size.num_answers > 30 and size.is_there
    folder = tmp_path / "run"
    folder.mkdir()
    _, provenance, _ = trained(spec, folder)
    assert provenance.recipe.features == "none" and provenance.training.num_train_answers > 20
    assert not (folder / "out" / "corpus.safetensors").exists()


def test_a_device_too_small_is_told_before_anything_is_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(model_folder)
    monkeypatch.setattr(
        harness.training.heads, "room_here", lambda device, work: DeviceRoom("a small card", 100_000)
    )
    monkeypatch.setattr(harness.training.heads, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="of a small card") as caught:
        train_heads(spec, work=tmp_path, target=tmp_path, console=QUIET)
    assert "\n" not in str(caught.value)


def test_several_processes_are_refused_before_anything_is_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes"):
        train_heads(spec_of(model_folder), work=tmp_path, target=tmp_path, console=QUIET)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.training.room, "best_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="no CUDA device"):
        heads_device(Medusa1Settings(device="cuda"))
    assert heads_device(Medusa1Settings()).type == "cpu"
    monkeypatch.setattr(harness.training.room, "best_device", lambda: torch.device("cuda", 1))
    assert heads_device(Medusa1Settings()) == heads_device(Medusa1Settings(device="cuda"))
    assert heads_device(Medusa1Settings(device="cpu")).type == "cpu"


def test_the_machine_is_what_the_plan_is_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_here(torch.device("cpu"), work=tmp_path / "not" / "there")
    assert room.memory_bytes > 2**28 and (room.disk_bytes or 0) > 0 and room.name
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("harness.training.room.shutil.disk_usage", lambda folder: free)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "states-0-00000.safetensors").write_bytes(b"x" * 70)
    (tmp_path / "corpus" / "corpus-0-00000.jsonl").write_bytes(b"x" * 9)
    assert room_here(torch.device("cpu"), work=tmp_path).disk_bytes == 1070
    size = size_of_one_step(Medusa1Settings(batch_positions=100))
    assert size.num_rows == 100 and not size.is_there


def test_memory_that_others_use_is_not_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a GPU that was half in use went by all of its memory, and training ran out of it."""
    some = SimpleNamespace(total=9999, available=1234)
    monkeypatch.setattr("psutil.virtual_memory", lambda: some)
    assert room_here(torch.device("cpu"), work=tmp_path).memory_bytes == 1234
    some.available = 3 * some.total
    assert room_here(torch.device("cpu"), work=tmp_path).memory_bytes == some.total


@pytest.mark.parametrize(
    ("total", "free", "room"), [(80, 80, 80), (80, 30, 35), (80, 79, 80)], ids=["idle", "shared", "reserved"]
)
def test_on_a_gpu_what_pytorch_keeps_for_itself_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, room: int
) -> None:
    gpu, named = torch.device("cuda"), SimpleNamespace(name="a card", memory_bytes=total)
    monkeypatch.setattr("harness.training.room.device_info", lambda device: named)
    for name, value in {
        "mem_get_info": (free, total),
        "memory_reserved": 9,
        "memory_allocated": 4,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    assert room_here(gpu, work=tmp_path).memory_bytes == room


@pytest.mark.parametrize(
    ("shape", "device", "code"),
    [
        ("vicuna-7b-v1.5", "h100-80gb-sxm", ExitCode.OK),
        ("vicuna-13b-v1.5", "h200-sxm", ExitCode.OK),
        ("vicuna-33b-v1.3", "h100-80gb-sxm", ExitCode.USER_ERROR),
        ("vicuna-33b-v1.3", "b200", ExitCode.OK),
        ("no-such-shape", "b200", ExitCode.USER_ERROR),
        ("vicuna-7b-v1.5", "no-such-device", ExitCode.USER_ERROR),
    ],
)
def test_dry_runs_of_the_papers_models(shape: str, device: str, code: ExitCode) -> None:
    ran = command("train", "paper_7b_medusa1", "--dry-run", "--shape", shape, "--device", device)
    assert ran.code == code, ran.err
    if code == ExitCode.OK:
        told = json.loads(ran.out.splitlines()[-1])
        assert told["features"] == "none" and set(told["ways"]) == {"none"}
        way = told["ways"]["none"]
        assert way["device_bytes"] == sum(way["parts"].values()) and way["full_throughput_s"] > 0
        assert way["num_steps"] is None and "those of one step" in ran.err + ran.out
    elif shape == "vicuna-33b-v1.3":
        assert "weights 65.1" in ran.error_line and "lower" not in ran.error_line
    else:
        assert shape in ran.error_line or device in ran.error_line


def test_a_dry_run_plans_this_machine_too(model_folder: Path, packed: Path, tmp_path: Path) -> None:
    spec = spec_of(
        ModelFolder(model_folder), recipe={"num_epochs": 2.0, "num_steps": None}, packed_corpus=str(packed)
    )
    file = tmp_path / "tiny_heads.toml"
    file.write_text(tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True)))
    ran = command("train", file, "--dry-run", "--work", tmp_path / "work")
    assert ran.code == ExitCode.OK, ran.err
    told = json.loads(ran.out.splitlines()[-1])
    assert told["features"] == "device" and set(told["ways"]) == {"device", "file", "none"}
    rows = corpus_size(spec).num_rows
    assert told["ways"]["device"]["num_steps"] == 2 * (rows // 60) > 4
    assert not (tmp_path / "work").exists()
    for wrong in (["--shape", "vicuna-7b-v1.5"], ["--device", "b200"]):
        assert command("train", file, *wrong).code == ExitCode.USER_ERROR


@pytest.mark.parametrize(
    ("recipe", "shape", "device", "fits"),
    [
        ("embedded_medusa2_ramped", "smollm2-135m-instruct", "t4", True),
        ("paper_7b_two_stage", "vicuna-7b-v1.5", "a100-40gb-sxm", True),
        ("paper_33b_ramped", "vicuna-33b-v1.3", "h100-80gb-sxm", False),
        ("paper_33b_ramped", "vicuna-33b-v1.3", "h200-sxm", True),
    ],
)
def test_dry_runs_of_heads_and_backbone(recipe: str, shape: str, device: str, fits: bool) -> None:
    ran = command("train", recipe, "--dry-run", "--shape", shape, "--device", device)
    assert (ran.code == ExitCode.OK) == fits, ran.err
    if fits:
        told = json.loads(ran.out.splitlines()[-1])
        assert told["device_bytes"] == sum(told["parts"].values()) > 0
        assert told["parts"]["adapter"] > 0
    else:
        assert "weights 65." in ran.error_line and "FSDP" in ran.error_line
