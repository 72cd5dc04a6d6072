"""The kinds of files that are altered: which file, in what format, which commands read it, and which
alterations no command may take for whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.tests.fuzz.formats import (
    Format,
    JsonFormat,
    LinesFormat,
    NpzFormat,
    SafetensorsFormat,
    TextFormat,
    TomlFormat,
    unreadable,
)

JSON, LINES, TOML, TEXT = JsonFormat(), LinesFormat(), TomlFormat(), TextFormat()
TENSORS, TRACE = SafetensorsFormat(), NpzFormat()
ALL = frozenset(
    ("truncate", "flip", "delete", "reorder", "duplicate", "nan", "huge", "version", "extra", "encoding")
)
SCHEMA = frozenset(("version", "extra"))
Command = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """One file that is altered and the commands that read it.

    `strict` are the mutations after which no command may succeed, but for what they change in `open_tables`,
    the names of tables that may hold any key. `checked` reads the part of the file that is held to
    something else (a hash, another file): where that differs, no command may succeed either. `sealed_by` is
    the manifest to write the altered file's hash into, for what is left to check after a right seal.
    """

    file: str
    form: Format
    commands: tuple[Command, ...]
    strict: frozenset[str] = frozenset()
    checked: Callable[[bytes], Any] | None = None
    sealed_by: str | None = None
    open_tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of files: its cases go over the targets in turn."""

    name: str
    targets: tuple[Target, ...] = field(default_factory=tuple)

    def target(self, index: int) -> tuple[Target, Command]:
        """Return the file and the command of the case with this number."""
        target = self.targets[index % len(self.targets)]
        return target, target.commands[index // len(self.targets) % len(target.commands)]


RUN: Command = ("reproduce", "suite.toml", "--limit", "1", "--results", "scratch/results")


def _trace(suite: str) -> Command:
    return ("trace", suite, "scratch/out.npz", "--limit", "1")


def _reproduce(suite: str, *more: str) -> Command:
    return ("reproduce", suite, "--limit", "1", "--results", "scratch/results", *more)


def _dry(suite: str, *more: str) -> Command:
    return ("reproduce", suite, "--dry-run", "--results", "scratch/results", *more)


def _of_record(kind: str) -> tuple[Command, ...]:
    exported = (("export", f"{kind}-record", "scratch/table.csv"),) if kind == "suite" else ()
    return (("validate", f"{kind}-record"), ("report", f"{kind}-record"), *exported)


def _sealed(kind: str, file: str, form: Format) -> Target:
    return Target(f"{kind}-record/{file}", form, _of_record(kind), strict=ALL)


def _resealed(kind: str, file: str, form: Format, *strict: str, open_tables: tuple[str, ...] = ()) -> Target:
    return Target(
        f"{kind}-record/{file}",
        form,
        _of_record(kind)[:1],
        strict=frozenset(strict),
        open_tables=open_tables,
        sealed_by=f"{kind}-record/manifest.json",
    )


# of a manifest; nothing else in a record can contradict them
_SAID_ONLY_HERE = ("finished_utc", "elapsed_s", "kind", "peak_memory_bytes")


def _manifest_parts(data: bytes) -> Any:
    """Return what other files can tell of a manifest: all but when and how long, where those can be."""
    try:
        value = {"schema_version": 1, **JSON.load(data)}  # which the first records do not say
        kept = {key: one for key, one in value.items() if key not in _SAID_ONLY_HERE}
        loose = [type(value.get(key)) for key in ("finished_utc", "elapsed_s")]
        return json.dumps([kept, loose], sort_keys=True, default=str)
    except (ValueError, RecursionError, TypeError):
        return unreadable()


_LINES_STRICT = ("truncate", "nan", "version", "extra")
_LINE_FILES = (
    ("suite", "generations.jsonl"),
    ("latency", "points.jsonl"),
    ("sweep", "cells.jsonl"),
    ("ablation", "arms.jsonl"),
    ("gpu", "parts.jsonl"),
)
_OPEN_IN_GATES = ("sides", "details", "packages", "parts_s", "replayed_tokens_per_step")
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "suite",
            (
                Target("suite.toml", TOML, (_dry("suite.toml"), _trace("suite.toml"), RUN), SCHEMA | {"nan"}),
                Target("tiny.toml", TOML, (_trace("tiny.toml"), _reproduce("tiny.toml")), SCHEMA | {"nan"}),
            ),
        ),
        Kind(
            "claims",
            tuple(
                Target(
                    "claims.toml",
                    TOML,
                    (("report", f"{kind}-record", "--claims", "claims.toml"),),
                    SCHEMA,
                    open_tables=("roles", "needs", "literal", "value"),
                )
                for kind in ("suite", "sweep", "ablation")
            ),
        ),
        Kind(
            "tree",
            (
                Target("tree.json", JSON, (_reproduce("tree-suite.toml"),), SCHEMA | {"nan"}),
                Target(
                    "paths.json",
                    JSON,
                    (_dry("searched-suite.toml", "--tree", "paths.json"),),
                    frozenset(("nan",)),
                ),
            ),
        ),
        Kind(
            "prompts",
            (
                Target("prompts.jsonl", LINES, (_trace("suite.toml"), _dry("suite.toml"))),
                Target("prompts.txt", TEXT, (_trace("text-suite.toml"), _reproduce("text-suite.toml"))),
            ),
        ),
        Kind(
            "conversations",
            tuple(
                Target(
                    f"conversations.{suffix}",
                    form,
                    (("train", f"recipe-{suffix}.toml", "--work", "scratch/work", "--out", "scratch/out"),),
                )
                for suffix, form in (("jsonl", LINES), ("json", JSON))
            ),
        ),
        Kind(
            "generations",
            (
                *(_sealed(kind, file, LINES) for kind, file in _LINE_FILES),
                *(_resealed(kind, file, LINES, *_LINES_STRICT) for kind, file in _LINE_FILES),
                _sealed("gate", "gate.json", JSON),
                _resealed("gate", "gate.json", JSON, *_LINES_STRICT, open_tables=_OPEN_IN_GATES),
            ),
        ),
        Kind(
            "manifest",
            tuple(
                Target(
                    f"{kind}-record/manifest.json",
                    JSON,
                    _of_record(kind),
                    SCHEMA,
                    checked=_manifest_parts,
                )
                for kind in ("suite", "latency", "sweep", "ablation", "gpu", "gate")
            ),
        ),
        Kind(
            "trace",
            (
                Target(
                    "trace.npz",
                    TRACE,
                    (
                        ("search-tree", "trace.npz", "--num-nodes", "8"),
                        ("search-tree", "trace.npz", "--num-nodes", "8", "--values", "marginals"),
                    ),
                    SCHEMA | {"nan"},
                    open_tables=("versions", "extra"),
                ),
                _sealed("suite", "trace.npz", TRACE),
                _sealed("ablation", "trace-start.npz", TRACE),
                _resealed("suite", "trace.npz", TRACE, "nan", *SCHEMA, open_tables=("versions", "extra")),
            ),
        ),
        Kind(
            "heads",
            (
                Target(
                    "heads.safetensors",
                    TENSORS,
                    (_trace("suite.toml"), RUN),
                    frozenset(("version",)),
                    checked=TENSORS.tensors,
                ),
            ),
        ),
        Kind(
            "adapter",
            (
                Target(
                    "adapter/adapter_model.safetensors",
                    TENSORS,
                    (_trace("adapter-suite.toml"),),
                    checked=TENSORS.tensors,
                ),
                Target("adapter/adapter_config.json", JSON, (_trace("adapter-suite.toml"),)),
            ),
        ),
        Kind("template", (Target("template.jinja", TEXT, (_trace("template-suite.toml"),)),)),
        Kind(
            "config",
            tuple(
                Target(f"model/{file}", JSON, (_trace("suite.toml"),))
                for file in (
                    "config.json",
                    "generation_config.json",
                    "config.json",
                    "tokenizer_config.json",
                    "config.json",
                    "tokenizer.json",
                )
            ),
        ),
    )
}
