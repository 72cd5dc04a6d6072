"""Linear layers with weights packed for oneDNN, which makes products of few rows fast on a CPU.

PyTorch's `nn.Linear` packs its weight on every call with more than one row, and a draft tree is such a call.
Packing once costs a second copy of the weights and gives the same products. Layers that read the same tensor
(query, key and value; gate and up; the first layers of all draft heads) are packed as one, because one
product is faster than several small ones.

On some processors the stock product of one row or two is the faster one, so that packing would slow vanilla
decoding down and flatter Medusa. That is measured once, on the model's own layers.

The operators are private to PyTorch, so a probe looks for them. Where they are missing, nothing is packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

_MEASURED_BYTES = 2**26  # of weights; smaller models fit a cache, where times say nothing of steps
_MEASURED_ROWS, _MEASURED_PASSES = 3, 5


@functools.cache
def packing_available(dtype: torch.dtype) -> bool:
    """Return whether packed products of this dtype work here and equal those of a stock linear layer."""
    try:
        # Not random: a probe that draws would change the random numbers of all that follows.
        weight = torch.linspace(-1, 1, 32 * 16).sin().reshape(32, 16).to(dtype)
        rows = torch.linspace(-2, 2, 3 * 16).cos().reshape(3, 16).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        product = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(
        product.float(),
        nn.functional.linear(rows, weight).float(),
        atol=1e-4 if dtype == torch.float32 else 0.2,
    )


def layers_of_one_input(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[list[nn.Linear]]:
    """Return the groups of linear layers that read the same tensor directly one after another.

    `run` calls the modules once, and hooks on their layers record what each layer reads. A layer that runs
    more than once belongs to no group. Layers with a bias and layers without one are never grouped together.
    """
    calls: list[tuple[nn.Linear, Tensor]] = []
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0])))
        for layer in layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[nn.Linear]] = []
    last: Tensor | None = None
    for layer, rows in calls:
        # The same tensor object, not an equal one: only then one product serves both layers.
        if rows is last and (layer.bias is None) == (groups[-1][0].bias is None):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = rows
    times_run = [id(layer) for layer, _ in calls]
    return [
        group
        for group in groups
        if len(group) > 1 and all(times_run.count(id(layer)) == 1 for layer in group)
    ]


class PackedLinears:
    """Packed copies of every CPU linear layer in some modules, which can be attached and detached.

    `groups` are layers that read the same tensor; each group becomes one product. The modules keep their
    parameters, so that hashing and saving see them unchanged. Nothing may train while packed copies are
    attached: the copies would not follow.
    """

    def __init__(
        self, *modules: nn.Module | None, rows_hint: int, groups: Sequence[Sequence[nn.Linear]] = ()
    ) -> None:
        self._forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self.from_rows = 1  # fewer rows take the stock product
        for group in groups:
            if all(_packable(layer) for layer in group):
                self._forwards.update(_JointProduct(group, rows_hint=rows_hint).forwards())
        for root in modules:
            for module in root.modules() if root is not None else ():
                if type(module) is nn.Linear and module not in self._forwards and _packable(module):
                    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows_hint)
                    self._forwards[module] = functools.partial(_packed_forward, packed, module.bias)

    def __len__(self) -> int:
        return len(self._forwards)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the packed copies."""
        return sum(module.weight.numel() * module.weight.element_size() for module in self._forwards)

    def attach(self) -> None:
        """Route the layers through their packed copies."""
        for module, forward in self._forwards.items():
            # On the instance: it hides the class's method until it is removed again.
            chosen = forward if self.from_rows == 1 else functools.partial(self._forward, module, forward)
            module.forward = chosen  # type: ignore[method-assign, assignment]

    def _forward(self, layer: nn.Linear, packed: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if rows.shape[:-1].numel() < self.from_rows:
            return nn.functional.linear(rows, layer.weight, layer.bias)
        return packed(rows)

    @torch.inference_mode()
    def measure_rows(self, clock: Callable[[], float]) -> None:
        """Find from how many rows on packed products are the faster ones here; small models keep one."""
        if self.num_bytes < _MEASURED_BYTES:
            return
        for num_rows in range(1, _MEASURED_ROWS + 1):
            packed_s, stock_s = self._fastest_passes(num_rows, clock)
            if packed_s <= stock_s:
                break
            self.from_rows = num_rows + 1

    def _fastest_passes(self, num_rows: int, clock: Callable[[], float]) -> tuple[float, float]:
        """Return the fastest pass of all layers, packed and stock in turns. Units: seconds."""
        widths = {(layer.in_features, layer.weight.dtype) for layer in self._forwards}
        rows = {(width, dtype): torch.ones(num_rows, width, dtype=dtype) for width, dtype in widths}

        def stock(layer: nn.Linear, given: Tensor) -> Tensor:
            return nn.functional.linear(given, layer.weight, layer.bias)

        fastest = [float("inf")] * 2
        for _ in range(_MEASURED_PASSES):
            for way in (0, 1):
                started = clock()
                for layer, packed in self._forwards.items():
                    given = rows[layer.in_features, layer.weight.dtype]
                    packed(given) if way == 0 else stock(layer, given)
                fastest[way] = min(fastest[way], clock() - started)
        return fastest[0], fastest[1]

    def detach(self) -> None:
        """Give the layers their stock forward back."""
        for module in self._forwards:
            module.__dict__.pop("forward", None)


class _JointProduct:
    """Several linear layers of one input as one product.

    The layer that is called first computes the product, the others take their columns of it. A layer that is
    called with another tensor computes the product again. So a model that uses its layers in another way than
    it did when they were grouped becomes slower, but not wrong.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, rows_hint: int) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._layers = layers
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows_hint)
        biases: list[Tensor | None] = [layer.bias for layer in layers]
        present = [bias.detach() for bias in biases if bias is not None]
        self._bias = torch.cat(present) if present else None
        self._widths = [layer.out_features for layer in layers]
        self._rows: Tensor | None = None
        self._products: tuple[Tensor, ...] = ()
        self._taken = 0

    def forwards(self) -> dict[nn.Linear, Callable[[Tensor], Tensor]]:
        return {layer: functools.partial(self._product, index) for index, layer in enumerate(self._layers)}

    def _product(self, index: int, rows: Tensor) -> Tensor:
        # A layer never takes its columns of one product twice: the tensor may hold new values by then.
        if rows is not self._rows or self._taken & (1 << index):
            self._rows, self._taken = rows, 0
            self._products = torch.split(
                _packed_forward(self._packed, self._bias, rows), self._widths, dim=-1
            )
        self._taken |= 1 << index  # a set of layers, as bits
        product = self._products[index]
        # All columns are taken: let go of the product, and of the tensor that it was made from.
        if self._taken == (1 << len(self._widths)) - 1:
            self._rows, self._products, self._taken = None, (), 0
        return product


def _packable(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and packing_available(layer.weight.dtype)


def _packed_forward(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product
