"""Files of heads: an exact round trip, and refusal of other backbones and of damaged files.

Published layouts are recognised by the names of their tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.assets.hashes import tensors_sha256 as folder_sha256
from medusa_impl.checkpoints.heads import HeadsProvenance, load_heads, save_heads
from medusa_impl.checkpoints.tensors import backbone_sha256
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture, Medusa1Settings
from medusa_impl.training_log import HeadEvaluation, TrainingFigures

HIDDEN, VOCAB = 8, 20
OURS = "ab" * 32
PROVENANCE = HeadsProvenance(
    backbone_name="tiny",
    backbone_sha256=OURS,
    recipe=Medusa1Settings(num_heads=2),
    training=TrainingFigures(
        num_steps=3,
        num_subset_steps=2,
        subset_size=10,
        num_positions_seen=96,
        num_targets_outside=4,
        num_train_rows=90,
        num_held_out_rows=6,
        num_train_answers=9,
        num_held_out_answers=1,
        num_corpus_tokens=106,
        final_loss=2.5,
        held_out=HeadEvaluation(loss_sums=(1.0, 2.0), num_targets=(6, 5), rank_hits=((1,) * 10, (0,) * 10)),
    ),
)


def make_heads(
    architecture: HeadArchitecture = "shared", *, num_heads: int = 2, num_layers: int = 2
) -> MedusaHeads:
    torch.manual_seed(0)
    heads = MedusaHeads(
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        architecture=architecture,
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    return heads


def same(ours: MedusaHeads, theirs: MedusaHeads) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(a_name == b_name and torch.equal(a, b) for (a_name, a), (b_name, b) in pairs)


def released_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    """Return tensors under the authors' names, written out here and not taken from the code under test."""
    tensors = {}
    for i in range(heads.num_heads):
        for j in range(heads.num_layers):
            tensors[f"{i}.{j}.linear.weight"] = heads.state_dict()[f"blocks.{i}.{j}.linear.weight"].clone()
            tensors[f"{i}.{j}.linear.bias"] = heads.state_dict()[f"blocks.{i}.{j}.linear.bias"].clone()
        if heads.architecture == "own":
            tensors[f"{i}.{heads.num_layers}.weight"] = heads.state_dict()[f"unembeddings.{i}.weight"].clone()
    return tensors


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_round_trip_keeps_every_bit_and_the_provenance(
    tmp_path: Path, architecture: HeadArchitecture
) -> None:
    heads = make_heads(architecture)
    save_heads(tmp_path / "heads.safetensors", heads, provenance=PROVENANCE)
    loaded, provenance = load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS)
    assert same(loaded, heads)
    assert loaded.architecture == architecture and not loaded.training
    assert provenance == PROVENANCE
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(released_tensors(heads))
    assert [path.name for path in tmp_path.iterdir()] == ["heads.safetensors"]


def test_half_size_storage_loads_as_float32_within_its_rounding(tmp_path: Path) -> None:
    heads = make_heads()
    save_heads(tmp_path / "heads.safetensors", heads, provenance=PROVENANCE, dtype=torch.bfloat16)
    loaded, _ = load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS)
    for ours, theirs in zip(loaded.parameters(), heads.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float())


def test_heads_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, make_heads(), provenance=PROVENANCE)
    with pytest.raises(UserError, match="trained on tiny"):
        load_heads(path, backbone_sha256="cd" * 32)
    load_heads(path, backbone_sha256=None)


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_truncated_files_are_clear_errors(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, make_heads(), provenance=PROVENANCE)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match="no readable safetensors"):
        load_heads(path, backbone_sha256=OURS)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, make_heads(), provenance=PROVENANCE)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="differ from their own hash"):
        load_heads(path, backbone_sha256=OURS)


def test_missing_files_foreign_files_and_other_schemas_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable safetensors"):
        load_heads(tmp_path / "none.safetensors", backbone_sha256=OURS)
    foreign = tmp_path / "foreign.safetensors"
    save_file(released_tensors(make_heads()), foreign)
    with pytest.raises(UserError, match="load_published_heads"):
        load_heads(foreign, backbone_sha256=OURS)
    path = tmp_path / "heads.safetensors"
    save_heads(path, make_heads(), provenance=PROVENANCE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["medusa_repro"])
    for version in (99, True):
        metadata = {"medusa_repro": json.dumps({**header, "schema_version": version})}
        save_file(released_tensors(make_heads()), path, metadata=metadata)
        with pytest.raises(UserError, match="schema_version"):
            load_heads(path, backbone_sha256=OURS)


def test_file_names_no_absolute_path(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, make_heads(), provenance=PROVENANCE)
    assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_hash_of_a_model_equals_the_hash_of_its_saved_folder(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    before = backbone_sha256(model)
    model.save_pretrained(tmp_path / "saved")
    assert before == folder_sha256(tmp_path / "saved")
    assert before == backbone_sha256(LlamaForCausalLM.from_pretrained(tmp_path / "saved"))
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert backbone_sha256(model) != before


def _with_header(path: Path, **changes: object) -> None:
    """Write heads whose header says something else than their tensors, with a hash that fits."""
    save_heads(path, make_heads(), provenance=PROVENANCE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["medusa_repro"])
    metadata = {"medusa_repro": json.dumps({**header, **changes})}
    save_file(released_tensors(make_heads()), path, metadata=metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 10_000_000),
        ("num_heads", 3),
        ("num_layers", 10**9),
        ("hidden_size", 2**40),
        ("architecture", "own"),
    ],
)
def test_a_header_that_claims_other_sizes_is_refused_before_anything_is_built(
    tmp_path: Path, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of ten million heads once took all memory."""
    path = tmp_path / "heads.safetensors"
    _with_header(path, **{name: value})
    built: list[object] = []
    monkeypatch.setattr(MedusaHeads, "__init__", lambda *_, **options: built.append(options))
    with pytest.raises(UserError, match=f"found {name} = .* in the header; need .*as the tensors have"):
        load_heads(path, backbone_sha256=OURS)
    assert not built


def test_tensors_of_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    _with_header(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) for name, tensor in released_tensors(make_heads()).items()
    }
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="of float8_e4m3fn; need floating-point weights"):
        load_heads(path, backbone_sha256=OURS)


def test_fewer_heads_than_the_file_has_are_its_first_and_more_are_refused(tmp_path: Path) -> None:
    heads = make_heads("own", num_heads=3)
    save_heads(tmp_path / "heads.safetensors", heads, provenance=PROVENANCE)
    fewer, _ = load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS, num_heads=2)
    kept = {name: tensor for name, tensor in released_tensors(heads).items() if not name.startswith("2.")}
    assert fewer.num_heads == 2 and released_tensors(fewer).keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in released_tensors(fewer).items())
    with pytest.raises(UserError, match="num_heads = 4 and 3 heads in the file; need 1 to 3 heads"):
        load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS, num_heads=4)
