"""From a latency spec to an engine to time, and to the facts of its model.

Arithmetic on the times needs those facts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from harness.device.engine import (
    Engine,
    LoadedModel,
    embedding_weights,
    engine_from_heads,
    load_model,
    model_without_weights,
)
from harness.device.environment import describe_engine
from harness.device.loading.experts import step_numbers
from harness.device.random_model import random_model
from harness.errors import UserError
from harness.files import canonical_sha256
from harness.measure.latency.prompts import LatencyPrompt
from harness.paths import resolve_path
from harness.records.latency import ModelFacts, facts_of_shape
from harness.records.provenance import Environment
from harness.specs.latency import DtypeName, HeadsForm, LatencyHeads, LatencySpec, ModeName
from harness.specs.shapes import ShapeSpec, load_shapes
from harness.specs.suite import TinyModelSpec
from medusa_impl.engine.families import position_limit
from medusa_impl.engine.packed_linear import packing_available
from medusa_impl.engine.runner import StepRunner
from medusa_impl.heads import MedusaHeads

_SEED = 0


def chosen_modes(spec: LatencySpec, available: Sequence[ModeName]) -> tuple[ModeName, ...]:
    """Return the spec's modes.

    `auto` is all that the device offers except those that compile, which take long to begin.
    """
    compiling = ("compiled", "fused_graph")
    return tuple(mode for mode in available if mode not in compiling) if spec.modes == "auto" else spec.modes


def packs_weights(spec: LatencySpec, *, dtype: DtypeName, device: torch.device) -> bool:
    """Return whether a run of the spec holds prepacked copies of the weights.

    It then needs their bytes twice, whatever mode is timed.
    """
    asked = spec.modes == "auto" or "packed" in spec.modes
    return asked and device.type == "cpu" and packing_available(getattr(torch, dtype))


def free_memory_bytes(device: torch.device) -> int:
    """Return what is free on the device now."""
    return (
        int(torch.cuda.mem_get_info(device)[0])
        if device.type == "cuda"
        else int(psutil.virtual_memory().available)
    )


def load_latency_engine(
    spec: LatencySpec, *, dtype: DtypeName, device: torch.device, base_folder: Path | None, allow_hub: bool
) -> Engine:
    """Load the spec's model in one dtype, or make one of the spec's shape, and put heads on it.

    Raises: UserError for an unknown shape, a model or heads that do not load, or fewer heads than the grids
    ask for.
    """
    if spec.shape is not None:
        shape = known_shape(spec.shape)
        model = random_model(shape, dtype=getattr(torch, dtype), device=device, seed=_SEED)
        digest = canonical_sha256({"shape": shape.model_dump(mode="json"), "seed": _SEED})
        loaded = LoadedModel(
            model=model, tokenizer=None, name=shape.name, sha256=digest, eos_ids=frozenset(), assets={}
        )
    else:
        assert spec.model is not None
        loaded = load_model(
            spec.model.model_copy(update={"dtype": dtype}),
            device=device,
            allow_hub=allow_hub,
            base_folder=base_folder,
        )
    # which copies nothing
    mode: ModeName | Literal["auto"] = "auto" if packs_weights(spec, dtype=dtype, device=device) else "eager"
    if spec.heads.path is None:
        runner = StepRunner(
            loaded.model, _random_heads(spec.heads.form, loaded), mode=mode, clock=time.perf_counter
        )
        return Engine(loaded=loaded, runner=runner, heads_sha256=None, heads_provenance={})
    file = resolve_path(spec.heads.path, base_folder=base_folder)
    engine = engine_from_heads(loaded, file, mode=mode, num_heads=spec.heads.num_heads)
    _check_form(spec.heads, engine.heads, where=file.name)
    asked = max(count for grid in spec.grids for count in grid.num_heads)
    if asked > engine.heads.num_heads:
        raise UserError(
            found=f"grids with {asked} heads",
            need=f"at most {engine.heads.num_heads}, as the checkpoint has",
            where=spec.name,
        )
    return engine


def _check_form(said: LatencyHeads, heads: MedusaHeads, *, where: str) -> None:
    """Refuse a spec that says another form of the checkpoint's heads than they have."""
    for name in ("num_layers", "architecture"):
        wanted, there = getattr(said, name), getattr(heads, name)
        if wanted is not None and wanted != there:
            raise UserError(
                found=f"heads.{name} = {wanted!r}", need=f"{there!r}, as the checkpoint has", where=where
            )


def facts_of_model(
    model: PreTrainedModel, *, name: str, random_weights: bool, heads: HeadsForm
) -> ModelFacts:
    """Return the facts of a model, which may stand on the meta device, under heads of a form."""
    config: Any = model.config
    embedding, lm_head = embedding_weights(model)
    vocab_size, hidden_size = lm_head.shape
    query_heads = int(config.num_attention_heads)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    return ModelFacts(
        name=name,
        random_weights=random_weights,
        num_layers=int(config.num_hidden_layers),
        hidden_size=hidden_size,
        num_attention_heads=query_heads,
        num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or query_heads),
        head_size=int(getattr(config, "head_dim", None) or hidden_size // query_heads),
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * hidden_size),
        vocab_size=vocab_size,
        num_parameters=num_parameters,
        step_parameters=sum(step_numbers(model).values())
        - (0 if embedding is lm_head else embedding.numel()),
        max_positions=position_limit(config),
        num_heads=heads.num_heads,
        num_head_layers=heads.num_layers,
        head_architecture=heads.architecture,
    )


def facts_of_engine(engine: Engine) -> ModelFacts:
    """Return the facts of what an engine runs; a model without a tokenizer has random weights."""
    form = HeadsForm(
        num_heads=engine.heads.num_heads,
        num_layers=engine.heads.num_layers,
        architecture=engine.heads.architecture,
    )
    loaded = engine.loaded
    return facts_of_model(loaded.model, name=loaded.name, random_weights=loaded.tokenizer is None, heads=form)


def planned_facts(spec: LatencySpec, *, base_folder: Path | None = None) -> ModelFacts:
    """Return the facts of a spec's model without loading a weight.

    They come from the published shape, or from the folder's configuration.
    Raises: UserError for an unknown shape, an asset whose shape is not published, or a folder without a
    configuration.
    """
    if spec.model is None or spec.model.asset is not None:
        shape = known_shape(spec.shape or (spec.model.asset if spec.model and spec.model.asset else ""))
        return facts_of_shape(shape, heads=spec.heads.form, random_weights=spec.model is None)
    if spec.model.tiny is not None:
        return facts_of_shape(_tiny_shape(spec.model.tiny), heads=spec.heads.form, random_weights=True)
    model = model_without_weights(spec.model, base_folder=base_folder)
    name = Path(spec.model.path or "").name
    return facts_of_model(model, name=name, random_weights=False, heads=spec.heads.form)


def known_shape(name: str) -> ShapeSpec:
    """Return a published shape.

    Raises: UserError where there is none of that name.
    """
    shapes = load_shapes()
    if name not in shapes:
        raise UserError(
            found=f"shape {name!r}",
            need=f"one of {sorted(shapes)}, or a model's folder",
            where="the spec or --shape",
        )
    return shapes[name]


def describe_latency(
    engine: Engine, *, spec: LatencySpec, prompts: Sequence[LatencyPrompt], command: str
) -> Environment:
    """Return where the record will come from.

    `engine` and `dtype` name all modes and dtypes; bytes are those of the first dtype.
    """
    texts = [[prompt.key, list(prompt.prompt_ids)] for prompt in prompts]
    modes = ", ".join(chosen_modes(spec, engine.runner.available_modes()))
    return describe_engine(engine, modes=modes, dtype=", ".join(spec.dtypes), texts=texts, command=command)


def model_description(spec: LatencySpec) -> str:
    """Return what a spec's model is called while it loads."""
    if spec.shape is not None:
        return f"the shape {spec.shape} with random weights"
    assert spec.model is not None
    return spec.model.asset or (Path(spec.model.path).name if spec.model.path else "a tiny random model")


def _tiny_shape(tiny: TinyModelSpec) -> ShapeSpec:
    return ShapeSpec(
        name=f"tiny-random-{tiny.seed}",
        model_type="llama",
        num_layers=tiny.num_layers,
        hidden_size=tiny.hidden_size,
        num_attention_heads=tiny.num_attention_heads,
        num_key_value_heads=tiny.num_key_value_heads,
        head_size=tiny.hidden_size // tiny.num_attention_heads,
        intermediate_size=tiny.intermediate_size,
        vocab_size=tiny.vocab_size,
        tie_word_embeddings=False,
        max_positions=tiny.max_positions,
        rope_theta=10000.0,  # of LlamaConfig; decides no size
        source="made on the spot",
    )


def _random_heads(form: HeadsForm, loaded: LoadedModel) -> MedusaHeads:
    """Return heads with random weights.

    Zeros, as fresh heads have, would let some devices run cooler and faster.
    """
    model = loaded.model
    _, lm_head = embedding_weights(model)
    vocab_size, hidden_size = lm_head.shape
    torch.manual_seed(_SEED)
    with torch.device(model.device):
        heads = MedusaHeads(
            num_heads=form.num_heads,
            num_layers=form.num_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            architecture=form.architecture,
        ).to(model.dtype)
    for parameter in heads.blocks.parameters():
        nn.init.normal_(parameter, std=1.0 / hidden_size**0.5)
    return heads
