"""From a suite's description to a loaded engine: model, tokenizer, heads, mode and hashes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from harness.assets.fetch import FetchedAsset, fetch_asset
from harness.assets.hashes import tensors_sha256
from harness.errors import UserError
from harness.files import canonical_sha256
from harness.paths import cache_dir, resolve_path
from harness.specs.assets import load_asset_specs
from harness.specs.suite import ModelSpec, SuiteSpec, TinyModelSpec
from medusa_impl.checkpoints.adapter import TunedModel, load_adapter
from medusa_impl.checkpoints.heads import HeadsProvenance, bind_heads
from medusa_impl.checkpoints.released import PublishedProvenance, open_heads
from medusa_impl.checkpoints.tensors import backbone_sha256
from medusa_impl.engine.runner import Mode, StepRunner
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings, Medusa2Settings

# Embeddings that outweigh the layers make the next token depend mostly on the last one: text that tiny heads
# can learn. A larger LM head makes the law sharp enough for sampling rules to accept drafts.
_TINY_STD, _TINY_EMBEDDING_SCALE, _TINY_LM_HEAD_SCALE = 0.1, 20.0, 4.0


@dataclass(frozen=True)
class LoadedModel:
    """A backbone as it comes from disk, before an engine mode touches it.

    With an adapter merged into it, `sha256` stands for both, `base_sha256` for the backbone alone, and
    `original_lm_head` is the LM head that the adapter changed, None where it changed none.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    sha256: str
    eos_ids: frozenset[int]
    assets: dict[str, str]
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    original_lm_head: nn.Module | None = None


@dataclass(frozen=True)
class Engine:
    """Everything that decodes, and what the record needs to know of it.

    Both arms share the runner.
    """

    loaded: LoadedModel
    runner: StepRunner
    heads_sha256: str | None
    heads_provenance: Mapping[str, Any]

    @property
    def heads(self) -> MedusaHeads:
        """The draft heads.

        Raises: UserError where the engine was loaded without any.
        """
        if self.runner.heads is None:
            raise UserError(found="no draft heads", need="trained heads for a Medusa arm", where="the suite")
        return self.runner.heads

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the backbone's weights that one decoding step reads.

        An embedding table is read by rows, not whole.
        """
        model = self.loaded.model
        counted = {
            parameter.data_ptr(): parameter.numel() * parameter.element_size()
            for parameter in model.parameters()
        }
        embedding, lm_head = embedding_weights(model)
        if embedding.data_ptr() != lm_head.data_ptr():
            counted.pop(embedding.data_ptr(), None)
        return sum(counted.values())

    @property
    def heads_bytes(self) -> int:
        """Bytes that one evaluation of all heads reads: their own weights and, where shared, the LM head."""
        if self.runner.heads is None:
            return 0
        own = sum(
            parameter.numel() * parameter.element_size() for parameter in self.runner.heads.parameters()
        )
        _, lm_head = embedding_weights(self.loaded.model)
        reads_backbone = self.runner.heads.architecture == "shared" and self.runner.heads.lm_head is None
        return own + (lm_head.numel() * lm_head.element_size() if reads_backbone else 0)


def embedding_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the weights of the token embedding and of the LM head, `[V, H]` each.

    Tied models return one tensor twice.
    """
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()
    return embedding.weight, lm_head.weight


def best_device() -> torch.device:
    """Return the GPU where there is one, a launcher's process its own, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device("cuda") if rank is None else torch.device("cuda", int(rank))


def load_model(
    spec: ModelSpec,
    *,
    device: torch.device,
    allow_hub: bool = False,
    base_folder: Path | None = None,
    quantisation: Literal["4bit"] | None = None,
) -> LoadedModel:
    """Return a backbone and its tokenizer, from an asset, a local folder or a tiny configuration.

    A tiny model has random weights. An adapter is merged into the backbone.
    Raises: UserError for what is missing or does not load, and for 4-bit weights without bitsandbytes and a
    CUDA device.
    """
    quantised = _quantised(quantisation)  # before anything is fetched
    bare = _load_bare(spec, device=device, allow_hub=allow_hub, quantised=quantised)
    if spec.chat_template is not None and bare.tokenizer is not None:
        bare.tokenizer.chat_template = resolve_path(spec.chat_template, base_folder=base_folder).read_text()
    if spec.adapter is None:
        return bare
    return with_adapter(bare, resolve_path(spec.adapter, base_folder=base_folder))


def with_adapter(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """Return a loaded model with an adapter merged into it; the model itself is changed."""
    tuned: TunedModel = load_adapter(loaded.model, folder)
    return replace(
        loaded,
        model=tuned.model,
        name=f"{loaded.name} with {folder.name}",
        sha256=canonical_sha256([loaded.sha256, tuned.adapter_sha256]),
        base_sha256=loaded.sha256,
        adapter_sha256=tuned.adapter_sha256,
        original_lm_head=tuned.original_lm_head,
    )


def heads_for(
    loaded: LoadedModel, path: Path, *, num_heads: int | None = None
) -> tuple[MedusaHeads, HeadsProvenance | PublishedProvenance]:
    """Return the heads of a file or folder, the first `num_heads` of them or all, and their provenance.

    Heads of this project are bound to the backbone, adapter and LM head that they were trained with.
    Published ones say nothing of these; where shared, they read the LM head of the model that runs.
    """
    heads, provenance = open_heads(
        path,
        backbone_sha256=loaded.base_sha256 or loaded.sha256,
        adapter_sha256=loaded.adapter_sha256,
        vocab_size=embedding_weights(loaded.model)[1].shape[0],
        num_heads=num_heads,
    )
    if isinstance(provenance, HeadsProvenance):
        bind_heads(heads, provenance, original_lm_head=loaded.original_lm_head)
    return heads, provenance


def _quantised(quantisation: Literal["4bit"] | None) -> dict[str, Any]:
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
    return {"quantization_config": config, "device_map": {"": best_device().index or 0}}


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _load_bare(
    spec: ModelSpec, *, device: torch.device, allow_hub: bool, quantised: dict[str, Any]
) -> LoadedModel:
    if spec.tiny is not None:
        return _tiny_model(spec.tiny, dtype=getattr(torch, spec.dtype))
    folder, name, assets = _model_folder(spec, allow_hub=allow_hub)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.dtype),
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            **quantised,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            found=f"a model that does not load ({str(error).splitlines()[0]})",
            need="a whole model folder",
            where=name,
        ) from error
    sha256 = tensors_sha256(folder)  # of the stored tensors: the same whatever dtype they are loaded in
    placed = model if quantised else model.to(device)
    return LoadedModel(
        model=placed.eval(),
        tokenizer=tokenizer,
        name=name,
        sha256=sha256,
        eos_ids=_eos_ids(model),
        assets=assets,
    )


def model_sha256(spec: ModelSpec, *, allow_hub: bool = False, base_folder: Path | None = None) -> str:
    """Return the hash that the model would be known by, where it can be had without loading it."""
    if spec.tiny is not None or spec.adapter is not None:
        return load_model(
            spec, device=torch.device("cpu"), allow_hub=allow_hub, base_folder=base_folder
        ).sha256
    return tensors_sha256(_model_folder(spec, allow_hub=allow_hub)[0])


def _model_folder(spec: ModelSpec, *, allow_hub: bool) -> tuple[Path, str, dict[str, str]]:
    """Return where a model lies, what it is called, and its asset with the hashes."""
    if spec.asset is None:
        assert spec.path is not None
        folder = Path(spec.path)
        if not folder.is_dir():
            raise UserError(
                found=f"no folder {folder.name!r}",
                need="a folder with a model in Hugging Face format",
                where="model.path",
            )
        return folder, folder.name, {}
    specs = load_asset_specs()
    if spec.asset not in specs:
        raise UserError(
            found=f"model asset {spec.asset!r}", need=f"one of {sorted(specs)}", where="the suite"
        )
    fetched: FetchedAsset = fetch_asset(specs[spec.asset], cache_dir=cache_dir(), allow_hub=allow_hub)
    return (
        fetched.paths["model"],
        spec.asset,
        {spec.asset: f"{fetched.source} {' '.join(sorted(fetched.sha256s.values()))}"},
    )


def engine_from_heads(
    loaded: LoadedModel,
    heads_file: Path,
    *,
    mode: Mode | Literal["auto"] = "auto",
    num_heads: int | None = None,
) -> Engine:
    """Return an engine of a loaded model and the heads of a file, the first `num_heads` of them or all.

    Raises: UserError for heads of another backbone or adapter, or of another shape than the model's.
    """
    heads, stored = heads_for(loaded, heads_file, num_heads=num_heads)
    digest = backbone_sha256(heads)  # before the runner casts them
    runner = StepRunner(loaded.model, heads, mode=mode)
    return Engine(
        loaded=loaded, runner=runner, heads_sha256=digest, heads_provenance=stored.model_dump(mode="json")
    )


def load_engine(
    suite: SuiteSpec,
    loaded: LoadedModel,
    *,
    base_folder: Path | None,
    heads: MedusaHeads | None = None,
    mode: Mode | None = None,
) -> Engine:
    """Return an engine of a loaded model, with a suite's heads and mode.

    `heads` stand in for the suite's checkpoint: tiny suites train theirs. `mode` stands in for its mode.
    """
    chosen = mode or suite.engine
    if heads is None and suite.heads.path is not None:
        file = resolve_path(suite.heads.path, base_folder=base_folder)
        return engine_from_heads(loaded, file, mode=chosen, num_heads=suite.heads.num_heads)
    digest = backbone_sha256(heads) if heads is not None else None  # before the runner casts them
    runner = StepRunner(loaded.model, heads, mode=chosen)
    return Engine(loaded=loaded, runner=runner, heads_sha256=digest, heads_provenance={})


def load_tuned_engine(
    suite: SuiteSpec, *, device: torch.device, allow_hub: bool, base_folder: Path | None
) -> Engine | None:
    """Return an engine of a suite's tuned backbone and its heads, or None.

    The backbone is a second copy of the suite's model with the adapter merged.
    Raises: UserError for an adapter or heads that do not fit the model, or each other.
    """
    if suite.tuned is None:
        return None
    model = suite.model.model_copy(update={"adapter": suite.tuned.adapter})
    loaded = load_model(model, device=device, allow_hub=allow_hub, base_folder=base_folder)
    file = resolve_path(suite.tuned.heads_path, base_folder=base_folder)
    return engine_from_heads(loaded, file, mode=suite.engine)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    generation: Any = model.generation_config
    eos = getattr(generation, "eos_token_id", None)
    eos = eos if eos is not None else model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


def _tiny_model(spec: TinyModelSpec, *, dtype: torch.dtype) -> LoadedModel:
    torch.manual_seed(spec.seed)
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        max_position_embeddings=spec.max_positions,
        initializer_range=_TINY_STD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding, lm_head = embedding_weights(model)
        embedding.mul_(_TINY_EMBEDDING_SCALE)
        lm_head.mul_(_TINY_LM_HEAD_SCALE)
    model = model.to(dtype).eval()
    model.generation_config = GenerationConfig()
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=f"tiny-random-{spec.seed}",
        sha256=backbone_sha256(model),
        eos_ids=frozenset(),
        assets={},
    )


def new_heads(loaded: LoadedModel, recipe: Medusa1Settings | Medusa2Settings) -> MedusaHeads:
    """Return untrained heads of a recipe's form for a model: each predicts what the model itself does."""
    lm_head: Any = loaded.model.get_output_embeddings()
    return MedusaHeads(
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        hidden_size=lm_head.weight.shape[1],
        vocab_size=lm_head.weight.shape[0],
        architecture=recipe.architecture,
        lm_head=lm_head,
    )
