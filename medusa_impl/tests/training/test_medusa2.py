"""The loss of joint training: what it equals, what its gradients reach, what the teacher leaves unchanged."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from medusa_impl.checkpoints.adapter import add_adapter, untie_lm_head
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import LoraSettings, Medusa2Settings
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tests.two_devices import HostAndDevice, is_on_device, put_module_on_device, put_on_device
from medusa_impl.training import medusa2
from medusa_impl.training.losses import NO_TARGET, NUM_RANKS, TokenSubset
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sequences import SequenceDataset, TrainingSequence, answer_targets, collate

BATCH = collate(
    [
        SequenceDataset(
            [
                TrainingSequence(token_ids=(3, 9, 4, 17, 33, 2), answers=((2, 6),)),
                TrainingSequence(token_ids=(8, 8, 40, 41, 2, 5, 50, 51, 52), answers=((2, 5), (6, 9))),
            ]
        )[index]
        for index in range(2)
    ]
)
LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)


def make_heads(*, architecture: Any = "shared") -> MedusaHeads:
    torch.manual_seed(3)
    heads = MedusaHeads(
        num_heads=3, num_layers=1, hidden_size=32, vocab_size=TINY_VOCAB, architecture=architecture
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.2)
    return heads


def tied_llama() -> LlamaForCausalLM:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def make_model(
    *,
    model: LlamaForCausalLM | None = None,
    architecture: Any = "shared",
    subset: TokenSubset | None = None,
    **recipe: Any,
) -> MedusaTrainingModel:
    made = Medusa2Settings(num_heads=3, num_steps=10, **{"lora": LORA, **recipe})
    torch.manual_seed(1)
    return MedusaTrainingModel(
        model or tiny_llama(), make_heads(architecture=architecture), recipe=made, subset=subset
    )


def stir(model: MedusaTrainingModel) -> None:
    """Move the adapter away from 0, as training would."""
    torch.manual_seed(9)
    for name, parameter in model.backbone.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def plain_parts(model: MedusaTrainingModel, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return L_LM and L1 written out over all logits at once, from the model's own forward pass."""
    output = model.backbone(
        input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], output_hidden_states=True
    )
    targets = answer_targets(BATCH["labels"], num_heads=3)
    chosen = targets[..., 0] >= 0
    count = chosen.sum()
    if teacher_logits is None:
        backbone = cross_entropy(output.logits[chosen], targets[..., 0][chosen], reduction="sum") / count
    else:
        backbone = kl_div(
            log_softmax(output.logits[chosen], -1),
            log_softmax(teacher_logits[chosen], -1),
            log_target=True,
            reduction="sum",
        )
        backbone = backbone / count
    states = model.heads.states(output.hidden_states[-1])
    heads = states.new_zeros(())
    for head in range(3):
        kept = targets[..., head + 1] >= 0
        if model.heads.architecture == "own":
            logits = model.heads.unembeddings[head](states[..., head, :])
        elif model.recipe.heads_lm_head == "adapted":
            logits = model.model.lm_head(states[..., head, :])
        else:
            logits = states[..., head, :] @ model.original_lm_head.weight.detach().T
        heads = (
            heads
            + 0.8 ** (head + 1)
            * cross_entropy(logits[kept], targets[..., head + 1][kept], reduction="sum")
            / count
        )
    return backbone, heads


@pytest.mark.parametrize("target", ["tokens", "original"])
@pytest.mark.parametrize("reads", ["original", "adapted"])
@pytest.mark.parametrize("architecture", ["shared", "own"])
def test_loss_and_gradients_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, target: str, reads: str, architecture: str
) -> None:
    """In chunks of two rows and through checkpoints, everything that learns gets the plain gradient."""
    monkeypatch.setattr(medusa2, "DEFAULT_LOGITS_BYTES", 2 * 4 * TINY_VOCAB)
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    model = make_model(target=target, heads_lm_head=reads, architecture=architecture, lora=lora)
    stir(model)
    with model.teacher() as original:
        teacher = original(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses, gradients = [], []
    for plain in (False, True):
        if plain:
            backbone, heads = plain_parts(model, teacher if target == "original" else None)
            loss = 1.0 * backbone + 0.3 * heads
        else:
            result = model(**BATCH, backbone_weight=1.0, heads_weight=0.3)
            loss = result["loss"]
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        gradients.append(
            {
                name: parameter.grad.clone()
                for name, parameter in learning.items()
                if parameter.grad is not None
            }
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() == learning.keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=2e-6, rtol=1e-4, msg=name)
        assert bool(gradient.any()), name


@pytest.mark.parametrize(
    "architecture, reads, restricted",
    [
        ("shared", "original", True),
        ("own", "original", True),
        ("own", "adapted", False),
        ("shared", "adapted", False),
    ],
)
@pytest.mark.parametrize("backbone, target", [("lora", "original"), ("lora", "tokens"), ("full", "original")])
def test_no_tensor_is_left_on_the_host(
    architecture: str, reads: str, restricted: bool, backbone: str, target: str
) -> None:
    """Regression: weights, sums and the token subset were made on the CPU, but the model was on the GPU."""
    subset = TokenSubset.most_frequent(torch.arange(TINY_VOCAB), size=40) if restricted else None
    model = make_model(
        architecture=architecture, heads_lm_head=reads, subset=subset, backbone=backbone, target=target
    )
    batch = {name: tensor.clone() for name, tensor in BATCH.items()}
    put_module_on_device(model)
    put_on_device(*batch.values())
    with HostAndDevice():
        found = model(**batch, backbone_weight=1.0, heads_weight=0.3)
    assert {name for name, value in found.items() if not is_on_device(value)} == set()


def test_the_stand_in_for_a_device_sees_what_was_left_behind() -> None:
    there, here = torch.ones(3), torch.ones(3)
    put_on_device(there)
    with HostAndDevice():
        assert (
            is_on_device((2 * there)[1:])
            and is_on_device(torch.zeros(2, device=there.device))
            and not is_on_device(here + 1)
        )
        assert is_on_device(there * torch.ones(()))
        with pytest.raises(RuntimeError, match="of the host meet"):
            there + here


def _tensors() -> list[Tensor]:
    objects = gc.get_objects()
    return [one for one in objects if issubclass(type(one), Tensor) and not isinstance(one, nn.Parameter)]


@pytest.mark.parametrize("target", ["tokens", "original"])
@pytest.mark.parametrize(
    "architecture, reads", [("shared", "original"), ("shared", "adapted"), ("own", "original")]
)
def test_no_logits_outlive_their_chunk(
    monkeypatch: pytest.MonkeyPatch, target: str, architecture: str, reads: str
) -> None:
    """Regression: the original model's logits of all positions were kept until the backward pass.

    There are ten positions, and two rows a chunk.
    """
    monkeypatch.setattr(medusa2, "DEFAULT_LOGITS_BYTES", 2 * 4 * TINY_VOCAB)
    model = make_model(
        target=target,
        architecture=architecture,
        heads_lm_head=reads,
        lora=LoraSettings(rank=4, alpha=8, dropout=0.0),
    )
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    gc.collect()
    before = _tensors()  # what other tests left, such as the shapes that a compiled step was traced with
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model(**BATCH, backbone_weight=1.0, heads_weight=0.3)
    others = {id(tensor) for tensor in before}
    alive = [tuple(one.shape) for one in _tensors() if id(one) not in others]
    wide = [shape for shape in (*alive, *saved) if len(shape) > 1 and shape[-1] == TINY_VOCAB]
    assert wide == [] and saved and float(result["loss"].detach()) > 0


def test_heads_move_the_backbone_only_while_it_learns() -> None:
    """The heads' loss alone reaches the adapter if the backbone's weight is not 0.

    If the weight is 0, it reaches nothing of the backbone.
    """
    model = make_model(target="original")
    stir(model)
    model(**BATCH, backbone_weight=1e-9, heads_weight=1.0)["loss"].backward()
    adapters = [
        parameter
        for name, parameter in model.backbone.named_parameters()
        if "lora_A" in name and "lm_head" not in name
    ]
    assert adapters and all(
        parameter.grad is not None and bool(parameter.grad.any()) for parameter in adapters
    )
    model.zero_grad()
    result = model(**BATCH, backbone_weight=0.0, heads_weight=1.0)
    result["loss"].backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
    assert "backbone_loss" not in result


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_divergence_from_itself_is_exactly_zero(backbone: str) -> None:
    """At step 0 the adapter adds nothing, whatever its dropout draws: the KL term must be exactly 0."""
    model = make_model(target="original", backbone=backbone).train()
    result = model(**BATCH, backbone_weight=1.0, heads_weight=0.2)
    assert float(result["backbone_loss"]) == 0.0
    assert int(result["agreements"]) == int(result["positions"]) == 4 + 3 + 3
    if backbone == "lora":
        stir(model)
        assert float(model(**BATCH, backbone_weight=1.0, heads_weight=0.2)["backbone_loss"]) > 1e-3


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_the_teacher_draws_no_dropout(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    """The student drops out in attention and adapter; the teacher is always exactly the untouched model.

    Regression: this was tested at step 0 of a model without dropout in its attention, where a teacher that is
    left in training mode looks the same.
    """
    noisy = tiny_llama()
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = make_model(
        model=noisy, target="original", backbone=backbone, lora=LoraSettings(rank=4, alpha=8, dropout=0.5)
    ).train()
    stir(model)
    read: list[tuple[Tensor, Tensor]] = []
    real = medusa2._divergence

    def spy(
        lm_head: nn.Module, states: Tensor, original_states: Tensor, original_lm_head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        read.append((states.detach().clone(), original_lm_head(original_states)))
        return real(lm_head, states, original_states, original_lm_head)

    monkeypatch.setattr(medusa2, "_divergence", spy)
    for _ in range(2):
        model(**BATCH, backbone_weight=1.0, heads_weight=0.2)
    with torch.no_grad():
        clean = tiny_llama()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    clean = clean[answer_targets(BATCH["labels"], num_heads=0)[..., 0] != NO_TARGET]
    (student, teacher), (student_again, teacher_again) = read
    assert not torch.allclose(student, student_again, atol=1e-3), "a student that drops nothing"
    for logits in (teacher, teacher_again):
        torch.testing.assert_close(logits, clean, atol=1e-5, rtol=1e-5)


def longer_batch() -> dict[str, Tensor]:
    """Return four random sequences of 24 tokens, the last one cut to 17.

    The tokens 6 to 16 are the answers: 11 positions a sequence.
    """
    torch.manual_seed(5)
    lengths = (24, 24, 24, 17)
    sequences = [
        TrainingSequence(tuple(torch.randint(TINY_VOCAB, (length,)).tolist()), ((6, 17),))
        for length in lengths
    ]
    data = SequenceDataset(sequences)
    return collate([data[index] for index in range(4)])


@pytest.mark.parametrize("backbone", ["lora", "full"])
@pytest.mark.parametrize("target", ["original", "tokens"])
def test_agreements_are_first_choices_compared_one_by_one(
    monkeypatch: pytest.MonkeyPatch, backbone: str, target: str
) -> None:
    """Training has moved the backbone, so some of its first choices are the targets and some are not.

    The chunks have three rows. Every other target is the moved model's own first choice, and differs from the
    token that it reads: else none would agree.
    """
    monkeypatch.setattr(medusa2, "DEFAULT_LOGITS_BYTES", 3 * 4 * TINY_VOCAB)
    model = make_model(backbone=backbone, target=target, lora=LoraSettings(rank=4, alpha=8, dropout=0.0))
    stir(model)
    batch = longer_batch()
    seen, labels = (
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        batch["labels"],
    )
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if backbone == "full":
                parameter.add_(0.05 * torch.randn_like(parameter))
        first, original = (one(**seen).logits.argmax(-1) for one in (model.backbone, tiny_llama()))
    labels[:, 6:17:2] = first[:, 5:16:2]
    result = model(**batch, backbone_weight=1.0, heads_weight=0.3)
    agreements = 0
    for row in range(4):
        for position in range(5, 16):
            wanted = original[row, position] if target == "original" else labels[row, position + 1]
            agreements += int(first[row, position]) == int(wanted)
    assert int(result["positions"]) == 44 and int(result["agreements"]) == agreements
    assert 8 < agreements < 36, "some agree and some do not"


@pytest.mark.parametrize(
    "architecture, reads", [("shared", "original"), ("shared", "adapted"), ("own", "original")]
)
def test_head_ranks_are_counted_one_by_one(
    monkeypatch: pytest.MonkeyPatch, architecture: str, reads: str
) -> None:
    """A target's rank is found from the sorted logits of its row, by the LM head that the heads read.

    The chunks have three rows. Every target is the (i mod 12)-th best token of head 1 two positions before.
    So head 1 hits every rank, and the others few.
    """
    monkeypatch.setattr(medusa2, "DEFAULT_LOGITS_BYTES", 3 * 4 * TINY_VOCAB)
    model = make_model(
        architecture=architecture, heads_lm_head=reads, lora=LoraSettings(rank=4, alpha=8, dropout=0.0)
    )
    stir(model)
    batch = longer_batch()
    with torch.no_grad():
        hidden = model.model.get_decoder()(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        logits = model.heads(
            hidden, lm_head=model.model.lm_head if reads == "adapted" else model.original_lm_head
        )
    counted = [[0] * NUM_RANKS for _ in range(3)]
    for row in range(4):
        for position in range(6, 17):
            batch["labels"][row, position] = logits[row, position - 2, 0].argsort(descending=True)[
                (11 * row + position) % 12
            ]
        for position in range(5, 16):
            for head in range(min(3, 15 - position)):
                values = logits[row, position, head].tolist()
                place = sorted(values, reverse=True).index(
                    values[int(batch["labels"][row, position + 2 + head])]
                )
                if place < NUM_RANKS:
                    counted[head][place] += 1
    result = model(**batch, backbone_weight=1.0, heads_weight=0.3)
    assert result["head_targets"].tolist() == [40, 36, 32]
    assert result["head_ranks"].tolist() == counted
    assert min(counted[0]) > 0 and all(sum(ranks) < 38 for ranks in counted)


def test_the_teacher_leaves_everything_as_it_was() -> None:
    """Regression: switching an adapter off and on again gave gradients to parameters that had none."""
    model = make_model(target="original").train()
    stir(model)
    for name, parameter in model.backbone.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.backbone.named_parameters()}
    with model.teacher() as original:
        assert not torch.is_grad_enabled() and not original.training
        states = original.get_decoder()(BATCH["input_ids"]).last_hidden_state
    torch.testing.assert_close(
        states, tiny_llama().model(BATCH["input_ids"]).last_hidden_state, atol=0, rtol=0
    )
    assert {name: parameter.requires_grad for name, parameter in model.backbone.named_parameters()} == before
    assert model.backbone.training and torch.is_grad_enabled()


def test_padding_changes_nothing() -> None:
    """Regression: with a KL over all positions and a cross-entropy over some, padding moved their balance."""
    model = make_model(target="original", lora=LoraSettings(rank=4, alpha=8, dropout=0.0)).eval()
    stir(model)
    sums = [model(**BATCH, backbone_weight=1.0, heads_weight=0.2)]
    wider = {
        "input_ids": torch.cat([BATCH["input_ids"], torch.full((2, 7), 2)], 1),
        "attention_mask": torch.cat([BATCH["attention_mask"], torch.zeros(2, 7, dtype=torch.long)], 1),
        "labels": torch.cat([BATCH["labels"], torch.full((2, 7), -100)], 1),
    }
    sums.append(model(**wider, backbone_weight=1.0, heads_weight=0.2))
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name], atol=1e-5, rtol=1e-5, msg=name)


def test_a_batch_in_parts_adds_up() -> None:
    model = make_model(target="tokens", lora=LoraSettings(rank=4, alpha=8, dropout=0.0))
    whole = model(**BATCH, backbone_weight=1.0, heads_weight=0.2)
    parts = [
        model(
            **{name: value[row : row + 1] for name, value in BATCH.items()},
            backbone_weight=1.0,
            heads_weight=0.2,
            num_items=10,
        )
        for row in range(2)
    ]
    assert float((parts[0]["loss"] + parts[1]["loss"]).detach()) == pytest.approx(
        float(whole["loss"]), rel=1e-5
    )


@torch.no_grad()
def test_a_tied_lm_head_is_untied_before_the_adapter_and_merges_exactly() -> None:
    """Regression: an adapter on a tied LM head is merged into the embedding too: all logits are wrong."""
    tied = tied_llama()
    expected = tied(BATCH["input_ids"]).logits
    model = make_model(model=tied).eval()
    torch.testing.assert_close(model.model(BATCH["input_ids"]).logits, expected, atol=1e-6, rtol=1e-6)
    stir(model)
    unmerged = model.backbone(input_ids=BATCH["input_ids"]).logits
    assert float((unmerged - expected).abs().max()) > 0.1
    merged = model.backbone.merge_and_unload()
    torch.testing.assert_close(merged(BATCH["input_ids"]).logits, unmerged, atol=1e-5, rtol=1e-5)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    torch.testing.assert_close(
        merged.model.embed_tokens.weight, tied_llama().model.embed_tokens.weight, atol=0, rtol=0
    )


def test_an_adapter_covers_every_linear_layer_and_the_lm_head_where_asked() -> None:
    with_head = add_adapter(tiny_llama(), LORA)
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in with_head.named_parameters()
        if "lora_A" in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    without = add_adapter(tied_llama(), LORA.model_copy(update={"lm_head": False, "targets": ("q_proj",)}))
    assert {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name, _ in without.named_parameters()
        if "lora_A" in name
    } == {"q_proj"}
    assert without.get_base_model().lm_head.weight is without.get_base_model().model.embed_tokens.weight
    with pytest.raises(UserError, match=r"adapter targets \['nowhere'\]"):
        add_adapter(tiny_llama(), LORA.model_copy(update={"targets": ("nowhere",)}))


def test_untying_copies_once() -> None:
    model = tied_llama()
    untie_lm_head(model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert (
        model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        and model.config.tie_word_embeddings is False
    )
    weight = model.lm_head.weight
    untie_lm_head(model)
    assert model.lm_head.weight is weight


def test_heads_in_a_subset_of_the_vocabulary() -> None:
    counts = torch.zeros(TINY_VOCAB)
    counts[BATCH["labels"][BATCH["labels"] >= 0]] = 1
    counts[33] = 0
    subset = TokenSubset.most_frequent(counts, size=int(counts.sum()))
    result = make_model(subset=subset)(**BATCH, backbone_weight=0.0, heads_weight=1.0)
    assert result["head_targets"].tolist() == [6, 3, 1], (
        "of 7, 4 and 1 targets, those that are token 33 are left out"
    )
    assert int(result["positions"]) == 10
    with pytest.raises(ValidationError, match="frozen LM head"):
        Medusa2Settings(num_steps=1, subset_size=8, heads_lm_head="adapted")


def test_schedules() -> None:
    """The heads first, then both; or a quarter of a sine up to lambda_0; or neither: direct fine-tuning."""
    stages = Medusa2Settings(num_steps=100, warmup="two_stage", stage_rate=0.4, lambda_0=0.2, warmup_steps=0)
    assert [stages.loss_weights(step, num_steps=100) for step in (0, 39, 40, 90)] == [
        (0, 1),
        (0, 1),
        (1, 0.2),
        (1, 0.2),
    ]
    assert stages.first_backbone_step(100) == 40
    assert stages.learning_rates(39, num_steps=100)[1] == 0
    assert stages.learning_rates(40, num_steps=100)[1] == pytest.approx(5e-4)
    ramped = Medusa2Settings(num_steps=100, warmup="ramped", lambda_0=0.01, ramp_rate=0.5)
    weights = [ramped.loss_weights(step, num_steps=100)[1] for step in (0, 25, 50, 99)]
    assert weights == pytest.approx([0, 0.01 * math.sin(math.pi / 4), 0.01, 0.01])
    linear = ramped.model_copy(update={"ramp": "linear"})
    assert linear.loss_weights(25, num_steps=100) == pytest.approx((1.0, 0.005))
    assert ramped.model_copy(update={"ramp": "constant"}).loss_weights(0, num_steps=100) == (1.0, 0.01)
    direct = Medusa2Settings(
        num_steps=100, warmup="none", lambda_0=1.0, heads_learning_rate=1e-3, backbone_learning_rate=1e-3
    )
    assert (
        direct.loss_weights(0, num_steps=100) == (1.0, 1.0)
        and len(set(direct.learning_rates(50, num_steps=100))) == 1
    )
    rates = [ramped.learning_rates(step, num_steps=100)[0] for step in range(100)]
    assert (
        rates[0] == pytest.approx(2e-3 / 41)
        and max(rates) == rates[40] == pytest.approx(2e-3)
        and rates[-1] < 2e-6
    )
    frozen = Medusa2Settings(num_steps=100, backbone="frozen")
    assert (
        frozen.loss_weights(70, num_steps=100) == (0.0, 1.0)
        and frozen.learning_rates(50, num_steps=100)[1] == 0
    )


def test_recipes_that_cannot_be_are_refused() -> None:
    for wrong in (
        {"num_steps": 1, "num_epochs": 1.0},
        {},
        {"num_steps": 1, "quantisation": "4bit", "backbone": "full"},
    ):
        with pytest.raises(ValidationError):
            Medusa2Settings(**wrong)


def test_capped_logits_are_refused() -> None:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    heads = MedusaHeads(num_heads=1, num_layers=1, hidden_size=16, vocab_size=40, architecture="shared")
    with pytest.raises(UserError, match="final_logit_softcapping"):
        MedusaTrainingModel(
            Gemma2ForCausalLM(config), heads, recipe=Medusa2Settings(num_steps=1, num_heads=1)
        )


@pytest.mark.parametrize(
    "recipe", [{"target": "original"}, {"target": "tokens", "backbone": "full", "heads_lm_head": "adapted"}]
)
def test_checkpointed_layers_give_the_same_gradients_and_keep_less(recipe: dict[str, Any]) -> None:
    """Layers that run again draw the same dropout masks as the first time; the teacher is not affected."""
    found = []
    for checkpointed in (False, True):
        backbone = LlamaForCausalLM._from_config(
            LlamaConfig(**{**tiny_llama().config.to_dict(), "attention_dropout": 0.1})
        )
        backbone.load_state_dict(tiny_llama().state_dict())
        model = make_model(model=backbone, gradient_checkpointing=checkpointed, **recipe)
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(11)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(**BATCH, backbone_weight=1.0, heads_weight=0.5)["loss"]
        loss.backward()
        gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        found.append((loss.item(), gradients, sum(kept.values())))
    (plain, expected, all_bytes), (checkpointed_loss, got, few_bytes) = found
    assert checkpointed_loss == plain and expected.keys() == got.keys() and len(got) > 10
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert few_bytes < 0.75 * all_bytes


def test_a_state_of_what_learns_is_enough_and_anything_else_is_refused() -> None:
    """DeepSpeed's checkpoints do not hold the frozen weights."""
    source, target = make_model(), make_model()
    learning = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
    state = {name: tensor + 1 for name, tensor in source.state_dict().items() if name in learning}
    frozen = {name: one.detach().clone() for name, one in target.named_parameters() if name not in learning}
    target.load_state_dict(state)
    assert len(frozen) > 10 and all(
        torch.equal(target.get_parameter(name), tensor) for name, tensor in frozen.items()
    )
    assert all(torch.equal(target.get_parameter(name), tensor) for name, tensor in state.items())
    first = min(learning)
    for wrong in (
        {name: tensor for name, tensor in state.items() if name != first},
        {**state, "other": state[first]},
    ):
        with pytest.raises(RuntimeError, match="only the checkpoint or the model has"):
            target.load_state_dict(wrong)
