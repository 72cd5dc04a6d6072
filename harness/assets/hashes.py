"""What an asset's content hashes to, and what was pinned."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.assets.files import CHUNK_BYTES, file_sha256, model_weight_files
from harness.errors import UserError
from harness.specs.assets import AssetSpec, Source

# Draft heads that a published model folder holds among the backbone's tensors.
_HEAD_TENSOR = re.compile(r"((model\.)?medusa_heads?\.)\S+|\d+\.\d+\.(linear\.)?(weight|bias)")


def is_head_tensor(name: str) -> bool:
    """Return whether a tensor of a model folder belongs to draft heads, by its name."""
    return _HEAD_TENSOR.fullmatch(name) is not None


def content_sha256s(spec: AssetSpec, paths: Mapping[str, Path]) -> dict[str, str]:
    if spec.kind == "model":
        if not (paths["model"] / "config.json").is_file():
            raise UserError(
                found="no config.json",
                need="a model folder in Hugging Face layout",
                where=str(paths["model"]),
            )
        return {"tensors": tensors_sha256(paths["model"])}
    return {role: file_sha256(path) for role, path in paths.items()}


def pinned_sha256s(spec: AssetSpec, source: Source) -> dict[str, str]:
    if spec.kind == "model":
        return {} if spec.tensors_sha256 is None else {"tensors": spec.tensors_sha256}
    return {role: file.sha256 for role, file in source.files.items() if file.sha256 is not None}


def require_pinned(
    spec: AssetSpec, *, pinned: Mapping[str, str], found: Mapping[str, str], where: str
) -> None:
    for role, sha256 in pinned.items():
        if found[role] != sha256:
            raise UserError(
                found=f"SHA-256 {found[role]} of {role}",
                need=f"{sha256} for asset {spec.name}",
                where=where,
                do="use the files that were pinned, or give these an asset of their own",
            )


def _safetensors_entries(path: Path) -> Iterator[tuple[str, str, list[int], int, int]]:
    """Yield name, dtype, shape, first byte and number of bytes of each tensor of a file, without torch."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if 8 + header_bytes + end > size:
                raise ValueError(f"tensor {name} ends after the file does")
            yield name, entry["dtype"], entry["shape"], 8 + header_bytes + start, end - start
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            found=f"a damaged safetensors file ({error})",
            need="a complete file",
            where=str(path),
            do="remove it and fetch it again",
        ) from error


def _update_digest(digest: Any, *, name: str, dtype: str, shape: list[int], num_bytes: int) -> None:
    digest.update(json.dumps([name, dtype, shape, num_bytes]).encode())


def _pickled_tensors(file: Path) -> dict[str, Any]:
    """Return the tensors of a pickle, which nothing else in it can make run.

    Raises: UserError for a damaged file, or one that holds more than tensors.
    """
    import torch

    def load(mmap: bool) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with file.open("rb") as stream:
            is_archive = stream.read(2) == b"PK"  # older files are no archives and cannot be mapped
        found = load(mmap=is_archive)
        if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise TypeError("not all of it is tensors")
    except Exception as error:  # pickle raises what the file makes it raise
        raise UserError(
            found=f"a file that is damaged or holds more than tensors ({type(error).__name__})",
            need="weights alone: nothing else in a file is ever run",
            where=file.name,
            do="fetch it again, or use weights in safetensors",
        ) from error
    return dict(found)


def _pickle_tensors_sha256(files: tuple[Path, ...]) -> str:
    import torch

    # The names that safetensors uses, so that one set of weights has one hash in either container.
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    tensors: dict[str, Any] = {}
    for file in files:
        tensors.update(_pickled_tensors(file))
    tensors = {name: tensor for name, tensor in tensors.items() if not is_head_tensor(name)}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        if tensor.dtype not in names:
            raise UserError(
                found=f"the tensor {name} of {tensor.dtype}",
                need=f"one of {', '.join(names.values())}",
                where=files[0].name,
            )
        num_bytes = tensor.numel() * tensor.element_size()
        _update_digest(
            digest, name=name, dtype=names[tensor.dtype], shape=list(tensor.shape), num_bytes=num_bytes
        )
        if num_bytes:
            digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def tensors_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model's tensors: in the order of their names, each with dtype, shape and bytes.

    Sharding, file order and metadata do not enter, so a re-saved model keeps its hash and a changed weight
    does not. Draft heads among the tensors do not enter either: they are no part of the backbone.

    Raises: UserError for no weight file, a damaged one, or one tensor name in two shards.
    """
    files = model_weight_files(folder)
    if files[0].suffix == ".bin":
        return _pickle_tensors_sha256(files)
    entries: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for file in files:
        for name, dtype, shape, start, num_bytes in _safetensors_entries(file):
            if is_head_tensor(name):
                continue
            if name in entries:
                raise UserError(
                    found=f"the tensor {name} in {entries[name][0].name} and in {file.name}",
                    need="each tensor in one file only",
                    where=str(folder),
                )
            entries[name] = (file, dtype, shape, start, num_bytes)
    digest = hashlib.sha256()
    for name in sorted(entries):
        file, dtype, shape, start, num_bytes = entries[name]
        _update_digest(digest, name=name, dtype=dtype, shape=shape, num_bytes=num_bytes)
        with file.open("rb") as stream:
            stream.seek(start)
            while num_bytes > 0:
                chunk = stream.read(min(CHUNK_BYTES, num_bytes))
                digest.update(chunk)
                num_bytes -= len(chunk)
    return digest.hexdigest()
