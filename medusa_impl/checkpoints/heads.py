"""Our file format of trained heads: safetensors, with the heads' shape and origin in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import nn

from medusa_impl.checkpoints.heads_shape import HeadsShape, check_storage, make_heads, named_tensors, shape_of
from medusa_impl.checkpoints.tensors import read_safetensors, tensors_sha256, write_by_rename
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture, HeadsLmHead, Medusa1Settings, Medusa2Settings
from medusa_impl.training_log import JointFigures, TrainingFigures

METADATA_KEY = "medusa_repro"


class HeadsProvenance(BaseModel):
    """The origin of trained heads, stored in their file.

    backbone_sha256: the hash of the backbone's tensors. With another backbone the heads are useless.
    adapter_sha256: the hash of the adapter that the backbone had in training, or None.
    lm_head_read: which LM head shared heads read, the original or the adapted one.
    lm_head_adapted: whether the two LM heads differ.
    corpus_sha256: the fingerprint of the features or sequences that the heads were trained on.
    behaviour: the hash of each part of what the model did with its tensors; None in older files.
    commit, dirty: the git commit of the code, None outside a checkout; whether files differed from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone_name: str
    backbone_sha256: str
    recipe: Medusa1Settings | Medusa2Settings
    training: TrainingFigures | JointFigures
    adapter_sha256: str | None = None
    lm_head_read: HeadsLmHead = "original"
    lm_head_adapted: bool = False
    corpus_sha256: str | None = None
    behaviour: dict[str, str] | None = None
    commit: str | None = None
    dirty: bool | None = None
    torch_version: str = torch.__version__


class _FileHeader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Annotated[int, Field(strict=True, ge=1, le=1)]  # `true` is no version, though Python's 1
    architecture: HeadArchitecture
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    tensors_sha256: str
    provenance: HeadsProvenance


def save_heads(
    path: Path, heads: MedusaHeads, *, provenance: HeadsProvenance, dtype: torch.dtype = torch.float32
) -> None:
    """Write the heads and their provenance as one safetensors file.

    The tensors have the names of the authors' files: `{head}.{layer}.linear.weight`, `.bias`, and
    `{head}.{L}.weight` for `own` unembeddings. The file appears only when it is complete.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous().clone()
        for name, tensor in named_tensors(heads).items()
    }
    header = _FileHeader(
        schema_version=1,
        architecture=heads.architecture,
        num_heads=heads.num_heads,
        num_layers=heads.num_layers,
        hidden_size=heads.hidden_size,
        vocab_size=heads.vocab_size,
        tensors_sha256=tensors_sha256(tensors),
        provenance=provenance,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # All in one key, because safetensors writes several keys in no fixed order.
    metadata = {METADATA_KEY: header.model_dump_json()}
    write_by_rename(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_heads(
    path: Path,
    *,
    backbone_sha256: str | None,
    adapter_sha256: str | None = None,
    num_heads: int | None = None,
) -> tuple[MedusaHeads, HeadsProvenance]:
    """Return the heads of a file that `save_heads` wrote, and their provenance.

    The heads are in float32 and evaluation mode. With `backbone_sha256` None neither backbone nor adapter is
    compared: for looking at a file without its backbone. `num_heads` keeps only the first heads.

    Raises: UserError for a file that is missing, cut short, altered, of another schema, or whose header says
    another shape than its tensors have; for heads that were trained on another backbone or adapter; and for
    more heads than the file has.
    """
    tensors, metadata = read_safetensors(path)
    header = _read_header(metadata, where=path.name)
    check_storage(tensors, where=path.name)
    if tensors_sha256(tensors) != header.tensors_sha256:
        raise UserError(
            found="tensors that differ from their own hash",
            need="an unaltered file",
            where=path.name,
            do="fetch it again",
        )
    # Names and shapes alone would let heads of another backbone pass: they would draft nonsense.
    if backbone_sha256 is not None:
        _check_made_for(header.provenance, backbone_sha256, adapter_sha256, where=path.name)
    shape = shape_of(tensors, where=path.name)
    _check_header(header, shape, where=path.name)
    heads = make_heads(shape, tensors, vocab_size=header.vocab_size, num_heads=num_heads, where=path.name)
    return heads, header.provenance


def _check_header(header: _FileHeader, shape: HeadsShape, *, where: str) -> None:
    """Refuse a header that says another shape than the tensors have, before anything is built."""
    for name in ("num_heads", "num_layers", "hidden_size", "vocab_size", "architecture"):
        said, there = getattr(header, name), getattr(shape, name)
        if there is not None and said != there:
            found = f"{name} = {said!r} in the header"
            raise UserError(found=found, need=f"{there!r}, as the tensors have", where=where)


def _read_header(metadata: Mapping[str, str], *, where: str) -> _FileHeader:
    try:
        return _FileHeader.model_validate_json(metadata[METADATA_KEY])
    except KeyError as error:
        raise UserError(
            found="a safetensors file without this project's metadata",
            need="heads written by this project",
            where=where,
            do="read published heads with load_published_heads",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            found=f"metadata that does not fit schema 1 ({'.'.join(map(str, first['loc']))}: {first['msg']})",
            need="schema version 1",
            where=where,
        ) from error


def _check_made_for(
    provenance: HeadsProvenance, backbone_sha256: str, adapter_sha256: str | None, *, where: str
) -> None:
    theirs = provenance.backbone_sha256
    if backbone_sha256 != theirs:
        raise UserError(
            found=f"heads trained on {provenance.backbone_name} with tensors {theirs[:16]}",
            need=f"heads for the backbone with tensors {backbone_sha256[:16]}",
            where=where,
            do="use the backbone that the heads were trained on, or train heads for this one",
        )
    if provenance.adapter_sha256 != adapter_sha256:
        raise UserError(
            found=f"heads trained {_with_adapter(provenance.adapter_sha256)}",
            need=f"heads trained {_with_adapter(adapter_sha256)}, as the backbone is",
            where=where,
            do="name the adapter that the heads were trained with, or no adapter for heads of the bare "
            "backbone",
        )


def bind_heads(
    heads: MedusaHeads, provenance: HeadsProvenance, *, original_lm_head: nn.Module | None
) -> None:
    """Have shared heads read the LM head that they were trained to read.

    This is the original one, if the heads read it in training and an adapter has changed the model's own.
    """
    if heads.architecture == "shared" and provenance.lm_head_read == "original":
        heads.lm_head = original_lm_head


def _with_adapter(digest: str | None) -> str:
    return "without an adapter" if digest is None else f"with the adapter {digest[:16]}"
