"""A pretended second device, so that tensors left on the host are found on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_TAG = "_is_on_device"


def put_on_device(*tensors: Tensor) -> None:
    """Mark these tensors as being on the device."""
    for tensor in tensors:
        setattr(tensor, _TAG, True)


def put_module_on_device(module: nn.Module) -> None:
    """Mark a module's parameters and buffers as being on the device."""
    put_on_device(*module.parameters(), *module.buffers())


def is_on_device(tensor: Tensor) -> bool:
    """Return whether a tensor was marked as being on the device, or was computed from one that was."""
    return bool(getattr(tensor, _TAG, False))


class HostAndDevice(TorchFunctionMode):
    """Raises an error if an operation mixes tensors of the device with tensors of the host.

    Scalars may be mixed. The results of operations on the device are on the device. A new tensor is on the
    host if no device is named, and on the device if it is made with `device=` or moved by `to`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and note which device its result is on."""
        named = kwargs or {}
        leaves = tree_leaves((args, named))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        on_device = any(is_on_device(tensor) for tensor in tensors)
        left_behind = [tuple(tensor.shape) for tensor in tensors if tensor.dim() and not is_on_device(tensor)]
        result = func(*args, **named)
        if isinstance(result, Tensor | tuple | list):
            if on_device and left_behind:
                raise RuntimeError(
                    f"{getattr(func, '__name__', func)}: tensors {left_behind} of the host meet tensors of "
                    "the device"
                )
            if on_device or any(isinstance(leaf, torch.device) for leaf in leaves):
                put_on_device(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result
