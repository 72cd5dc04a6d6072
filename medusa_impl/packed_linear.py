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
        weight = torch.linspace(-1, 1, 32 * 16).sin().reshape(32, 16).to(dtype)  # no draw: a probe must not move the random numbers
        rows = torch.linspace(-2, 2, 3 * 16).cos().reshape(3, 16).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        product = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(product.float(), nn.functional.linear(rows, weight).float(), atol=1e-4 if dtype == torch.float32 else 0.2)


class PackedLinears:
    """Packed copies of every CPU linear layer under some modules, attached and detached at will.

    The parameters stay where they are (hashing and saving see them unchanged); nothing may train while packed copies are attached.
    """

    def __init__(self, *modules: nn.Module | None, rows_hint: int) -> None:
        self._packed: dict[nn.Linear, Tensor] = {}
        for root in modules:
            for module in root.modules() if root is not None else ():
                if type(module) is nn.Linear and module.weight.device.type == "cpu" and packing_available(module.weight.dtype):
                    self._packed[module] = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows_hint)

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(module.weight.numel() * module.weight.element_size() for module in self._packed)

    def attach(self) -> None:
        """Route the layers through their packed copies."""
        for module, packed in self._packed.items():
            module.forward = functools.partial(_packed_forward, packed, module.bias)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the layers their stock forward back."""
        for module in self._packed:
            module.__dict__.pop("forward", None)


def _packed_forward(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product
