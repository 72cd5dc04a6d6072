"""Eq. 1 in chunks equals Eq. 1 written out, in value and gradient, however a batch is padded or cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture
from medusa_impl.training.losses import (
    NO_TARGET,
    NUM_RANKS,
    OUTSIDE_SUBSET,
    TokenSubset,
    head_weights,
    medusa1_loss,
    rank_counts,
)

HIDDEN, VOCAB, NUM_HEADS, NUM_POSITIONS = 12, 50, 3, 23
LAMBDAS = head_weights(num_heads=NUM_HEADS, lambda_base=0.8)
SMALL_CHUNKS = 4 * VOCAB * 5  # five rows of logits


def _case(architecture: HeadArchitecture) -> tuple[MedusaHeads, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    lm_head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    heads = MedusaHeads(
        num_heads=NUM_HEADS,
        num_layers=2,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        architecture=architecture,
        lm_head=lm_head,
    )
    for parameter in heads.blocks.parameters():
        nn.init.normal_(parameter, std=0.3)
    targets = torch.randint(VOCAB, (NUM_POSITIONS, NUM_HEADS), dtype=torch.int32)
    for head in range(NUM_HEADS):
        targets[NUM_POSITIONS - 1 - head :, head] = NO_TARGET
    return heads, lm_head, torch.randn(NUM_POSITIONS, HIDDEN), targets


def _plain_loss(heads: MedusaHeads, lm_head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    logits = heads(states, lm_head=lm_head)
    total = logits.new_zeros(())
    for head, weight in enumerate(LAMBDAS):
        total = total + weight * cross_entropy(
            logits[:, head], targets[:, head].long(), ignore_index=NO_TARGET, reduction="sum"
        )
    loss: Tensor = total / (targets[:, 0] >= 0).sum()
    return loss


def _counted_one_by_one(logits: Tensor, targets: Tensor) -> list[list[int]]:
    """Return the targets at rank 0 .. 9 of each head, from the sorted logits of each row.

    A target's rank is the first index of its logit there, so equal logits do not count against it.
    """
    counts = [[0] * NUM_RANKS for _ in range(logits.shape[1])]
    for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        for head, (values, token) in enumerate(zip(row, wanted, strict=True)):
            place = NUM_RANKS if token < 0 else sorted(values, reverse=True).index(values[token])
            if place < NUM_RANKS:
                counts[head][place] += 1
    return counts


def _gradients(heads: MedusaHeads, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(heads.parameters())))


def test_weights_count_heads_from_one() -> None:
    assert head_weights(num_heads=3, lambda_base=0.8) == pytest.approx((0.8, 0.64, 0.512))


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_value_and_every_gradient_equal_the_plain_loss(architecture: HeadArchitecture) -> None:
    """Elsewhere, a fused loss left out the residual blocks, which then had no gradient."""
    heads, lm_head, states, targets = _case(architecture)
    plain = _plain_loss(heads, lm_head, states, targets)
    chunked = medusa1_loss(
        states,
        targets,
        heads=heads,
        lm_head_weight=lm_head.weight,
        lambdas=LAMBDAS,
        max_logits_bytes=SMALL_CHUNKS,
    )
    torch.testing.assert_close(chunked.loss, plain)
    for ours, theirs in zip(_gradients(heads, 3 * chunked.loss), _gradients(heads, 3 * plain), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_sums_and_hits_are_those_of_the_logits(architecture: HeadArchitecture) -> None:
    heads, lm_head, states, targets = _case(architecture)
    best = heads(states, lm_head=lm_head).argmax(-1)
    targets[:4, 1] = best[:4, 1].int()
    chunked = medusa1_loss(
        states,
        targets,
        heads=heads,
        lm_head_weight=lm_head.weight,
        lambdas=LAMBDAS,
        max_logits_bytes=SMALL_CHUNKS,
    )
    assert chunked.num_targets.tolist() == [NUM_POSITIONS - 1 - head for head in range(NUM_HEADS)]
    assert chunked.num_hits.tolist() == ((best == targets) & (targets >= 0)).sum(0).tolist()
    assert chunked.num_hits[1] >= 4
    assert chunked.num_positions == NUM_POSITIONS - 1
    weighted = (torch.tensor(LAMBDAS, dtype=torch.float64) * chunked.loss_sums).sum() / chunked.num_positions
    assert float(weighted) == pytest.approx(float(chunked.loss.detach()), rel=1e-5)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_hits_of_all_ten_ranks_are_those_of_the_sorted_logits(
    architecture: HeadArchitecture, restricted: bool
) -> None:
    """Targets are drawn from a row's twelve best tokens.

    So every head hits every rank, and some targets come after the tenth.
    """
    heads, lm_head, _, _ = _case(architecture)
    subset = TokenSubset.most_frequent(torch.randperm(VOCAB), size=30) if restricted else None
    states, kept = torch.randn(120, HIDDEN), slice(None) if subset is None else subset.token_ids
    logits = heads(states, lm_head=lm_head)[..., kept]
    targets = (
        logits.argsort(-1, descending=True)
        .gather(-1, torch.randint(12, (120, NUM_HEADS, 1)))
        .squeeze(-1)
        .int()
    )
    targets[100:, 1], targets[110:, 2] = NO_TARGET, OUTSIDE_SUBSET
    counted = _counted_one_by_one(logits, targets)
    loss = medusa1_loss(
        states,
        targets,
        heads=heads,
        lm_head_weight=lm_head.weight[kept],
        lambdas=LAMBDAS,
        subset=subset,
        max_logits_bytes=SMALL_CHUNKS,
    )
    assert loss.rank_hits.tolist() == counted
    assert all(
        min(hits) > 0 and sum(hits) < num_targets
        for hits, num_targets in zip(counted, loss.num_targets.tolist(), strict=True)
    )


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_equal_logits_count_for_the_target(architecture: HeadArchitecture) -> None:
    """Small whole numbers make exact products and many ties; blocks at 0 leave the states as they are."""
    heads, lm_head, _, targets = _case(architecture)
    lm_head.weight.copy_(torch.randint(-1, 2, (VOCAB, HIDDEN)))
    for parameter in (*heads.blocks.parameters(), *heads.unembeddings.parameters()):
        nn.init.zeros_(parameter)
    for unembedding in heads.unembeddings:
        unembedding.load_state_dict({"weight": lm_head.weight})
    states = torch.randint(-2, 3, (NUM_POSITIONS, HIDDEN)).float()
    logits = heads(states, lm_head=lm_head)
    loss = medusa1_loss(
        states,
        targets,
        heads=heads,
        lm_head_weight=lm_head.weight,
        lambdas=LAMBDAS,
        max_logits_bytes=SMALL_CHUNKS,
    )
    assert loss.rank_hits.tolist() == _counted_one_by_one(logits, targets)
    by_lower_id = (
        logits.sort(dim=-1, descending=True, stable=True).indices[..., :NUM_RANKS] == targets[..., None]
    )
    assert loss.rank_hits.tolist() != by_lower_id.sum(0).tolist(), "no tie, nothing tested"


def test_ranks_are_counted_head_by_head() -> None:
    """Rank 10 is not counted, least of all as the next head's rank 0.

    A head without a target has a row of zeros.
    """
    ranks, groups = torch.randint(0, 15, (300,)), torch.randint(0, 3, (300,))
    pairs = list(zip(groups.tolist(), ranks.tolist(), strict=True))
    assert (0, NUM_RANKS) in pairs and (1, NUM_RANKS - 1) in pairs
    assert rank_counts(ranks, groups, num_heads=4).tolist() == [
        [pairs.count((head, rank)) for rank in range(NUM_RANKS)] for head in range(4)
    ]


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_padding_changes_nothing(architecture: HeadArchitecture) -> None:
    """Elsewhere, one term was divided by padded positions, so the balance moved with the padding."""
    heads, lm_head, states, targets = _case(architecture)
    padded_states = torch.cat([states, torch.randn(9, HIDDEN)])
    padded_targets = torch.cat([targets, torch.full((9, NUM_HEADS), NO_TARGET, dtype=torch.int32)])
    bare = medusa1_loss(states, targets, heads=heads, lm_head_weight=lm_head.weight, lambdas=LAMBDAS)
    padded = medusa1_loss(
        padded_states, padded_targets, heads=heads, lm_head_weight=lm_head.weight, lambdas=LAMBDAS
    )
    torch.testing.assert_close(padded.loss, bare.loss)
    for ours, theirs in zip(_gradients(heads, padded.loss), _gradients(heads, bare.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_add_up_under_one_normaliser() -> None:
    heads, lm_head, states, targets = _case("shared")
    whole = medusa1_loss(states, targets, heads=heads, lm_head_weight=lm_head.weight, lambdas=LAMBDAS)
    parts = [
        medusa1_loss(
            states[part],
            targets[part],
            heads=heads,
            lm_head_weight=lm_head.weight,
            lambdas=LAMBDAS,
            num_positions=whole.num_positions,
        ).loss
        for part in (slice(0, 3), slice(3, 20), slice(20, None))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole.loss)


def test_batch_without_targets_has_zero_loss_and_gradient() -> None:
    for architecture in ("own", "shared"):
        heads, lm_head, states, targets = _case(architecture)
        empty = medusa1_loss(
            states,
            torch.full_like(targets, NO_TARGET),
            heads=heads,
            lm_head_weight=lm_head.weight,
            lambdas=LAMBDAS,
        )
        assert float(empty.loss.detach()) == 0.0
        empty.loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in heads.parameters())


def test_subset_keeps_the_most_frequent_tokens_and_renumbers_targets() -> None:
    subset = TokenSubset.most_frequent(torch.tensor([5, 0, 9, 5, 1]), size=3)
    assert subset.token_ids.tolist() == [0, 2, 3]
    targets = torch.tensor([[0, 2], [3, 4], [NO_TARGET, 1]], dtype=torch.int32)
    assert subset.localise(targets).tolist() == [[0, 1], [2, OUTSIDE_SUBSET], [NO_TARGET, OUTSIDE_SUBSET]]


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_subset_loss_is_the_plain_loss_over_the_kept_columns(architecture: HeadArchitecture) -> None:
    heads, lm_head, states, targets = _case(architecture)
    subset = TokenSubset.most_frequent(torch.bincount(targets[targets >= 0], minlength=VOCAB), size=30)
    local = subset.localise(targets)
    logits = heads(states, lm_head=lm_head)[..., subset.token_ids]
    plain = (
        sum(
            weight
            * cross_entropy(
                logits[:, head], local[:, head].long().clamp_min(-1), ignore_index=-1, reduction="sum"
            )
            for head, weight in enumerate(LAMBDAS)
        )
        / (targets[:, 0] >= 0).sum()
    )
    chunked = medusa1_loss(
        states,
        local,
        heads=heads,
        lm_head_weight=lm_head.weight[subset.token_ids],
        lambdas=LAMBDAS,
        subset=subset,
        max_logits_bytes=SMALL_CHUNKS,
    )
    assert isinstance(plain, Tensor)
    torch.testing.assert_close(chunked.loss, plain)
    assert chunked.num_outside == int((local == OUTSIDE_SUBSET).sum()) > 0
    for ours, theirs in zip(_gradients(heads, chunked.loss), _gradients(heads, plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bfloat16_products_stay_close_to_float32() -> None:
    heads, lm_head, states, targets = _case("shared")
    exact = medusa1_loss(states, targets, heads=heads, lm_head_weight=lm_head.weight, lambdas=LAMBDAS)
    rounded = medusa1_loss(
        states, targets, heads=heads, lm_head_weight=lm_head.weight.bfloat16(), lambdas=LAMBDAS
    )
    assert rounded.loss.dtype == torch.float32
    assert float(rounded.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=5e-3)
    for ours, theirs in zip(_gradients(heads, rounded.loss), _gradients(heads, exact.loss), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_fit_the_cache_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are those of whole chunks in any case; the work between them is done row by row."""
    heads, lm_head, states, targets = _case("shared")
    weight = lm_head.weight.detach().to(dtype)
    found = []
    for block_bytes in (4 * VOCAB * 2, 2**30):  # two rows, and all
        monkeypatch.setattr("medusa_impl.training.losses._CACHE_BYTES", block_bytes)
        loss = medusa1_loss(
            states,
            targets,
            heads=heads,
            lm_head_weight=weight,
            lambdas=LAMBDAS,
            max_logits_bytes=SMALL_CHUNKS,
        )
        found.append((loss, _gradients(heads, loss.loss)))
    (small, small_gradients), (whole, whole_gradients) = found
    assert torch.equal(small.loss, whole.loss) and torch.equal(small.loss_sums, whole.loss_sums)
    assert torch.equal(small.rank_hits, whole.rank_hits) and small.rank_hits.sum() > 0
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(small_gradients, whole_gradients, strict=True)
    )


def test_no_more_than_a_chunk_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, lm_head, states, targets = _case("shared")
    sizes: list[int] = []
    real = torch.softmax

    def spy(logits: Tensor, dim: int) -> Tensor:
        sizes.append(logits.numel() * logits.element_size())
        return real(logits, dim=dim)

    monkeypatch.setattr(torch, "softmax", spy)
    medusa1_loss(
        states,
        targets,
        heads=heads,
        lm_head_weight=lm_head.weight,
        lambdas=LAMBDAS,
        max_logits_bytes=SMALL_CHUNKS,
    )
    assert max(sizes) <= SMALL_CHUNKS
    assert sum(sizes) == int((targets >= 0).sum()) * VOCAB * 4


def test_wrong_shapes_and_a_trainable_lm_head_are_refused() -> None:
    heads, lm_head, states, targets = _case("shared")
    with pytest.raises(UserError, match="targets of shape"):
        medusa1_loss(states[:-1], targets, heads=heads, lm_head_weight=lm_head.weight, lambdas=LAMBDAS)
    trainable = lm_head.weight.detach().clone().requires_grad_()
    with pytest.raises(UserError, match="asks for gradients"):
        medusa1_loss(states, targets, heads=heads, lm_head_weight=trainable, lambdas=LAMBDAS)
