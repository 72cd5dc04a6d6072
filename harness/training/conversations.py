"""Conversations of several turns as token ids, with the spans that are the assistant's answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.assets.chat import has_template, render_chat, render_messages
from harness.assets.prompts import check_text
from harness.errors import UserError
from harness.files import Frozen, lines_of, read_text
from medusa_impl.training.distill import CorpusSample
from medusa_impl.training.sequences import TrainingSequence

# the key of an answer to a later turn: its conversation's, and "+2"
_LATER_TURN = re.compile(r"(.+)\+([2-9]|[1-9][0-9]+)", re.DOTALL)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Conversation(Frozen):
    """One conversation: pairs of what the user asks and the assistant answers."""

    key: str
    turns: tuple[tuple[str, str], ...]


def load_conversations(path: Path) -> tuple[Conversation, ...]:
    """Return the conversations of a file in ShareGPT's layout.

    That is a JSON list, or one JSON object a line, of `conversations` with `from` and `value`.
    What comes before the first question, and a question without an answer at the end, are left out; so is a
    conversation whose speakers do not take turns.
    Raises: UserError for a file that is no such thing or holds no conversation, and for a text in it that no
    tokenizer reads.
    """
    text = read_text(path, need="a file of conversations in UTF-8")
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in lines_of(text) if line.strip()]
        )
        found = [(str(row.get("id", index)), _pairs(row["conversations"])) for index, row in enumerate(rows)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            found=f"no readable conversations ({type(error).__name__}: {error})",
            need="objects with `conversations`, a list of `from` and `value`",
            where=path.name,
        ) from error
    for key, turns in found:
        for said in (key or "-", *itertools.chain.from_iterable(turns)):
            check_text(said, where=f"{path.name}, conversation {key!r}")
    kept = tuple(Conversation(key=key, turns=turns) for key, turns in found if turns)
    if not kept:
        raise UserError(
            found="no conversation in which user and assistant take turns",
            need="at least one such conversation",
            where=path.name,
            do="check that each begins with the user and ends with the assistant",
        )
    return kept


def check_has_template(tokenizer: Any, *, where: str) -> None:
    """Refuse a tokenizer without a chat template: conversations would be trained on as text without roles.

    Raises: UserError.
    """
    if not has_template(tokenizer):
        raise UserError(
            found="a tokenizer without a chat template",
            need="a chat template, for conversations of several turns",
            where=where,
            do="name a Jinja file in model.chat_template; chat_templates/vicuna.jinja is shipped",
        )


def conversation_sequence(
    tokenizer: Any, turns: Sequence[tuple[str, str]], *, max_length: int
) -> TrainingSequence | None:
    """Return a conversation through the tokenizer's chat template, or None where no answer is left.

    It is cut at `max_length`.
    Each answer's span holds its text and the end-of-sequence token after it, as the model would have to
    write them.
    """
    token_ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for question, answer in turns:
        token_ids += follow_up_ids(tokenizer, question) if token_ids else render_chat(tokenizer, question)
        start = len(token_ids)
        token_ids += [*tokenizer(answer, add_special_tokens=False)["input_ids"], *_end(tokenizer)]
        answers.append((start, len(token_ids)))
    cut = tuple((start, min(end, max_length)) for start, end in answers if start < max_length)
    return TrainingSequence(token_ids=tuple(token_ids[:max_length]), answers=cut) if cut else None


def follow_up_ids(tokenizer: Any, question: str) -> tuple[int, ...]:
    """Return the tokens between an answer that ended and the next.

    These are the template's own text around the next question.
    A tokenizer without a template gets the plain text.
    """
    if not has_template(tokenizer):
        return tuple(tokenizer(question, add_special_tokens=False)["input_ids"])
    # for the answer, while the template is rendered; no template and no question can hold it
    stand_in = "answer" + hashlib.sha256(question.encode()).hexdigest()
    messages = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": stand_in},
        {"role": "user", "content": question},
    ]
    _, *rest = render_messages(tokenizer, messages).split(stand_in)
    if len(rest) != 1:
        raise UserError(
            found=f"a chat template that writes earlier answers {len(rest)} times",
            need="a template that keeps each once",
            where="the tokenizer",
            do="name another Jinja file in model.chat_template",
        )
    after = rest[0]
    # some templates set a space before the end
    end, unspaced = (
        getattr(tokenizer, "eos_token", None),
        after.lstrip(" "),
    )
    tail = unspaced.removeprefix(end) if end and unspaced.startswith(end) else after
    return tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])


def turn_key(conversation: str, turn: int) -> str:
    """Return the key of the answer to a conversation's n-th question, counted from 1.

    The first answer's key is the conversation's own.
    """
    return conversation if turn == 1 else f"{conversation}+{turn}"


def conversation_and_turn(key: str) -> tuple[str, int]:
    """Return the conversation that an answer belongs to, and which of its questions it answers.

    It undoes `turn_key`.
    """
    later = _LATER_TURN.fullmatch(key)
    return (key, 1) if later is None else (later[1], int(later[2]))


def next_turn_key(key: str) -> str:
    """Return the key of the answer that follows this one in its conversation."""
    conversation, turn = conversation_and_turn(key)
    return turn_key(conversation, turn + 1)


def turn_sequences(
    samples: Iterable[CorpusSample], *, max_length: int
) -> tuple[tuple[str, TrainingSequence], ...]:
    """Return a corpus as sequences, by the key of their first turn.

    The turns of a conversation become one sequence with a span for each answer.
    What is left of a sequence without an answer token, once it is cut at `max_length`, is left out.
    Raises: UserError for a later turn that does not follow the answer before it.
    """
    by_key = {sample.key: sample for sample in samples}
    following = {next_turn_key(key) for key in by_key}
    made = []
    for key in by_key:
        if key in following:
            continue
        turn: CorpusSample | None = by_key[key]
        token_ids: tuple[int, ...] = ()
        spans: list[tuple[int, int]] = []
        while turn is not None:
            if turn.prompt_ids[: len(token_ids)] != token_ids:
                raise UserError(
                    found=f"the turn {turn.key!r} after another answer than its own",
                    need="each turn after the answer before it",
                    where="the corpus",
                    do="make the corpus again in an empty work folder",
                )
            token_ids = (*turn.prompt_ids, *turn.token_ids)
            spans.append((len(turn.prompt_ids), len(token_ids)))
            turn = by_key.get(next_turn_key(turn.key))
        cut = tuple((start, min(end, max_length)) for start, end in spans if start < max_length)
        if cut:
            made.append((key, TrainingSequence(token_ids=token_ids[:max_length], answers=cut)))
    return tuple(made)


def _pairs(messages: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    spoken = [(_ROLES.get(message["from"], ""), message["value"]) for message in messages]
    first = next((index for index, (role, _) in enumerate(spoken) if role == "user"), len(spoken))
    spoken = spoken[first:]
    spoken = spoken[: len(spoken) - len(spoken) % 2]
    turns = zip(spoken, itertools.cycle(("user", "assistant")), strict=False)
    if any(role != expected or not text.strip() for (role, text), expected in turns):
        return ()
    return tuple((spoken[index][1], spoken[index + 1][1]) for index in range(0, len(spoken), 2))


def _end(tokenizer: Any) -> list[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return [] if end is None else [int(end)]
