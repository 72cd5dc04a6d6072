"""A stand-in for a second device, so that a machine without one shows tensors that were left on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_TAG = "_is_on_device"


def put_on_device(*tensors: Tensor) -> None:
    """Say that these tensors lie on the device."""
    for tensor in tensors:
        setattr(tensor, _TAG, True)


def put_module_on_device(module: nn.Module) -> None:
    """Say so of a module's parameters and buffers."""
    put_on_device(*module.parameters(), *module.buffers())


def is_on_device(tensor: Tensor) -> bool:
    """Return whether a tensor was said to lie on the device, or was made of one that does."""
    return bool(getattr(tensor, _TAG, False))


class HostAndDevice(TorchFunctionMode):
    """Raises where a tensor on the device meets one, scalars aside, that is not; what an operation on the
    device makes stays there.

    A tensor that is made without naming a device is on the host, one that is made with `device=` or moved by
    `to` on the device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and follow where its tensors lie."""
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
