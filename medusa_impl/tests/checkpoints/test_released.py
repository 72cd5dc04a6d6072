"""Published heads: every layout gives the same heads, and nothing but the tensors decides what is built."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.checkpoints.released import PublishedProvenance, load_published_heads, open_heads
from medusa_impl.checkpoints.tensors import file_sha256
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture
from medusa_impl.tests.checkpoints.test_heads import (
    HIDDEN,
    OURS,
    PROVENANCE,
    VOCAB,
    make_heads,
    released_tensors,
    same,
)


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if path.suffix in (".pt", ".bin"):
        torch.save(dict(tensors), path)
    else:
        save_file(dict(tensors), path)


def prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("architecture", ["own", "shared"])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_published_heads_have_a_door(
    tmp_path: Path, architecture: HeadArchitecture, suffix: str, has_prefix: bool
) -> None:
    heads = make_heads(architecture, num_heads=3)
    tensors = released_tensors(heads)
    path = tmp_path / f"medusa_lm_head.{suffix}"
    save(path, prefixed(tensors) if has_prefix else tensors)
    for place in (path, tmp_path):
        loaded, provenance = open_heads(place, backbone_sha256=OURS, vocab_size=VOCAB)
        assert same(loaded, heads) and not loaded.training
        assert provenance == PublishedProvenance(
            files={path.name: file_sha256(path)}, num_heads=3, num_layers=2, architecture=architecture
        )
        assert provenance.training == "published heads, training unknown"


@pytest.mark.parametrize("name", ["heads.bin", "heads", "medusa_lm_head.pt"])
def test_content_and_not_the_name_tells_whose_heads_they_are(tmp_path: Path, name: str) -> None:
    heads = make_heads("own")
    ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
    save_heads(ours, heads, provenance=PROVENANCE)
    theirs.parent.mkdir()
    save_file(released_tensors(heads), theirs)
    assert isinstance(open_heads(ours, backbone_sha256=OURS)[1], HeadsProvenance)
    assert isinstance(open_heads(theirs, backbone_sha256=OURS)[1], PublishedProvenance)


@pytest.mark.parametrize("layout", ["one file", "index", "no index", "pickled", "pickled index"])
def test_heads_inside_a_whole_model_are_found(tmp_path: Path, layout: str) -> None:
    """A file that the model's index does not name is not read: it may be an older one."""
    heads = make_heads("own", num_layers=1)
    tensors = prefixed(released_tensors(heads))
    backbone, names = {"model.norm.weight": torch.ones(HIDDEN)}, sorted(tensors)
    stem, suffix = ("pytorch_model", "bin") if "pickled" in layout else ("model", "safetensors")
    if layout in ("one file", "pickled"):
        holders = {f"{stem}.{suffix}": names}
    else:
        holders = {f"{stem}-00001-of-00002.{suffix}": names[:3], f"{stem}-00002-of-00002.{suffix}": names[3:]}
    for file, kept in holders.items():
        save(tmp_path / file, {**backbone, **{name: tensors[name] for name in kept}})
    if "no index" not in layout:
        weight_map = {name: file for file, kept in holders.items() for name in kept}
        (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save(tmp_path / f"{stem}-old.{suffix}", {"medusa_head.9.0.linear.weight": torch.ones(HIDDEN, HIDDEN)})
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
    loaded, provenance = load_published_heads(tmp_path)
    assert same(loaded, heads) and provenance.configured_num_heads == 2
    assert provenance.files == {name: file_sha256(tmp_path / name) for name in holders}


def test_number_of_heads_comes_from_the_tensors(tmp_path: Path) -> None:
    """A published configuration says 2 where the file has 5 heads."""
    heads = make_heads("own", num_heads=5, num_layers=1)
    save(tmp_path / "medusa_lm_head.pt", released_tensors(heads))
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    loaded, provenance = load_published_heads(tmp_path)
    assert same(loaded, heads) and (provenance.num_heads, provenance.configured_num_heads) == (5, 2)
    fewer, _ = load_published_heads(tmp_path, num_heads=4)
    last = "unembeddings.3.weight"
    assert fewer.num_heads == 4 and torch.equal(fewer.state_dict()[last], heads.state_dict()[last])
    with pytest.raises(UserError, match="num_heads = 6 and 5 heads in the file"):
        load_published_heads(tmp_path, num_heads=6)


def test_layers_saved_from_one_repeated_module_are_reported(tmp_path: Path) -> None:
    """`[Block] * L` writes one block under L names."""
    tensors = released_tensors(make_heads("own", num_heads=2, num_layers=3))
    for part in ("weight", "bias"):
        tensors[f"1.2.linear.{part}"] = tensors[f"1.0.linear.{part}"]
    save(tmp_path / "medusa_lm_head.pt", tensors)
    loaded, provenance = load_published_heads(tmp_path)
    assert provenance.repeated_blocks == ((1, 2),)
    assert len({parameter.data_ptr() for parameter in loaded.parameters()}) == 2 * (3 * 2 + 1)


def own() -> dict[str, Tensor]:
    return released_tensors(make_heads("own"))


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in own().items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (without("1.1.linear.bias"), r"missing: 1\.1\.linear\.bias"),
        ({**own(), "0.0.linear.scale": torch.ones(1)}, r"unknown: 0\.0\.linear\.scale"),
        ({**own(), "0.00.linear.bias": torch.ones(HIDDEN)}, r"unknown: 0\.00\.linear\.bias"),
        ({**own(), "1.2.weight": torch.ones(VOCAB, HIDDEN + 1)}, r"1\.2\.weight of shape \[20, 9\]"),
        ({**own(), "0.1.linear.bias": torch.full((HIDDEN,), float("nan"))}, "not finite"),
        ({**own(), "0.1.linear.bias": torch.ones(HIDDEN, dtype=torch.int32)}, "of int32"),
        (without("0.0.linear.weight"), r"no tensor 0\.0\.linear\.weight"),
        ({**own(), "0.0.linear.weight": torch.ones(())}, r"0\.0\.linear\.weight of shape \[\]"),
        ({**own(), "0.0.linear.weight": torch.ones(0, 0)}, r"0\.0\.linear\.weight of shape \[0, 0\]"),
        ({**own(), "0.2.weight": torch.ones(2**40, 0)}, r"0\.2\.weight of shape \[1099511627776, 0\]"),
        ({**own(), "9999999.0.linear.bias": torch.ones(HIDDEN)}, r"unknown: 9999999\.0\.linear\.bias"),
        ({**own(), "9999.0.linear.bias": torch.ones(HIDDEN)}, "head 9999.*at most 64 heads"),
        ({**own(), "0.9999.linear.bias": torch.ones(HIDDEN)}, "layer 9999.*of 64 layers"),
        ({**own(), "63.0.linear.bias": torch.ones(HIDDEN)}, "missing: .* more"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_missing_unknown_and_misshapen_tensors_are_named_before_anything_is_built(
    tmp_path: Path, tensors: dict[str, Tensor], match: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, loading that was not strict left heads random without a message."""
    built: list[object] = []
    monkeypatch.setattr(MedusaHeads, "__init__", lambda *_, **options: built.append(options))
    save(tmp_path / f"medusa_lm_head.{suffix}", tensors)
    with pytest.raises(UserError, match=match):
        load_published_heads(tmp_path, vocab_size=VOCAB)
    assert not built


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    """One stored number can be given any shape in a pickle: copying it would take terabytes."""
    size = 2**20
    huge = torch.ones(1).as_strided((size, size), (0, 0))
    save(tmp_path / "heads.pt", {"0.0.linear.weight": huge, "0.0.linear.bias": torch.ones(1).expand(size)})
    assert (tmp_path / "heads.pt").stat().st_size < 10_000
    with pytest.raises(UserError, match="a tensor that the file holds"):
        load_published_heads(tmp_path / "heads.pt", vocab_size=VOCAB)


def test_shared_heads_need_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    save(tmp_path / "heads.pt", released_tensors(make_heads("shared")))
    with pytest.raises(UserError, match="need vocab_size"):
        load_published_heads(tmp_path / "heads.pt")


def test_files_that_hold_no_heads_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "medusa_lm_head.pt"

    def refused(content: bytes, match: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=match) as caught:
            open_heads(tmp_path, backbone_sha256=OURS, vocab_size=VOCAB)
        assert "\n" not in str(caught.value)

    torch.save({"0.0.linear.weight": Path("x")}, path)  # unpickling it would run code
    refused(path.read_bytes(), "no readable checkpoint")
    torch.save({3: torch.ones(2)}, path)
    refused(path.read_bytes(), "no dictionary of tensors")
    torch.save(released_tensors(make_heads()), path)
    refused(path.read_bytes()[:-200], "no readable checkpoint")
    refused(b"not a checkpoint", "no readable checkpoint")
    refused(b"", "no readable checkpoint")
    refused(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "pointer of Git LFS")
    header = b'{"a":' + b"[" * 100_000
    refused(struct.pack("<Q", len(header)) + header, "no readable safetensors file")


def test_a_pipe_in_place_of_heads_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "heads.pt")
    with pytest.raises(UserError, match="no regular file"):
        open_heads(tmp_path / "heads.pt", backbone_sha256=OURS)


@pytest.mark.parametrize("text", ["{", "[]", '{"medusa_num_heads": "many"}', "[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    save(tmp_path / "medusa_lm_head.pt", own())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"unreadable configuration .* in config\.json"):
        load_published_heads(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', "[" * 100_000])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"unreadable index .* in model\.safetensors\.index\.json"):
        load_published_heads(tmp_path)


def test_folder_without_heads_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Medusa heads"):
        load_published_heads(tmp_path)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no Medusa heads"):
        load_published_heads(tmp_path)
    with pytest.raises(UserError, match=re.escape("tensor names unknown: model.norm.weight")):
        load_published_heads(tmp_path / "model.safetensors")
