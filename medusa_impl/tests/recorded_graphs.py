"""Two ways to prove on a CPU that a decoding step can be one CUDA graph.

`Launches` watches a step on the meta device, whose tensors hold no data: asking for a value there fails.
`RecordedGraphs` stands in for CUDA's graphs with their semantics: it keeps every operation with the very
tensors that it ran on, and runs the same again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medusa_impl.engine.captured_step import Graph

aten = torch.ops.aten


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a device would be told to do, and notes what would make it wait for the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = [one for one in _tensors(args, kwargs, out) if one.dim() or one.device.type != "cpu"]
        if len({one.device.type for one in held}) > 1:
            self.waits.append(f"{func}: from one device to another")
        indexing = (aten.index, aten.index_put, aten.index_put_)
        if func.overloadpacket in indexing and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.waits.append(f"{func}: by a mask")
        self.count += not func.is_view
        return out


class _Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A graph of this stand-in: operations with their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        storages = {one.untyped_storage()._cdata for one in _tensors(args, kwargs)}
        fresh = [one for one in _tensors(out) if one.untyped_storage()._cdata not in storages]
        changes = bool(func._schema.is_mutable)
        if changes or fresh:
            self._calls.append((func, args, kwargs, [] if changes else fresh))
        return out

    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            out = func(*args, **kwargs)
            if results:
                storages = {one.untyped_storage()._cdata for one in _tensors(args, kwargs)}
                again = [one for one in _tensors(out) if one.untyped_storage()._cdata not in storages]
                for held, new in zip(results, again, strict=True):
                    held.copy_(new)


class RecordedGraphs:
    """Makes recorded graphs and counts them; `fails_at` names captures, from 1, that fail like a real one.

    With `complains_at_the_end` a capture in which something fails raises an error of its own at its end.
    """

    def __init__(self, *, fails_at: frozenset[int] = frozenset(), complains_at_the_end: bool = False) -> None:
        self._complains = complains_at_the_end
        self.num_captures = self.num_warm_ups = 0
        self._fails_at = fails_at

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        self.num_warm_ups += 1
        yield

    @contextlib.contextmanager
    def capture(
        self, *, generator: torch.Generator | None = None, after: Graph | None = None
    ) -> Iterator[Graph]:
        self.num_captures += 1
        if self.num_captures in self._fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        graph = _Recorded()
        try:
            with graph:
                yield graph
        except RuntimeError:
            if self._complains:  # as CUDA does where a broken capture ends
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            raise
