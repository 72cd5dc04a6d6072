"""Chat templates that fail, or that ask for the date."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.assets.chat import asks_for_date, fix_date, render_chat, render_messages, taken_date
from harness.errors import UserError

DATED = "Today is {{ strftime_now('%d %b %Y %H') }}. {{ messages[0]['content'] }}"
NEW_YEAR = date(2026, 1, 1)


def tokenizer_with(template: Any) -> Any:
    words = {word: index for index, word in enumerate(("<unknown>", "hi", "2026", "Today"))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unknown>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}{{ m.content }",
        "{{ messages[0].content / 0 }}",
        "{{ nothing.at.all }}",
        {"one": "{{ messages[0].content }}", "two": "{{ messages[0].content }}"},
    ],
    ids=["raises", "broken", "wrong_type", "undefined", "several_without_a_default"],
)
def test_a_template_that_fails_is_one_line(template: Any) -> None:
    with pytest.raises(UserError, match="a chat template that fails") as caught:
        render_chat(tokenizer_with(template), "hi")
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no token of the text 'hi'"):
        render_chat(tokenizer_with("{{ '' }}"), "hi")


def test_a_dated_template_writes_the_day_of_the_run() -> None:
    """The day is fixed, else that on which the run began: a resume after midnight reads the same prompts."""
    messages = [{"role": "user", "content": "hi"}]
    dated = tokenizer_with(DATED)
    assert asks_for_date(dated) and taken_date(dated, begun=NEW_YEAR) == NEW_YEAR
    assert render_messages(dated, messages) == "Today is 01 Jan 2026 00. hi"
    assert render_chat(dated, "hi")[0] == 3
    assert taken_date(dated, begun=date(2026, 1, 2)) == NEW_YEAR, "taken once"
    fixed = tokenizer_with({"default": DATED})
    fix_date(fixed, date(2025, 12, 31))
    assert taken_date(fixed, begun=NEW_YEAR) == date(2025, 12, 31), "the file's own day goes first"
    assert taken_date(tokenizer_with(DATED), begun=None) == date.today()
    assert taken_date(tokenizer_with("{{ messages[0].content }}"), begun=NEW_YEAR) is None
    assert taken_date(None, begun=NEW_YEAR) is None
