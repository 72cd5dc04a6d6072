"""Benchmark prompts: loaders on small files, selection, rendering, and the check for overlap."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from harness.assets.chat import render_chat
from harness.assets.prompts import (
    BenchmarkPrompt,
    load_human_eval,
    load_mt_bench,
    load_prompt_file,
    overlap_report,
    select_prompts,
    turns_note,
)
from harness.device.engine import LoadedModel
from harness.device.prompts import NUM_RANDOM_PROMPTS, suite_prompts, warmup_prompts
from harness.errors import UserError
from harness.specs.suite import SuiteSpec
from harness.tests.tiny_suite import smoke_suite

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a letter.", "Now shorter."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And times 3?"]},
]


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gzipped(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_mt_bench_with_references(tmp_path: Path) -> None:
    questions = json_lines(tmp_path / "question.jsonl", QUESTIONS)
    references = json_lines(
        tmp_path / "reference.jsonl", [{"question_id": 111, "choices": [{"turns": ["4", "12"]}]}]
    )
    first, second = load_mt_bench(questions, reference_file=references)
    assert (first.key, first.category, first.turns, first.reference) == (
        "mt_bench-81",
        "writing",
        ("Write a letter.", "Now shorter."),
        None,
    )
    assert second.reference == ("4", "12")
    assert load_mt_bench(questions)[1].reference is None


@pytest.mark.parametrize(
    ("text", "found", "where"),
    [
        ('{"question_id": 1, "category": "x"}\n', "a row without 'turns'", "question.jsonl:1"),
        ('{"question_id": 1, "category": "x", "turns": ["a"]}\n\n[1]\n', "a list", "question.jsonl:3"),
        ("{half", "invalid JSON", "question.jsonl:1"),
    ],
)
def test_mt_bench_names_the_row_at_fault(text: str, found: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        load_mt_bench(tmp_path / "question.jsonl")
    assert caught.value.where == where


def test_broken_references_are_named(tmp_path: Path) -> None:
    questions = json_lines(tmp_path / "question.jsonl", QUESTIONS)
    references = json_lines(tmp_path / "reference.jsonl", [{"question_id": 111, "choices": []}])
    with pytest.raises(UserError, match=r"reference\.jsonl:1"):
        load_mt_bench(questions, reference_file=references)


def test_human_eval(tmp_path: Path) -> None:
    task = {"task_id": "HumanEval/0", "prompt": "def one():\n    ", "canonical_solution": "    return 1\n"}
    path = gzipped(tmp_path / "tasks.jsonl.gz", json.dumps(task) + "\n\n")
    (prompt,) = load_human_eval(path)
    assert (prompt.key, prompt.category, prompt.reference) == ("humaneval-0", "coding", ("    return 1\n",))
    assert prompt.turns[0].endswith("```python\ndef one():\n```")


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip at all",
        gzip.compress(b"{}\n", mtime=0)[:-9],
        gzip.compress(b"{}\n", mtime=0),
        gzip.compress(b"{half\n", mtime=0),
    ],
)
def test_human_eval_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tasks.gz").write_bytes(content)
    with pytest.raises(UserError, match="no readable tasks") as caught:
        load_human_eval(tmp_path / "tasks.gz")
    assert caught.value.where == "tasks.gz"


def test_own_prompts_as_text(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("  one \n\ntwo\u2019s\n", encoding="utf-8")
    prompts = load_prompt_file(tmp_path / "mine.txt")
    assert [(prompt.key, prompt.category, prompt.turns) for prompt in prompts] == [
        ("mine-0", "own", ("one",)),
        ("mine-1", "own", ("two\u2019s",)),
    ]


def test_own_prompts_as_json_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"turns": ["two", "three"], "category": "math", "key": "k"}]
    first, second = load_prompt_file(json_lines(tmp_path / "mine.jsonl", rows))
    assert (first.key, first.category, first.turns) == ("mine-0", "own", ("one",))
    assert (second.key, second.category, second.turns) == ("k", "math", ("two", "three"))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("mine.jsonl", b'{"text": "one"}\n', r"keys \['text'\]"),
        ("mine.jsonl", b'{"prompt": ""}\n', r"keys \['prompt'\]"),
        ("mine.jsonl", b'{"turns": "one"}\n', "keys"),
        ("mine.jsonl", b'{"turns": ["one", 2]}\n', "keys"),
        (
            "mine.jsonl",
            b'{"prompt": "a", "key": "k"}\n{"prompt": "b", "key": "k"}\n',
            "a key that two prompts have",
        ),
        ("mine.jsonl", b"", "no prompt"),
        ("mine.txt", b"\n \n", "no prompt"),
        ("mine.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("mine.json", b'["one", "two"]', "suffix '.json'"),  # once taken as text, brackets and all
    ],
)
def test_own_prompts_that_cannot_be_read(name: str, content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=found) as caught:
        load_prompt_file(tmp_path / name)
    assert caught.value.where is not None and caught.value.where.startswith("mine")


@pytest.mark.parametrize("name", ["gone.txt", "folder.txt"])
def test_own_prompts_need_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="no such file"):
        load_prompt_file(tmp_path / name)


def prompts_of(*categories: str) -> list[BenchmarkPrompt]:
    return [
        BenchmarkPrompt(key=f"{category}{number}", category=category, turns=("x",))
        for number, category in enumerate(categories)
    ]


def test_selection_takes_categories_in_turn_so_that_a_limit_stays_balanced() -> None:
    prompts = prompts_of("a", "a", "a", "b", "b", "c")
    assert [prompt.key for prompt in select_prompts(prompts)] == ["a0", "b3", "c5", "a1", "b4", "a2"]
    assert [prompt.key for prompt in select_prompts(prompts, limit=3)] == ["a0", "b3", "c5"]
    assert [prompt.key for prompt in select_prompts(prompts, per_category=1)] == ["a0", "b3", "c5"]
    assert [prompt.key for prompt in select_prompts(prompts, per_category=2, limit=4)] == [
        "a0",
        "b3",
        "c5",
        "a1",
    ]


def test_a_limit_takes_a_prefix() -> None:
    prompts = prompts_of(*"abcabcabd")
    whole = select_prompts(prompts)
    assert all(select_prompts(prompts, limit=limit) == whole[:limit] for limit in range(1, 10))


class PlainTokenizer:
    """A tokenizer without a chat template: one id a character."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class ChatTokenizer(PlainTokenizer):
    """A tokenizer with one."""

    chat_template = "<user>{}<assistant>"  # type: ignore[assignment]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> dict[str, list[int]]:
        assert (
            options == {"add_generation_prompt": True, "return_dict": True} and messages[0]["role"] == "user"
        )
        return self(f"<user>{messages[0]['content']}<assistant>")


def test_rendering_uses_the_template_where_there_is_one() -> None:
    assert render_chat(PlainTokenizer(), "hi") == (104, 105)
    assert "".join(map(chr, render_chat(ChatTokenizer(), "hi"))) == "<user>hi<assistant>"


def test_overlap_is_found_whatever_its_case_and_punctuation() -> None:
    benchmark = ["Describe a vivid and unique character, using strong imagery and creative language."]
    clean = ["Describe a market in the rain.", "a vivid and unique character using strong pictures"]
    assert overlap_report(clean, benchmark).clean
    report = overlap_report(
        [*clean, "Please: A VIVID and unique -- character using strong imagery; thanks"], benchmark
    )
    assert not report.clean
    (overlap,) = report.overlaps  # two n-grams of one pair of prompts are one overlap
    assert (overlap.training, overlap.benchmark) == (2, 0)
    assert overlap.ngram == "a vivid and unique character using strong imagery"
    assert not overlap_report(clean, benchmark, ngram_words=7).clean


def tiny(suite: SuiteSpec) -> LoadedModel:
    return LoadedModel(model=None, tokenizer=None, name=suite.name, sha256="", eos_ids=frozenset(), assets={})  # type: ignore[arg-type]


def test_random_prompts_follow_the_plan_seed_and_never_warm_up() -> None:
    suite = smoke_suite()
    measured, warmup = suite_prompts(suite, tiny(suite)), warmup_prompts(suite, tiny(suite))
    assert measured == suite_prompts(suite, tiny(suite)) and len(measured) == 8
    assert not {prompt.prompt_ids for prompt in measured} & {prompt.prompt_ids for prompt in warmup}
    assert not {prompt.key for prompt in measured} & {prompt.key for prompt in warmup}
    other = suite.model_copy(update={"plan_seed": 2})
    assert suite_prompts(other, tiny(suite)) != measured
    fewer = suite.model_copy(update={"prompts": suite.prompts.model_copy(update={"limit": 3})})
    assert suite_prompts(fewer, tiny(suite)) == measured[:3]
    default = suite.model_copy(update={"prompts": suite.prompts.model_copy(update={"limit": None})})
    assert len(suite_prompts(default, tiny(suite))) == NUM_RANDOM_PROMPTS
    assert all(0 <= token < 128 for prompt in measured for token in prompt.prompt_ids)


def test_text_prompts_warm_up_with_held_out_training_prompts() -> None:
    suite = smoke_suite().model_copy(
        update={"prompts": smoke_suite().prompts.model_copy(update={"source": "mt_bench"})}
    )
    no_model: Any = None
    loaded = LoadedModel(no_model, ChatTokenizer(), name="", sha256="", eos_ids=frozenset(), assets={})
    warmup = warmup_prompts(suite, loaded)
    assert len(warmup) == 4 and len({prompt.category for prompt in warmup}) == 4
    assert "".join(map(chr, warmup[0].prompt_ids)).startswith("<user>")


def test_random_prompts_need_a_tiny_model() -> None:
    suite = smoke_suite()
    real = suite.model_copy(update={"model": suite.model.model_copy(update={"tiny": None, "asset": "x"})})
    with pytest.raises(UserError, match="need a tiny model"):
        suite_prompts(real, tiny(suite))


def test_a_byte_order_mark_and_odd_separators_stay_out_of_prompts(tmp_path: Path) -> None:
    """Regression: the mark was part of the first prompt; a raw U+2028, U+2029 or U+0085 cut a line in two."""
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfName three\xe2\x80\xa8rivers.\r\nName a lake.\n")
    assert [prompt.turns[0] for prompt in load_prompt_file(tmp_path / "mine.txt")] == [
        "Name three\u2028rivers.",
        "Name a lake.",
    ]
    for separator in ("\u2028", "\u2029", "\x85"):
        line = f'{{"prompt": "first{separator}second"}}\n'
        (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
        (prompt,) = load_prompt_file(tmp_path / "mine.jsonl")
        assert prompt.turns == (f"first{separator}second",)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "   "}', "a blank text"),
        (r'{"turns": ["hi", "\n"]}', "a blank text"),
        (r'{"prompt": "a\u0000b"}', "a NUL character"),
        (r'{"prompt": "bad \ud83d half"}', r"half of a surrogate pair \(\\ud83d\)"),
        (r'{"prompt": "hi", "key": "\ud83d"}', "half of a surrogate pair"),
        (r'{"prompt": "hi", "category": "\ud83d"}', "half of a surrogate pair"),
        ("[" * 100_000, "invalid JSON"),
    ],
)
def test_text_that_no_tokenizer_reads_is_refused(line: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(f'{{"prompt": "hi"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=found) as caught:
        load_prompt_file(tmp_path / "mine.jsonl")
    assert caught.value.where == "mine.jsonl:2"


def test_further_turns_are_not_left_out_without_a_word(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"turns": ["two", "three"]}, {"turns": ["four"]}]
    prompts = load_prompt_file(json_lines(tmp_path / "mine.jsonl", rows))
    note = turns_note(prompts, file="mine.jsonl")
    assert note == "mine.jsonl: 1 of 3 prompts have further turns; only the first turn is decoded"
    assert turns_note(prompts[:1], file="mine.jsonl") is None
