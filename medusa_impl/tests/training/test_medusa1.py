"""Medusa-1 training on a rule: what it learns, what it leaves alone, and how it is resumed."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture, Medusa1Settings
from medusa_impl.training.batches import epoch_order
from medusa_impl.training.evaluation import evaluate_heads
from medusa_impl.training.features import FeatureSet
from medusa_impl.training.losses import NO_TARGET
from medusa_impl.training.medusa1 import train_medusa1
from medusa_impl.training.whole_checkpoints import last_checkpoint
from medusa_impl.training_log import TrainingStep

HIDDEN, VOCAB, NUM_HEADS = 24, 40, 2
RECIPE = Medusa1Settings(
    num_heads=NUM_HEADS,
    num_epochs=None,
    num_steps=24,
    batch_positions=32,
    warmup_steps=3,
    learning_rate=0.02,
    subset_size=30,
    full_vocabulary_rate=0.25,
)


def _lm_head_weight() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


def _features(*, seed: int = 0, num_answers: int = 40, length: int = 12) -> FeatureSet:
    """Return answers in which token t is always followed by 7 t + 3 modulo V, with a state that shows t."""
    generator = torch.Generator().manual_seed(seed)
    codes = _lm_head_weight() / HIDDEN**0.5
    states, targets = [], []
    for _ in range(num_answers):
        tokens = [int(torch.randint(VOCAB, (), generator=generator))]
        for _ in range(length):
            tokens.append((7 * tokens[-1] + 3) % VOCAB)
        states.append(codes[tokens[:-1]])
        targets.append(
            [
                [tokens[i + k] if i + k <= length else NO_TARGET for k in range(1, NUM_HEADS + 1)]
                for i in range(length)
            ]
        )
    return FeatureSet(
        states=torch.cat(states).half(),
        targets=torch.tensor(targets, dtype=torch.int32).reshape(-1, NUM_HEADS),
        sample_index=torch.arange(num_answers, dtype=torch.int32).repeat_interleave(length),
        held_out=torch.arange(num_answers) % 5 == 0,
        keys=tuple(f"answer-{number}" for number in range(num_answers)),
        num_tokens=num_answers * (length + 1),
    )


def _heads(architecture: HeadArchitecture = "shared") -> MedusaHeads:
    lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    lm_head.weight.data = _lm_head_weight()
    return MedusaHeads(
        num_heads=NUM_HEADS,
        num_layers=1,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        architecture=architecture,
        lm_head=lm_head,
    )


def _train(
    folder: Path, *, recipe: Medusa1Settings = RECIPE, features: FeatureSet | None = None, **options: Any
) -> tuple[MedusaHeads, Any]:
    heads = _heads(recipe.architecture)
    figures = train_medusa1(
        features if features is not None else _features(),
        heads,
        _lm_head_weight(),
        recipe=recipe,
        checkpoint_dir=folder,
        log_every_steps=1,
        save_every_steps=5,
        clock=lambda: 0.0,
        **options,
    )
    return heads, figures


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training-log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("architecture", ["own", "shared"])
def test_heads_learn_the_rule_and_beat_fresh_ones_on_held_out_text(
    tmp_path: Path, architecture: HeadArchitecture
) -> None:
    recipe = RECIPE.model_copy(update={"num_steps": 300, "architecture": architecture})
    _, figures = _train(tmp_path, recipe=recipe)
    features = _features()
    fresh = evaluate_heads(
        features, features.held_out_rows(), heads=_heads(architecture), lm_head_weight=_lm_head_weight()
    )
    assert figures.held_out.num_targets == fresh.num_targets == (96, 88)
    for head in range(NUM_HEADS):
        assert figures.held_out.top_accuracies()[head][0] > 0.65
        assert fresh.top_accuracies()[head][0] < 0.3  # type: ignore[operator]
        assert figures.held_out.losses()[head] < fresh.losses()[head]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lm_head_stays_bit_identical_and_every_head_parameter_moves(tmp_path: Path, dtype: Any) -> None:
    """One released script trained the LM head along with shared heads.

    Another gave biases a different learning rate.
    """
    weight = _lm_head_weight()
    heads = _heads()
    before = [parameter.detach().clone() for parameter in heads.parameters()]
    recipe = RECIPE.model_copy(update={"matmul_dtype": dtype})
    train_medusa1(_features(), heads, weight, recipe=recipe, checkpoint_dir=tmp_path)
    assert torch.equal(weight, _lm_head_weight())
    for parameter, start in zip(heads.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, start)


def test_own_unembeddings_multiply_in_the_recipes_dtype_and_learn_in_float32(tmp_path: Path) -> None:
    """Regression: bfloat16 was for shared ones alone, and own ones, which a GPU takes longest for, kept
    float32.
    """
    losses = {}
    for dtype in ("float32", "bfloat16"):
        recipe = RECIPE.model_copy(update={"architecture": "own", "matmul_dtype": dtype, "num_steps": 4})
        heads, _ = _train(tmp_path / dtype, recipe=recipe)
        assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
        losses[dtype] = [line["loss"] for line in _log(tmp_path / dtype)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [3, 13, 21])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(tmp_path: Path, killed_at: int) -> None:
    """Elsewhere, a resumed run counted its inputs, and skipped or repeated some.

    Here runs are cut off before the first save, between saves, and in the last part.
    """

    def kill(record: TrainingStep) -> None:
        if record.step == killed_at:
            raise _Killed

    unbroken, figures = _train(tmp_path / "unbroken")
    with pytest.raises(_Killed):
        _train(tmp_path / "killed", on_step=kill)
    with (tmp_path / "killed" / "training-log.jsonl").open("a") as file:
        file.write('{"step": 14, "torn')
    resumed, resumed_figures = _train(tmp_path / "killed")
    assert _log(tmp_path / "killed") == _log(tmp_path / "unbroken")
    assert resumed_figures == figures
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, figures = _train(tmp_path)
    steps: list[TrainingStep] = []
    second, again = _train(tmp_path, on_step=steps.append)
    assert steps == [] and again == figures
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    _train(tmp_path, on_step=steps.append, resume=False)
    assert len(steps) == 24


def test_another_recipe_or_corpus_cannot_go_on_from_a_kept_state(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        _train(tmp_path, recipe=RECIPE.model_copy(update={"seed": 1}))
    with pytest.raises(UserError, match="another features"):
        _train(tmp_path, features=_features(seed=1))


def test_corrupt_state_is_a_clear_error(tmp_path: Path) -> None:
    _train(tmp_path)
    path = tmp_path / "heads-run.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match="unreadable training state"):
        _train(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "checkpoint-24" / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="no readable checkpoint"):
        _train(tmp_path)


def test_a_checkpoint_without_its_counts_is_a_clear_error(tmp_path: Path) -> None:
    _train(tmp_path)
    (tmp_path / "checkpoint-24" / "counts.json").unlink()
    with pytest.raises(UserError, match="no readable counts"):
        _train(tmp_path)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    features = _features()
    rows = features.train_rows()
    poisoned_row = rows[epoch_order(len(rows), epoch=0, seed=RECIPE.seed)[8 * 32]]
    states = features.states.clone()
    states[poisoned_row, 0] = float("inf")
    with pytest.raises(UserError, match="step 8"):
        _train(tmp_path, features=replace(features, states=states))
    kept = last_checkpoint(tmp_path)
    assert kept is not None and kept.step == 5
    assert all(
        torch.isfinite(tensor).all() for tensor in load_file(kept.folder / "model.safetensors").values()
    )


def test_same_seed_same_heads_other_seed_other_heads(tmp_path: Path) -> None:
    first, _ = _train(tmp_path / "a")
    same, _ = _train(tmp_path / "b")
    other, _ = _train(tmp_path / "c", recipe=RECIPE.model_copy(update={"seed": 1}))
    weights = [heads.blocks.state_dict()["0.0.linear.weight"] for heads in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_epoch_sees_each_row_once_and_epochs_differ() -> None:
    first, second = epoch_order(100, epoch=0, seed=3), epoch_order(100, epoch=1, seed=3)
    assert first.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_order(100, epoch=0, seed=4))


def test_held_out_rows_never_enter_training(tmp_path: Path) -> None:
    features = _features()
    poisoned = features.states.clone()
    poisoned[features.held_out_rows()] = 3.0
    clean, _ = _train(tmp_path / "clean")
    other, _ = _train(tmp_path / "other", features=replace(features, states=poisoned))
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), other.parameters(), strict=True))


def test_subset_comes_first_then_the_full_vocabulary(tmp_path: Path) -> None:
    _, figures = _train(tmp_path)
    assert [row["vocabulary"] for row in _log(tmp_path)] == ["subset"] * 18 + ["full"] * 6
    assert (figures.num_subset_steps, figures.subset_size) == (18, 30)
    outside = [row["num_targets_outside"] for row in _log(tmp_path)]
    assert 0 < outside[0] < outside[17] == outside[-1] == figures.num_targets_outside
    assert figures.num_positions_seen == 24 * 32
    _, whole = _train(tmp_path / "whole", recipe=RECIPE.model_copy(update={"subset_size": None}))
    assert (whole.num_subset_steps, whole.subset_size, whole.num_targets_outside) == (0, None, 0)


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [RECIPE.learning_rate_at(step, num_steps=24) for step in range(25)]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates[3] == pytest.approx(0.02)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert rates[24] == pytest.approx(0.0, abs=1e-12)


def test_recipe_needs_exactly_one_length_and_knows_its_keys() -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Medusa1Settings(num_epochs=1.0, num_steps=5)
    with pytest.raises(ValidationError, match="exactly one"):
        Medusa1Settings(num_epochs=None, num_steps=None)
    with pytest.raises(ValidationError, match="lerning_rate"):
        Medusa1Settings.model_validate({"lerning_rate": 1.0})
    assert Medusa1Settings(num_epochs=2.5, batch_positions=10).steps_for(105) == 25


def test_heads_of_another_shape_than_the_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training recipe"):
        train_medusa1(
            _features(),
            _heads(),
            _lm_head_weight(),
            recipe=RECIPE.model_copy(update={"num_layers": 2}),
            checkpoint_dir=tmp_path,
        )


@torch.no_grad()
def test_evaluation_counts_ranks_as_decoding_orders_candidates() -> None:
    """Elsewhere, a fixed divisor ignored that head k has fewer targets than head 1."""
    features = _features(num_answers=4)
    heads, weight = _heads(), _lm_head_weight()
    weight[5] = weight[9]  # equal logits: the lower id comes first
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(len(features.states))
    evaluation = evaluate_heads(
        features, rows, heads=heads, lm_head_weight=weight, max_logits_bytes=4 * VOCAB * 7
    )
    logits = heads.states(features.states.float()) @ weight.T
    for head in range(NUM_HEADS):
        hits, loss = [0] * 10, 0.0
        kept = [row for row in rows.tolist() if features.targets[row, head] >= 0]
        for row in kept:
            target = int(features.targets[row, head])
            order = sorted((-logits[row, head, token].item(), token) for token in range(VOCAB))
            rank = [token for _, token in order].index(target)
            loss -= float(logits[row, head].log_softmax(-1)[target])
            if rank < 10:
                hits[rank] += 1
        assert evaluation.rank_hits[head] == tuple(hits)
        assert evaluation.num_targets[head] == len(kept) == 4 * (12 - head)
        assert evaluation.loss_sums[head] == pytest.approx(loss, rel=1e-4)
        assert evaluation.top_accuracies()[head][2] == pytest.approx(sum(hits[:3]) / len(kept))


def test_no_held_out_answers_leave_the_evaluation_out(tmp_path: Path) -> None:
    features = _features()
    _, figures = _train(tmp_path, features=replace(features, held_out=torch.zeros_like(features.held_out)))
    assert figures.held_out is None and figures.num_held_out_rows == 0
