"""The three ways to Medusa-1's states: the same losses, and heads that are equal within rounding."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments, masking_utils

from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import FeaturesWay, HeadArchitecture, Medusa1Settings
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.training.batches import AnswerBatches, PositionBatches
from medusa_impl.training.distill import CorpusPrompt, CorpusStore, generate_corpus
from medusa_impl.training.features import AnswerSet, FeatureSet, load_answers, load_features
from medusa_impl.training.heads_trainer import HeadsTrainer, StepItems, heads_arguments
from medusa_impl.training.medusa1 import HeadsTrainingModel, train_medusa1
from medusa_impl.training.states import BackboneStates, DeviceStates, FileStates

NUM_HEADS = 3
RECIPE = Medusa1Settings(
    num_heads=NUM_HEADS,
    num_epochs=None,
    num_steps=6,
    batch_positions=40,
    warmup_steps=2,
    learning_rate=0.02,
    subset_size=30,
    full_vocabulary_rate=0.5,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A model of this module's own, with stock attention, as training loads it."""
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CorpusStore:
    """Answers of that model to prompts of several lengths, with the states of decoding."""
    store = CorpusStore(tmp_path_factory.mktemp("states"), shard_samples=7)
    prompts = [
        CorpusPrompt(str(n), "c", tuple(1 + (n * 7 + i) % 60 for i in range(2 + n % 9)), 0.8, n)
        for n in range(40)
    ]
    backbone = Backbone(tiny_llama(seed=3))
    generate_corpus(backbone, prompts, store=store, num_rows=8, max_new_tokens=14, eos_ids=frozenset({5}))
    return store


@pytest.fixture(scope="module")
def answers(store: CorpusStore) -> AnswerSet:
    return load_answers(store.samples(with_states=False), num_heads=NUM_HEADS, held_out_rate=0.2)


@pytest.fixture(scope="module")
def features(store: CorpusStore) -> FeatureSet:
    return load_features(store, num_heads=NUM_HEADS, held_out_rate=0.2)


def _train(
    folder: Path,
    table: FeatureSet | AnswerSet,
    model: LlamaForCausalLM,
    *,
    way: FeaturesWay,
    architecture: HeadArchitecture = "shared",
    whole_answers: bool = True,
) -> tuple[MedusaHeads, Any, list[dict[str, Any]]]:
    recipe = RECIPE.model_copy(update={"features": way, "architecture": architecture})
    heads = MedusaHeads(
        num_heads=NUM_HEADS,
        num_layers=1,
        hidden_size=32,
        vocab_size=TINY_VOCAB,
        architecture=architecture,
        lm_head=model.get_output_embeddings(),
    )
    kind = AnswerBatches if whole_answers else PositionBatches
    figures = train_medusa1(
        table,
        heads,
        model.get_output_embeddings().get_parameter("weight").detach(),
        recipe=recipe,
        checkpoint_dir=folder,
        decoder=model.get_decoder(),
        batches=kind(table, batch_positions=recipe.batch_positions, seed=recipe.seed),
        log_every_steps=1,
        clock=lambda: 0.0,
    )
    lines = (folder / "training-log.jsonl").read_text().splitlines()
    return heads, figures, [json.loads(line) for line in lines]


@pytest.mark.parametrize("architecture", ["shared", "own"])
def test_losses_are_the_same_in_all_three_ways(
    tmp_path: Path,
    model: LlamaForCausalLM,
    store: CorpusStore,
    features: FeatureSet,
    answers: AnswerSet,
    architecture: HeadArchitecture,
) -> None:
    """From the same batches. Kept states are float16, so they differ from fresh ones by 2^-11 of themselves;
    the two ways that keep them give the same bits.
    """
    mapped = load_features(
        store, num_heads=NUM_HEADS, held_out_rate=0.2, states_file=tmp_path / "states.table"
    )
    on_device, figures, log = _train(
        tmp_path / "device", features, model, way="device", architecture=architecture
    )
    streamed, same, same_log = _train(tmp_path / "file", mapped, model, way="file", architecture=architecture)
    assert log == same_log and figures == same
    for ours, theirs in zip(on_device.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    fresh, near, near_log = _train(tmp_path / "none", answers, model, way="none", architecture=architecture)
    assert [line["num_positions_seen"] for line in near_log] == [line["num_positions_seen"] for line in log]
    for line, other in zip(near_log, log, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert line["head_losses"] == pytest.approx(other["head_losses"], rel=2e-3)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-2)
    assert near.held_out.num_targets == figures.held_out.num_targets
    assert near.held_out.loss_sums == pytest.approx(figures.held_out.loss_sums, rel=2e-3)
    assert all(bool(parameter.any()) for parameter in fresh.blocks.parameters())  # which start at 0
    for ours, theirs in zip(fresh.parameters(), on_device.parameters(), strict=True):
        assert float((ours - theirs).detach().norm()) < 0.02 * float(theirs.detach().norm())


def test_batches_of_positions_are_the_same_from_a_file(
    tmp_path: Path, model: LlamaForCausalLM, store: CorpusStore, features: FeatureSet
) -> None:
    """The default of kept states, which the shipped heads were trained with."""
    mapped = load_features(
        store, num_heads=NUM_HEADS, held_out_rate=0.2, states_file=tmp_path / "states.table"
    )
    assert torch.equal(mapped.states, features.states) and mapped.fingerprint() == features.fingerprint()
    kept = _train(tmp_path / "device", features, model, way="device", whole_answers=False)
    streamed = _train(tmp_path / "file", mapped, model, way="file", whole_answers=False)
    assert kept[1:] == streamed[1:]


def test_what_a_gpu_is_told_trains_the_same_heads_on_a_cpu(
    tmp_path: Path, model: LlamaForCausalLM, features: FeatureSet
) -> None:
    """Another process makes the items, and copies do not wait: the same heads, bit for bit."""
    recipe = RECIPE.model_copy(update={"subset_size": None, "features": "file"})
    batches = PositionBatches(features, batch_positions=recipe.batch_positions, seed=recipe.seed)
    weight = model.get_output_embeddings().get_parameter("weight").detach()
    trained = []
    for kind in ("cpu", "cuda"):
        heads = MedusaHeads(
            num_heads=NUM_HEADS, num_layers=1, hidden_size=32, vocab_size=TINY_VOCAB, architecture="shared"
        )
        source = FileStates(features)
        arguments = heads_arguments(
            recipe, folder=tmp_path / kind, num_steps=6, save_steps=100, device=torch.device(kind)
        )
        on_gpu = kind == "cuda"
        assert (arguments.dataloader_num_workers, arguments.dataloader_pin_memory) == (int(on_gpu), on_gpu)
        HeadsTrainer(
            HeadsTrainingModel(heads, weight, source=source, recipe=recipe, num_steps=6, subset=None),
            items=StepItems(source, batches, num_steps=6),
            arguments=arguments,
            recipe=recipe,
            clock=lambda: 0.0,
        ).train()
        trained.append(heads)
    for ours, theirs in zip(*(heads.parameters() for heads in trained), strict=True):
        assert torch.equal(ours, theirs) and bool(ours.any())


def test_several_processes_are_sent_to_the_joint_trainer_and_one_gpu_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would spread one process over all GPUs that it sees, with a copy of the heads on each."""
    options: dict[str, Any] = {
        "folder": tmp_path,
        "num_steps": 6,
        "save_steps": 9,
        "device": torch.device("cpu"),
    }
    made: Any = TrainingArguments.__post_init__

    def on_four(arguments: TrainingArguments) -> None:
        made(arguments)
        arguments._n_gpu = 4

    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "__post_init__", on_four)
        assert heads_arguments(RECIPE, **options).n_gpu == 1
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(UserError, match="2 processes"):
        heads_arguments(RECIPE, **options)


def _read(source: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    states, targets = source.read(source.item(rows))
    return states, targets


def test_sources_agree_on_any_whole_answers(
    model: LlamaForCausalLM, features: FeatureSet, answers: AnswerSet
) -> None:
    """Whatever the parts that the backbone reads: one text each, or several, padded."""
    rows = AnswerBatches(answers, batch_positions=60, seed=4).rows(1)
    expected, targets = _read(DeviceStates(features, device=torch.device("cpu")), rows)
    assert torch.equal(expected, _read(FileStates(features), rows)[0])
    for pass_tokens in (1, 60, 10_000):
        source = BackboneStates(answers, model.get_decoder(), pass_tokens=pass_tokens)
        num_parts = len(source.item(rows)["parts"])
        assert num_parts == 1 if pass_tokens == 10_000 else num_parts > 1
        states, same = _read(source, rows)
        assert torch.equal(targets, same) and not states.requires_grad
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="whole answers"):
        BackboneStates(answers, model.get_decoder()).item(rows[1:])


def test_reading_decides_nothing_on_the_host(
    features: FeatureSet, answers: AnswerSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are no values, so whatever asks for one fails: a GPU would have to wait.

    transformers asks one thing of its own once a pass, whether texts are packed; it is answered here.
    """
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    rows = AnswerBatches(answers, batch_positions=60, seed=4).rows(0)

    def on_meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        if isinstance(value, list):
            return [on_meta(one) for one in value]
        return {name: on_meta(one) for name, one in value.items()}

    on_meta_model: Any = tiny_llama(seed=3)
    fresh = BackboneStates(answers, on_meta_model.to("meta").get_decoder())
    kept = DeviceStates(features, device=torch.device("meta"))
    for source in (fresh, kept, FileStates(features)):
        states, targets = source.read(on_meta(source.item(rows)))
        assert states.device.type == targets.device.type == "meta"
        assert states.shape == (len(rows), 32) and targets.shape == (len(rows), NUM_HEADS)


def test_every_answer_is_in_one_batch_of_an_epoch(answers: AnswerSet) -> None:
    batches = AnswerBatches(answers, batch_positions=40, seed=1)
    total = len(answers.train_rows())
    assert batches.num_per_epoch == total // 40 > 3
    epochs = [
        [batches.rows(epoch * batches.num_per_epoch + index) for index in range(batches.num_per_epoch)]
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert Counter(torch.cat(epoch).tolist()) == Counter(answers.train_rows().tolist())
        assert all(20 <= len(rows) <= 60 for rows in epoch)
    assert [rows.tolist() for rows in epochs[0]] != [rows.tolist() for rows in epochs[1]]
    again = AnswerBatches(answers, batch_positions=40, seed=1)
    assert torch.equal(again.rows(2), batches.rows(2))
    other = AnswerBatches(answers, batch_positions=40, seed=2)
    assert not torch.equal(other.rows(2), batches.rows(2))


def test_answers_longer_than_a_batch_leave_none_empty(answers: AnswerSet) -> None:
    batches = AnswerBatches(answers, batch_positions=3, seed=1)
    num_answers = len(set(answers.sample_index[answers.train_rows()].tolist()))
    assert batches.num_per_epoch == num_answers
    assert all(len(batches.rows(step)) for step in range(num_answers))


def test_evaluation_splits_at_answers(model: LlamaForCausalLM, answers: AnswerSet) -> None:
    source, rows = BackboneStates(answers, model.get_decoder()), answers.held_out_rows()
    parts = list(source.split(rows, 30))
    assert torch.equal(torch.cat(parts), rows) and len(parts) > 1
    for part in parts:
        source.item(part)  # whole answers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ["shared", "own"])
def test_a_gpu_trains_as_a_cpu_does(
    tmp_path: Path,
    model: LlamaForCausalLM,
    features: FeatureSet,
    answers: AnswerSet,
    architecture: HeadArchitecture,
) -> None:
    on_gpu: Any = tiny_llama(seed=3)
    on_gpu = on_gpu.to("cuda")
    ways: tuple[FeaturesWay, ...] = ("device", "file", "none")
    for way in ways:
        table = answers if way == "none" else features
        _, _, log = _train(tmp_path / f"cpu-{way}", table, model, way=way, architecture=architecture)
        heads, _, gpu_log = _train(tmp_path / way, table, on_gpu, way=way, architecture=architecture)
        assert {parameter.device.type for parameter in heads.parameters()} == {"cuda"}
        for line, other in zip(gpu_log, log, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
