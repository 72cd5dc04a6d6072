"""Corpora of any number of turns: keys, prompts and sequences, what ends a conversation, and files from
before that read as they did.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.files import canonical_sha256
from harness.paths import shipped
from harness.specs.recipe import CorpusSpec
from harness.tests.training.test_conversations import ChatTokenizer, sample
from harness.training.conversations import (
    conversation_and_turn,
    follow_up_ids,
    next_turn_key,
    turn_key,
    turn_sequences,
)
from harness.training.corpus import amount, catalogue_prompts, next_questions, next_turn_prompts, questions
from medusa_impl.training.distill import CorpusPrompt, CorpusSample, CorpusStore, unpack_corpus

# Two shards as `CorpusStore(folder, shard_samples=2)` wrote them at commit 8c2fed6: a conversation of two
# turns, and one of a single turn.
OLD_SHARDS = {
    "corpus-0-00000.jsonl": (
        '{"schema_version":1,"key":"k1","category":"own","temperature":0.3,"seed":5,"ended_by":"eos","prompt_ids":[5,6],"token_ids":[7,0]}\n'
        '{"schema_version":1,"key":"k2","category":"own","temperature":0.0,"seed":6,"ended_by":"budget","prompt_ids":[4],"token_ids":[8]}\n'
    ),
    "corpus-0-00001.jsonl": (
        '{"schema_version":1,"key":"k1+2","category":"own","temperature":0.3,"seed":7,"ended_by":"eos",'
        '"prompt_ids":[5,6,7,0,3,9],"token_ids":[10,0]}\n'
    ),
}


def spec_of(folder: Path, rows: list[dict[str, object]], **changes: object) -> CorpusSpec:
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = {"num_samples": 2, "second_turn_share": 1.0, "prompts_file": str(folder / "own.jsonl"), **changes}
    return CorpusSpec.model_validate(table)


def next_prompts(
    samples: list[CorpusSample], *, spec: CorpusSpec, max_tokens: int = 1000
) -> tuple[CorpusPrompt, ...]:
    return next_turn_prompts(ChatTokenizer(), samples, spec=spec, fits=lambda tokens: tokens <= max_tokens)


def answer(prompt: CorpusPrompt, *token_ids: int) -> CorpusSample:
    return sample(prompt.key, prompt.prompt_ids, token_ids)


def test_keys_name_conversation_and_turn() -> None:
    assert [turn_key("k", turn) for turn in (1, 2, 3, 12)] == ["k", "k+2", "k+3", "k+12"]
    for name in ("k", "c++", "a+b", "k+1", "k+02", "+2"):
        assert conversation_and_turn(name) == (name, 1)
        for turn in (2, 9, 10, 100):
            assert conversation_and_turn(turn_key(name, turn)) == (name, turn)
            assert next_turn_key(turn_key(name, turn)) == turn_key(name, turn + 1)


def test_a_files_turns_are_asked_one_after_another(tmp_path: Path) -> None:
    """Regression: what a file asked beyond its second turn was never put to the model."""
    spec = spec_of(
        tmp_path,
        [{"key": "k1", "turns": ["one", "two", "three", "four"]}, {"key": "k2", "turns": ["one", "two"]}],
    )
    held = [sample("k1", (1,), (2, 0)), sample("k2", (1,), (2, 0))]
    asked = []
    while prompts := next_prompts(held, spec=spec):
        assert next_prompts(held, spec=spec) == prompts, (
            "the same prompts and seeds however often it is asked"
        )
        asked.append([prompt.key for prompt in prompts])
        held += [answer(prompt, 40 + len(held), 0) for prompt in prompts]
    assert asked == [["k1+2", "k2+2"], ["k1+3"], ["k1+4"]]
    assert questions(spec) == ("one", "two", "three", "four", "one", "two"), (
        "what is compared with the benchmarks"
    )
    by_key = {one.key: one for one in held}
    tokenizer = ChatTokenizer()
    last = by_key["k1+4"]
    context: tuple[int, ...] = ()
    for key, question in (("k1", None), ("k1+2", "two"), ("k1+3", "three"), ("k1+4", "four")):
        context += follow_up_ids(tokenizer, question) if question is not None else (1,)
        assert by_key[key].prompt_ids == context
        context += by_key[key].token_ids
    assert len({prompt.seed for prompt in next_prompts(held[:2], spec=spec)}) == 2

    ((name, sequence), _) = turn_sequences(reversed(held), max_length=1000)[::-1]
    assert name == "k1" and sequence.token_ids == context == (*last.prompt_ids, *last.token_ids)
    answers = [sequence.token_ids[start:end] for start, end in sequence.answers]
    assert answers == [by_key[key].token_ids for key in ("k1", "k1+2", "k1+3", "k1+4")]


def test_a_conversation_goes_on_from_where_it_is(tmp_path: Path) -> None:
    """Some of a killed run's conversations are a turn ahead of the others."""
    spec = spec_of(tmp_path, [{"key": name, "turns": ["one", "two", "three"]} for name in ("k1", "k2", "k3")])
    firsts = [sample(name, (1,), (2, 0)) for name in ("k1", "k2", "k3")]
    seconds = [answer(prompt, 50, 0) for prompt in next_prompts(firsts, spec=spec)]
    assert [prompt.key for prompt in next_prompts([*firsts, seconds[1]], spec=spec)] == [
        "k1+2",
        "k3+2",
        "k2+3",
    ]


def test_what_ends_a_conversation(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"key": "k1", "turns": ["one", "two", "three" * 20]}]
    first = sample("k1", (1,), (2, 0))
    (second,) = next_prompts([first], spec=spec_of(tmp_path, rows))
    whole, cut = answer(second, 9, 0), CorpusSample(**{**answer(second, 9).__dict__, "ended_by": "budget"})
    (third,) = next_prompts([first, whole], spec=spec_of(tmp_path, rows))
    length = len(third.prompt_ids)
    assert next_prompts([first, whole], spec=spec_of(tmp_path, rows), max_tokens=length) == (third,)
    assert not next_prompts([first, whole], spec=spec_of(tmp_path, rows), max_tokens=length - 1), (
        "no room for another answer"
    )
    assert not next_prompts([first, whole], spec=spec_of(tmp_path, rows, max_prompt_tokens=50)), (
        "a question too long"
    )
    assert not next_prompts([first, cut], spec=spec_of(tmp_path, rows)), "an answer that was cut off"
    assert not next_prompts([first, whole], spec=spec_of(tmp_path, rows, second_turn_share=0.0))


def test_the_projects_own_conversations_have_two_turns() -> None:
    spec = CorpusSpec(num_samples=20, second_turn_share=1.0)
    first = sample("writing-1", (1,), (2, 0))
    (second,) = next_prompts([first], spec=spec)
    assert second.key == "writing-1+2" and not next_questions([first, answer(second, 3, 0)], spec=spec)


@pytest.mark.parametrize("key", ["c+2", "c++11"])
def test_a_files_key_that_a_later_turn_would_bear_is_refused(tmp_path: Path, key: str) -> None:
    spec = spec_of(tmp_path, [{"key": key, "turns": ["one"]}])
    with pytest.raises(UserError, match=r"found the key .*; in own\.jsonl; to mend it: rename the key"):
        catalogue_prompts(spec, 5)


def test_a_key_that_looks_like_a_later_turns_is_a_conversation_where_nothing_is_before_it() -> None:
    """A file could name one so before such keys were refused: its answers stay what they were."""
    made = dict(
        turn_sequences([sample("lesson+3", (5, 6), (7, 0)), sample("k", (4,), (8, 0))], max_length=50)
    )
    assert made["lesson+3"].answers == ((2, 4),) and made["k"].answers == ((1, 3),)


def test_a_third_turn_behind_another_answer_is_refused() -> None:
    turns = [
        sample("k", (1,), (2, 0)),
        sample("k+2", (1, 2, 0, 3), (4, 0)),
        sample("k+3", (1, 2, 0, 3, 5, 0, 6), (7, 0)),
    ]
    with pytest.raises(UserError, match=r"the turn 'k\+3' after another answer"):
        turn_sequences(turns, max_length=50)


def test_shards_from_before_read_as_they_did(tmp_path: Path) -> None:
    for name, text in OLD_SHARDS.items():
        (tmp_path / name).write_text(text)
    store = CorpusStore(tmp_path)
    assert store.finished_keys() == {"k1", "k2", "k1+2"}
    ((first, pair), (second, single)) = turn_sequences(store.samples(), max_length=50)
    assert (first, second) == ("k1", "k2")
    assert pair.token_ids == (5, 6, 7, 0, 3, 9, 10, 0) and pair.answers == ((2, 4), (6, 8))
    assert single.token_ids == (4, 8) and single.answers == ((1, 2),)
    assert amount(CorpusSpec(num_samples=9), store.samples()) == 2
    copy = CorpusStore(tmp_path / "copy", shard_samples=2)
    for one in store.samples():
        copy.add(one)
    copy.flush()
    assert {path.name: path.read_text() for path in copy.shard_files()} == OLD_SHARDS, (
        "and are written as they were"
    )


def test_the_shipped_corpus_gives_the_sequences_it_gave() -> None:
    """Golden hash of `turn_sequences(unpack_corpus(FILE, backbone_sha256=None), max_length=512)` at commit
    8c2fed6, before third turns.
    """
    path = shipped("embedded", "corpus.safetensors")
    made = turn_sequences(unpack_corpus(path, backbone_sha256=None), max_length=512)
    found = canonical_sha256([(key, sequence.token_ids, sequence.answers) for key, sequence in made])
    assert len(made) == 4352 and found == "b7655e73f57fb6967fd5b770118db108c9391ee7bfaf7e27f38e2ca2b05803b1"
