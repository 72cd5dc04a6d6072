"""Messages through a tokenizer's chat template, which is a program of its model's authors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from harness.errors import UserError

_DAY = "medusa_repro_chat_date"  # attribute of a tokenizer
_ASKS = "strftime_now"  # the function by which a template asks
_CODES = (
    *(f"%-{letter}" for letter in "dmyHIMSj"),
    *(f"%{letter}" for letter in "aAbBcdDeFHIjmMpSTuUwWxXyY"),
)


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def render_chat(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return one user message as token ids, through the tokenizer's chat template, ready for the answer.

    A tokenizer without a template gets the plain text.
    Raises: UserError for a template that fails, or where no token comes out.
    """
    if has_template(tokenizer):
        ids = _applied(tokenizer, [{"role": "user", "content": text}], return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    if not len(ids):
        raise UserError(
            found=f"no token of the text {text[:40]!r}",
            need="at least one",
            where="the tokenizer or its chat template",
            do="name another Jinja file in [model] chat_template",
        )
    return tuple(ids)


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages through the tokenizer's chat template, as text. Raises: UserError where it fails."""
    return str(_applied(tokenizer, messages, tokenize=False))


def asks_for_date(tokenizer: Any) -> bool:
    """Return whether the chat template writes the date of the day into its text."""
    templates = getattr(tokenizer, "chat_template", None)
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return any(_ASKS in text for text in texts if isinstance(text, str))


def fix_date(tokenizer: Any, day: date) -> None:
    """Make the chat template of a tokenizer write one date, whatever the day on which it is rendered."""
    setattr(tokenizer, _DAY, day)


def fixed_date(tokenizer: Any) -> date | None:
    """Return the date that a chat template is made to write; None where it would write today's."""
    day: date | None = getattr(tokenizer, _DAY, None)
    return day


def taken_date(tokenizer: Any, *, begun: date | None) -> date | None:
    """Return the date that the chat template writes from now on; None where it asks for none.

    It is the one that was fixed, else that of the day on which the work was `begun`, else today's.
    """
    if tokenizer is None or not asks_for_date(tokenizer):
        return None
    day = fixed_date(tokenizer) or begun or date.today()
    fix_date(tokenizer, day)
    return day


def _told(day: date) -> str:
    """Return a macro that goes before a template and before the function by which it would ask for today."""
    moment = datetime.combine(day, time())
    told = "".join(f".replace('{code}', '{moment.strftime(code)}')" for code in _CODES)
    return f"{{%- macro {_ASKS}(format) -%}}{{{{ format{told} }}}}{{%- endmacro -%}}"


def _applied(tokenizer: Any, messages: Sequence[Mapping[str, str]], **how: Any) -> Any:
    day = fixed_date(tokenizer)
    try:
        if day is not None and asks_for_date(tokenizer):
            how["chat_template"] = _told(day) + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **how)
    except Exception as error:  # a template may raise whatever it likes
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            found=f"a chat template that fails ({type(error).__name__}: {reason})",
            need="one that renders what a user asks",
            where="the tokenizer",
            do="name another Jinja file in [model] chat_template; chat_templates/vicuna.jinja is shipped",
        ) from error
