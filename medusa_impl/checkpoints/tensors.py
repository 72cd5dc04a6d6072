"""What tensors hash to, and safe reading of files of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

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
    """Return the hash of a model's tensors as loaded; of tensors that share memory, the first name alone
    counts, as on disk.

    It equals the hash of the folder that the model was loaded from if the dtype is the file's own: a model
    that was cast on loading has other bytes, and is known by the hash of its folder.
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


def some(names: list[str]) -> str:
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})",
            need="a whole one",
            where=path.name,
            do="fetch or make it again",
        ) from error
