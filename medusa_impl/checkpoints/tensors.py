"""Hashes of tensors, and safe reading and writing of their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from medusa_impl.errors import UserError

# The names that safetensors itself uses in a file's header.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def backbone_sha256(model: nn.Module) -> str:
    """Return the hash of a model's tensors as they are in memory.

    Tensors that share memory count once, under their first name, as in a file. If the model was loaded in the
    dtype of its files, the result is the hash of its folder. A model that was cast while loading has other
    bytes; it is identified by the hash of its folder instead.
    """
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor
    return tensors_sha256(kept)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over named tensors: names in sorted order, each with its dtype, shape and bytes.

    `harness.assets.hashes` hashes a model folder over the same bytes, so the two can be compared.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        digest.update(json.dumps([name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape), num_bytes]).encode())
        if num_bytes:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(names: list[str]) -> str:
    """Return the first four names and the number of the others, for a message."""
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises: UserError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})",
            need="a complete file",
            where=path.name,
            do="fetch or make it again",
        ) from error


def share_like(text_file: Path) -> None:
    """Let those read the weights in a folder who may read a text file there; the text has the user's umask.

    safetensors writes files for their owner alone.
    """
    for weights in text_file.parent.glob("*.safetensors"):
        weights.chmod(text_file.stat().st_mode & 0o777)


def write_by_rename(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it appears complete or not at all, whenever the process is killed.

    `write` gets the path of a temporary file, which is renamed at the end. Those may read it whom
    the user's umask lets: safetensors writes files for their owner alone.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode & 0o777)
    # On disk before it gets its name: else a power failure could leave the name with an empty file.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
