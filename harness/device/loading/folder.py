"""A model's folder: where it lies, what is wrong with it before anything is loaded, and what of it runs."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.assets.fetch import FetchedAsset, fetch_asset
from harness.assets.files import MODEL_INDEXES, model_weight_files
from harness.errors import UserError
from harness.files import text_of
from harness.paths import cache_dir
from harness.paths import model_folder as named_folder
from harness.specs.assets import load_asset_specs
from harness.specs.suite import ModelSpec

TRUST_VARIABLE = "MEDUSA_REPRO_TRUST_REMOTE_CODE"
"""Set to 1 by the command line's --trust-remote-code, so that a command's other processes know of it."""

_LOG = logging.getLogger(__name__)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What transformers reads besides the weights. A broken one would be skipped by some of its readers.
_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# Attention that every installation has; all other kinds come with packages or from the hub.
_STOCK_ATTENTION = (None, "eager", "sdpa")


@dataclass(frozen=True)
class ModelFolder:
    """Where a model lies and what it is called; of an asset also its source and what is pinned of it."""

    path: Path
    name: str
    assets: Mapping[str, str] = field(default_factory=dict)
    pinned_behaviour: Mapping[str, str] = field(default_factory=dict)


def model_folder(spec: ModelSpec, *, allow_hub: bool, base_folder: Path | None) -> ModelFolder:
    """Return where a model lies, fetched if it is an asset that is not here yet.

    A path goes from the base folder, that of the data file which names it, unless it is absolute.
    Raises: UserError for a folder or an asset that is not there.
    """
    if spec.asset is None:
        assert spec.path is not None
        folder = named_folder(spec.path, base_folder=base_folder)
        return ModelFolder(folder, folder.name)
    return asset_folder(spec.asset, allow_hub=allow_hub)


def asset_folder(name: str, *, allow_hub: bool) -> ModelFolder:
    """Return where a model or heads that are an asset lie, fetched if they are not here yet.

    Raises: UserError for an asset of another kind, or one that no source has.
    """
    specs = load_asset_specs()
    if name not in specs or specs[name].kind != "model":
        need = f"one of {sorted(key for key, asset in specs.items() if asset.kind == 'model')}"
        raise UserError(found=f"model asset {name!r}", need=need, where="the suite")
    fetched: FetchedAsset = fetch_asset(specs[name], cache_dir=cache_dir(), allow_hub=allow_hub)
    source = f"{fetched.source} {' '.join(sorted(fetched.sha256s.values()))}"
    return ModelFolder(fetched.paths["model"], name, {name: source}, specs[name].behaviour_sha256s)


def require_trust(spec: ModelSpec, *, environ: Mapping[str, str] | None = None) -> None:
    """Refuse a suite that would run the code of a model's folder, unless the command line says so as well.

    Raises: UserError.
    """
    environment = os.environ if environ is None else environ
    if spec.trust_remote_code and environment.get(TRUST_VARIABLE) != "1":
        raise UserError(
            found="trust_remote_code = true, which runs the code in the model's folder",
            need="the same word on the command line",
            where="model",
            do="read that code, then begin the command with medusa-repro --trust-remote-code",
        )


def check_folder(folder: Path, *, name: str, needs_weights: bool = True) -> None:
    """Refuse a folder in which something is wrong that its files show, before any of them is loaded.

    Raises: UserError for files that are missing, cut short or stand-ins of git-lfs, for weights that are
    quantised, attention that comes with another package, and a padding token outside the vocabulary.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file():
            _check_no_pointer(path, name=name)
    if not (folder / "config.json").is_file():
        raise UserError(found="no config.json", need="a model folder in Hugging Face format", where=name)
    parsed = {file: read_json_object(folder / file, name=name) for file in _JSON_FILES}
    for file in model_weight_files(folder) if needs_weights else ():
        _check_no_pointer(file, name=name)
    config = parsed["config.json"] or {}
    for table in (config, *(table for table in config.values() if isinstance(table, dict))):
        _check_config(table, name=name)


def read_json_object(path: Path, *, name: str) -> dict[str, Any] | None:
    """Return a JSON file's object, or None without the file. Raises: UserError for anything else."""
    if not path.is_file():
        return None
    try:
        data = json.loads(text_of(path.read_bytes()))
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            found=f"a broken {path.name} ({type(error).__name__}: {error})",
            need="a whole file with one JSON object",
            where=name,
            do="fetch or copy it again",
        ) from error
    return data


def _check_no_pointer(path: Path, *, name: str) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) != _LFS_POINTER:
            return
    raise UserError(
        found=f"a pointer of git-lfs instead of {path.name}",
        need="the file itself",
        where=name,
        do="run git lfs pull in that folder, or fetch the model again",
    )


_MOST_PARTS = (
    10_000  # layers, experts or blocks, each built in turn: the deepest published models have some 130
)
_PARTS_KEY = re.compile("layer|expert|block")


def _check_config(config: Mapping[str, Any], *, name: str) -> None:
    where = f"config.json of {name}"
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise UserError(
            found=f"quantised weights ({method or 'of a method that is not named'})",
            need="weights in float32, bfloat16 or float16",
            where=where,
            do="name the folder of the model that was quantised",
        )
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        if config.get(key) not in _STOCK_ATTENTION:
            raise UserError(
                found=f"{key} = {config[key]!r}",
                need="eager or sdpa, or no such entry: a tree needs attention that takes a mask",
                where=where,
                do=f"remove {key}",
            )
    if config.get("transformers_weights") is not None:
        raise UserError(
            found=f"transformers_weights = {config['transformers_weights']!r}",
            need="weights under their usual names",
            where=where,
            do="rename the file to model.safetensors and remove the entry",
        )
    for key, value in config.items():
        if isinstance(value, int) and value > _MOST_PARTS and _PARTS_KEY.search(key):
            raise UserError(
                found=f"{key} = {value}",
                need=f"at most {_MOST_PARTS}, or a model never ends to be built",
                where=where,
            )
    pad, size = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise UserError(
            found=f"pad_token_id = {pad} with vocab_size = {size}",
            need="a padding token of the vocabulary",
            where=where,
            do="set it to null, or to a token that is there",
        )


@contextmanager
def only_what_runs(folder: Path, *, weights: tuple[Path, ...]) -> Iterator[Path]:
    """Yield a folder that holds links to the files that a model is made of, and to no others, for a while.

    An adapter next to the weights is left aside: transformers would load it on top. So are weights that the
    folder holds a second time, so that those are loaded that were hashed.
    """
    if weights and any((folder / name).is_file() for name in _ADAPTER_FILES):
        _LOG.warning(
            "an adapter next to the weights of %s is left aside; model.adapter names one that is merged",
            folder.name,
        )
    with tempfile.TemporaryDirectory() as home:
        view = Path(home) / folder.name
        view.mkdir()
        kept = [*weights, *(path for path in sorted(folder.iterdir()) if _is_kept(path, weights))]
        for path in kept:
            link = view / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield view


def _is_kept(path: Path, weights: tuple[Path, ...]) -> bool:
    """Return whether a folder's entry, apart from its weights, takes part in loading."""
    if path in weights or path.name in _ADAPTER_FILES:
        return False
    if path.is_dir():
        return path.name == "additional_chat_templates"
    if path.name in MODEL_INDEXES:  # one file of weights needs none
        is_single = {weight.name for weight in weights} & {"model.safetensors", "pytorch_model.bin"}
        return not is_single and any(weight.suffix in path.suffixes for weight in weights)
    return path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
