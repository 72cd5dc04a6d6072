"""A corpus of one turn and two, made by a tiny model with a tokenizer of its own, from the catalogue's prompts to sequences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tomli_w
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.config import ModelSpec
from harness.conversations import SECOND_TURN, conversation_sequence
from harness.corpus import goes_on
from harness.distill_run import distill_suite
from harness.engine import best_device, load_model, model_sha256
from harness.errors import ExitCode, UserError
from harness.joint_run import read_text
from harness.tests.tiny_suite import QUIET, command
from harness.training_run import corpus_backbone, corpus_worker, fill_corpus
from harness.training_specs import JointSuite
from medusa_impl.distill import CorpusSample, CorpusStore, unpack_corpus
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer knows a few words and calls all others unknown; id 0 ends a sequence."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    words = {"<end>": 0, "<unknown>": 1, "<user>": 2, "<assistant>": 3, **{f"word{index}": index for index in range(4, TINY_VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unknown>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    model = tiny_llama(scale=0.1)  # nearly uniform: about a quarter of the answers end by themselves
    model.generation_config.eos_token_id = 0
    model.save_pretrained(str(folder))
    return folder


def suite(model_folder: Path) -> JointSuite:
    corpus = {"num_samples": 40, "max_new_tokens": 16, "sampled_share": 1.0, "temperature": 1.0, "num_rows": 8, "second_turn_share": 1.0}
    data = {"schema_version": 1, "kind": "joint", "name": "tiny", "description": "-", "model": {"path": str(model_folder)}}
    return JointSuite.model_validate({**data, "corpus": corpus, "recipe": {"num_steps": 2}})


def samples(work: Path) -> dict[str, CorpusSample]:
    return {sample.key: sample for sample in CorpusStore(work / "corpus").samples(with_states=False)}


def test_conversations_of_two_turns_are_made_resumed_and_read(model_folder: Path, tmp_path: Path) -> None:
    spec = suite(model_folder)
    assert spec.corpus is not None
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1)
    made = samples(tmp_path)
    first = {key: sample for key, sample in made.items() if not key.endswith(SECOND_TURN)}
    going_on = {key for key, sample in first.items() if goes_on(sample, spec=spec.corpus)}
    assert len(first) >= 40 and 2 <= len(going_on) < len(first)
    assert {key for key in made if key.endswith(SECOND_TURN)} == {key + SECOND_TURN for key in going_on}
    for key in going_on:
        before, after = first[key], made[key + SECOND_TURN]
        context = (*before.prompt_ids, *before.token_ids)
        assert after.prompt_ids[: len(context)] == context and before.token_ids[-1] == 0
        assert after.prompt_ids[len(context)] == 2 and after.prompt_ids[-1] == 3, "the end of the answer stands once, then the next turn"

    loaded = load_model(ModelSpec(path=str(model_folder)), device=best_device())
    assert corpus_backbone(CorpusStore(tmp_path / "corpus")) == loaded.sha256
    text = read_text(spec, loaded, work=tmp_path)
    sequences = (*text.train, *text.held_out)
    assert len(sequences) == len(first), "a second turn is part of its conversation, not one of its own"
    assert sum(len(sequence.answers) == 2 for sequence in sequences) == len(going_on)

    shards = sorted((tmp_path / "corpus").glob("corpus-*.jsonl"))
    shards[-1].unlink()  # as if the run had been killed before its last shard was whole
    assert len(samples(tmp_path)) < len(made)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1)
    again = samples(tmp_path)
    assert again.keys() == made.keys()
    assert all(again[key].prompt_ids == made[key].prompt_ids for key in first)


def test_another_models_answers_in_the_work_folder_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Regression: a recipe whose model was changed went on with the first one's answers, and called them the second one's."""
    spec = suite(model_folder)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1)
    other = shutil.copytree(model_folder, tmp_path / "other")
    torch.manual_seed(5)
    changed = tiny_llama(scale=0.1)
    torch.nn.init.normal_(changed.lm_head.weight)
    changed.save_pretrained(str(other))
    elsewhere = spec.model_copy(update={"model": ModelSpec(path=str(other))})
    loaded = load_model(elsewhere.model, device=best_device())
    assert model_sha256(elsewhere.model) == loaded.sha256 != corpus_backbone(CorpusStore(tmp_path / "corpus"))
    for use in (
        lambda: fill_corpus(elsewhere, work=tmp_path, console=QUIET),
        lambda: corpus_worker(elsewhere.model_dump(mode="json"), str(tmp_path), 0, 1),
        lambda: read_text(elsewhere, loaded, work=tmp_path),
        lambda: distill_suite(elsewhere, work=tmp_path, target=tmp_path / "out", console=QUIET),
    ):
        with patch("harness.distill_run.check_overlap"), pytest.raises(UserError, match="found the answers of a model with tensors"):
            use()


def test_distill_answers_packs_and_goes_on_from_the_command_line(model_folder: Path, tmp_path: Path) -> None:
    data = suite(model_folder).model_dump(mode="json", exclude_none=True)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps({**data, "num_workers": 2}))
    told = []
    with patch("harness.distill_run.check_overlap"):
        for _ in range(2):
            ran = command("distill", recipe, "--work", tmp_path / "work", "--out", tmp_path / "out")
            assert ran.code == ExitCode.OK, ran.err
            told.append(json.loads(ran.out.splitlines()[-1]))
    loaded = load_model(ModelSpec(path=str(model_folder)), device=best_device())
    made = list(unpack_corpus(tmp_path / "out" / "corpus.safetensors", backbone_sha256=loaded.sha256))
    assert told[0] == told[1] and told[0]["answers"] == len(made) >= 40 and told[0]["second_turns"] > 0
    assert told[0]["tokens"] == sum(len(sample.token_ids) for sample in made)
    assert not list((tmp_path / "work" / "corpus").glob("states-*")), "text alone: no state is kept where none is learnt from"


def test_labels_are_where_the_templates_own_mask_is(model_folder: Path) -> None:
    tokenizer: Any = load_model(ModelSpec(path=str(model_folder)), device=best_device()).tokenizer
    turns = [("word5 word6", "word7 word8 word9"), ("word10", "word11")]
    messages = [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    marked = (
        "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }} <end>{% endgeneration %} {% else %}{{ message['content'] }} <end> {% endif %}{% endfor %}"
    )
    whole = tokenizer.apply_chat_template(messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    made = conversation_sequence(tokenizer, turns, max_length=100)
    assert made is not None and list(made.token_ids) == list(whole["input_ids"])
    inside = [int(any(start <= index < end for start, end in made.answers)) for index in range(len(made.token_ids))]
    assert inside == list(whole["assistant_masks"]) and sum(inside) == 6


def test_a_whole_corpus_starts_no_worker(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = suite(model_folder)
    corpus_worker(spec.model_dump(mode="json"), str(tmp_path), 0, 1)
    monkeypatch.setattr("harness.training_run.multiprocessing.get_context", lambda kind: pytest.fail("a worker was started"))
    fill_corpus(spec, work=tmp_path, console=QUIET)


def test_a_recipe_without_a_corpus_has_nothing_to_distil(tmp_path: Path) -> None:
    ran = command("distill", "embedded_direct", "--work", tmp_path / "work")
    assert ran.code == ExitCode.USER_ERROR and "without a corpus to make" in ran.error_line
