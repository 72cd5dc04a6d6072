"""A step of a fixed shape, recorded once as a CUDA graph and replayed.

At batch size 1 a step is hundreds of kernels of a few microseconds each. When Python launches them one by
one, the device waits for the host. A replay launches all of them at once.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from medusa_impl.engine.backbone import BackboneOutput, ModelCall, StepInputs
from medusa_impl.engine.kv_cache import TreeCache

# As PyTorch's documentation advises: in the first calls kernels choose their algorithms and workspaces, which
# a capture cannot record.
_WARMUP_CALLS = 3


class CapturedSteps:
    """The model's call by CUDA graphs, one for each shape and cache; a new shape is captured when it occurs.

    Each graph has a memory pool of its own, which lives as long as the graph: PyTorch frees a shared pool
    with its last graph, and a capture that fails leaves the pool that it was to fill unusable for any other.
    """

    def __init__(self, call: ModelCall) -> None:
        self._call = call
        self._graphs: weakref.WeakKeyDictionary[TreeCache, dict[tuple[Any, ...], _CapturedStep]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the output of the step of this shape on these inputs; the next replay overwrites it."""
        graphs = self._graphs.setdefault(cache, {})
        key = (tuple(inputs.token_ids.shape), cache.plan.view_length, inputs.num_logits)
        if key not in graphs:
            graphs[key] = _CapturedStep(self._call, inputs, cache)
        return graphs[key].replay(inputs, cache)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting cycles meanwhile; what is due is collected before.

    A cache and its layers name each other, so an old cache goes when Python looks for cycles, and its graphs
    with it. CUDA forbids freeing during a capture: a collection there makes the capture fail.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _CapturedStep:
    """One graph with the memory that it reads: a replay first copies its inputs there."""

    def __init__(self, call: ModelCall, inputs: StepInputs, cache: TreeCache) -> None:
        assert cache.plan.flat_slots is not None
        self._slots = cache.plan.flat_slots.clone()
        self._inputs = StepInputs(
            token_ids=inputs.token_ids.clone(),
            position_ids=inputs.position_ids.clone(),
            mask={name: mask.clone() for name, mask in inputs.mask.items()}
            if isinstance(inputs.mask, dict)
            else inputs.mask.clone(),
            num_logits=inputs.num_logits,
        )
        cache.plan.flat_slots = self._slots  # so that the recorded write reads the slots from here
        # PyTorch requires that these calls run on another stream than the default one.
        warming = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            for _ in range(_WARMUP_CALLS):  # each call writes the same keys and values into the same slots
                call(self._inputs, cache)
        torch.cuda.current_stream().wait_stream(warming)
        self._graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(self._graph):
            self._output = call(self._inputs, cache)

    def replay(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the recorded step's output on new inputs, in the same memory as before."""
        assert cache.plan.flat_slots is not None
        self._slots.copy_(cache.plan.flat_slots)
        for held, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output


def _tensors(inputs: StepInputs) -> list[Tensor]:
    masks = list(inputs.mask.values()) if isinstance(inputs.mask, dict) else [inputs.mask]
    return [inputs.token_ids, inputs.position_ids, *masks]
