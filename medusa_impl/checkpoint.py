"""Checkpoints of Medusa heads and of the adapters that they were trained with: our own files, and the layouts that others published."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.medusa2 import untie_lm_head
from medusa_impl.recipes import HeadArchitecture, HeadsLmHead, Medusa1Recipe, Medusa2Recipe
from medusa_impl.training_log import JointFigures, TrainingFigures

ADAPTER_FILE = "adapter_model.safetensors"
_METADATA_KEY = "medusa_repro"
_HEAD_NAME = re.compile(r"^(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)$")
_RELEASED_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
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


def adapter_sha256(folder: Path) -> str:
    """Return the hash of an adapter's tensors.

    Raises: UserError where the folder holds no readable adapter.
    """
    return tensors_sha256(_read_safetensors(folder / ADAPTER_FILE)[0])


def backbone_sha256(model: nn.Module) -> str:
    """Return the hash of a model's tensors as loaded; of tensors that share memory, the first name alone counts, as on disk.

    It equals the hash of the folder that the model was loaded from if the dtype is the file's own: a model that was cast on loading
    has other bytes, and is known by the hash of its folder.
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


class HeadsProvenance(BaseModel):
    """Where trained heads come from; travels inside their file.

    backbone_sha256 is the hash of the backbone's tensors (`backbone_sha256`), without which the heads mean nothing; adapter_sha256 that of
    the adapter they were trained with, on top of it. `lm_head_read` says whether shared heads read the original LM head or the adapted one;
    `lm_head_adapted`, whether the two differ at all. corpus_sha256 is the features' or the sequences' fingerprint; commit is None outside
    a git checkout, dirty says that files differed from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone_name: str
    backbone_sha256: str
    recipe: Medusa1Recipe | Medusa2Recipe
    training: TrainingFigures | JointFigures
    adapter_sha256: str | None = None
    lm_head_read: HeadsLmHead = "original"
    lm_head_adapted: bool = False
    corpus_sha256: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    torch_version: str = torch.__version__


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over named tensors: names in sorted order, each with its dtype, shape and bytes.

    The same bytes are hashed as by the assets' hash of a model folder.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        num_bytes = tensor.numel() * tensor.element_size()
        digest.update(json.dumps([name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape), num_bytes]).encode())
        if num_bytes:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _FileHeader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1]
    architecture: HeadArchitecture
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    tensors_sha256: str
    provenance: HeadsProvenance


@dataclass(frozen=True)
class ReleasedHeads:
    """Heads read from a published file: what was inferred, and what is odd about them.

    repeated_blocks lists (head, layer) of blocks that equal the head's first one bit by bit: a sign of one module saved L times.
    """

    heads: MedusaHeads
    configured_num_heads: int | None
    repeated_blocks: tuple[tuple[int, int], ...]


def save_heads(path: Path, heads: MedusaHeads, *, provenance: HeadsProvenance, dtype: torch.dtype = torch.float32) -> None:
    """Write the heads and their provenance as one safetensors file, by rename.

    Tensor names are those of released heads: `{head}.{layer}.linear.weight`, `.bias`, and `{head}.{L}.weight` for `own` unembeddings.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in _named_tensors(heads).items()}
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
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={_METADATA_KEY: header.model_dump_json()})  # one key: more are written in no set order
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_heads(path: Path, *, backbone_sha256: str | None, adapter_sha256: str | None = None) -> tuple[MedusaHeads, HeadsProvenance]:
    """Return the heads of a file that `save_heads` wrote, in float32 and evaluation mode, and where they come from.

    `backbone_sha256` None skips the comparison, for looking at a file without its backbone.
    Raises: UserError for a file that is missing, cut short, altered, of another schema, or trained on another backbone or adapter.
    """
    tensors, metadata = _read_safetensors(path)
    try:
        header = _FileHeader.model_validate_json(metadata[_METADATA_KEY])
    except KeyError as error:
        raise UserError(
            found="a safetensors file without this project's metadata",
            need="heads written by this project",
            where=path.name,
            do="read published heads with load_released_heads",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            found=f"metadata that does not fit schema 1 ({'.'.join(map(str, first['loc']))}: {first['msg']})",
            need="schema version 1",
            where=path.name,
        ) from error
    if tensors_sha256(tensors) != header.tensors_sha256:
        raise UserError(found="tensors that differ from their own hash", need="an unaltered file", where=path.name, do="fetch it again")
    theirs = header.provenance.backbone_sha256
    if backbone_sha256 is not None and backbone_sha256 != theirs:
        raise UserError(
            found=f"heads trained on {header.provenance.backbone_name} with tensors {theirs[:16]}",
            need=f"heads for the backbone with tensors {backbone_sha256[:16]}",
            where=path.name,
            do="use the backbone that the heads were trained on, or train heads for this one",
        )
    adapter = header.provenance.adapter_sha256
    if backbone_sha256 is not None and adapter != adapter_sha256:
        raise UserError(
            found=f"heads trained {_with_adapter(adapter)}",
            need=f"heads trained {_with_adapter(adapter_sha256)}, as the backbone is",
            where=path.name,
            do="name the adapter that the heads were trained with beside them, or none for heads of the bare backbone",
        )
    heads = MedusaHeads(
        num_heads=header.num_heads,
        num_layers=header.num_layers,
        hidden_size=header.hidden_size,
        vocab_size=header.vocab_size,
        architecture=header.architecture,
    )
    _fill(heads, tensors, where=path.name)
    return heads.eval(), header.provenance


@dataclass(frozen=True)
class TunedModel:
    """A model with an adapter merged into it; `original_lm_head` is the LM head it had before, where the adapter changed it."""

    model: PreTrainedModel
    adapter_sha256: str
    original_lm_head: nn.Module | None


def save_adapter(folder: Path, model: Any, *, dtype: torch.dtype = torch.bfloat16) -> str:
    """Write a peft model's adapter, no embeddings and no place on this machine in it, and return its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}
    model.peft_config["default"].base_model_name_or_path = ""  # peft would write the folder that the model was loaded from
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card, to be filled in by hand
    return adapter_sha256(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> TunedModel:
    """Merge an adapter into a model, in place, and return it ready for decoding; an LM head that the adapter changes is untied first.

    Raises: UserError where the folder holds no adapter, or it does not fit the model.
    """
    from peft import PeftConfig, PeftModel  # here, since it takes seconds to import

    digest = adapter_sha256(folder)  # before peft, which would ask a hub for a folder that is not there
    lm_head: Any = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is lm_head)
    original: nn.Module | None = None
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if name in config.target_modules:
            untie_lm_head(model)
            weight = lm_head.weight.detach()
            original = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
            original.load_state_dict({"weight": weight})
            original.requires_grad_(False)
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            found=f"an adapter that does not fit ({str(error).splitlines()[0]})", need="the adapter of this model", where=folder.name
        ) from error
    return TunedModel(model=merged.eval().requires_grad_(False), adapter_sha256=digest, original_lm_head=original)


def bind_heads(heads: MedusaHeads, provenance: HeadsProvenance, *, original_lm_head: nn.Module | None) -> None:
    """Have shared heads read the LM head that they were trained to read: the original one, where the model's own was changed since."""
    if heads.architecture == "shared" and provenance.lm_head_read == "original":
        heads.lm_head = original_lm_head


def _with_adapter(digest: str | None) -> str:
    return "without an adapter" if digest is None else f"with the adapter {digest[:16]}"


def load_released_heads(path: Path, *, vocab_size: int | None = None, num_heads: int | None = None) -> ReleasedHeads:
    """Return published heads: a `.pt` or `.safetensors` file, or a folder that holds one or a whole model with its heads.

    The numbers of heads and layers come from names and shapes. `vocab_size` is needed for heads without an unembedding of their own,
    whose files do not tell it. `num_heads` keeps the first so many and stands above a wrong `medusa_num_heads` in the configuration.
    Raises: UserError for unreadable files, missing or unknown names, wrong shapes, or a configuration that names another number of heads.
    """
    where = path.name
    tensors, config_file = _read_released(path)
    found_heads, num_layers, architecture = _infer_shape(tensors, where=where)
    configured = _configured_num_heads(config_file)
    if num_heads is None and configured is not None and configured != found_heads:
        raise UserError(
            found=f"{found_heads} heads in the file and medusa_num_heads = {configured} in its configuration",
            need="the same number",
            where=where,
            do=f"pass num_heads={found_heads} if the file is right (published configurations often are not)",
        )
    if num_heads is not None and not 1 <= num_heads <= found_heads:
        raise UserError(found=f"{found_heads} heads", need=f"at least the {num_heads} asked for", where=where)
    hidden_size = tensors["0.0.linear.weight"].shape[0]
    if architecture == "own":
        vocab_size = tensors[f"0.{num_layers}.weight"].shape[0]
    elif vocab_size is None:
        raise UserError(found="heads without unembeddings", need="vocab_size", where=where, do="pass the backbone's vocabulary size")
    heads = MedusaHeads(
        num_heads=num_heads or found_heads, num_layers=num_layers, hidden_size=hidden_size, vocab_size=vocab_size, architecture=architecture
    )
    kept = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[0]) < heads.num_heads}
    _fill(heads, kept, where=where)
    return ReleasedHeads(heads=heads.eval(), configured_num_heads=configured, repeated_blocks=_repeated_blocks(heads))


def _named_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    tensors = {f"{head}.{name}": tensor for head, blocks in enumerate(heads.blocks) for name, tensor in blocks.state_dict().items()}
    for head, unembedding in enumerate(heads.unembeddings):
        tensors[f"{head}.{heads.num_layers}.weight"] = unembedding.weight
    return tensors


def _fill(heads: MedusaHeads, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into the heads; every name and shape must fit, none may be left over, every value must be finite."""
    own = _named_tensors(heads)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise UserError(
            found=f"tensors missing: {_some(missing)}; unknown: {_some(unknown)}",
            need=f"exactly those of {heads.num_heads} heads of {heads.num_layers} layers",
            where=where,
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(found=f"{name} of shape {list(tensor.shape)}", need=f"shape {list(own[name].shape)}", where=where)
        if not torch.isfinite(tensor).all():
            raise UserError(found=f"values in {name} that are not finite", need="finite weights", where=where)
        with torch.no_grad():
            own[name].copy_(tensor)


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})", need="a whole one", where=path.name, do="fetch or make it again"
        ) from error


def _read_released(path: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the heads' tensors under plain names, and where their configuration would be."""
    if path.is_dir():
        for name in _RELEASED_FILES:
            if (path / name).is_file():
                return _read_released(path / name)[0], path / "config.json"
        tensors: dict[str, Tensor] = {}
        for shard in sorted(path.glob("*.safetensors")):
            tensors.update(_read_model_shard(shard))
        if not tensors:
            raise UserError(
                found="no Medusa heads", need=f"{' or '.join(_RELEASED_FILES)}, or a model with medusa_head tensors", where=path.name
            )
        return tensors, path / "config.json"
    config_file = path.with_name("config.json")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0] if not (part := _read_model_shard(path)) else part, config_file
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and unpickling errors share no base class
        raise UserError(
            found=f"no readable checkpoint ({type(error).__name__})", need="a dictionary of tensors", where=path.name, do="fetch it again"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(found="something else than a dictionary of tensors", need="the heads' state dictionary", where=path.name)
    return dict(loaded), config_file


def _read_model_shard(shard: Path) -> dict[str, Tensor]:
    """Return a full model's `medusa_head.` tensors without that prefix; the backbone's are never read."""
    try:
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("medusa_head.")]  # noqa: SIM118
            return {name.removeprefix("medusa_head."): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})", need="a whole one", where=shard.name, do="fetch it again"
        ) from error


def _infer_shape(tensors: Mapping[str, Tensor], *, where: str) -> tuple[int, int, HeadArchitecture]:
    unknown = sorted(name for name in tensors if not _HEAD_NAME.match(name))
    if unknown or not tensors:
        raise UserError(
            found=f"tensor names unknown: {_some(unknown)}" if tensors else "no tensors",
            need="names such as 0.0.linear.weight and 0.1.weight",
            where=where,
        )
    parts = [name.split(".", 2) for name in tensors]
    num_heads = 1 + max(int(head) for head, _, _ in parts)
    layers = [int(layer) for _, layer, kind in parts if kind.startswith("linear")]
    if not layers or "0.0.linear.weight" not in tensors:
        raise UserError(found="no tensor 0.0.linear.weight", need="at least one residual block", where=where)
    num_layers = 1 + max(layers)
    own = any(kind == "weight" for _, _, kind in parts)
    if own and f"0.{num_layers}.weight" not in tensors:
        raise UserError(found=f"no tensor 0.{num_layers}.weight", need="an unembedding behind the last block of head 0", where=where)
    return num_heads, num_layers, "own" if own else "shared"


def _configured_num_heads(config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    try:
        value = json.loads(config_file.read_text()).get("medusa_num_heads")
        return None if value is None else int(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(found=f"an unreadable configuration ({error})", need="a JSON object", where=config_file.name) from error


def _repeated_blocks(heads: MedusaHeads) -> tuple[tuple[int, int], ...]:
    repeated: list[tuple[int, int]] = []
    for head, blocks in enumerate(heads.blocks):
        states = [block.state_dict() for block in blocks.children()]
        first = states[0]
        repeated += [
            (head, layer) for layer, state in enumerate(states) if layer and all(torch.equal(state[name], first[name]) for name in first)
        ]
    return tuple(repeated)
