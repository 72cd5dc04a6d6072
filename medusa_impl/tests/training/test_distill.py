"""A corpus on disk is read whole or refused in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medusa_impl.errors import UserError
from medusa_impl.training.distill import CorpusSample, CorpusStore, pack_corpus, unpack_corpus

SAMPLE = CorpusSample("k0", "words", (1, 2), (3, 4, 5), "eos", 0.0, 7, states=None)


def shard(folder: Path) -> Path:
    store = CorpusStore(folder)
    store.add(SAMPLE)
    store.flush()
    assert list(store.samples()) == [SAMPLE] and store.finished_keys() == {"k0"}
    return store.shard_files()[0]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b'{"schema_version": 1}',
        b"[]",
        b'"text"',
        b"{",
        b"[" * 100_000,
        json.dumps({"schema_version": 1, **SAMPLE.__dict__, "token_ids": [1.5], "states": None}).encode(),
        json.dumps({"schema_version": 2}).encode(),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, line: bytes) -> None:
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    for read in (CorpusStore(tmp_path).finished_keys, lambda: list(CorpusStore(tmp_path).samples())):
        with pytest.raises(UserError, match=r"corpus-0-00000\.jsonl"):
            read()


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    shard(tmp_path).with_name("states-0-00000.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="states-0-00000"):
        list(CorpusStore(tmp_path).samples())


def test_a_packed_corpus_whose_lengths_do_not_add_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.safetensors"
    pack_corpus([SAMPLE], path, backbone_sha256=None)
    assert list(unpack_corpus(path, backbone_sha256=None)) == [SAMPLE]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in ("lengths", "prompt_lengths"):
        for wrong in (torch.tensor([9], dtype=torch.int32), torch.tensor([], dtype=torch.int32)):
            save_file({**tensors, name: wrong}, path, metadata=metadata)
            with pytest.raises(UserError, match="do not add up"):
                list(unpack_corpus(path, backbone_sha256=None))
