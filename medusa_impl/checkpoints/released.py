"""Reading heads in the file layouts that the authors and others published."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa_impl.checkpoints.heads import METADATA_KEY, HeadsProvenance, load_heads
from medusa_impl.checkpoints.heads_shape import HeadsShape, is_head_name, make_heads, shape_of
from medusa_impl.checkpoints.tensors import file_sha256, some
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture
from medusa_impl.text_files import read_text

_PREFIX = "medusa_head."  # of the heads' tensors in a whole model
_HEADS_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# As transformers looks for weights: a single file, an index of several, or several without one.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MODEL_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_LFS_POINTER = b"version https://git-lfs"


class PublishedProvenance(BaseModel):
    """What can be said of heads that someone published: the files, and what their tensors show.

    files: the SHA-256 of every file that holds a tensor of the heads, by name.
    num_heads, num_layers, architecture: as the tensors show them.
    configured_num_heads: the `medusa_num_heads` of the configuration next to the file, which is often wrong;
    None without one.
    repeated_blocks: (head, layer) of every block that equals the head's first block bit by bit. This is how
    one module that was saved several times looks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: Literal["published heads, training unknown"] = "published heads, training unknown"
    files: dict[str, str]
    num_heads: int
    num_layers: int
    architecture: HeadArchitecture
    configured_num_heads: int | None = None
    repeated_blocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Found:
    """Tensors of heads, named from the head's number on, with the files that hold them."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    config_file: Path


def open_heads(
    path: Path,
    *,
    backbone_sha256: str | None,
    adapter_sha256: str | None = None,
    vocab_size: int | None = None,
    num_heads: int | None = None,
) -> tuple[MedusaHeads, HeadsProvenance | PublishedProvenance]:
    """Return the heads of a file that this project wrote or someone published, and their provenance.

    The file's content decides which of the two it is, never its name. Only the first of them says which
    backbone and adapter it was trained on, so only there are they compared.

    Raises: UserError as `load_heads` and `load_published_heads` do.
    """
    if not _is_published(path):
        return load_heads(
            path, backbone_sha256=backbone_sha256, adapter_sha256=adapter_sha256, num_heads=num_heads
        )
    return load_published_heads(path, vocab_size=vocab_size, num_heads=num_heads)


def load_published_heads(
    path: Path, *, vocab_size: int | None = None, num_heads: int | None = None
) -> tuple[MedusaHeads, PublishedProvenance]:
    """Return the heads of a published file, which is a `.pt` or `.safetensors` file, or of a folder.

    The folder holds such a file, or a whole model with its heads. The tensors' names may have the prefix
    `medusa_head.`. The numbers of heads and layers come from the names and shapes of the tensors, never from
    a configuration. Heads without unembeddings do not show the size of the vocabulary, so they need
    `vocab_size`. `num_heads` keeps only the first heads.

    Raises: UserError for files that cannot be read, missing or unknown names, wrong shapes, or fewer heads
    than were asked for.
    """
    found = _read_folder(path) if path.is_dir() else _read_files((path,), path.with_name("config.json"))
    shape = shape_of(found.tensors, where=path.name)
    heads = make_heads(shape, found.tensors, vocab_size=vocab_size, num_heads=num_heads, where=path.name)
    provenance = PublishedProvenance(
        files={file.name: file_sha256(file) for file in found.files},
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        architecture=shape.architecture,
        configured_num_heads=_configured_num_heads(found.config_file),
        repeated_blocks=tuple(_repeated_blocks(found.tensors, shape)),
    )
    return heads, provenance


def _is_published(path: Path) -> bool:
    if path.is_dir():
        return True
    if not _is_safetensors(path):
        return True
    with _opened(path) as file:
        return METADATA_KEY not in (file.metadata() or {})


def _is_safetensors(path: Path) -> bool:
    """Return whether a file has the layout of safetensors: eight bytes of length, then a JSON object.

    Raises: UserError if there is no such file, if it is a pipe or device, or the pointer of Git LFS.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(found="no regular file", need="a file of draft heads", where=path.name)
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        found = f"no readable safetensors file ({error.strerror})"
        raise UserError(found=found, need="a file of draft heads", where=path.name) from error
    if start == _LFS_POINTER:
        raise UserError(
            found="a pointer of Git LFS in place of the file",
            need="the file itself",
            where=path.name,
            do="fetch it with git lfs pull",
        )
    return start[8:9] == b"{"


def _read_folder(folder: Path) -> _Found:
    """Return the heads in a folder: in a file of their own, or among the tensors of a whole model."""
    config_file = folder / "config.json"
    for name in _HEADS_FILES:
        if (folder / name).is_file():
            return _read_files((folder / name,), config_file)
    files = _model_files(folder)
    tensors: dict[str, Tensor] = {}
    holders = []
    for file in files:
        part = _with_prefix(file)
        tensors |= part
        holders += [file] if part else []
    if not tensors:
        raise UserError(
            found="no Medusa heads",
            need=f"{' or '.join(_HEADS_FILES)}, or a model with medusa_head tensors",
            where=folder.name,
        )
    return _Found(tensors, tuple(holders), config_file)


def _model_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files as transformers chooses them, else whatever looks like one."""
    for single, index in zip(_MODEL_FILES, _INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return (folder / single,)
        if (folder / index).is_file():
            return _indexed_files(folder / index)
    found = (tuple(sorted(folder.glob(pattern))) for pattern in _MODEL_PATTERNS)
    return next((files for files in found if files), ())


def _indexed_files(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside the folder")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        found = f"an unreadable index ({type(error).__name__})"
        raise UserError(found=found, need="a JSON object with a weight_map", where=index.name) from error
    return tuple(index.with_name(name) for name in names)


def _read_files(files: tuple[Path, ...], config_file: Path) -> _Found:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _with_prefix(file) or _bare(file)
    return _Found(tensors, files, config_file)


def _with_prefix(path: Path) -> dict[str, Tensor]:
    """Return the `medusa_head.` tensors of a file, without this prefix; others are not read."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in _tensors(path, prefix=_PREFIX)}


def _bare(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file that holds nothing but heads."""
    return dict(_tensors(path, prefix=""))


def _tensors(path: Path, *, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file whose names begin so."""
    if not _is_safetensors(path):
        for name, tensor in _unpickled(path).items():
            if name.startswith(prefix):
                yield name, tensor.detach()
        return
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        foreign = sorted(name for name in names if not is_head_name(name.removeprefix(_PREFIX)))
        if foreign:  # before a whole model is read
            raise UserError(
                found=f"tensor names unknown: {some(foreign)}",
                need="names such as 0.0.linear.weight and 0.1.weight",
                where=path.name,
            )
        for name in names:
            yield name, file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})",
            need="a complete file",
            where=path.name,
            do="fetch it again",
        ) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch saved; no code in it runs."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and unpickling errors share no base class
        raise UserError(
            found=f"no readable checkpoint ({type(error).__name__})",
            need="a dictionary of tensors and nothing else",
            where=path.name,
            do="fetch it again",
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise UserError(
            found="no dictionary of tensors",
            need="the heads' state dictionary",
            where=path.name,
        )
    return dict(loaded)


def _configured_num_heads(config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    try:
        value = json.loads(read_text(config_file)).get("medusa_num_heads")
        return None if value is None else int(value)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            found=f"an unreadable configuration ({type(error).__name__})",
            need="a JSON object",
            where=config_file.name,
        ) from error


def _repeated_blocks(tensors: Mapping[str, Tensor], shape: HeadsShape) -> Iterator[tuple[int, int]]:
    for head in range(shape.num_heads):
        first, *later = (
            [tensors[f"{head}.{layer}.linear.{part}"] for part in ("weight", "bias")]
            for layer in range(shape.num_layers)
        )
        for layer, block in enumerate(later, start=1):
            if all(map(torch.equal, block, first)):
                yield head, layer
