"""The small parts of a draft: ordered top-k, packed linear layers, heads on a real model's LM head."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.packed_linear import PackedLinears, layers_of_one_input, packing_available
from medusa_impl.heads import MedusaHeads, ordered_topk, topk_by_blocks
from medusa_impl.recipes import HeadArchitecture
from medusa_impl.tests.conftest import TINY_VOCAB


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocab_size=st.integers(1, 12), levels=st.integers(1, 4))
def test_ordered_topk_equals_a_stable_sort(data: st.DataObject, vocab_size: int, levels: int) -> None:
    """Few distinct values make many ties, also across the cut; of equal logits the lower id is first."""
    values = data.draw(st.lists(st.integers(0, levels - 1), min_size=2 * vocab_size, max_size=2 * vocab_size))
    count = data.draw(st.integers(1, vocab_size))
    logits = torch.tensor(values, dtype=torch.float32).reshape(2, vocab_size)
    expected = [
        sorted(range(vocab_size), key=lambda token: (-row[token], token))[:count] for row in logits.tolist()
    ]
    assert ordered_topk(logits, count).tolist() == expected
    assert topk_by_blocks(logits, count).tolist() == expected
    assert topk_by_blocks(logits.bfloat16() - 1, count).tolist() == expected  # negative logits and minus zero
    size = data.draw(st.integers(1, 5))
    assert topk_by_blocks(logits, count, block_tokens=size).tolist() == expected
    lowest = torch.where(logits == 0, -torch.inf, logits)  # what fills the last block must not come first
    assert topk_by_blocks(lowest, count, block_tokens=size).tolist() == expected


def test_ordered_topk_on_a_large_vocabulary() -> None:
    """On a large vocabulary `torch.topk` uses another algorithm.

    There are 30,000 logits of 50 levels, and the same without any tie.
    """
    torch.manual_seed(0)
    tied = torch.randint(0, 50, (3, 2, 30_000)).float()
    distinct = torch.stack([torch.randperm(30_000) for _ in range(6)]).reshape(3, 2, -1).float()
    for logits in (tied, distinct):
        expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :10]
        assert torch.equal(ordered_topk(logits, 10), expected) and torch.equal(
            topk_by_blocks(logits, 10), expected
        )


@pytest.mark.parametrize("architecture", ["own", "shared"])
@torch.inference_mode()
def test_fresh_heads_on_a_backbone_predict_what_it_predicts(
    backbone: Backbone, architecture: HeadArchitecture
) -> None:
    """At step 0 every head is the LM head: on the backbone's own states it gives the backbone's logits."""
    heads = MedusaHeads(
        num_heads=3,
        num_layers=2,
        hidden_size=backbone.hidden_size,
        vocab_size=TINY_VOCAB,
        architecture=architecture,
        lm_head=backbone.lm_head,
    )
    output = backbone.prefill(
        torch.tensor([4, 8, 15, 16]), cache=backbone.new_cache(batch_size=1, max_length=10)
    )
    logits = heads(output.hidden[:, -1], lm_head=backbone.lm_head)
    torch.testing.assert_close(logits, output.logits.expand(-1, 3, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(heads.states(output.hidden), output.hidden[..., None, :].expand(-1, -1, 3, -1))


def test_every_block_learns_on_its_own() -> None:
    """Regression: `[Block] * L` repeats one module.

    Here each of the L blocks has its own parameters, gradient and effect.
    """
    torch.manual_seed(0)
    heads = MedusaHeads(num_heads=2, num_layers=3, hidden_size=8, vocab_size=10, architecture="shared")
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    lm_head, hidden = nn.Linear(8, 10, bias=False), torch.randn(4, 8)
    heads(hidden, lm_head=lm_head).square().sum().backward()
    gradients = [parameter.grad for name, parameter in heads.named_parameters() if name.endswith("weight")]
    assert (
        len(gradients)
        == 6
        == len({tuple(gradient.flatten().tolist()) for gradient in gradients if gradient is not None})
    )
    before = heads(hidden, lm_head=lm_head)
    with torch.no_grad():
        for parameter in list(heads.blocks[0].parameters())[:2]:
            parameter.zero_()
    after = heads(hidden, lm_head=lm_head)
    assert not torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 1], after[:, 1])


needs_packing = pytest.mark.skipif(
    not packing_available(torch.float32), reason="this PyTorch has no packed linear operators"
)


@needs_packing
@torch.inference_mode()
def test_packed_layers_multiply_as_stock_ones_and_come_off() -> None:
    torch.manual_seed(0)
    last = nn.Linear(40, 17, bias=False)
    module = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), last).eval()
    inputs = [torch.randn(*shape) for shape in ((1, 24), (3, 5, 24), (2, 70, 24))]
    stock = [module(rows) for rows in inputs]
    packed = PackedLinears(module, None, rows_hint=16)
    assert len(packed) == 2 and packed.num_bytes == 4 * (24 * 40 + 40 * 17)
    packed.attach()
    for rows, expected in zip(inputs, stock, strict=True):
        torch.testing.assert_close(module(rows), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        last.weight.zero_()
    assert bool(module(inputs[0]).any()), "the packed copy is in use, so that a changed weight does not show"
    packed.detach()
    packed.detach()  # twice is harmless
    assert not bool(module(inputs[0]).any())


@needs_packing
@torch.inference_mode()
def test_few_rows_take_the_stock_product_where_that_is_the_faster_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On some processors a packed step of one row was slower than `generate`: a baseline that flatters."""
    layer = nn.Linear(24, 40).eval()
    for ticks, from_rows in (([0.0, 9.0, 9.0, 10.0], 4), ([0.0, 1.0, 1.0, 10.0], 1)):  # packed is slow; stock
        packed = PackedLinears(layer, None, rows_hint=16)
        packed.measure_rows(itertools.cycle(ticks).__next__)
        assert packed.from_rows == 1, "a small model is not measured, since its weights fit a cache"
        monkeypatch.setattr("medusa_impl.engine.packed_linear._MEASURED_BYTES", 0)
        packed.measure_rows(itertools.cycle(ticks).__next__)
        monkeypatch.undo()
        assert packed.from_rows == from_rows
    packed.from_rows = 3
    expected = [layer(torch.ones(1, num_rows, 24)) for num_rows in (2, 3)]
    packed.attach()
    layer.weight.zero_()
    two, three = (layer(torch.ones(1, num_rows, 24)) for num_rows in (2, 3))
    packed.detach()
    assert not torch.allclose(two, expected[0]), "two rows read the weight itself"
    torch.testing.assert_close(three, expected[1], atol=1e-5, rtol=1e-5)


class Siblings(nn.Module):
    """Layers of one input and of others, with and without a bias, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(12, width, bias=False) for width in (5, 9, 12))
        self.biased, self.twice = nn.Linear(12, 4), nn.Linear(12, 12, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        mixed = torch.cat([self.one(rows), self.two(rows), self.biased(rows)], dim=-1)
        return torch.add(mixed.sum(-1, keepdim=True), self.twice(self.twice(self.three(rows * 2))))


@needs_packing
@torch.inference_mode()
def test_layers_of_one_input_are_one_product_with_the_results_of_several() -> None:
    torch.manual_seed(0)
    module, probe = Siblings().eval(), torch.randn(2, 12)
    groups = layers_of_one_input([module], lambda: module(probe))
    assert groups == [[module.one, module.two]]
    assert not any(child._forward_pre_hooks for child in module.modules())
    inputs = [torch.randn(*shape, 12) for shape in ((1,), (3, 5), (40,))]
    stock = [module(rows) for rows in inputs]
    packed = PackedLinears(module, rows_hint=16, groups=groups)
    assert len(packed) == 5 and packed.num_bytes == 4 * 12 * (5 + 9 + 12 + 4 + 12)
    packed.attach()
    for rows, expected in zip(inputs, stock, strict=True):
        torch.testing.assert_close(module(rows), expected, atol=1e-5, rtol=1e-5)
    packed.detach()
    torch.testing.assert_close(module(inputs[0]), stock[0], atol=0, rtol=0)


@needs_packing
@torch.inference_mode()
def test_a_joint_product_is_never_taken_for_another_tensor() -> None:
    """Grouped layers may be used in another way than when they were grouped, and still give right results.

    They get different tensors, one of them runs alone, one runs twice, or a tensor gets new values.
    """
    torch.manual_seed(0)
    module = Siblings().eval()
    weights = {layer: layer.weight.detach().clone() for layer in (module.one, module.two)}
    packed = PackedLinears(module, rows_hint=16, groups=[[module.one, module.two]])
    packed.attach()
    first, second = torch.randn(3, 12), torch.randn(3, 12)
    for layer, rows in [
        (module.one, first),
        (module.two, second),
        (module.one, second),
        (module.one, second),
        (module.two, first),
        (module.two, second),
        (module.one, first),
    ]:
        torch.testing.assert_close(layer(rows), rows @ weights[layer].T, atol=1e-5, rtol=1e-5)
    module.one(first)
    first.add_(1)
    torch.testing.assert_close(module.one(first), first @ weights[module.one].T, atol=1e-5, rtol=1e-5)


def test_probing_for_packed_operators_moves_no_random_numbers() -> None:
    """Regression: the probe once drew from the global generator.

    So texts that were sampled later depended on whether it had run.
    """
    packing_available.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    packing_available(torch.float32)
    assert torch.equal(torch.rand(4), expected)
