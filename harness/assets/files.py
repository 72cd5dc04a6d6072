"""File work beneath the assets: hashing, taking members out of a wheel atomically, and converting GGUF once.

Everything half-made ends in `.part` and gets its real name by one rename, so a name without `.part` is always
complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from harness.errors import UserError
from harness.files import text_of
from harness.paths import CACHE_VARIABLE

PART = ".part"
CHUNK_BYTES = 1 << 22
_WEIGHT_FILES = (("model", "safetensors"), ("pytorch_model", "bin"))
MODEL_INDEXES = tuple(f"{stem}.{suffix}.index.json" for stem, suffix in _WEIGHT_FILES)

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done so far and the bytes in all (None where unknown)."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `folder` into a UserError with the remedy.

    Raises: UserError for no space, a quota used up, or no permission to write.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors reports a full disk as its own error type, with the system's text inside.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(
                found="no space left on the disk",
                need="room for the asset and one temporary copy of it",
                where=str(folder),
                do=f"free some space, or set {CACHE_VARIABLE} to a folder on another disk; finished parts "
                "are kept",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                found=f"no permission to write ({os.strerror(number)})",
                need="a cache folder that this user may write",
                where=str(folder),
                do=f"set {CACHE_VARIABLE} to another folder",
            ) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted command left half-made in `folder`; complete parts stay."""
    for path in folder.glob(f"*{PART}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_hashed(
    source: IO[bytes], target: IO[bytes], *, num_bytes: int, label: str, progress: Progress | None
) -> str:
    digest = hashlib.sha256()
    done_bytes = 0
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        digest.update(chunk)
        done_bytes += len(chunk)
        if progress is not None:
            progress(label, done_bytes, num_bytes)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest()


def extract_member(
    wheel: Path, target: Path, *, member: str, sha256: str, progress: Progress | None = None
) -> Path:
    """Write one member of a wheel to `target`, checked and by rename, and return `target`.

    Raises: UserError for a wheel that is no zip file or lacks the member, or for a member with another hash;
        nothing stays.
    """
    part = target.with_name(target.name + PART)
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            with archive.open(info) as source, part.open("wb") as sink:
                found = _copy_hashed(
                    source, sink, num_bytes=info.file_size, label=f"extract {target.name}", progress=progress
                )
        if found != sha256:
            raise UserError(
                found=f"SHA-256 {found} of member {member}",
                need=sha256,
                where=wheel.name,
                do="correct the pinned hash if the member was meant to change; otherwise the index serves "
                "another file",
            )
        os.replace(part, target)
    except KeyError:
        raise UserError(
            found=f"no member {member}",
            need="the wheel that the assets file describes",
            where=wheel.name,
            do="correct the member's path in the assets file",
        ) from None
    except zipfile.BadZipFile as error:
        raise UserError(
            found=f"a damaged zip file ({error})",
            need="a complete wheel",
            where=wheel.name,
            do="fetch it again",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def model_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a model folder in Hugging Face layout, as transformers chooses them.

    One file goes before shards with an index, safetensors before pickles. Shards are sorted.
    Raises: UserError for a folder that holds none, a broken index, or a shard that the index names and that
        is not there.
    """
    for stem, suffix in _WEIGHT_FILES:
        if (folder / f"{stem}.{suffix}").is_file():
            return (folder / f"{stem}.{suffix}",)
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            return _shards(index)
    raise UserError(
        found="no model.safetensors and no pytorch_model.bin, in one file or in shards",
        need="a model folder in Hugging Face layout",
        where=str(folder),
    )


def _shards(index: Path) -> tuple[Path, ...]:
    folder = index.parent
    try:
        names = json.loads(text_of(index.read_bytes()))["weight_map"].values()
        shards = sorted({folder / name for name in names})
        if not shards or any(folder.absolute() not in Path(os.path.abspath(path)).parents for path in shards):
            raise ValueError("no shards of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            found=f"a broken {index.name} ({type(error).__name__})",
            need="the index of the shards in this folder",
            where=str(folder),
            do="fetch or copy it again",
        ) from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            found=f"no shard {', '.join(missing)}",
            need=f"every shard named by {index.name}",
            where=str(folder),
        )
    return tuple(shards)


def convert_gguf(gguf_file: Path, target: Path) -> Path:
    """Write a GGUF model as a float32 safetensors folder with its tokenizer, and return the folder, `target`.

    The model is rebuilt from a clean configuration and the dequantised tensors, since transformers refuses to
    save a model that it loaded from GGUF. The generation configuration is greedy and stops at the model's own
    end token.

    Raises: UserError for a file that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    part = target.with_name(target.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    folder, name = str(gguf_file.parent), gguf_file.name
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        except (ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise UserError(
                found=f"a GGUF file that transformers cannot read ({error})",
                need="a supported architecture",
                where=name,
            ) from error
        dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype")
        settings = {key: value for key, value in loaded.config.to_dict().items() if key not in dropped}
        model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        end, pad = model.config.eos_token_id, model.config.pad_token_id
        pad = end if pad is None else pad
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
        part.mkdir(parents=True)
        model.save_pretrained(part)
        for weights in part.glob("*.safetensors"):  # which safetensors writes for their owner alone
            weights.chmod((part / "config.json").stat().st_mode & 0o777)
        tokenizer.save_pretrained(part)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
