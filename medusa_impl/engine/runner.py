"""The engine that vanilla and Medusa decoding share: a backbone, its heads, and the mode of their steps.

mode          what a step runs
eager         PyTorch's own kernels, one after another
packed        the same, with weights packed for oneDNN once, and layers of one input as one product (CPU)
compiled      the model through torch.compile: fused kernels; compiling a new shape takes a minute or more
cuda_graph    the model recorded once for each shape and replayed, with no launches from Python (GPU)

In every mode both decoding loops run the same code with the same weights. So a speedup never compares two
different engines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from medusa_impl.engine.backbone import Backbone, BackboneOutput, ModelCall, StepInputs
from medusa_impl.engine.captured_step import CapturedSteps
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.packed_linear import PackedLinears, layers_of_one_input, packing_available
from medusa_impl.heads import MedusaHeads

Mode = Literal["eager", "packed", "compiled", "cuda_graph"]
# oneDNN packs for an expected number of rows. This one is between a single node and a large tree.
_PACKING_ROWS = 16


class StepRunner:
    """A backbone and its heads in one mode.

    `auto` takes the fastest mode that needs no compiling: `cuda_graph` on a GPU, `packed` on a CPU where
    PyTorch has the operators, else `eager`. A mode that is not available here becomes `eager`. `mode` is the
    mode in use; `note` says so if it is not the one asked for. With a `clock`, in seconds, packing finds out
    whether the stock product of a row or two is the faster one here.

    Raises: UserError if the heads do not fit the backbone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: MedusaHeads | None,
        *,
        mode: Mode | Literal["auto"] = "auto",
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.backbone, self._clock = Backbone(model), clock
        self.heads = heads.eval().to(device=model.device, dtype=model.dtype) if heads is not None else None
        if heads is not None:
            heads.check_backbone(hidden_size=self.backbone.hidden_size, vocab_size=self.backbone.vocab_size)
        self._packed: PackedLinears | None = None
        self._calls: dict[Mode, ModelCall] = {}
        self.mode: Mode = "eager"
        self.note = ""
        self.use(self.available_modes()[0] if mode == "auto" else mode)

    def available_modes(self) -> tuple[Mode, ...]:
        """Return the modes that this device, dtype and PyTorch offer; `auto` takes the first."""
        device = self.backbone.device
        modes: list[Mode] = ["eager"]
        if device.type == "cuda":
            modes = ["cuda_graph", "eager"]
        elif device.type == "cpu" and packing_available(self.backbone.dtype):
            modes = ["packed", "eager"]
        return (*modes, "compiled") if compiling_available(device.type) else tuple(modes)

    def use(self, mode: Mode) -> None:
        """Switch to a mode, or to `eager` if it is not available.

        Packed weights, compiled code and captured graphs are kept, so that switching back is cheap.
        """
        self.note = ""
        if mode not in self.available_modes():
            self.note = f"{mode} mode is not available here: fell back to eager"
            mode = "eager"
        # Packed layers exist for one mode only; the others call the stock ones.
        if self.mode == "packed" and self._packed is not None:
            self._packed.detach()
        self.mode = mode
        if mode == "packed":
            self._packed = self._packed or self._pack()
            self._packed.attach()
            if self._packed.from_rows > 1:
                self.note = (
                    f"fewer than {self._packed.from_rows} rows take the stock product, the faster one here"
                )
        if mode not in self._calls:
            self._calls[mode] = self._call_of(mode)
        self.backbone.step_call = self._calls[mode]

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of packed copies of weights; 0 if there are none."""
        return self._packed.num_bytes if self._packed is not None else 0

    @contextlib.contextmanager
    def stock(self) -> Iterator[PreTrainedModel]:
        """Lend the model with the linear layers and the attention of transformers, for its `generate`."""
        packed = self._packed if self.mode == "packed" else None
        if packed is not None:
            packed.detach()
        with self.backbone.stock_attention():
            try:
                yield self.backbone.model
            finally:
                if packed is not None:
                    packed.attach()

    def _call_of(self, mode: Mode) -> ModelCall:
        if mode == "cuda_graph":
            return CapturedSteps(self.backbone.call_model)
        if mode == "compiled":
            return _CompiledCall(self.backbone)
        return self.backbone.call_model

    @torch.inference_mode()
    def _pack(self) -> PackedLinears:
        """Return backbone and heads packed; one short pass of each shows which layers share an input."""
        model: Any = self.backbone.model
        heads = self.heads

        def short_pass() -> None:
            both = torch.tensor([[0, 0], [0, 1]], device=model.device)
            model(input_ids=both[:1], position_ids=both[1:], use_cache=False)
            if heads is not None:
                heads.states(torch.zeros(1, heads.hidden_size, dtype=model.dtype, device=model.device))

        groups = layers_of_one_input([module for module in (model, heads) if module is not None], short_pass)
        packed = PackedLinears(model, heads, rows_hint=_PACKING_ROWS, groups=groups)
        if self._clock is not None:
            packed.measure_rows(self._clock)
        return packed


@functools.cache
def compiling_available(device_type: str) -> bool:
    """Return whether torch.compile can build code: it needs a C++ compiler for a CPU, Triton for a GPU."""
    if device_type == "cpu":
        return any(shutil.which(compiler) for compiler in (os.environ.get("CXX") or "g++", "clang++"))
    return importlib.util.find_spec("triton") is not None


class _CompiledCall:
    """The model's call through torch.compile.

    The part of the cache that attention reads grows; it is the only size that varies within a compiled shape.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._compiled = torch.compile(backbone.call_model)

    def __call__(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        return self._compiled(inputs, cache)
