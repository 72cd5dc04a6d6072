"""The heads: their start, their blocks and the two kinds of unembedding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads, ResBlock
from medusa_impl.recipes import HeadArchitecture

HIDDEN, VOCAB = 16, 40


def _lm_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB, bias=False)


def _heads(architecture: HeadArchitecture, lm_head: nn.Linear, *, num_layers: int = 2) -> MedusaHeads:
    return MedusaHeads(
        num_heads=3,
        num_layers=num_layers,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        architecture=architecture,
        lm_head=lm_head,
    )


@pytest.mark.parametrize("architecture", ["own", "shared"])
@torch.no_grad()
def test_fresh_heads_equal_the_lm_head_exactly(architecture: HeadArchitecture) -> None:
    """The authors' blocks keep a random bias, so their heads do not start as the LM head. These do."""
    lm_head = _lm_head()
    hidden = torch.randn(4, HIDDEN)
    logits = _heads(architecture, lm_head)(hidden, lm_head=lm_head)
    assert logits.shape == (4, 3, VOCAB)
    expected = (
        lm_head(hidden.unsqueeze(1).expand(-1, 3, -1))
        if architecture == "shared"
        else lm_head(hidden).unsqueeze(1).expand(-1, 3, -1)
    )
    assert torch.equal(logits, expected)


def test_block_is_state_plus_silu_of_a_linear_map() -> None:
    torch.manual_seed(1)
    block = ResBlock(HIDDEN)
    nn.init.normal_(block.linear.weight)
    nn.init.normal_(block.linear.bias)
    hidden = torch.randn(5, HIDDEN)
    mapped = hidden @ block.linear.weight.T + block.linear.bias
    torch.testing.assert_close(block(hidden), hidden + mapped * torch.sigmoid(mapped))


def test_blocks_of_one_head_are_distinct_modules() -> None:
    """`[Block] * L` in the released code repeats one module: L layers in a file, but one in memory."""
    heads = _heads("shared", _lm_head(), num_layers=3)
    assert len({parameter.data_ptr() for parameter in heads.parameters()}) == 3 * 3 * 2


def test_own_unembeddings_are_copies_not_the_lm_head() -> None:
    lm_head = _lm_head()
    heads = _heads("own", lm_head)
    with torch.no_grad():
        heads.unembeddings[0].weight.add_(1.0)  # type: ignore[operator]
    assert torch.equal(lm_head.weight, _lm_head().weight)
    assert torch.equal(heads.unembeddings[1].weight, lm_head.weight)  # type: ignore[arg-type]


def test_shared_heads_own_no_unembedding() -> None:
    assert all(
        tuple(parameter.shape) in {(HIDDEN, HIDDEN), (HIDDEN,)}
        for parameter in _heads("shared", _lm_head()).parameters()
    )


def test_fewer_heads_give_the_first_ones() -> None:
    lm_head = _lm_head()
    heads = _heads("shared", lm_head)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(2, 7, HIDDEN)
    torch.testing.assert_close(
        heads(hidden, lm_head=lm_head, num_heads=2), heads(hidden, lm_head=lm_head)[..., :2, :]
    )


def test_bad_sizes_and_foreign_backbones_are_refused() -> None:
    with pytest.raises(UserError, match="0 heads"):
        MedusaHeads(num_heads=0, num_layers=1, hidden_size=HIDDEN, vocab_size=VOCAB, architecture="shared")
    with pytest.raises(UserError, match="vocabulary 40"):
        _heads("shared", _lm_head()).check_backbone(hidden_size=HIDDEN, vocab_size=VOCAB + 1)
