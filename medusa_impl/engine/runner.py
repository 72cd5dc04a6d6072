"""The engine that vanilla and Medusa decoding share: a backbone, its heads, and the mode of their steps.

mode          what a step runs
eager         PyTorch's own kernels, one after another
packed        the same, with weights packed for oneDNN once, and layers of one input as one product (CPU)
compiled      the decoder's layers through torch.compile: fused kernels, after seconds of compiling
cuda_graph    the whole step recorded once for each shape and replayed: one launch from Python (GPU)
fused_graph   both: steps with compiled layers, recorded (GPU)

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
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from medusa_impl.engine.backbone import Backbone, ModelCall
from medusa_impl.engine.captured_step import CapturedSteps, Failure, RecordedSteps, Recorder
from medusa_impl.engine.compiled_layers import CompiledLayers
from medusa_impl.engine.launch import Launcher, run_directly
from medusa_impl.engine.meta_pass import host_question
from medusa_impl.engine.packed_linear import PackedLinears, layers_of_one_input, packing_available
from medusa_impl.heads import MedusaHeads

Mode = Literal["eager", "packed", "compiled", "cuda_graph", "fused_graph"]
# oneDNN packs for an expected number of rows. This one is between a single node and a large tree.
_PACKING_ROWS = 16


@dataclass(frozen=True)
class _Calls:
    """How one mode calls the model in a step, in `Backbone.forward`, and how it launches a step."""

    model: ModelCall
    forward: ModelCall
    launch: Launcher


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
        self._calls: dict[Mode, _Calls] = {}
        self._mode: Mode = "eager"
        self._note = ""
        self.use(self.available_modes()[0] if mode == "auto" else mode)

    @property
    def mode(self) -> Mode:
        """Return the mode in use: one without graphs from the moment on in which a capture failed."""
        call = self.backbone.model_call
        compiles = isinstance(call, CompiledLayers) and not call.failure
        if self._mode == "fused_graph" and not self._failure:
            return "fused_graph" if compiles else "cuda_graph"
        if self._mode in ("compiled", "fused_graph"):
            return "compiled" if compiles else "eager"
        return "eager" if self._failure else self._mode

    @property
    def note(self) -> str:
        """Return why the mode in use is not the one asked for, or what is special about it; else nothing."""
        call = self.backbone.model_call
        whys = [("a capture", self._failure)]
        if isinstance(call, CompiledLayers):
            whys.append(("compiling", call.failure))
        failed = [f"{what} failed: {why}" for what, why in whys if why]
        return f"{self._mode} mode fell back to {self.mode}: {'; '.join(failed)}" if failed else self._note

    @property
    def _failure(self) -> str:
        used: tuple[object, ...] = (self.backbone.launch, self.backbone.step_call)
        return next((one.failure for one in used if isinstance(one, Recorder) and one.failure), "")

    def available_modes(self) -> tuple[Mode, ...]:
        """Return the modes that this device, dtype and PyTorch offer; `auto` takes the first."""
        device = self.backbone.device
        modes: list[Mode] = ["eager"]
        if device.type == "cuda":
            modes = ["eager"] if self._host_question else ["cuda_graph", "eager"]
        elif device.type == "cpu" and packing_available(self.backbone.dtype):
            modes = ["packed", "eager"]
        if compiling_available(device.type):
            modes += ["compiled", "fused_graph"] if "cuda_graph" in modes else ["compiled"]
        return tuple(modes)

    def use(self, mode: Mode) -> None:
        """Switch to a mode, or to `eager` if it is not available.

        Packed weights, compiled code and captured graphs are kept, so that switching back is cheap.
        """
        self._note = ""
        if mode not in self.available_modes():
            self._note = f"{mode} mode is not available here: fell back to eager"
            if self.backbone.device.type == "cuda" and self._host_question:
                self._note += f" (a step of this model asks the host: {self._host_question})"
            mode = "eager"
        if mode not in self._calls:
            self._calls[mode] = self._calls_of(mode)
        # Packed layers exist for one mode only; the others call the stock ones.
        if self._mode == "packed" and self._packed is not None:
            self._packed.detach()
        self._mode = mode
        if mode == "packed":
            self._packed = self._packed or self._pack()
            self._packed.attach()
            if self._packed.from_rows > 1:
                self._note = (
                    f"fewer than {self._packed.from_rows} rows take the stock product, the faster one here"
                )
        calls = self._calls[mode]
        self.backbone.model_call, self.backbone.step_call = calls.model, calls.forward
        self.backbone.launch = calls.launch

    @functools.cached_property
    def _host_question(self) -> str:
        return host_question(self.backbone.model)

    @property
    def records_steps(self) -> bool:
        """Return whether whole steps are recorded: then marks of their parts make other, longer steps."""
        return self.backbone.launch is not run_directly

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

    def _calls_of(self, mode: Mode) -> _Calls:
        plain = self.backbone.call_model
        call: ModelCall = plain
        if mode in ("compiled", "fused_graph"):
            call = CompiledLayers.of(self.backbone)
        if mode in ("cuda_graph", "fused_graph"):
            failed = Failure()
            return _Calls(call, CapturedSteps(call, failed=failed), RecordedSteps(failed=failed))
        return _Calls(call, call, run_directly)

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
    """Return whether torch.compile can build code.

    It needs a C++ compiler for a CPU, Triton and the C compiler that Triton calls for a GPU.
    """
    if device_type == "cpu":
        return any(shutil.which(compiler) for compiler in (os.environ.get("CXX") or "g++", "clang++"))
    has_compiler = any(shutil.which(compiler) for compiler in (os.environ.get("CC") or "gcc", "clang"))
    return has_compiler and importlib.util.find_spec("triton") is not None
