"""Compiled layers: the same numbers, compiled once, and no copy of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codecache import PyCodeCache

from medusa_impl.engine import compiled_layers, runner
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.compiled_layers import CompiledLayers, decoder_layers
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.errors import UserError
from medusa_impl.tests.conftest import tiny_llama
from medusa_impl.tests.engine.test_backbone import FAMILIES, build
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

pytestmark = pytest.mark.skipif(
    not runner.compiling_available("cpu"), reason="no C++ compiler for torch.compile"
)
TREES = [DraftTree.root_only(), DraftTree.cartesian([3, 2]), DraftTree.cartesian([4, 4])]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@torch.inference_mode()
def logits_of(
    backbone: Backbone, tree: DraftTree, *, context: int = 9, cache: TreeCache | None = None
) -> Tensor:
    buffers = tree_buffers(tree, device=backbone.device)
    cache = cache or backbone.new_cache(batch_size=2, max_length=150)
    cache.clear_rows()
    for row, length in enumerate((context, 4)):
        backbone.prefill(torch.arange(length) % backbone.vocab_size, cache=cache, row=row)
    tokens = torch.arange(2 * buffers.num_nodes).reshape(2, -1) % backbone.vocab_size
    output = backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache)
    return output.logits.clone()


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_all_layers_and_all_trees_share_two_graphs() -> None:
    """One for a lone root, since sizes of 1 are always special, and one for every larger tree and view."""
    backbone = Backbone(tiny_llama(num_layers=5))
    expected = [logits_of(backbone, tree, context=context) for tree in TREES for context in (9, 100)]
    backbone.step_call = CompiledLayers(backbone)
    cache = backbone.new_cache(batch_size=2, max_length=150)
    found = [
        logits_of(backbone, tree, context=context, cache=cache) for tree in TREES for context in (9, 100)
    ]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert num_graphs() == 2


def test_another_length_of_cache_and_other_batches_compile_little_more() -> None:
    """PyTorch gives up after eight graphs of one code, and other models have graphs of their own."""
    for model in (tiny_llama(), tiny_llama().bfloat16()):
        backbone = Backbone(model)
        backbone.step_call = CompiledLayers.of(backbone)
        for max_length in (150, 90, 200):
            for tree in TREES[:2]:
                cache = backbone.new_cache(batch_size=2, max_length=max_length)
                logits_of(backbone, tree, cache=cache)
    assert num_graphs() == 4, "a lone root and a tree, of each model"


def test_backbones_of_one_model_share_its_compiled_layers() -> None:
    model = tiny_llama()
    first, second = Backbone(model), Backbone(model)
    assert CompiledLayers.of(first) is CompiledLayers.of(second)
    layer: Any = decoder_layers(Backbone(other := tiny_llama()))[0]
    layer.forward = lambda *arguments, **options: None
    with pytest.raises(UserError, match="something else has replaced"):
        CompiledLayers.of(Backbone(other))


def test_layers_that_cannot_be_compiled_run_as_they_are_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = runner.StepRunner(tiny_llama(), None, mode="compiled")
    plain = Backbone(tiny_llama())
    expected = logits_of(plain, TREES[1])
    call: Any = engine.backbone.model_call

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no compiler was found\nlong trace")

    monkeypatch.setattr(call, "_run", failing)
    modes: list[str] = [engine.mode]
    assert engine.note == "" and torch.equal(logits_of(engine.backbone, TREES[1]), expected)
    modes.append(engine.mode)
    assert modes == ["compiled", "eager"]
    assert engine.note == "compiled mode fell back to eager: compiling failed: no compiler was found"


@pytest.fixture
def only_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the layers into graphs as ever, and run these without generating code.

    That takes most of the time, and is not ours.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@torch.inference_mode()
def test_a_first_step_without_a_prompt_runs_as_it_is(only_traced: None) -> None:
    backbone = Backbone(tiny_llama())
    tokens, depths = torch.tensor([[3]]), torch.zeros(1, dtype=torch.long)
    visible = torch.ones(1, 1, dtype=torch.bool)
    found = []
    for compiled in (False, True):
        if compiled:
            backbone.step_call = CompiledLayers.of(backbone)
        cache = backbone.new_cache(batch_size=1, max_length=20)
        found.append(backbone.forward(tokens, depths=depths, visible=visible, cache=cache).logits.clone())
    torch.testing.assert_close(found[0], found[1])
    assert CompiledLayers.of(backbone).failure == ""


@pytest.mark.parametrize("family", ["gpt2", "gemma3 text", "mixtral"])
def test_families_that_differ_in_how_they_call_a_layer(family: str, only_traced: None) -> None:
    """The cache by position, masks by layer type, experts."""
    assert family in FAMILIES
    backbone = Backbone(build(family))
    expected = logits_of(backbone, TREES[1])
    backbone.step_call = CompiledLayers(backbone)
    torch.testing.assert_close(logits_of(backbone, TREES[1]), expected, atol=1e-4, rtol=1e-4)
    assert 1 <= num_graphs() <= 2, "one for each type of layer"
    call: Any = backbone.step_call
    assert call.failure == ""


def largest_allocation(cache: TreeCache, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the elements of the largest tensor that the generated code of a step allocates."""
    guards: Any = torch._C._dynamo.guards
    allocate, sizes = guards._empty_strided_cpu, []

    def noting(size: tuple[int, ...], *others: Any) -> Any:
        sizes.append(math.prod(size))
        return allocate(size, *others)

    # Code that is loaded already has the other function. Its kernels stay on the disk: they allocate nothing.
    PyCodeCache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(guards, "_empty_strided_cpu", noting)
        logits_of(backbone, TREES[1], cache=cache)
    PyCodeCache.cache_clear()
    assert len(sizes) > 5, "the code allocates what its products give"
    return max(sizes)


@pytest.mark.parametrize("grows", [False, True])
def test_the_generated_code_allocates_no_second_storage(grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is copied gives the right tokens, so that nothing else notices.

    The control puts old and new keys together, as a cache that grows does: that is seen.
    """
    backbone = Backbone(tiny_llama(num_layers=1))
    backbone.step_call = CompiledLayers(backbone)
    cache = backbone.new_cache(batch_size=2, max_length=150)

    def growing(slots: Any, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> Any:
        views = []
        for storage, states in ((slots._keys, keys), (slots._values, values)):
            new = states.transpose(1, 2).flatten(0, 1)
            storage.index_copy_(0, slots._slots, new)
            by_row = torch.cat([storage, new])[: storage.shape[0]].view(2, -1, *storage.shape[1:])
            views.append(by_row[:, : slots._view_length].transpose(1, 2))
        return tuple(views)

    if grows:
        monkeypatch.setattr(compiled_layers._LayerSlots, "update", growing)
    largest = largest_allocation(cache, backbone, monkeypatch)
    assert (largest >= cache.flat_storage(0)[0].numel()) is grows


def test_prompts_are_read_by_the_layers_as_they_are() -> None:
    backbone = Backbone(tiny_llama())
    backbone.step_call = CompiledLayers(backbone)
    cache = backbone.new_cache(batch_size=1, max_length=40)
    for length in (3, 5, 8):
        backbone.prefill(torch.arange(length), cache=cache)
        cache.clear_rows()
    assert num_graphs() == 0


def test_the_decoder_s_layers_are_told_from_other_lists() -> None:
    for family in FAMILIES:
        backbone = Backbone(build(family))
        layers = decoder_layers(backbone)
        assert len(layers) == backbone.num_layers
        assert all("Layer" in type(one).__name__ or "Block" in type(one).__name__ for one in layers)


def test_a_model_with_two_such_lists_is_refused() -> None:
    model: Any = tiny_llama()
    backbone = Backbone(model)
    model.others = nn.ModuleList([nn.Linear(2, 2) for _ in range(backbone.num_layers)])
    with pytest.raises(UserError, match="2 lists of 2 modules"):
        decoder_layers(backbone)
