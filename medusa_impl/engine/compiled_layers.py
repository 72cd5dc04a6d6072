"""The decoder's layers through torch.compile: compiled once, since they repeat, and run for each layer.

Everything around the layers, and the cache, stays as it is. A compiled layer gets the cache's tensors of its
own layer, flat, and writes into them in place; what its attention reads is a view of them, as long as the
mask. So neither more layers, nor a longer view or cache, nor a larger tree compile anything anew.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medusa_impl.engine.backbone import Backbone, BackboneOutput, StepInputs
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.errors import UserError


class _LayerSlots:
    """What a compiled layer sees of the cache: the slots of one layer."""

    def __init__(
        self, keys: Tensor, values: Tensor, slots: Tensor, *, num_rows: int, view_length: int
    ) -> None:
        self._keys, self._values, self._slots = keys, values, slots
        self._num_rows, self._view_length = num_rows, view_length

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        # The layer's index is among the arguments. It must not be read: what is read of a layer is a part of
        # the compiled code, and every layer would be compiled on its own.
        views = []
        for storage, states in ((self._keys, key_states), (self._values, value_states)):
            storage.index_copy_(0, self._slots, states.transpose(1, 2).flatten(0, 1))
            by_row = storage.view(self._num_rows, -1, *storage.shape[1:])
            views.append(by_row[:, : self._view_length].transpose(1, 2))
        return views[0], views[1]


class CompiledLayers:
    """The model's call with compiled decoder layers; prompts are read by the layers as they are.

    Raises: UserError for a model whose layers cannot be told.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        # PyTorch counts what it compiled by code object, and gives up after a few: each model has its own.
        own = types.FunctionType(_run_layer.__code__.replace(), _run_layer.__globals__, "run_layer")
        self._run = torch.compile(own, fullgraph=True)
        self._cache: TreeCache | None = None
        self.failure = ""  # why the layers run as they are, where they cannot be compiled
        layers = decoder_layers(backbone)
        if any("forward" in vars(layer) for layer in layers):
            raise UserError(
                found="decoder layers whose forward pass something else has replaced",
                need="layers as they are",
                where="the compiled mode",
                do="take another mode",
            )
        for index, layer in enumerate(layers):
            plain = type(layer).forward
            parameters = inspect.signature(plain)
            layer.forward = functools.partial(
                self._forward, layer, index=index, plain=plain, parameters=parameters
            )

    @classmethod
    def of(cls, backbone: Backbone) -> CompiledLayers:
        """Return the compiled layers of a model: there is one set, however many backbones share it."""
        installed = vars(decoder_layers(backbone)[0]).get("forward")
        owner = getattr(getattr(installed, "func", None), "__self__", None)
        return owner if isinstance(owner, cls) else cls(backbone)

    def __call__(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the output of a step whose rows are all the cache's."""
        for mask in inputs.mask.values() if isinstance(inputs.mask, dict) else [inputs.mask]:
            torch._dynamo.maybe_mark_dynamic(mask, 3)
        self._cache = cache
        try:
            return self._backbone.call_model(inputs, cache)
        finally:
            self._cache = None

    def _forward(
        self,
        layer: nn.Module,
        *arguments: Any,
        index: int,
        plain: Callable[..., Any],
        parameters: inspect.Signature,
        **options: Any,
    ) -> Any:
        cache = self._cache
        # Before anything was written there are no tensors to give.
        if cache is None or cache.num_bytes == 0 or self.failure:
            return plain(layer, *arguments, **options)
        given = _by_name(parameters, layer, arguments, options)
        name = next(name for name, value in given.items() if isinstance(value, TreeCache))
        keys, values = cache.flat_storage(index)
        for tensor in (keys, values):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # caches differ in length
        slots = cache.plan.flat_slots
        assert slots is not None
        try:
            return self._run(plain, layer, keys, values, slots, cache.num_rows, name, given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what a compiler raises, or PyTorch where it gives up
            lines = (line.strip() for line in str(error).splitlines())
            self.failure = next(filter(None, lines), type(error).__name__)
            return plain(layer, *arguments, **options)


def decoder_layers(backbone: Backbone) -> nn.ModuleList:
    """Return the list of the model's decoder layers.

    Raises: UserError where no list, or more than one, has as many modules as the model has layers.
    """
    lists = [
        module
        for module in backbone.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == backbone.num_layers
    ]
    outer = [one for one in lists if not any(one is not other and _holds(other, one) for other in lists)]
    if len(outer) != 1:
        raise UserError(
            found=f"{len(outer)} lists of {backbone.num_layers} modules in the model",
            need="one: its decoder layers",
            where="the compiled mode",
            do="take another mode",
        )
    return outer[0]


def _holds(module: nn.Module, inner: nn.Module) -> bool:
    return any(one is inner for one in module.modules())


def _by_name(
    parameters: inspect.Signature, layer: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a layer's arguments by name: some families pass the cache by position."""
    given = dict(parameters.bind(layer, *arguments, **options).arguments)
    given.pop(next(iter(parameters.parameters)))
    for name, parameter in parameters.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _run_layer(
    plain: Callable[..., Any],
    layer: nn.Module,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    num_rows: int,
    name: str,
    given: dict[str, Any],
) -> Any:
    view_length = given["attention_mask"].shape[-1]
    seen = _LayerSlots(keys, values, slots, num_rows=num_rows, view_length=view_length)
    return plain(layer, **{**given, name: seen})
