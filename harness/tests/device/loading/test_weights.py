"""A model folder is whole, and what was loaded is what was hashed: else one line, before anything runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.assets.hashes import tensors_sha256
from harness.device.engine import LoadedModel, load_model, model_sha256, model_without_weights
from harness.errors import UserError
from harness.files import ModelFolder
from harness.specs.suite import ModelSpec
from harness.tests.tiny_folder import edit_json, write_tiny_folder

WEIGHTS, CPU = "model.safetensors", torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder, which tests copy before they change it."""
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole folder."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def spec_of(folder: Path, **changes: Any) -> ModelSpec:
    return ModelSpec(path=ModelFolder(folder), **changes)


def loaded_from(folder: Path, **changes: Any) -> LoadedModel:
    return load_model(spec_of(folder, **changes), device=CPU)


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(torch.arange(2, 12)[None]).logits
    return logits


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_whole_folder_loads_with_the_hash_of_its_tensors(whole: Path) -> None:
    loaded = loaded_from(whole)
    assert loaded.sha256 == model_sha256(spec_of(whole)) == tensors_sha256(whole)
    assert set(loaded.behaviour) == {"forward", "end", "tokenizer", "template"} and loaded.eos_ids == {0}


def test_tensors_under_other_names_are_refused(folder: Path) -> None:
    """They were random at every load, under one and the same hash."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.w1.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")

    change_tensors(folder, rename)
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.mlp\.up_proj.*unknown: .*w1\.weight"):
        loaded_from(folder)


def test_a_layer_that_the_weights_lack_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\."):
        loaded_from(folder)


def test_a_missing_lm_head_is_refused_unless_it_is_tied(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        loaded_from(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert loaded_from(folder).sha256 == tensors_sha256(folder)


def test_a_layer_that_the_configuration_lacks_is_refused(folder: Path) -> None:
    change_tensors(
        folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2)})
    )
    with pytest.raises(UserError, match=r"unknown: model\.layers\.1\.mlp"):
        loaded_from(folder)


def test_tensors_that_the_class_declares_as_ignorable_pass(folder: Path) -> None:
    change_tensors(
        folder,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    loaded_from(folder)


@pytest.mark.parametrize("name", ["medusa_head.0.0.linear.weight", "0.1.weight"])
def test_published_heads_among_the_weights_are_left_aside_and_named(
    name: str, whole: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    assert loaded_from(folder).sha256 == tensors_sha256(whole)
    assert "1 tensors of draft heads" in caplog.text


def test_an_adapter_next_to_the_weights_is_not_loaded_on_top(
    whole: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers loads one unasked, under the hash of the bare weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(loaded_from(whole).model, config)
    adapted.save_pretrained(str(folder))
    assert (folder / "adapter_config.json").exists()
    assert torch.equal(logits_of(loaded_from(folder)), logits_of(loaded_from(whole)))
    assert "left aside" in caplog.text


def test_an_index_next_to_a_newer_single_file_does_not_name_other_weights(whole: Path, folder: Path) -> None:
    """The hash was that of the index's shards, the model that of the single file."""
    old = write_tiny_folder(folder.parent / "old", seed=1)
    shutil.copy(old / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loaded = loaded_from(folder)
    assert loaded.sha256 == tensors_sha256(whole)
    assert torch.equal(logits_of(loaded), logits_of(loaded_from(whole)))
    (folder / WEIGHTS).unlink()
    shards = loaded_from(folder)
    assert shards.sha256 == tensors_sha256(old)
    assert torch.equal(logits_of(shards), logits_of(loaded_from(old)))


def test_weights_in_a_pickle_have_the_same_hash_and_a_malicious_one_never_runs(
    whole: Path, folder: Path
) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert loaded_from(folder).sha256 == tensors_sha256(whole)
    ran = folder / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(ran),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="nothing else in a file is ever run"):
        loaded_from(folder)
    assert not ran.exists()


def test_code_in_a_folder_needs_the_command_line_s_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite alone could make a model folder's code run."""
    ran = folder / "ran"
    (folder / "code.py").write_text(
        "import os\nfrom transformers import LlamaConfig\n"
        f"os.mkdir({str(ran)!r})\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own"})
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
    asking = spec_of(folder, trust_remote_code=True)
    attempts: list[Callable[[], Any]] = [
        lambda: load_model(asking, device=CPU),
        lambda: model_sha256(asking),
        lambda: model_without_weights(asking),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match="--trust-remote-code"):
            attempt()
    assert not ran.exists()


def test_token_ids_beyond_the_embedding_are_refused(whole: Path) -> None:
    loaded = loaded_from(whole)
    loaded.require_known_ids([1, 96], where="a prompt")
    with pytest.raises(UserError, match="found token id 97; need ids below 97"):
        loaded.require_known_ids([1, 97], where="a prompt")
