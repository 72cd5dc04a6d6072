"""A preallocated key-value cache that takes all nodes of a draft tree and keeps one path of them.

The cache implements the public `Cache` interface of transformers, so any causal LM writes into it unchanged.
One row of one layer, before and after `keep` for the path of the nodes 0, 2, 5:

    slot        0 1 2 3 | 4 5 6 7 8 9 | ..
    written     k k k k | 0 1 2 3 4 5 |         the kept prefix, then the N nodes of the step
    kept        k k k k   0 2 5 | ..            the path joins the prefix, the other nodes are dropped

So the slot of a kept token is its position in the text.

Paper: Section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_impl.errors import UserError

# Attention reads the filled part of the cache, rounded up to this many slots. So its shape changes rarely: a
# mode that compiles or captures a step does so once for each shape. On a GPU a capture costs far more than
# the slots that are read in vain.
BUCKET_TOKENS, _BUCKET_TOKENS_ON_GPU = 64, 512
_MOST_STEPS = 8  # kinds of steps over one cache, each with its tree, heads and rule


class _WritePlan:
    """Where the present forward pass writes, and how far its attention reads; the same for all layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.flat_slots: Tensor | None = None
        self.view_length = 0


class TreeCacheLayer(CacheLayerMixin):
    """The keys and values of one layer, a part of the storage that all layers share.

    transformers calls these methods; their names and arguments are its own.
    """

    is_sliding = False

    def __init__(self, cache: TreeCache, layer_index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer_index = layer_index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._cache.allocate(key_states, value_states)
        self.keys, self.values = self._cache.flat_storage(self._layer_index)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the filled part of the cache, after the new ones were written to it.

        Shapes: states `[B', Hkv, N, d]`, results `[B', Hkv, view_length, d]`, views of the storage.
        Raises: UserError if this layer's shape is not that of the first layer.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        plan, rows = self._cache.plan, (self._cache.num_rows, self._cache.row_slots)
        assert plan.flat_slots is not None
        views = []
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            if states.shape[1] != storage.shape[1] or states.shape[3] != storage.shape[2]:
                raise UserError(
                    found=f"layer {self._layer_index} with key-value shape {tuple(states.shape[1::2])}",
                    need=f"the same shape in every layer, {tuple(storage.shape[1:])}",
                    where="the backbone",
                    do="use a model whose layers have equal key-value heads",
                )
            # One write for all rows, though each row's kept prefix has its own length.
            storage.index_copy_(0, plan.flat_slots, states.transpose(1, 2).flatten(0, 1))
            views.append(
                storage.view(*rows, *storage.shape[1:])[plan.rows, : plan.view_length].transpose(1, 2)
            )
        return views[0], views[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.plan.view_length, 0

    def get_seq_length(self) -> int:
        return max(self._cache.lengths)

    def get_max_length(self) -> int:
        return self._cache.max_length

    @torch.inference_mode()
    def reset(self) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys.zero_()
            self.values.zero_()


class TreeCache(Cache):
    """Keys and values of `batch_size` rows, each with its own kept length.

    The kept lengths exist twice. The host's `lengths` decide what fits and how far attention reads. From
    `device_lengths` `[B]` the device computes slots, positions and masks. Neither side waits for the other:
    `plan_step` and `advance` are the host's part of a step, `place_step` and `move` the device's.

    Keys and values lie in tensors of their own, and the rows of a layer one after another: a compiled layer
    that writes into such a tensor makes no copy of it.

    Shapes: keys and values `[layers, B * row_slots, Hkv, d]`, allocated in the first forward pass.
    Raises: UserError if a step does not fit into `max_length`.
    Paper: Section 2.1.2.
    """

    def __init__(
        self, *, num_layers: int, batch_size: int, max_length: int, device: torch.device | None = None
    ) -> None:
        self.max_length = max_length
        self.num_rows = batch_size
        self.lengths: list[int] = [0] * batch_size
        self.device_lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        on_gpu = self.device_lengths.device.type == "cuda"
        self.bucket_tokens = _BUCKET_TOKENS_ON_GPU if on_gpu else BUCKET_TOKENS
        self.plan = _WritePlan()
        self._steps: dict[Hashable, Any] = {}
        # 0, 1, .., max_length - 1. Slots and positions are parts of it, so that no step allocates its own.
        self.slots = torch.arange(max_length, device=device)
        # One slot more than is ever read: a view of all slots would be contiguous, as no other view is, and
        # compiled code would be compiled anew for it.
        self.row_slots = max_length + 1
        self._row_starts = torch.arange(batch_size, device=device) * self.row_slots
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__(layers=[TreeCacheLayer(self, index) for index in range(num_layers)])

    @property
    def num_bytes(self) -> int:
        """Return the bytes allocated for keys and values; 0 before the first forward pass."""
        return 0 if self._keys is None else 2 * self._keys.numel() * self._keys.element_size()

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the storage of all layers, if it is not there yet, in the shape of these states.

        Raises: UserError if keys and values differ in size.
        """
        if self._keys is not None:
            return
        if key_states.shape[-1] != value_states.shape[-1]:
            raise UserError(
                found=f"keys of size {key_states.shape[-1]} and values of size {value_states.shape[-1]}",
                need="keys and values of equal size",
                where="the backbone's attention",
            )
        shape = (
            len(self.layers),
            self.num_rows * self.row_slots,
            key_states.shape[1],
            key_states.shape[3],
        )
        # Zeros, because uninitialised memory may hold NaN: masked attention multiplies unused values by 0,
        # and 0 * NaN is NaN.
        self._keys, self._values = (
            torch.zeros(shape, dtype=key_states.dtype, device=key_states.device) for _ in range(2)
        )

    def flat_storage(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer, the slots of one row after those of another.

        Shapes: `[B * row_slots, Hkv, d]` each.
        """
        assert self._keys is not None and self._values is not None
        return self._keys[layer_index], self._values[layer_index]

    def layer_storage(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer by row, as views of the storage.

        Shapes: `[B, row_slots, Hkv, d]` each.
        """
        keys, values = self.flat_storage(layer_index)
        rows = (self.num_rows, self.row_slots, *keys.shape[1:])
        return keys.view(rows), values.view(rows)

    def step_of(self, kind: Hashable, make: Callable[[], Any]) -> Any:
        """Return the step of this kind over this cache, made where there is none; the last few are kept.

        What was recorded of a step reads the cache's memory and its own, so it lives with them.
        """
        step = self._steps.pop(kind, None)
        self._steps[kind] = step if step is not None else make()
        while len(self._steps) > _MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        return self._steps[kind]

    def begin_step(self, *, num_new: int, rows: slice | None = None) -> int:
        """Return how many slots attention will read; plan to write `num_new` tokens after the kept prefix.

        All rows by default.

        Raises: UserError if the new tokens do not fit.
        """
        view_length = self.plan_step(num_new=num_new, rows=rows)
        self.place_step(num_new=num_new)
        return view_length

    def plan_step(self, *, num_new: int, rows: slice | None = None) -> int:
        """Return how many slots attention will read in a step of `num_new` tokens, known on the host.

        Raises: UserError if the new tokens do not fit.
        """
        rows = rows if rows is not None else slice(0, self.num_rows)
        longest = max(self.lengths[rows])
        if longest + num_new > self.max_length:
            raise UserError(
                found=f"{longest} kept tokens and {num_new} new ones",
                need=f"at most {self.max_length} slots",
                where="the key-value cache",
                do="shorten the prompt, lower the token budget or allocate a longer cache",
            )
        buckets = -(-(longest + num_new) // self.bucket_tokens)
        self.plan.rows = rows
        self.plan.view_length = min(buckets * self.bucket_tokens, self.max_length)
        return self.plan.view_length

    def place_step(self, *, num_new: int) -> None:
        """Compute on the device the slots of the planned step."""
        rows = self.plan.rows
        starts = self._row_starts[rows] + self.device_lengths[rows]
        self.plan.flat_slots = (starts[:, None] + self.slots[:num_new]).flatten()

    def keep(self, nodes: Tensor, num_kept: Tensor, *, counts: Sequence[int] | None = None) -> None:
        """Keep the first `num_kept[b]` of `nodes[b]` of the step just written, and drop the other nodes.

        The kept nodes follow the prefix in this order. A row with `num_kept` 0 stays as it was. `counts` are
        the numbers of `num_kept` on the host; without them the host waits for the device.

        Shapes: nodes `[B, D]` node indices, the root first; num_kept `[B]`.
        """
        self.move(nodes, num_kept)
        self.advance(num_kept.tolist() if counts is None else counts)

    @torch.inference_mode()  # the storage is an inference tensor: it was allocated in a forward pass
    def move(self, nodes: Tensor, num_kept: Tensor, *, in_place: bool = False) -> None:
        """Move the kept nodes to the end of the prefix on the device; `advance` tells the host.

        `in_place` says that the nodes are those of a chain, which lie there already. So does a root alone.

        Shapes: as in `keep`.
        """
        if nodes.shape[1] > 1 and not in_place:
            steps = self.slots[: nodes.shape[1]]
            starts = (self._row_starts + self.device_lengths)[:, None]
            target = starts + steps
            # Entries from `num_kept` on copy a slot onto itself, so that the shapes do not depend on how many
            # nodes each row keeps.
            source = torch.where(steps < num_kept[:, None], starts + nodes, target)
            assert self._keys is not None and self._values is not None
            for storage in (self._keys, self._values):
                flat = storage.flatten(2)
                # `index_select` makes a copy first: a node may move into a slot whose node has not moved yet.
                flat.index_copy_(1, target.flatten(), flat.index_select(1, source.flatten()))
        self.device_lengths += num_kept

    def advance(self, counts: Sequence[int]) -> None:
        """Add the numbers of kept nodes to the host's lengths."""
        for row, count in enumerate(counts):
            self.lengths[row] += count

    @torch.inference_mode()
    def keep_all(self, *, row: int, count: int) -> None:
        """Keep the first `count` tokens of the pass just made over one row, which was a prompt."""
        self.device_lengths[row] += count
        self.lengths[row] += count

    def reset(self) -> None:
        """Forget all rows and zero the storage."""
        self.clear_rows()
        super().reset()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def clear_rows(self, rows: slice | None = None) -> None:
        """Forget the kept tokens of `rows` (all by default); storage stays allocated."""
        self.device_lengths[rows or slice(0, self.num_rows)] = 0
        for row in range(*(rows or slice(0, self.num_rows)).indices(self.num_rows)):
            self.lengths[row] = 0
