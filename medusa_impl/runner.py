"""The engine that both arms share: a backbone, its heads, and the mode that steps run in.

Modes: `eager`, stock PyTorch kernels; `packed`, the same step with linear weights prepacked for oneDNN (CPU). Whatever the mode, vanilla
and Medusa go through the same code with the same weights, so that a speedup never compares two engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from transformers import PreTrainedModel

from medusa_impl.backbone import Backbone
from medusa_impl.heads import MedusaHeads
from medusa_impl.packed_linear import PackedLinears, packing_available

Mode = Literal["eager", "packed"]
_PACKING_ROWS = 16  # the row count that packed layouts are chosen for: between one node and a large tree


class StepRunner:
    """A backbone and its heads in one mode; `mode` says which was taken and `note` why.

    With `auto` the fastest mode available is taken: `packed` on a CPU that has the operators, `eager` elsewhere.
    """

    def __init__(self, model: PreTrainedModel, heads: MedusaHeads | None, *, mode: Mode | Literal["auto"] = "auto") -> None:
        self.backbone = Backbone(model)
        self.heads = heads.eval().to(device=model.device, dtype=model.dtype) if heads is not None else None
        if heads is not None:
            heads.check_backbone(hidden_size=self.backbone.hidden_size, vocab_size=self.backbone.vocab_size)
        packable = model.device.type == "cpu" and packing_available(model.dtype)
        self.note = ""
        if mode == "packed" and not packable:
            self.note = "packed operators are missing here: fell back to eager"
        self.mode: Mode = "packed" if packable and mode != "eager" else "eager"
        self._packed = PackedLinears(model, self.heads, rows_hint=_PACKING_ROWS) if self.mode == "packed" else None
        if self._packed is not None:
            self._packed.attach()

    @property
    def packed_bytes(self) -> int:
        """Bytes of prepacked weight copies; 0 in eager mode."""
        return self._packed.num_bytes if self._packed is not None else 0

    @contextlib.contextmanager
    def stock(self) -> Iterator[PreTrainedModel]:
        """Lend the model as transformers ships it: stock linear layers and stock attention, for `generate`."""
        if self._packed is not None:
            self._packed.detach()
        with self.backbone.stock_attention():
            try:
                yield self.backbone.model
            finally:
                if self._packed is not None:
                    self._packed.attach()
