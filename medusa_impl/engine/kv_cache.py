"""A preallocated key-value cache that takes all nodes of a draft tree and keeps one root-to-leaf path of
them.

It stands behind the public `Cache` interface of transformers, so that any causal LM writes into it unchanged.
Slots of a row are positions: the kept prefix fills slots `0 .. length - 1`, the N nodes of a step lie in the
N slots behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from medusa_impl.errors import UserError

BUCKET_TOKENS = (
    64  # attention reads the filled part of the cache rounded up to this, so that few shapes occur
)


class _WritePlan:
    """Where the forward pass under way writes and how far attention may read; shared by all layers of a
    cache.
    """

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.flat_slots: Tensor | None = None
        self.view_length = 0


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values: a window into the storage that all layers share."""

    is_sliding = False

    def __init__(self, cache: TreeCache, layer_index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self._layer_index = layer_index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._cache.allocate(key_states, value_states)
        self.keys, self.values = self._cache.layer_storage(self._layer_index)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows and return keys and values over the filled part of the cache.

        Shapes: states `[B', Hkv, N, d]`, returned views `[B', Hkv, view_length, d]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        plan = self._cache.plan
        assert plan.flat_slots is not None
        views = []
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            if states.shape[1] != storage.shape[2] or states.shape[3] != storage.shape[3]:
                raise UserError(
                    found=f"layer {self._layer_index} with key-value shape {tuple(states.shape[1::2])}",
                    need=f"the same shape in every layer, {tuple(storage.shape[2:])}",
                    where="the backbone",
                    do="use a model whose layers have equal key-value heads",
                )
            storage.flatten(0, 1).index_copy_(0, plan.flat_slots, states.transpose(1, 2).flatten(0, 1))
            views.append(storage[plan.rows, : plan.view_length].transpose(1, 2))
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

    The kept lengths stand twice: `lengths` on the host, which decides what fits and how far attention reads,
    and `device_lengths` `[B]` on the device, from which slots, positions and masks are formed without asking
    the host.
    Shapes: storage `[layers, 2, B, max_length, Hkv, d]`, allocated with zeros (uninitialised memory may hold
    NaN, which survives masking) on the first forward pass.
    Raises: UserError where a step does not fit into `max_length`.
    """

    def __init__(
        self, *, num_layers: int, batch_size: int, max_length: int, device: torch.device | None = None
    ) -> None:
        self.max_length = max_length
        self.num_rows = batch_size
        self.lengths: list[int] = [0] * batch_size
        self.device_lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.plan = _WritePlan()
        # 0, 1, .., for whoever forms positions: no step makes its own
        self.slots = torch.arange(max_length, device=device)
        self._row_starts = torch.arange(batch_size, device=device) * max_length
        self._storage: Tensor | None = None
        super().__init__(layers=[TreeCacheLayer(self, index) for index in range(num_layers)])

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values; 0 before the first forward pass."""
        return 0 if self._storage is None else self._storage.numel() * self._storage.element_size()

    def allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the storage of all layers in the shape of the first layer's states."""
        if self._storage is not None:
            return
        if key_states.shape[-1] != value_states.shape[-1]:
            raise UserError(
                found=f"keys of size {key_states.shape[-1]} and values of size {value_states.shape[-1]}",
                need="keys and values of equal size",
                where="the backbone's attention",
            )
        shape = (
            len(self.layers),
            2,
            self.num_rows,
            self.max_length,
            key_states.shape[1],
            key_states.shape[3],
        )
        self._storage = torch.zeros(shape, dtype=key_states.dtype, device=key_states.device)

    def layer_storage(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, `[B, max_length, Hkv, d]` each, as views of the shared
        storage.
        """
        assert self._storage is not None
        return self._storage[layer_index, 0], self._storage[layer_index, 1]

    def begin_step(self, *, num_new: int, rows: slice | None = None) -> int:
        """Plan to write `num_new` slots behind the kept prefix of `rows`; return how many slots attention
        will read.
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
        starts = self._row_starts[rows] + self.device_lengths[rows]
        self.plan.rows = rows
        self.plan.flat_slots = (starts[:, None] + self.slots[:num_new]).flatten()
        self.plan.view_length = min(-(-(longest + num_new) // BUCKET_TOKENS) * BUCKET_TOKENS, self.max_length)
        return self.plan.view_length

    @torch.inference_mode()  # the storage is an inference tensor: it was allocated in a forward pass
    def keep(self, nodes: Tensor, num_kept: Tensor, *, counts: Sequence[int] | None = None) -> None:
        """Keep the first `num_kept[b]` of `nodes[b]` of the step just written, in that order, and drop the
        others; all on the device.

        A row with `num_kept` 0 stays as it was. `counts` are the same numbers where the host knows them
        already; without them it waits for the device.
        Shapes: nodes `[B, D]` node indices (the root first), num_kept `[B]`.
        """
        counts = num_kept.tolist() if counts is None else counts
        if max(counts) > 1:  # lone roots lie in their places
            steps = self.slots[: nodes.shape[1]]
            starts = (self._row_starts + self.device_lengths)[:, None]
            target = starts + steps
            # what is dropped is copied onto itself
            source = torch.where(steps < num_kept[:, None], starts + nodes, target)
            assert self._storage is not None
            flat = self._storage.flatten(0, 1).flatten(1, 2)
            flat.index_copy_(1, target.flatten(), flat.index_select(1, source.flatten()))
        self.device_lengths += num_kept
        for row, count in enumerate(counts):
            self.lengths[row] += count

    @torch.inference_mode()
    def keep_all(self, *, row: int, count: int) -> None:
        """Keep the first `count` tokens of the pass just made over one row: a prompt."""
        self.device_lengths[row] += count
        self.lengths[row] += count

    def reset(self) -> None:
        """Forget all rows and zero the storage."""
        self.clear_rows()
        super().reset()  # type: ignore[no-untyped-call]

    def clear_rows(self, rows: slice | None = None) -> None:
        """Forget the kept tokens of `rows` (all by default); storage stays allocated."""
        self.device_lengths[rows or slice(0, self.num_rows)] = 0
        for row in range(*(rows or slice(0, self.num_rows)).indices(self.num_rows)):
            self.lengths[row] = 0
