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
from medusa_impl.checkpoints.released import load_released_heads
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


def _heads(
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


def _same(ours: MedusaHeads, theirs: MedusaHeads) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(a_name == b_name and torch.equal(a, b) for (a_name, a), (b_name, b) in pairs)


def _released_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
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
    heads = _heads(architecture)
    save_heads(tmp_path / "heads.safetensors", heads, provenance=PROVENANCE)
    loaded, provenance = load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS)
    assert _same(loaded, heads)
    assert loaded.architecture == architecture and not loaded.training
    assert provenance == PROVENANCE
    with safe_open(tmp_path / "heads.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(_released_tensors(heads))
    assert [path.name for path in tmp_path.iterdir()] == ["heads.safetensors"]


def test_half_size_storage_loads_as_float32_within_its_rounding(tmp_path: Path) -> None:
    heads = _heads()
    save_heads(tmp_path / "heads.safetensors", heads, provenance=PROVENANCE, dtype=torch.bfloat16)
    loaded, _ = load_heads(tmp_path / "heads.safetensors", backbone_sha256=OURS)
    for ours, theirs in zip(loaded.parameters(), heads.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float())


def test_heads_of_another_backbone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, _heads(), provenance=PROVENANCE)
    with pytest.raises(UserError, match="trained on tiny"):
        load_heads(path, backbone_sha256="cd" * 32)
    load_heads(path, backbone_sha256=None)


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_truncated_files_are_clear_errors(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, _heads(), provenance=PROVENANCE)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match="no readable safetensors"):
        load_heads(path, backbone_sha256=OURS)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, _heads(), provenance=PROVENANCE)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="differ from their own hash"):
        load_heads(path, backbone_sha256=OURS)


def test_missing_files_foreign_files_and_other_schemas_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable safetensors"):
        load_heads(tmp_path / "none.safetensors", backbone_sha256=OURS)
    foreign = tmp_path / "foreign.safetensors"
    save_file(_released_tensors(_heads()), foreign)
    with pytest.raises(UserError, match="load_released_heads"):
        load_heads(foreign, backbone_sha256=OURS)
    path = tmp_path / "heads.safetensors"
    save_heads(path, _heads(), provenance=PROVENANCE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["medusa_repro"])
    save_file(
        _released_tensors(_heads()),
        path,
        metadata={"medusa_repro": json.dumps({**header, "schema_version": 99})},
    )
    with pytest.raises(UserError, match="schema_version"):
        load_heads(path, backbone_sha256=OURS)


def test_file_names_no_absolute_path(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    save_heads(path, _heads(), provenance=PROVENANCE)
    assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_released_files_tell_their_heads_and_layers(
    tmp_path: Path, architecture: HeadArchitecture, suffix: str
) -> None:
    heads = _heads(architecture, num_heads=3)
    path = tmp_path / f"medusa_lm_head.{suffix}"
    if suffix == "pt":
        torch.save(_released_tensors(heads), path)
    else:
        save_file(_released_tensors(heads), path)
    for place in (path, tmp_path):
        released = load_released_heads(place, vocab_size=VOCAB)
        assert _same(released.heads, heads)
        assert released.configured_num_heads is None and released.repeated_blocks == ()


def test_heads_inside_a_whole_model_are_found_across_shards(tmp_path: Path) -> None:
    heads = _heads("own", num_heads=2, num_layers=1)
    tensors = {f"medusa_head.{name}": tensor for name, tensor in _released_tensors(heads).items()}
    names = sorted(tensors)
    backbone = {"model.norm.weight": torch.ones(HIDDEN)}
    save_file(
        {**backbone, **{name: tensors[name] for name in names[:3]}},
        tmp_path / "model-00001-of-00002.safetensors",
    )
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    released = load_released_heads(tmp_path)
    assert _same(released.heads, heads)
    assert released.configured_num_heads == 2


def test_wrong_number_of_heads_in_the_configuration_needs_an_override(tmp_path: Path) -> None:
    """A published configuration says 2 where the file has 5 heads."""
    heads = _heads("own", num_heads=5, num_layers=1)
    torch.save(_released_tensors(heads), tmp_path / "medusa_lm_head.pt")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    with pytest.raises(UserError, match=r"found 5 heads in the file and medusa_num_heads = 2.*num_heads=5"):
        load_released_heads(tmp_path)
    assert _same(load_released_heads(tmp_path, num_heads=5).heads, heads)
    assert load_released_heads(tmp_path, num_heads=4).heads.num_heads == 4
    with pytest.raises(UserError, match="at least the 6"):
        load_released_heads(tmp_path, num_heads=6)


def test_layers_saved_from_one_repeated_module_are_reported(tmp_path: Path) -> None:
    """`[Block] * L` writes one block under L names."""
    tensors = _released_tensors(_heads("own", num_heads=2, num_layers=3))
    for part in ("weight", "bias"):
        tensors[f"1.2.linear.{part}"] = tensors[f"1.0.linear.{part}"]
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    released = load_released_heads(tmp_path)
    assert released.repeated_blocks == ((1, 2),)
    assert len({parameter.data_ptr() for parameter in released.heads.parameters()}) == 2 * (3 * 2 + 1)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    """Elsewhere, loading that was not strict left heads random without a message."""
    path = tmp_path / "medusa_lm_head.safetensors"
    whole = _released_tensors(_heads("own"))

    def refused(tensors: dict[str, Tensor], match: str) -> None:
        save_file(tensors, path)
        with pytest.raises(UserError, match=match):
            load_released_heads(path, vocab_size=VOCAB)

    refused(
        {name: tensor for name, tensor in whole.items() if name != "1.1.linear.bias"},
        r"missing: 1\.1\.linear\.bias",
    )
    refused({**whole, "0.0.linear.scale": torch.ones(1)}, r"unknown: 0\.0\.linear\.scale")
    refused({**whole, "1.2.weight": torch.ones(VOCAB, HIDDEN + 1)}, r"1\.2\.weight of shape \[20, 9\]")
    refused({**whole, "0.1.linear.bias": torch.full((HIDDEN,), float("nan"))}, "not finite")
    refused(
        {name: tensor for name, tensor in whole.items() if not name.startswith("0.")},
        r"no tensor 0\.0\.linear\.weight",
    )
    save_file(_released_tensors(_heads("shared")), path)
    with pytest.raises(UserError, match="need vocab_size"):
        load_released_heads(path)


def test_pickles_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"0.0.linear.weight": Path("x")}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_released_heads(tmp_path)
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_released_heads(tmp_path)


def test_folder_without_heads_is_a_clear_error(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no Medusa heads"):
        load_released_heads(tmp_path)


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
