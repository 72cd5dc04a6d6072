"""Heads that a suite names as an asset: the record says where they came from, as literal claims need it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.device.engine import load_engine, load_model
from harness.errors import UserError
from harness.files import ModelFolder
from harness.judge.claims.literal import hub_repository
from harness.specs.suite import HeadsSpec, ModelSpec
from harness.tests.tiny_folder import write_tiny_folder
from harness.tests.tiny_suite import smoke_suite

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "FasterDecoding/medusa-1.0-vicuna-7b-v1.5"


def publish(hub: Path, *, num_heads: int = 3) -> None:
    """Lay a whole model with its heads into the hub's local cache, as a published one lies there."""
    repository = hub / f"models--{REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = write_tiny_folder(repository / "snapshots" / COMMIT)
    tensors = load_file(folder / "model.safetensors")
    size, width = tensors["lm_head.weight"].shape
    for head in range(num_heads):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.zeros(width, width)
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.zeros(width)
        tensors[f"medusa_head.{head}.1.weight"] = torch.randn(size, width)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_heads_out_of_the_hub_say_so_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.delenv("MEDUSA_REPRO_MEDUSA_VICUNA_7B", raising=False)
    model = ModelSpec(path=ModelFolder(write_tiny_folder(tmp_path / "model")))
    suite = smoke_suite().model_copy(
        update={"model": model, "heads": HeadsSpec(asset="medusa-vicuna-7b", num_heads=2)}
    )
    loaded = load_model(model, device=torch.device("cpu"))
    engine = load_engine(suite, loaded, base_folder=None)
    assert engine.heads.num_heads == 2
    assert engine.heads_provenance["training"] == "published heads, training unknown"
    source = engine.loaded.assets["medusa-vicuna-7b"]
    assert source.startswith(f"hub {REPOSITORY}@main (commit {COMMIT}) ")
    assert hub_repository(source) == REPOSITORY and not loaded.assets


def test_heads_of_a_local_folder_are_no_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "hub")
    (snapshot,) = (tmp_path / "hub").glob("*/snapshots/*")
    monkeypatch.setenv("MEDUSA_REPRO_MEDUSA_VICUNA_7B", str(snapshot))
    model = ModelSpec(path=ModelFolder(write_tiny_folder(tmp_path / "model")))
    suite = smoke_suite().model_copy(update={"heads": HeadsSpec(asset="medusa-vicuna-7b")})
    engine = load_engine(suite, load_model(model, device=torch.device("cpu")), base_folder=None)
    assert hub_repository(engine.loaded.assets["medusa-vicuna-7b"]) is None


@pytest.mark.parametrize("asset", ["mt-bench", "nosuch"])
def test_heads_of_an_asset_that_is_no_model_are_refused(tmp_path: Path, asset: str) -> None:
    model = ModelSpec(path=ModelFolder(write_tiny_folder(tmp_path / "model")))
    suite = smoke_suite().model_copy(update={"heads": HeadsSpec(asset=asset)})
    with pytest.raises(UserError, match=f"found model asset '{asset}'; need one of"):
        load_engine(suite, load_model(model, device=torch.device("cpu")), base_folder=None)
