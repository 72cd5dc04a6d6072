"""What the tensors of draft heads say of themselves: how many heads and layers, how large, of which form.

Whatever a header or a configuration claims, only the tensors decide what is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_impl.checkpoints.tensors import some
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import MAX_HEADS, MAX_LAYERS, HeadArchitecture

# At most four digits: a greater number is no number of a head or layer, and needs no counting.
_NAME = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(linear\.weight|linear\.bias|weight)")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EXAMPLES = "names such as 0.0.linear.weight and 0.1.weight"


@dataclass(frozen=True)
class HeadsShape:
    """The sizes and the form of draft heads; `vocab_size` is None where no tensor shows it."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int | None
    architecture: HeadArchitecture


def shape_of(tensors: Mapping[str, Tensor], *, where: str) -> HeadsShape:
    """Return the shape of the heads that these tensors make, each of which is looked at.

    Raises: UserError if a name is missing or unknown, if there are more heads or layers than anyone trains,
    if a tensor has another shape than the first head's, or if its values are no finite floating-point
    numbers that the file really holds.
    """
    num_heads, num_layers, architecture = _counts(tensors, where=where)
    first = tensors.get("0.0.linear.weight")
    if first is None or first.dim() != 2 or not 1 <= first.shape[0] == first.shape[1]:
        found = "no tensor 0.0.linear.weight" if first is None else f"0.0.linear.weight of {_shape(first)}"
        raise UserError(found=found, need="a residual block's square matrix", where=where)
    hidden_size = int(first.shape[0])
    vocab_size = None
    if architecture == "own":
        vocab_size = _vocab_size(tensors, num_layers=num_layers, hidden_size=hidden_size, where=where)
    shape = HeadsShape(num_heads, num_layers, hidden_size, vocab_size, architecture)
    _check_names(tensors, shape, where=where)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, shape, where=where)
    return shape


def is_head_name(name: str) -> bool:
    """Return whether tensors of heads have such names."""
    return _NAME.fullmatch(name) is not None


def check_storage(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse tensors that are not plain floating-point numbers, each of them in the file.

    A tensor of a `.pt` file can claim any size over one stored number.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(found=f"{name} of {kind}", need="floating-point weights", where=where)
        held, claimed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if claimed > held:
            found = f"{name} of {_shape(tensor)} over {held} bytes"
            raise UserError(found=found, need="a tensor that the file holds", where=where)


def make_heads(
    shape: HeadsShape,
    tensors: Mapping[str, Tensor],
    *,
    vocab_size: int | None,
    num_heads: int | None,
    where: str,
) -> MedusaHeads:
    """Return heads with these tensors as values, in float32 and evaluation mode.

    `vocab_size` is that of the backbone, for heads that do not show their own. `num_heads` keeps only the
    first heads.

    Raises: UserError for more heads than there are, and where the size of the vocabulary is not known.
    """
    if num_heads is not None and not 1 <= num_heads <= shape.num_heads:
        raise UserError(
            found=f"num_heads = {num_heads} and {shape.num_heads} heads in the file",
            need=f"1 to {shape.num_heads} heads",
            where=where,
            do="ask for fewer, or leave num_heads out to take all",
        )
    known = vocab_size if shape.vocab_size is None else shape.vocab_size
    if known is None:
        raise UserError(
            found="heads without unembeddings",
            need="vocab_size",
            where=where,
            do="pass the backbone's vocabulary size",
        )
    heads = MedusaHeads(
        num_heads=num_heads or shape.num_heads,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        vocab_size=known,
        architecture=shape.architecture,
    )
    with torch.no_grad():
        for name, own in named_tensors(heads).items():
            own.copy_(tensors[name])
    return heads.eval()


def named_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    """Return the heads' tensors under the names that files have; the tensors themselves, not copies."""
    tensors = {
        f"{head}.{name}": tensor
        for head, blocks in enumerate(heads.blocks)
        for name, tensor in blocks.state_dict().items()
    }
    for head, unembedding in enumerate(heads.unembeddings):
        tensors[f"{head}.{heads.num_layers}.weight"] = unembedding.weight
    return tensors


def _counts(tensors: Mapping[str, Tensor], *, where: str) -> tuple[int, int, HeadArchitecture]:
    """Return the numbers of heads and layers and the architecture, read off the names."""
    unknown = sorted(name for name in tensors if not is_head_name(name))
    if unknown or not tensors:
        found = f"tensor names unknown: {some(unknown)}" if tensors else "no tensors"
        raise UserError(found=found, need=_EXAMPLES, where=where)
    parts = [name.split(".", 2) for name in tensors]
    num_heads = 1 + max(int(head) for head, _, _ in parts)
    num_layers = 1 + max((int(layer) for _, layer, kind in parts if kind.startswith("linear")), default=-1)
    if num_heads > MAX_HEADS or num_layers > MAX_LAYERS:
        raise UserError(
            found=f"tensors of head {num_heads - 1} and layer {num_layers - 1}, counted from 0",
            need=f"at most {MAX_HEADS} heads of {MAX_LAYERS} layers",
            where=where,
        )
    return num_heads, num_layers, "own" if any(kind == "weight" for _, _, kind in parts) else "shared"


def _vocab_size(tensors: Mapping[str, Tensor], *, num_layers: int, hidden_size: int, where: str) -> int:
    name = f"0.{num_layers}.weight"
    unembedding = tensors.get(name)
    if unembedding is None or unembedding.dim() != 2 or unembedding.shape[1] != hidden_size:
        found = f"no tensor {name}" if unembedding is None else f"{name} of {_shape(unembedding)}"
        need = f"an unembedding of shape [.., {hidden_size}] after the last block of head 0"
        raise UserError(found=found, need=need, where=where)
    return int(unembedding.shape[0])


def _check_names(tensors: Mapping[str, Tensor], shape: HeadsShape, *, where: str) -> None:
    wanted = {
        f"{head}.{layer}.linear.{part}"
        for head in range(shape.num_heads)
        for layer in range(shape.num_layers)
        for part in ("weight", "bias")
    }
    if shape.architecture == "own":
        wanted |= {f"{head}.{shape.num_layers}.weight" for head in range(shape.num_heads)}
    missing, unknown = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or unknown:
        raise UserError(
            found=f"tensors missing: {some(missing)}; unknown: {some(unknown)}",
            need=f"exactly those of {shape.num_heads} heads of {shape.num_layers} layers",
            where=where,
        )


def _check_tensor(name: str, tensor: Tensor, shape: HeadsShape, *, where: str) -> None:
    if name.endswith("linear.bias"):
        wanted = [shape.hidden_size]
    else:
        rows = shape.hidden_size if name.endswith("linear.weight") else shape.vocab_size
        wanted = [rows or 0, shape.hidden_size]
    if list(tensor.shape) != wanted:
        found = f"{name} of {_shape(tensor)}"
        raise UserError(found=found, need=f"shape {wanted}, as head 0 has", where=where)
    check_storage({name: tensor}, where=where)
    if not torch.isfinite(tensor).all():
        raise UserError(found=f"values in {name} that are not finite", need="finite weights", where=where)


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"
