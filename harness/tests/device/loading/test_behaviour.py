"""The identity besides the tensors' hash: an edit that may change a text changes its part, and only that."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.device.engine import LoadedModel, heads_for, load_model, with_adapter
from harness.device.loading.behaviour import (
    FORWARD_FIELDS,
    OTHER_FIELDS,
    adapter_behaviour,
    check_pinned,
)
from harness.errors import UserError
from harness.files import ModelFolder
from harness.paths import shipped
from harness.specs.assets import load_asset_specs
from harness.specs.suite import ModelSpec
from harness.tests.tiny_folder import edit_json, write_tiny_folder
from harness.tests.tiny_suite import save_tiny_heads
from medusa_impl.checkpoints.heads import load_heads, save_heads
from medusa_impl.heads import MedusaHeads

# Of `write_tiny_folder`, the same with transformers 5.17.0 and 5.23.0, by
#   python -c "from harness.tests.device.loading.test_behaviour import print_pinned; print_pinned()"
PINNED = {
    "forward": "9864d1d53193b7448714f5434a4de33f50b973896caf3239fc35131a09f38403",
    "end": "d0bca111f8628137adc4c16f123496dcdd1d590d06cb5d9acd68b39fe656fb97",
    "tokenizer": "fb3ec42f2c390042c63dde5b0a6897c38a576e9f471c5b304044123e1fc093d9",
    "template": "db257f00e49caa34002b0683344a8df2f3634778fb9df775051bd93e6f3a594c",
}
FAMILIES = (  # noqa: SIM905
    "Llama Mistral Qwen2 Qwen3 Gemma2 Phi3 Olmo2 Granite GPTNeoX GPT2 OPT Falcon Mixtral Qwen3Moe StableLm "
    "GPTJ"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def loaded_from(folder: Path, **changes: Any) -> LoadedModel:
    return load_model(ModelSpec(path=ModelFolder(folder), **changes), device=torch.device("cpu"))


def print_pinned() -> None:
    """Print the values that are pinned above."""
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        print(transformers.__version__, dict(loaded_from(write_tiny_folder(Path(home) / "m")).behaviour))


def test_the_behaviour_of_one_folder_is_pinned(whole: Path) -> None:
    """In the oldest and the newest transformers allowed."""
    assert dict(loaded_from(whole).behaviour) == PINNED


def edit_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def edit_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(data))


def edit_rope(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope": (edit_rope, "forward"),
    "eps": (lambda folder: edit_json(folder / "config.json", rms_norm_eps=0.1), "forward"),
    "eos": (lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[0, 5]), "end"),
    "tokenizer": (edit_tokenizer, "tokenizer"),
    "template": (edit_template, "template"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_its_part_and_no_other(edit: str, whole: Path, folder: Path) -> None:
    change, part = EDITS[edit]
    change(folder)
    before, after = loaded_from(whole), loaded_from(folder)
    assert [name for name in before.behaviour if before.behaviour[name] != after.behaviour[name]] == [part]
    assert before.sha256 == after.sha256 and before.behaviour_sha256 != after.behaviour_sha256


def test_two_spellings_of_one_model_have_one_behaviour(whole: Path, folder: Path) -> None:
    """Older files have rope_theta at the top level and leave defaults out; a window is ignored by Llama."""
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    for name in ("head_dim", "mlp_bias", "attention_bias", "transformers_version", "use_cache"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": int(theta), "sliding_window": 8}))
    assert loaded_from(folder).behaviour == loaded_from(whole).behaviour


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_family_is_in_one_of_the_two_lists(family: str) -> None:
    """A field that is in neither would change a model without a trace."""
    fields = set(inspect.signature(getattr(transformers, f"{family}Config").__init__).parameters)
    aliases = getattr(transformers, f"{family}Config").attribute_map
    known = {*FORWARD_FIELDS, *OTHER_FIELDS, *(aliases.get(name, name) for name in FORWARD_FIELDS)}
    assert fields - known - {"self", "kwargs"} == set()
    assert not set(FORWARD_FIELDS) & set(OTHER_FIELDS)


def test_heads_of_another_configuration_of_the_same_tensors_are_refused(
    whole: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = loaded_from(whole)
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    heads = MedusaHeads(num_heads=2, num_layers=1, hidden_size=16, vocab_size=97, architecture="own")
    save_tiny_heads(old, heads, backbone_sha256=loaded.sha256)
    provenance = load_heads(old, backbone_sha256=None)[1]
    carrying = provenance.model_copy(update={"behaviour": dict(loaded.behaviour)})
    save_heads(new, heads, provenance=carrying)
    heads_for(loaded, new)
    assert caplog.text == ""
    heads_for(loaded, old)
    assert "old.safetensors does not say which forward, tokenizer" in caplog.text
    EDITS["eos"][0](folder)
    heads_for(loaded_from(folder), new)  # they do not depend on it
    EDITS["rope"][0](folder)
    with pytest.raises(UserError, match="heads trained with another forward of the same tensors"):
        heads_for(loaded_from(folder), new)


def test_the_scale_of_an_adapter_is_part_of_the_behaviour(whole: Path, tmp_path: Path) -> None:
    """An edited lora_alpha changed the model and no hash."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(loaded_from(whole).model, config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merged = with_adapter(loaded_from(whole), tmp_path / "adapter")
    assert merged.behaviour["adapter"] == adapter_behaviour(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", lora_alpha=64)
    other = with_adapter(loaded_from(whole), tmp_path / "adapter")
    assert other.sha256 == merged.sha256 and other.behaviour["adapter"] != merged.behaviour["adapter"]


def test_a_pinned_asset_is_held_to_its_behaviour() -> None:
    check_pinned({"forward": "a", "end": "b"}, {"forward": "a"}, name="mine")
    with pytest.raises(UserError, match=r"another behaviour .forward a. of the pinned tensors"):
        check_pinned({"forward": "a"}, {"forward": "b"}, name="mine")


@pytest.mark.parametrize("name", ["medusa1.safetensors", "medusa2/heads.safetensors"])
def test_shipped_heads_carry_the_behaviour_that_their_asset_is_pinned_to(name: str) -> None:
    """They gained it without training: their tensors are what they were."""
    pinned = load_asset_specs()["smollm2-135m-instruct"].behaviour_sha256s
    carried = load_heads(shipped("embedded", name), backbone_sha256=None)[1].behaviour
    assert carried is not None and set(pinned) == {"forward", "end", "tokenizer", "template"}
    adapter = {"adapter": adapter_behaviour(shipped("embedded", "medusa2", "adapter"))}
    assert carried == {**pinned, **(adapter if "medusa2" in name else {})}
