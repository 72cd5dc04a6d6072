"""Prompts of benchmarks and of the user's own, and the check that no training prompt overlaps with them."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import Frozen, lines_of, read_text


class BenchmarkPrompt(Frozen):
    """One prompt of a benchmark: its turns and, where the set has them, reference answers."""

    key: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None


class Overlap(Frozen):
    """A word n-gram that a training and a benchmark prompt share."""

    training: int
    benchmark: int
    ngram: str


class OverlapReport(Frozen):
    """All shared word n-grams; clean means none."""

    ngram_words: int
    overlaps: tuple[Overlap, ...]

    @property
    def clean(self) -> bool:
        """Return whether no n-gram is shared."""
        return not self.overlaps


def load_mt_bench(question_file: Path, *, reference_file: Path | None = None) -> tuple[BenchmarkPrompt, ...]:
    """Read FastChat's `question.jsonl` and, where given, its reference answers."""
    references: dict[int, tuple[str, ...]] = {}
    if reference_file is not None:
        for row, where in _json_lines(reference_file):
            try:
                references[row["question_id"]] = tuple(row["choices"][0]["turns"])
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(
                    found=f"a row without {error}", need="the keys question_id and choices", where=where
                ) from error
    prompts = []
    for row, where in _json_lines(question_file):
        try:
            identity = row["question_id"]
            prompts.append(
                BenchmarkPrompt(
                    key=f"mt_bench-{identity}",
                    category=row["category"],
                    turns=tuple(row["turns"]),
                    reference=references.get(identity),
                )
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                found=f"a row without {error}", need="the keys question_id, category and turns", where=where
            ) from error
    return tuple(prompts)


def load_human_eval(path: Path) -> tuple[BenchmarkPrompt, ...]:
    """Read HumanEval's gzipped task file; each task becomes an instruction to complete the function."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            tasks = [json.loads(line) for line in file if line.strip()]
        return tuple(
            BenchmarkPrompt(
                key=task["task_id"].replace("/", "-").lower(),
                category="coding",
                turns=(f"Complete this Python function.\n\n```python\n{task['prompt'].rstrip()}\n```",),
                reference=(task["canonical_solution"],),
            )
            for task in tasks
        )
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            found=f"no readable tasks ({type(error).__name__}: {error})",
            need="gzipped JSON lines with task_id and prompt",
            where=path.name,
        ) from error


def load_prompt_file(path: Path) -> tuple[BenchmarkPrompt, ...]:
    """Return a user's own prompts out of a `.jsonl` or text file.

    JSON lines hold `prompt`, a text, or `turns`, a list of texts; perhaps `key`, a name of the prompt's own,
    and `category`, which a limit is balanced over. Other keys are left aside. A text file holds one prompt a
    line; its blank lines are left out.
    Raises: UserError naming the line at fault.
    """
    if not path.is_file() or path.suffix not in (".jsonl", ".txt"):
        found = f"suffix {path.suffix!r}" if path.is_file() else "no such file"
        raise UserError(found=found, need="a .jsonl or .txt file of prompts", where=path.name)
    prompts: list[BenchmarkPrompt] = []
    if path.suffix == ".txt":
        for number, line in enumerate(lines_of(read_text(path)), start=1):
            if line.strip():
                check_text(line, where=f"{path.name}:{number}")
                key = f"{path.stem}-{len(prompts)}"
                prompts.append(BenchmarkPrompt(key=key, category="own", turns=(line.strip(),)))
    else:
        for number, (row, where) in enumerate(_json_lines(path)):
            turns = row.get("turns") or ([row["prompt"]] if row.get("prompt") else None)
            if not isinstance(turns, list) or not all(isinstance(turn, str) and turn for turn in turns):
                raise UserError(
                    found=f"the keys {sorted(row)}",
                    need="a non-empty `prompt` string or `turns` list",
                    where=where,
                )
            key, category = str(row.get("key", f"{path.stem}-{number}")), str(row.get("category", "own"))
            for text in (*turns, key, category):
                check_text(text, where=where)
            prompts.append(BenchmarkPrompt(key=key, category=category, turns=tuple(turns)))
    if len({prompt.key for prompt in prompts}) != len(prompts):
        raise UserError(
            found="a key that two prompts have", need="a key of its own for each prompt", where=path.name
        )
    if not prompts:
        raise UserError(found="no prompt", need="at least one prompt", where=path.name)
    return tuple(prompts)


def check_text(text: str, *, where: str) -> None:
    """Refuse a text that says nothing, or that no tokenizer reads: blank, with a NUL, or half a character.

    Raises: UserError.
    """
    fault = next(_faults(text), None)
    if fault is not None:
        raise UserError(found=fault, need="text of whole characters", where=where, do="mend or drop the text")


def _faults(text: str) -> Iterator[str]:
    if not text.strip():
        yield "a blank text"
    if "\0" in text:
        yield "a NUL character"
    lone = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if lone is not None:
        yield f"half of a surrogate pair (\\u{ord(lone):04x})"


def turns_note(prompts: Sequence[BenchmarkPrompt], *, file: str) -> str | None:
    """Return a line that says which prompts of a file have turns that nothing decodes; None without any."""
    more = sum(len(prompt.turns) > 1 for prompt in prompts)
    if not more:
        return None
    return f"{file}: {more} of {len(prompts)} prompts have further turns; only the first turn is decoded"


def select_prompts(
    prompts: Sequence[BenchmarkPrompt], *, per_category: int | None = None, limit: int | None = None
) -> tuple[BenchmarkPrompt, ...]:
    """Return the first `per_category` prompts of each category.

    Categories are taken in turn, so that a `limit` stays balanced.
    """
    groups: dict[str, list[BenchmarkPrompt]] = defaultdict(list)
    for prompt in prompts:
        if per_category is None or len(groups[prompt.category]) < per_category:
            groups[prompt.category].append(prompt)
    interleaved = [prompt for row in zip_longest(*groups.values()) for prompt in row if prompt is not None]
    return tuple(interleaved[:limit])


def overlap_report(
    training: Iterable[str], benchmark: Iterable[str], *, ngram_words: int = 8
) -> OverlapReport:
    """Return every run of words that a training prompt shares with a benchmark prompt, once a pair.

    Words are compared in lower case and without punctuation.
    """
    index: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(benchmark):
        for ngram in _ngrams(text, ngram_words):
            index.setdefault(ngram, number)
    overlaps: dict[tuple[int, int], Overlap] = {}
    for number, text in enumerate(training):
        for ngram in _ngrams(text, ngram_words):
            if ngram in index:
                overlaps.setdefault(
                    (number, index[ngram]),
                    Overlap(training=number, benchmark=index[ngram], ngram=" ".join(ngram)),
                )
    return OverlapReport(ngram_words=ngram_words, overlaps=tuple(overlaps.values()))


def _ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    rows = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                found=f"invalid JSON ({why})", need="one JSON object a line", where=where
            ) from error
        if not isinstance(row, dict):
            raise UserError(found=f"a {type(row).__name__}", need="one JSON object a line", where=where)
        rows.append((row, where))
    return rows
