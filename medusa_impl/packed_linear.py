"""Linear layers with weights prepacked for oneDNN, so that few-row products on a CPU do not fall off a cliff.

Stock `nn.Linear` reorders its weight on every call with more than one row. Packing once costs a second copy of the weights and gives
the same products. The operators are private to PyTorch: they are probed, and where they are missing nothing is packed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


@functools.cache
def packing_available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs and multiplies weights of `dtype` on this CPU with the result of a stock linear layer."""
    try:
        weight, rows = torch.randn(32, 16).to(dtype), torch.randn(3, 16).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        product = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(product.float(), nn.functional.linear(rows, weight).float(), atol=1e-4 if dtype == torch.float32 else 0.2)


def pack_linears(model: nn.Module, *, rows_hint: int) -> int:
    """Route every CPU linear layer under `model` through a packed copy of its weight; return how many were packed.

    The parameters stay where they are (hashing, saving and training see them unchanged); training must not run while packed.
    """
    num_packed = 0
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and packing_available(module.weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows_hint)
            module.forward = functools.partial(_packed_forward, packed, module.bias)  # type: ignore[method-assign]
            num_packed += 1
    return num_packed


def unpack_linears(model: nn.Module) -> None:
    """Undo `pack_linears`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__.pop("forward", None)


def _packed_forward(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product
