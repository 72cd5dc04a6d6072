"""Draft trees as text: our canonical JSON, and the Python lists of tuples that the authors publish.

These stand alone or after a name, as in `mc_sim_7b_63 = [(0,), (0, 0), ..]`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_impl.errors import UserError
from medusa_impl.text_files import read_text

SCHEMA_VERSION = 1


def paths_to_json(paths: tuple[tuple[int, ...], ...], *, provenance: Mapping[str, Any] | None) -> str:
    """Return these rank paths as one line of canonical JSON: sorted keys, no spaces.

    A tree's fingerprint is a hash of this text, so the text must never vary for one tree.
    """
    data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "paths": paths}
    if provenance is not None:
        data["provenance"] = dict(provenance)
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def read_paths(text_or_path: str | Path) -> tuple[object, str]:
    """Return what a file, or the text itself, gives as paths, and a name of the source for messages.

    What is returned as paths is not checked.

    Raises: UserError if there is no such file, or the text is neither JSON nor a Python literal, or a JSON
    object has an unknown key or version.
    """
    text, where = _read_text(text_or_path)
    return _parse(text, where=where), where


def _read_text(text_or_path: str | Path) -> tuple[str, str]:
    # A tree begins with a bracket, which no sensible path of a file does.
    if isinstance(text_or_path, str) and text_or_path.lstrip()[:1] in ("{", "[", "("):
        return text_or_path, "tree given as text"
    where = str(text_or_path)
    try:
        return read_text(Path(text_or_path)), where
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            found=f"no readable tree ({error})", need="a JSON file of rank paths", where=where
        ) from error


def _python_literal(text: str, *, where: str) -> object:
    """Return a tree as it is published: a Python list of tuples, with or without a name. No code runs.

    Raises: UserError for anything else, and for a file of several trees.
    """
    try:
        statements = ast.parse(text.strip()).body
        if len(statements) > 1:
            names = [name for statement in statements for name in _assigned_names(statement)]
            raise UserError(
                found=f"{len(statements)} statements ({', '.join(names[:4]) or 'no tree among them'})",
                need="one tree a file",
                where=where,
                do="copy the tree that you mean into a file of its own",
            )
        only = statements[0] if statements else None
        if not isinstance(only, ast.Assign | ast.AnnAssign | ast.Expr) or only.value is None:
            raise ValueError("no list of tuples")
        value: object = ast.literal_eval(only.value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        need = "JSON, or a Python list of tuples such as [(0,), (0, 1)]"
        raise UserError(found=f"text that cannot be read ({error})", need=need, where=where) from error
    return value


def _assigned_names(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _parse(text: str, *, where: str) -> object:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = _python_literal(text, where=where)
    if not isinstance(data, dict):
        return data
    if unknown := sorted(map(str, set(data) - {"schema_version", "paths", "provenance"})):
        raise UserError(
            found=f"unknown key {unknown[0]!r}",
            need="only schema_version, paths and provenance",
            where=where,
        )
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION or "paths" not in data:
        found = f"schema_version {version!r}" if "paths" in data else "no paths"
        raise UserError(found=found, need=f"schema_version {SCHEMA_VERSION} and paths", where=where)
    return data["paths"]
