"""The cache: rows of unequal length, kept paths, and unused slots that must never be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import BUCKET_TOKENS, TreeCache
from medusa_impl.errors import UserError
from medusa_impl.tests.conftest import TINY_VOCAB
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

CPU = torch.device("cpu")
LAYERS, HEADS, SIZE = 2, 3, 4


def empty_cache(*, rows: int = 2, max_length: int = 20) -> TreeCache:
    return TreeCache(num_layers=LAYERS, batch_size=rows, max_length=max_length)


def write(
    cache: TreeCache, marks: list[list[int]], *, rows: slice | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return what attention reads after one step with known keys and values.

    Node n of row b has keys `marks[b][n] + layer / 10`, and the negative of these as values.
    """
    cache.begin_step(num_new=len(marks[0]), rows=rows)
    views = []
    for layer in range(LAYERS):
        keys = (torch.tensor(marks, dtype=torch.float32) + layer / 10)[:, None, :, None].expand(
            -1, HEADS, -1, SIZE
        )
        views.append(cache.update(keys, -keys, layer))
    return views


def keep(cache: TreeCache, paths: list[list[int]]) -> None:
    """Keep a list of nodes of each row, padded to one width as an acceptance rule pads them.

    The cache reads the counts from the device.
    """
    width = max(len(path) for path in paths)
    nodes = torch.tensor([path + [0] * (width - len(path)) for path in paths]).reshape(len(paths), width)
    cache.keep(nodes, torch.tensor([len(path) for path in paths]))


def slots(cache: TreeCache, row: int, *, layer: int = 0) -> list[float]:
    """Return the kept keys of a row, after a check that all heads and the values agree with them."""
    keys, values = (storage[row, : cache.lengths[row]] for storage in cache.layer_storage(layer))
    assert cache.device_lengths.tolist() == cache.lengths
    assert torch.equal(keys, -values) and bool((keys == keys[:, :1, :1]).all())
    return keys[:, 0, 0].tolist()


def test_keeps_any_path_of_each_row() -> None:
    """Unequal rows, nodes that are not neighbours, a row that keeps nothing; every layer moves alike."""
    cache = empty_cache(rows=3)
    write(cache, [[1, 2, 3]], rows=slice(0, 1))
    cache.keep_all(row=0, count=3)
    write(cache, [[7]], rows=slice(2, 3))
    cache.keep_all(row=2, count=1)
    assert cache.lengths == [3, 0, 1]
    write(cache, [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]])
    keep(cache, [[0, 2, 4], [], [0, 1, 3]])
    assert cache.lengths == [6, 0, 4]
    assert slots(cache, 0) == [1, 2, 3, 10, 12, 14]
    assert slots(cache, 2) == [7, 30, 31, 33]
    assert slots(cache, 0, layer=1) == pytest.approx([1.1, 2.1, 3.1, 10.1, 12.1, 14.1])
    write(cache, [[40], [41], [42]])
    keep(cache, [[0], [0], [0]])
    assert [slots(cache, row) for row in range(3)] == [[1, 2, 3, 10, 12, 14, 40], [41], [7, 30, 31, 33, 42]]


def test_kept_nodes_may_move_onto_each_other() -> None:
    """Node 2 moves to slot 1 and node 3 to slot 2: the second move must not read what the first one wrote."""
    cache = empty_cache(rows=1)
    write(cache, [[10, 11, 12, 13, 14]])
    keep(cache, [[0, 2, 3, 4]])
    assert slots(cache, 0) == [10, 12, 13, 14]
    write(cache, [[50, 51, 52]])
    keep(cache, [[2, 1, 0]])  # not a path, but the order is the caller's
    assert slots(cache, 0) == [10, 12, 13, 14, 52, 51, 50]


def test_storage_starts_as_zeros_and_unused_slots_stay_finite() -> None:
    """Regression: storage from `torch.empty` may hold NaN, and NaN times a masked weight of zero is NaN.

    In deterministic mode PyTorch fills uninitialised memory with NaN, so that chance cannot hide the fault.
    """
    cache = empty_cache(rows=2, max_length=100)
    assert cache.num_bytes == 0
    torch.use_deterministic_algorithms(True)
    try:
        views = write(cache, [[5, 6]], rows=slice(1, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert cache.num_bytes == LAYERS * 2 * 2 * (100 + 1) * HEADS * SIZE * 4
    for layer in range(LAYERS):
        keys, values = cache.layer_storage(layer)
        assert int(keys.count_nonzero()) == int(values.count_nonzero()) == 2 * HEADS * SIZE
        assert bool((views[layer][0][:, :, 2:] == 0).all())


def test_views_share_the_storage_and_end_at_a_bucket() -> None:
    cache = empty_cache(rows=2, max_length=2 * BUCKET_TOKENS + 5)
    keys, _ = write(cache, [[1, 2], [3, 4]])[1]
    assert keys.shape == (2, HEADS, BUCKET_TOKENS, SIZE)
    assert keys.untyped_storage().data_ptr() == cache.layer_storage(0)[0].untyped_storage().data_ptr()
    assert cache.get_mask_sizes(2, 0) == (BUCKET_TOKENS, 0)
    keep(cache, [[0, 1], [0]])
    assert cache.get_seq_length() == 2
    wide = [list(range(BUCKET_TOKENS))] * 2
    assert write(cache, wide)[0][0].shape[2] == 2 * BUCKET_TOKENS
    keep(cache, [list(range(BUCKET_TOKENS))] * 2)
    assert write(cache, wide)[0][0].shape[2] == 2 * BUCKET_TOKENS + 5 == cache.get_max_length()


def test_overflow_is_refused_before_anything_is_written() -> None:
    cache = empty_cache(rows=2, max_length=6)
    write(cache, [[1, 2, 3, 4], [5, 6, 7, 8]])
    keep(cache, [[0, 1, 2, 3], [0]])
    with pytest.raises(UserError, match="4 kept tokens and 3 new ones; need at most 6 slots"):
        cache.begin_step(num_new=3)
    cache.begin_step(num_new=3, rows=slice(1, 2))  # the other row has room
    assert slots(cache, 0) == [1, 2, 3, 4]


def test_layers_of_unequal_shape_are_refused() -> None:
    cache = empty_cache(rows=1)
    cache.begin_step(num_new=1)
    cache.update(torch.ones(1, HEADS, 1, SIZE), torch.ones(1, HEADS, 1, SIZE), 0)
    with pytest.raises(UserError, match=r"layer 1 .* equal key-value heads"):
        cache.update(torch.ones(1, HEADS + 1, 1, SIZE), torch.ones(1, HEADS + 1, 1, SIZE), 1)
    with pytest.raises(UserError, match="keys of size 4 and values of size 5"):
        other = empty_cache(rows=1)
        other.begin_step(num_new=1)
        other.update(torch.ones(1, HEADS, 1, SIZE), torch.ones(1, HEADS, 1, SIZE + 1), 0)


def test_clear_rows_and_reset() -> None:
    cache = empty_cache(rows=3)
    write(cache, [[1, 2]] * 3)
    keep(cache, [[0, 1]] * 3)
    cache.clear_rows(slice(1, 2))
    assert cache.lengths == [2, 0, 2]
    write(cache, [[8], [9], [10]])
    keep(cache, [[0]] * 3)
    assert [slots(cache, row) for row in range(3)] == [[1, 2, 8], [9], [1, 2, 10]]
    cache.clear_rows()
    assert cache.lengths == [0, 0, 0]
    cache.reset()
    assert int(cache.layer_storage(0)[0].count_nonzero()) == 0
    write(cache, [[3]] * 3)
    keep(cache, [[0]] * 3)
    cache.reset()
    assert cache.lengths == [0, 0, 0] and cache.get_seq_length() == 0


def test_garbage_in_unused_slots_never_reaches_attention(backbone: Backbone) -> None:
    """A cache that held other texts gives exactly what a new one gives, in rows of unequal length."""
    buffers = tree_buffers(DraftTree.cartesian([2, 2]), device=CPU)
    tokens = torch.arange(2 * buffers.num_nodes).reshape(2, -1) % TINY_VOCAB
    dirty, fresh = (backbone.new_cache(batch_size=2, max_length=40) for _ in range(2))
    for row in range(2):
        backbone.prefill(torch.arange(30) % TINY_VOCAB, cache=dirty, row=row)
    with torch.inference_mode():
        for layer in range(backbone.num_layers):
            for storage in dirty.layer_storage(layer):
                storage.mul_(1e6)
    dirty.clear_rows()
    outputs = []
    for cache in (dirty, fresh):
        for row, prompt in enumerate(([1, 2, 3, 4, 5], [6])):
            backbone.prefill(torch.tensor(prompt), cache=cache, row=row)
        outputs.append(backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert bool(outputs[0].logits.isfinite().all())
