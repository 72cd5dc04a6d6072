"""A model and its tokenizer out of a folder, with every tensor accounted for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from harness.assets.files import model_weight_files
from harness.assets.hashes import is_head_tensor, tensors_sha256
from harness.device.loading.folder import ModelFolder, check_folder, only_what_runs
from harness.errors import UserError
from harness.specs.suite import ModelSpec
from medusa_impl.checkpoints.tensors import some

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A model as its folder holds it, its tokenizer, and the hash of the stored tensors that were loaded."""

    model: PreTrainedModel
    tokenizer: Any
    sha256: str


def load_folder(place: ModelFolder, spec: ModelSpec, *, quantised: dict[str, Any]) -> Weights:
    """Return what a folder holds. `quantised` are further arguments of transformers, for 4-bit weights.

    The hash is that of the stored tensors: the same whatever dtype they are loaded in.
    Raises: UserError for a folder that is not whole, a tensor that the model lacks, that it does not know or
    that has another shape, and for whatever else keeps it from loading.
    """
    check_folder(place.path, name=place.name)
    sha256 = tensors_sha256(place.path)
    shared: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "local_files_only": True}
    files = model_weight_files(place.path)
    with only_what_runs(place.path, weights=files) as view, _one_line(place.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            view,
            dtype=getattr(torch, spec.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below, with their shapes
            **shared,
            **quantised,
        )
        model, told = loaded
        check_tensors(told, kind=type(model).__name__, name=place.name)
        tokenizer = AutoTokenizer.from_pretrained(view, **shared)
        _check_tokenizer(tokenizer, name=place.name)
    # Whatever asks later where they came from gets the folder, not the links that are gone.
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = str(place.path)
    return Weights(model=model, tokenizer=tokenizer, sha256=sha256)


def empty_model(place: ModelFolder, spec: ModelSpec) -> PreTrainedModel:
    """Return the model of a folder on the meta device, without its weights.

    Raises: UserError as `load_folder` does, for what the configuration shows.
    """
    check_folder(place.path, name=place.name, needs_weights=False)
    with only_what_runs(place.path, weights=()) as view, _one_line(place.name), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            view, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=spec.trust_remote_code
        )
    return model


def check_tensors(told: dict[str, Any], *, kind: str, name: str) -> None:
    """Refuse a model that is not wholly made of its folder's tensors; `told` is transformers' own account.

    What the model's class declares as ignorable is not in it. Draft heads that lie among the tensors are
    named as left aside.
    Raises: UserError that names the tensors.
    """
    unexpected = set(told["unexpected_keys"])
    heads = {tensor for tensor in unexpected if is_head_tensor(tensor)}
    mismatched = [
        f"{tensor} ({_shape(stored)}, the configuration says {_shape(meant)})"
        for tensor, stored, meant in sorted(told["mismatched_keys"])
    ]
    faults = [
        *_named("missing", told["missing_keys"]),
        *_named("unknown", unexpected - heads),
        *_named("of another shape", mismatched),
        *_named("in error", told.get("error_msgs") or ()),
    ]
    if faults:
        raise UserError(
            found=f"tensors {'; '.join(faults)}",
            need=f"exactly those of {kind}, since a tensor that is missing would be random at every load",
            where=f"the weights of {name}",
            do="use the config.json that belongs to these weights, and all of their files",
        )
    if heads:
        _LOG.warning("%d tensors of draft heads among the weights of %s are left aside", len(heads), name)


def _named(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    return [f"{what}: {some(listed)}"] if listed else []


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _check_tokenizer(tokenizer: Any, *, name: str) -> None:
    # Without its files, some classes give a tokenizer of no words or of the special tokens alone.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise UserError(
            found="a tokenizer without a vocabulary",
            need="the tokenizer's files next to the weights",
            where=name,
            do="fetch the model's tokenizer.json, or tokenizer.model, into that folder",
        )
    tokenizer(min(words))  # settings of another shape, such as a list for a length, show at the first text


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn whatever a model's own code or files raise into one line, without tables on the terminal."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, its classes and their packages raise all kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            found=f"a model that does not load ({': '.join([type(error).__name__, *lines[:1]])})",
            need="a whole folder of a causal language model that the installed transformers knows",
            where=name,
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def quantised_options(quantisation: Literal["4bit"] | None, *, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs for a quantised backbone; nothing without quantisation.

    Raises: UserError without bitsandbytes or a CUDA device.
    """
    if quantisation is None:
        return {}
    missing = [
        name
        for name, there in (
            ("bitsandbytes", _has_bitsandbytes()),
            ("a CUDA device", torch.cuda.is_available()),
        )
        if not there
    ]
    if missing:
        raise UserError(
            found=f"no {' and no '.join(missing)}",
            need="both for a 4-bit backbone",
            where="the recipe",
            do="leave out quantisation, or train where they are",
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config, "device_map": {"": device.index or 0}}


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
