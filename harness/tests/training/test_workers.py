"""A corpus of one turn, two and more, made by a tiny model with a tokenizer of its own, from the catalogue's
prompts to sequences.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import tomli_w
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.device.engine import best_device, load_model, model_sha256
from harness.errors import ExitCode, UserError
from harness.files import ModelFolder
from harness.specs.recipe import JointRecipe
from harness.specs.suite import ModelSpec
from harness.tests.tiny_suite import QUIET, command
from harness.training.conversations import conversation_and_turn, conversation_sequence, turn_key
from harness.training.corpus import goes_on
from harness.training.text import read_text
from harness.training.workers import (
    _rates,
    corpus_backbone,
    corpus_worker,
    distill_corpus,
    end_with_parent,
    fill_corpus,
)
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.training.distill import CorpusSample, CorpusStore, unpack_corpus

SECOND_TURN = "+2"  # golden: what keys on disk end with
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows a few words and calls all others unknown; id 0 ends a sequence."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    words = {
        "<end>": 0,
        "<unknown>": 1,
        "<user>": 2,
        "<assistant>": 3,
        **{f"word{index}": index for index in range(4, TINY_VOCAB)},
    }
    plain = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unknown>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    model = tiny_llama(scale=0.1)  # nearly uniform: about a quarter of the answers end by themselves
    model.generation_config.eos_token_id = 0
    model.save_pretrained(str(folder))
    return folder


def suite(model_folder: Path, **changes: Any) -> JointRecipe:
    corpus = {
        "num_samples": 40,
        "max_new_tokens": 16,
        "sampled_share": 1.0,
        "temperature": 1.0,
        "num_rows": 8,
        "second_turn_share": 1.0,
    }
    corpus |= changes
    data = {
        "schema_version": 1,
        "kind": "recipe",
        "trains": "heads_and_backbone",
        "name": "tiny",
        "description": "-",
        "model": {"path": str(model_folder)},
    }
    return JointRecipe.model_validate({**data, "corpus": corpus, "recipe": {"num_steps": 2}})


def samples(work: Path) -> dict[str, CorpusSample]:
    return {sample.key: sample for sample in CorpusStore(work / "corpus").samples(with_states=False)}


def test_conversations_of_two_turns_are_made_resumed_and_read(model_folder: Path, tmp_path: Path) -> None:
    spec = suite(model_folder)
    assert spec.corpus is not None
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1, num_gpus=0)
    made = samples(tmp_path)
    first = {key: sample for key, sample in made.items() if not key.endswith(SECOND_TURN)}
    going_on = {key for key, sample in first.items() if goes_on(sample, spec=spec.corpus)}
    assert len(first) >= 40 and 2 <= len(going_on) < len(first)
    assert {key for key in made if key.endswith(SECOND_TURN)} == {key + SECOND_TURN for key in going_on}
    for key in going_on:
        before, after = first[key], made[key + SECOND_TURN]
        context = (*before.prompt_ids, *before.token_ids)
        assert after.prompt_ids[: len(context)] == context and before.token_ids[-1] == 0
        assert after.prompt_ids[len(context)] == 2 and after.prompt_ids[-1] == 3, (
            "the end of the answer stands once, then the next turn"
        )

    loaded = load_model(ModelSpec(path=ModelFolder(model_folder)), device=best_device())
    assert corpus_backbone(CorpusStore(tmp_path / "corpus")) == loaded.sha256
    text = read_text(spec, loaded, work=tmp_path)
    sequences = (*text.train, *text.held_out)
    assert len(sequences) == len(first), "a second turn is part of its conversation, not one of its own"
    assert sum(len(sequence.answers) == 2 for sequence in sequences) == len(going_on)

    shards = sorted((tmp_path / "corpus").glob("corpus-*.jsonl"))
    shards[-1].unlink()  # as if the run had been killed before its last shard was whole
    assert len(samples(tmp_path)) < len(made)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1, num_gpus=0)
    again = samples(tmp_path)
    assert again.keys() == made.keys()
    assert all(again[key].prompt_ids == made[key].prompt_ids for key in first)


def say(folder: Path, conversations: list[list[str]]) -> str:
    """Write a prompts file and return where it is."""
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"key": f"k{index}", "turns": turns}) + "\n"
            for index, turns in enumerate(conversations)
        )
    )
    return str(path)


def words(count: int, *, seed: int = 0) -> str:
    source = random.Random(seed)
    return " ".join(f"word{source.randrange(4, TINY_VOCAB)}" for _ in range(count))


def test_conversations_of_a_file_go_on_for_as_long_as_it_and_the_model_let_them(
    model_folder: Path, tmp_path: Path
) -> None:
    """Of 512 positions, three questions of 100 words and answers of at most 64 leave room; a fourth does not.

    Regression: there was no third turn; and a model was run past its positions.
    """
    asked = say(tmp_path, [[words(100, seed=seed)] * (4 if seed % 2 else 1) for seed in range(30)])
    spec = suite(model_folder, num_samples=30, prompts_file=asked, max_new_tokens=64, second_turn_share=1.0)
    for index in range(2):
        corpus_worker(spec.model_dump(mode="json"), str(tmp_path), index, 2, num_gpus=0)
    made = samples(tmp_path)
    turns = Counter(conversation_and_turn(key)[1] for key in made)
    assert turns[1] == 30 and turns[2] > turns[3] > 1 and not turns[4]
    ended = {key for key, sample in made.items() if sample.ended_by == "eos"}
    assert ended & {key for key in made if key.endswith("+3")}, "some would have gone on to the fourth"
    assert all(len(sample.prompt_ids) + 64 <= 512 for sample in made.values())
    for key, sample in made.items():
        conversation, turn = conversation_and_turn(key)
        if turn > 1:
            before = made[turn_key(conversation, turn - 1)]
            context = (*before.prompt_ids, *before.token_ids)
            assert before.ended_by == "eos" and sample.prompt_ids[: len(context)] == context
            assert len(sample.prompt_ids) - len(context) == 103, (
                "question, its role, its end, the assistant's role"
            )

    folder = tmp_path / "corpus"
    last = {max(folder.glob(f"corpus-{writer}-*.jsonl")) for writer in (0, 1)}
    for shard in last:
        shard.unlink()  # a run killed in the middle of a turn
    assert len(samples(tmp_path)) < len(made)
    for index in range(2):
        corpus_worker(spec.model_dump(mode="json"), str(tmp_path), index, 2, num_gpus=0)
    assert samples(tmp_path).keys() == made.keys()
    shards = sorted(folder.glob("*.jsonl"))
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 2, num_gpus=0)
    assert sorted(folder.glob("*.jsonl")) == shards


def test_what_cannot_be_brought_further_starts_no_worker_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that run out before the goal, and conversations that end before their last question, leave
    nothing to do.
    """
    rows = [[words(20, seed=seed), words(500)] for seed in range(4)]
    spec = suite(
        model_folder, num_samples=30, prompts_file=say(tmp_path, rows), max_new_tokens=64
    ).model_copy(update={"num_workers": 1})
    fill_corpus(spec, work=tmp_path, console=QUIET)
    assert len(samples(tmp_path)) == 4 and any(
        sample.ended_by == "eos" for sample in samples(tmp_path).values()
    )

    class Started(Exception):
        pass

    def start(kind: str) -> None:
        raise Started

    monkeypatch.setattr("harness.training.workers.multiprocessing.get_context", start)
    fill_corpus(spec, work=tmp_path, console=QUIET)
    say(tmp_path, [*rows, [words(20)]])
    with pytest.raises(Started):
        fill_corpus(spec, work=tmp_path, console=QUIET)
    say(tmp_path, rows)
    with pytest.raises(Started):
        fill_corpus(spec.model_copy(update={"num_workers": 2}), work=tmp_path, console=QUIET)


def test_prompts_that_leave_no_room_are_refused_by_all_workers_before_anything_is_generated(
    model_folder: Path, tmp_path: Path
) -> None:
    """The one that does not fit is the second worker's; the first has answered none of its own by then."""
    asked = say(tmp_path, [[words(20)], [words(490)]])
    data = suite(model_folder, num_samples=2, prompts_file=asked, max_new_tokens=64).model_dump(
        mode="json", exclude_none=True
    )
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps({**data, "num_workers": 2}))
    with patch("harness.training.workers.check_overlap"):
        ran = command("distill", recipe, "--work", tmp_path / "work", "--out", tmp_path / "out")
    assert ran.code == ExitCode.USER_ERROR
    assert (
        "a prompt of 493 tokens with a budget of 64" in ran.error_line
        and "need at most 512 positions" in ran.error_line
    )
    assert "in the corpus; to mend it: lower max_prompt_tokens or max_new_tokens" in ran.error_line
    assert not CorpusStore(tmp_path / "work" / "corpus").shard_files() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_gpus", "devices"),
    [
        (0, ["cpu", "cpu", "cpu"]),
        (1, ["cuda:0", "cuda:0", "cuda:0"]),
        (2, ["cuda:0", "cuda:1", "cuda:0"]),
        (8, ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_every_worker_loads_its_model_onto_a_gpu_of_its_own(
    num_gpus: int, devices: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: all of them went to the first GPU."""
    current, loaded = [], []

    class Loaded(Exception):
        pass

    def load(spec: ModelSpec, *, device: torch.device) -> None:
        loaded.append(str(device))
        raise Loaded

    monkeypatch.setattr("harness.training.workers.load_model", load)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: current.append(str(device)))
    threads = torch.get_num_threads()
    for index in range(3):
        with pytest.raises(Loaded):
            corpus_worker(
                suite(model_folder).model_dump(mode="json"), str(tmp_path), index, 3, num_gpus=num_gpus
            )
    assert torch.get_num_threads() == threads, (
        "regression: a worker that was called, not started, left its caller with one thread"
    )
    assert loaded == devices and current == [device for device in devices if device != "cpu"]


@pytest.mark.parametrize(("asked", "num_gpus", "started"), [(None, 4, 4), (2, 4, 2), (3, 0, 3)])
def test_there_is_a_worker_a_gpu_and_each_is_told_how_many_there_are(
    asked: int | None,
    num_gpus: int,
    started: int,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[Any, ...]] = []

    class Context:
        @staticmethod
        def Process(*, target: Any, args: tuple[Any, ...]) -> Any:
            given.append(args)
            return SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=0)

        @staticmethod
        def SimpleQueue() -> Any:
            return SimpleNamespace(empty=lambda: True)

    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("harness.training.workers.multiprocessing.get_context", lambda kind: Context)
    fill_corpus(suite(model_folder).model_copy(update={"num_workers": asked}), work=tmp_path, console=QUIET)
    assert [args[3:] for args in given] == [(index, started, num_gpus) for index in range(started)]


def test_another_models_answers_in_the_work_folder_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Regression: a recipe whose model was changed went on with the first one's answers, and called them the
    second one's.
    """
    spec = suite(model_folder)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1, num_gpus=0)
    other = shutil.copytree(model_folder, tmp_path / "other")
    torch.manual_seed(5)
    changed = tiny_llama(scale=0.1)
    torch.nn.init.normal_(changed.lm_head.weight)
    changed.save_pretrained(str(other))
    elsewhere = spec.model_copy(update={"model": ModelSpec(path=ModelFolder(other))})
    loaded = load_model(elsewhere.model, device=best_device())
    assert model_sha256(elsewhere.model) == loaded.sha256 != corpus_backbone(CorpusStore(tmp_path / "corpus"))
    for use in (
        lambda: fill_corpus(elsewhere, work=tmp_path, console=QUIET),
        lambda: corpus_worker(elsewhere.model_dump(mode="json"), str(tmp_path), 0, 1, num_gpus=0),
        lambda: read_text(elsewhere, loaded, work=tmp_path),
        lambda: distill_corpus(elsewhere, work=tmp_path, target=tmp_path / "out", console=QUIET),
    ):
        with (
            patch("harness.training.workers.check_overlap"),
            pytest.raises(UserError, match="found the answers of a model whose tensors hash to"),
        ):
            use()


def test_distill_answers_packs_and_goes_on_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    data = suite(model_folder).model_dump(mode="json", exclude_none=True)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps({**data, "num_workers": 2}))
    told = []
    with patch("harness.training.workers.check_overlap"):
        for _ in range(2):
            ran = command("distill", recipe, "--work", tmp_path / "work", "--out", tmp_path / "out")
            assert ran.code == ExitCode.OK, ran.err
            told.append(json.loads(ran.out.splitlines()[-1]))
    loaded = load_model(ModelSpec(path=ModelFolder(model_folder)), device=best_device())
    made = list(unpack_corpus(tmp_path / "out" / "corpus.safetensors", backbone_sha256=loaded.sha256))
    assert told[0] == told[1] and told[0]["answers"] == len(made) >= 40 and told[0]["second_turns"] > 0
    assert told[0]["tokens"] == sum(len(sample.token_ids) for sample in made)
    assert not list((tmp_path / "work" / "corpus").glob("states-*")), (
        "text alone: no state is kept where none is learnt from"
    )


def test_labels_are_where_the_templates_own_mask_is(model_folder: Path) -> None:
    tokenizer: Any = load_model(ModelSpec(path=ModelFolder(model_folder)), device=best_device()).tokenizer
    turns = [("word5 word6", "word7 word8 word9"), ("word10", "word11")]
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    marked = (
        "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }} <end>{% endgeneration %} {% else %}{{ message['content'] "
        "}} <end> {% endif %}{% endfor %}"
    )
    whole = tokenizer.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    made = conversation_sequence(tokenizer, turns, max_length=100)
    assert made is not None and list(made.token_ids) == list(whole["input_ids"])
    inside = [
        int(any(start <= index < end for start, end in made.answers)) for index in range(len(made.token_ids))
    ]
    assert inside == list(whole["assistant_masks"]) and sum(inside) == 6


def test_a_whole_corpus_starts_no_worker(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = suite(model_folder)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1, num_gpus=0)
    monkeypatch.setattr(
        "harness.training.workers.multiprocessing.get_context",
        lambda kind: pytest.fail("a worker was started"),
    )
    fill_corpus(spec, work=tmp_path, console=QUIET)


def test_a_recipe_without_a_corpus_has_nothing_to_distil(tmp_path: Path) -> None:
    ran = command("distill", "embedded_direct", "--work", tmp_path / "work")
    assert ran.code == ExitCode.USER_ERROR and "without a corpus to make" in ran.error_line


@pytest.mark.parametrize("note", ["", "12", "nan\n", "0.000\n", "-3.0\n", "\x00"])
def test_a_rate_that_a_kill_cut_short_is_passed_over(tmp_path: Path, note: str) -> None:
    (tmp_path / "rate-0.txt").write_text("20.5\n")
    (tmp_path / "rate-1.txt").write_text(note)
    assert _rates(tmp_path) == ([20.5, 12.0] if note == "12" else [20.5])


def test_a_worker_ends_with_the_command_that_started_it(tmp_path: Path) -> None:
    """After kill -9 of the command it once went on, into a folder that the next command writes into."""
    told = tmp_path / "worker"
    context = multiprocessing.get_context("fork")
    command = context.Process(target=_start_a_worker, args=(told,))
    command.start()
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told.exists(), "the worker did not start"
    watch = os.pidfd_open(int(told.read_text()))
    command.kill()
    command.join()
    ended = bool(select.select([watch], [], [], 60)[0])
    if not ended:
        signal.pidfd_send_signal(watch, signal.SIGKILL)
    os.close(watch)
    assert ended, "it goes on"


def _start_a_worker(told: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_work_for_ever, args=(told,))
    worker.start()
    worker.join()


def _work_for_ever(told: Path) -> None:
    end_with_parent()
    told.write_text(str(os.getpid()), encoding="utf-8")
    while True:
        time.sleep(0.01)
