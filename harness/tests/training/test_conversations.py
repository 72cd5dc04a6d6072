"""Conversations as tokens: golden ids of a template, spans of answers, ShareGPT's layout, second turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.assets.listing import find_cached
from harness.errors import UserError
from harness.files import DataPath
from harness.paths import cache_dir, shipped
from harness.specs.assets import load_asset_specs
from harness.specs.recipe import CorpusSpec
from harness.training.conversations import (
    check_has_template,
    conversation_sequence,
    follow_up_ids,
    load_conversations,
    turn_sequences,
)
from harness.training.corpus import amount, catalogue_prompts, goes_on, next_turn_prompts, questions
from medusa_impl.training.distill import CorpusPrompt, CorpusSample
from medusa_impl.training.losses import NO_TARGET
from medusa_impl.training.sequences import IGNORED, SequenceDataset, TrainingSequence, answer_targets, collate

SECOND_TURN = "+2"  # golden: what keys on disk end with


class ChatTokenizer:
    """One id a character; markers of a turn and the end of sequence are single ids; the template is that of
    many chat models.
    """

    chat_template = "a template"
    eos_token, eos_token_id = "$", 0
    _IDS = {"$": 0, "<": 1, ">": 2, "\n": 3}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self._IDS.get(letter, ord(letter)) for letter in text]}

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> Any:
        text = "".join(f"<{message['role'][0]}>{message['content']}$\n" for message in messages) + (
            "<a>" if add_generation_prompt else ""
        )
        return self(text) if tokenize else text


TURNS = (("hi", "yes"), ("so", "no"))


def sample(
    key: str,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    *,
    ended_by: Any = "eos",
    category: str = "writing",
) -> CorpusSample:
    return CorpusSample(key, category, prompt, answer, ended_by, 0.3, 5, None)


def second_turns(firsts: list[CorpusSample], *, spec: CorpusSpec) -> tuple[CorpusPrompt, ...]:
    return next_turn_prompts(ChatTokenizer(), firsts, spec=spec, fits=lambda tokens: True)


def test_a_conversation_is_the_templates_own_text_with_its_answers_marked() -> None:
    """Golden ids: what the template writes, up to the end of the last answer; the end-of-sequence token
    belongs to each answer.
    """
    tokenizer = ChatTokenizer()
    sequence = conversation_sequence(tokenizer, TURNS, max_length=100)
    assert sequence is not None
    messages = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_dict=True)[
        "input_ids"
    ]
    assert list(sequence.token_ids) == whole[:-1]  # but for the line break after the last turn
    answers = [sequence.token_ids[start:end] for start, end in sequence.answers]
    assert answers == [tuple(tokenizer("yes$")["input_ids"]), tuple(tokenizer("no$")["input_ids"])]


def test_a_conversation_is_cut_where_it_is_too_long() -> None:
    whole = conversation_sequence(ChatTokenizer(), TURNS, max_length=100)
    assert whole is not None
    (_, first_end), (second, end) = whole.answers
    cut = conversation_sequence(ChatTokenizer(), TURNS, max_length=end - 1)
    assert cut is not None and cut.answers[1] == (second, end - 1) and len(cut.token_ids) == end - 1
    one = conversation_sequence(ChatTokenizer(), TURNS, max_length=first_end + 2)
    assert one is not None and len(one.answers) == 1
    assert conversation_sequence(ChatTokenizer(), TURNS, max_length=3) is None


def test_sharegpt_is_read_and_what_takes_no_turns_is_left_out(tmp_path: Path) -> None:
    def say(*words: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": who, "value": text} for who, text in words]

    rows = [
        {
            "id": "a",
            "conversations": say(
                ("gpt", "welcome"), ("human", "hi"), ("gpt", "yes"), ("human", "unanswered")
            ),
        },
        {"id": "b", "conversations": say(("human", "one"), ("human", "two"))},
        {
            "id": "c",
            "conversations": say(("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")),
        },
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_conversations(tmp_path / "list.json")
    assert [(one.key, one.turns) for one in found] == [("a", (("hi", "yes"),)), ("c", TURNS)]
    assert load_conversations(tmp_path / "lines.jsonl") == found


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '[{"id": 1}]', '[{"conversations": [{"from": "human", "value": "alone"}]}]']
)
def test_files_without_conversations_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(UserError, match=r"wrong\.json"):
        load_conversations(tmp_path / "wrong.json")


def test_two_turns_become_one_sequence_with_two_spans() -> None:
    first, second = sample("k", (5, 6), (7, 8, 0)), sample("k" + SECOND_TURN, (5, 6, 7, 8, 0, 3, 9), (10, 0))
    other = sample("m", (4,), (11,))
    ((key, pair), (_, single)) = turn_sequences([second, first, other], max_length=50)
    assert key == "k" and pair.token_ids == (5, 6, 7, 8, 0, 3, 9, 10, 0) and pair.answers == ((2, 5), (7, 9))
    assert single.answers == ((1, 2),)
    assert turn_sequences([first, second], max_length=8)[0][1].answers == ((2, 5), (7, 8))
    assert turn_sequences([first, second], max_length=7)[0][1].answers == ((2, 5),)
    with pytest.raises(UserError, match="after another answer"):
        turn_sequences([sample("k", (5, 6), (7, 9, 0)), second], max_length=50)


def test_second_turns_follow_answers_that_ended_and_resume_by_key() -> None:
    spec = CorpusSpec(num_tokens=400, max_new_tokens=20, second_turn_share=0.5)
    firsts = [
        sample(f"k{index}", (1, 2), (60 + index, 0), ended_by="eos" if index % 4 else "budget")
        for index in range(80)
    ]
    prompts = second_turns(firsts, spec=spec)
    going = {one.key for one in firsts if goes_on(one, spec=spec)}
    assert {prompt.key for prompt in prompts} == {key + SECOND_TURN for key in going}
    # 60 ended, half of them wanted
    assert 15 < len(going) < 45 and not {f"k{index}" for index in range(0, 80, 4)} & going
    by_key = {one.key: one for one in firsts}
    for prompt in prompts:
        before = by_key[prompt.key.removesuffix(SECOND_TURN)]
        assert prompt.prompt_ids[:4] == (*before.prompt_ids, *before.token_ids) and prompt.temperature == 0.3
        assert prompt.prompt_ids[4:7] == (3, 1, ord("u")), (
            "the line break that the template has after an answer, then the next turn"
        )
    assert second_turns(firsts[:40], spec=spec) == tuple(
        prompt for prompt in prompts if int(prompt.key[1:].removesuffix(SECOND_TURN)) < 40
    )
    assert not second_turns(firsts, spec=CorpusSpec(num_tokens=400))


def vicuna_template() -> str:
    return shipped("chat_templates", "vicuna.jinja").read_text()


def written_out(turns: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def marked(tokenizer: Any, sequence: TrainingSequence | None) -> str:
    """The tokens of a sequence as the trainer gets them, a star before each that is trained on."""
    assert sequence is not None
    row = SequenceDataset([sequence])[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert all(
        label in (IGNORED, token_id) for label, token_id in zip(row["labels"], row["input_ids"], strict=True)
    )
    return " ".join(
        ("" if label == IGNORED else "*") + token for label, token in zip(row["labels"], tokens, strict=True)
    )


def test_vicunas_template_writes_its_roles() -> None:
    """Golden text: a system line, one space, roles in capitals, the end of sequence after answers and
    nowhere else.
    """
    plain = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = vicuna_template()
    messages = written_out(TURNS)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<s>A chat between") and text.endswith(
        "answers to the user's questions. USER: hi ASSISTANT: yes</s>USER: so ASSISTANT: no</s>"
    )
    own = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, messages[0]], add_generation_prompt=True, tokenize=False
    )
    assert own == "<s>Be brief. USER: hi ASSISTANT:"


# Written by hand from suites/chat_templates/vicuna.jinja: a bar before each word, as Llama's tokenizers set
# it; stars on the answers.
VICUNA_GOLDEN = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The "
    "▁assistant ▁gives ▁helpful, ▁detailed, "
    "▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions. ▁USER: ▁hi ▁ASSISTANT: *▁yes, *▁always *</s> "
    "▁USER: ▁so ▁ASSISTANT: *▁no *</s>"
)
# AutoTokenizer.from_pretrained(FOLDER), FOLDER of the asset smollm2-135m-instruct, under transformers 5.23.0:
# its apply_chat_template on written_out(LONGER), then convert_ids_to_tokens, without the line break at the
# end; the stars set by hand.
SMOLLM2_GOLDEN = (
    "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH "
    "ugging ĠFace <|im_end|> Ċ "
    "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> ass istant Ċ *yes *, *Ġalways *<|im_end|> Ċ "
    "<|im_start|> user Ċ so <|im_end|> Ċ <|im_start|> ass istant Ċ *no *<|im_end|>"
)
LONGER = (("hi", "yes, always"), ("so", "no"))


def test_under_vicunas_template_the_assistants_tokens_are_trained_on_and_no_others() -> None:
    """Golden mask of two turns, the end of sequence of both included, and what each position is asked for."""
    tokens = list(dict.fromkeys(["<unk>", *VICUNA_GOLDEN.replace("*", "").split()]))
    words = Tokenizer(
        models.WordLevel({token: token_id for token_id, token in enumerate(tokens)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = vicuna_template()
    sequence = conversation_sequence(tokenizer, LONGER, max_length=100)
    assert marked(tokenizer, sequence) == VICUNA_GOLDEN
    assert sequence is not None
    assert (
        list(sequence.token_ids)
        == tokenizer.apply_chat_template(written_out(LONGER), return_dict=True)["input_ids"]
    )
    batch = collate([SequenceDataset([sequence])[0]])
    targets = answer_targets(batch["labels"], num_heads=1)[0]
    asked = [
        (tokenizer.convert_ids_to_tokens(token_id), *(["-", *tokens][target + 1] for target in row))
        for token_id, row in zip(sequence.token_ids, targets.tolist(), strict=True)
        if row[0] != NO_TARGET
    ]
    assert asked == [
        ("▁ASSISTANT:", "▁yes,", "▁always"),
        ("▁yes,", "▁always", "</s>"),
        ("▁always", "</s>", "-"),
        ("▁ASSISTANT:", "▁no", "</s>"),
        ("▁no", "</s>", "-"),
    ]


def test_under_smollm2s_own_template_the_assistants_tokens_are_trained_on_and_no_others() -> None:
    """Golden mask of two turns: neither the roles nor the line break after an answer is trained on, the end
    of sequence is.
    """
    found = find_cached(load_asset_specs()["smollm2-135m-instruct"], cache_dir=cache_dir())
    if found is None:
        pytest.skip(
            "the asset smollm2-135m-instruct is not in the cache; `medusa-repro assets "
            "smollm2-135m-instruct` puts it there"
        )
    tokenizer = AutoTokenizer.from_pretrained(found[1]["model"], local_files_only=True)
    assert marked(tokenizer, conversation_sequence(tokenizer, LONGER, max_length=100)) == SMOLLM2_GOLDEN


def test_conversations_without_a_template_are_refused() -> None:
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None  # type: ignore[assignment]
    spec = CorpusSpec(num_samples=20, second_turn_share=1.0)
    with pytest.raises(UserError, match=r"without a chat template; .*model\.chat_template"):
        next_turn_prompts(tokenizer, [sample("k1", (1,), (2, 0))], spec=spec, fits=lambda tokens: True)
    with pytest.raises(UserError, match=r"mine\.toml"):
        check_has_template(tokenizer, where="mine.toml")


def test_the_second_question_of_a_file_is_its_own(tmp_path: Path) -> None:
    rows = [{"key": "k1", "turns": ["first", "second"]}, {"key": "k2", "turns": ["alone"]}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = CorpusSpec(num_samples=2, prompts_file=DataPath(tmp_path / "own.jsonl"), second_turn_share=1.0)
    firsts = [sample("k1", (1,), (2, 0)), sample("k2", (1,), (2, 0))]
    (prompt,) = second_turns(firsts, spec=spec)
    assert prompt.prompt_ids == (1, 2, 0, *follow_up_ids(ChatTokenizer(), "second"))
    assert [one.text for one in catalogue_prompts(spec, 9)] == ["first", "alone"]
    assert questions(spec) == ("first", "second", "alone"), "what is compared with the benchmarks"


def test_a_corpus_has_one_goal() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        CorpusSpec(num_tokens=5, num_samples=5)
    answers = CorpusSpec(num_samples=3)
    samples = [sample("k", (1,), (2, 0)), sample("k" + SECOND_TURN, (1, 2, 0, 3), (2, 0))]
    assert amount(answers, samples) == 1 and amount(CorpusSpec(num_tokens=9), samples) == 2
    assert (answers.goal, answers.unit) == (3, "answers")


class WordyTokenizer(ChatTokenizer):
    """Its template begins with a sentence that holds what once stood for the answer."""

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        told = super().apply_chat_template(messages, **{**options, "tokenize": False})
        text = "ANSWER each question.\n" + told
        return self(text) if options.get("tokenize", True) else text


def test_a_template_that_holds_the_stand_in_word_changes_no_later_turn() -> None:
    """Regression: all of the template after the word ANSWER, the first turn too, went into the second."""
    assert follow_up_ids(WordyTokenizer(), "ANSWER me") == follow_up_ids(ChatTokenizer(), "ANSWER me")


def test_a_byte_order_mark_and_odd_separators_stay_out_of_conversations(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "conversations": [{"from": "human", "value": "x\u2028y\x85"}, {"from": "gpt", "value": "z"}],
    }
    for name, text in (
        ("list.json", json.dumps([row])),
        ("lines.jsonl", json.dumps(row, ensure_ascii=False)),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        (found,) = load_conversations(tmp_path / name)
        assert found.turns == (("x\u2028y\x85", "z"),)


@pytest.mark.parametrize("said", [r"x \ud83d", r"x \u0000"])
def test_conversations_that_no_tokenizer_reads_are_refused(said: str, tmp_path: Path) -> None:
    text = f'[{{"conversations": [{{"from": "human", "value": "{said}"}}, {{"from": "gpt", "value": "y"}}]}}]'
    (tmp_path / "wrong.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"wrong\.json, conversation '0'"):
        load_conversations(tmp_path / "wrong.json")
