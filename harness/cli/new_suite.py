"""`new-suite` writes a suite for a model of the user's own, with what fits it and nothing else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer

from harness.cli.options import console
from harness.errors import UserError
from harness.files import read_text, write_text
from harness.specs.suite import SuiteSpec

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_NEW_TOKENS = 96
_HEAD = """\
# A suite that medusa-repro new-suite wrote: run it with medusa-repro reproduce {name}.
# Paths go from the folder of this file. What else may stand here: suites/README.md of the project.
"""


def new_suite(
    model: Annotated[Path, typer.Option(help="folder of your model, in Hugging Face format")],
    heads: Annotated[
        Path | None,
        typer.Option(help="draft heads of that model; without them the suite has the arms that need none"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="TOML file to write; without it one here, named after the model")
    ] = None,
) -> None:
    """Write a suite for your own model: the arms that fit it, greedy, on MT-Bench's questions.

    A calibration trace next to the heads, as training leaves one, adds the arms whose trees are grown on it.
    """
    config = _config(model)
    name = re.sub(r"[^a-z0-9]+", "_", model.resolve().name.lower()).strip("_") or "mine"
    target = out or Path(f"{name}.toml")
    if target.exists():
        raise UserError(
            found=f"a file {target.name} that is there already",
            need="a new file",
            where="--out",
            do="name another file, or take that one away",
        )
    if target.suffix != ".toml" or not target.name.isprintable():
        raise UserError(found=f"a file {target.name!r}", need="a name that ends in .toml", where="--out")
    if heads is not None and not heads.exists():
        raise UserError(found=f"no file {heads.name!r}", need="trained draft heads", where="--heads")
    data = suite_data(name, config=config, model=model, heads=heads, home=target.parent)
    SuiteSpec.model_validate(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, _HEAD.format(name=target.name) + tomli_w.dumps(data))
    console.print(f"next: medusa-repro reproduce {target}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps({"suite": name, "file": target.name, "arms": [arm["name"] for arm in data["arms"]]}))


def suite_data(
    name: str, *, config: dict[str, Any], model: Path, heads: Path | None, home: Path
) -> dict[str, Any]:
    """Return a suite of a model and, where there are any, its heads; `home` is the folder of its file."""
    said = config.get("dtype", config.get("torch_dtype"))
    positions = config.get("max_position_embeddings")
    if isinstance(positions, bool) or not isinstance(positions, int) or positions < 4:
        positions = 2 * _MAX_NEW_TOKENS  # not said, or nothing that a number of positions can be
    tokens = min(_MAX_NEW_TOKENS, positions // 2)
    trace = heads.parent / "calibration.npz" if heads is not None else None
    has_trace = trace is not None and trace.is_file()
    return {
        "schema_version": 1,
        "kind": "suite",
        "name": name,
        "description": f"{model.resolve().name} on MT-Bench's first turns, {tokens} new tokens each.",
        "max_new_tokens": tokens,
        "warmup_prompts": 2,
        **({"calibration_trace": _from(home, trace)} if trace is not None and has_trace else {}),
        "model": {"path": _from(home, model), "dtype": said if said in _DTYPES else "float32"},
        **({"heads": {"path": _from(home, heads)}} if heads is not None else {}),
        "prompts": {"source": "mt_bench", "per_category": 2},
        "arms": _arms(has_heads=heads is not None, has_trace=has_trace),
    }


def _arms(*, has_heads: bool, has_trace: bool) -> list[dict[str, Any]]:
    trees: dict[str, dict[str, Any]] = {}
    if has_heads:
        trees["cartesian"] = {"kind": "cartesian", "max_nodes": 16}
    if has_trace:
        trees["optimised"] = {"kind": "searched", "num_nodes": 64}
        trees["fastest"] = {"kind": "fastest", "max_nodes": 64}
    return [
        {"name": "vanilla", "method": "vanilla"},
        *(
            {
                "name": name,
                "method": "medusa",
                "baseline": "vanilla",
                "tree": tree,
                "acceptance": {"rule": "greedy"},
            }
            for name, tree in trees.items()
        ),
        {"name": "hf_greedy", "method": "hf_greedy", "baseline": "vanilla"},
        {"name": "hf_prompt_lookup", "method": "hf_prompt_lookup", "baseline": "vanilla"},
    ]


def _config(model: Path) -> dict[str, Any]:
    """Return the configuration of a model's folder. Raises: UserError where there is none."""
    need = "a folder with a model in Hugging Face format, which has a config.json"
    try:
        config = json.loads(read_text(model / "config.json", need=need))
    except (ValueError, RecursionError) as error:
        raise UserError(found="a config.json that is no JSON", need=need, where=model.name) from error
    if not isinstance(config, dict):
        raise UserError(found=f"a config.json with a {type(config).__name__}", need=need, where=model.name)
    return config


def _from(home: Path, path: Path) -> str:
    """Return a path as a file in `home` names it: relative where it lies below that folder."""
    home, path = home.absolute(), path.absolute()
    below = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(home))
    return Path(os.path.relpath(path, home)).as_posix() if below else os.path.normpath(path)
