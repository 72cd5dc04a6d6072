"""From a suite's words to a loaded engine: model, tokenizer, heads, mode and hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from harness.asset_files import tensors_sha256
from harness.assets import FetchedAsset, cache_dir, fetch_asset, load_asset_specs
from harness.config import ModelSpec, SuiteSpec, TinyModelSpec
from harness.errors import UserError
from harness.paths import resolve_path
from medusa_impl.checkpoint import backbone_sha256, load_heads
from medusa_impl.heads import MedusaHeads
from medusa_impl.runner import Mode, StepRunner

# Embeddings that outweigh the layers make the next token depend mostly on the last one: text that tiny heads can learn. A larger LM
# head makes the law sharp enough for sampling rules to accept drafts.
_TINY_STD, _TINY_EMBEDDING_SCALE, _TINY_LM_HEAD_SCALE = 0.1, 20.0, 4.0


@dataclass(frozen=True)
class LoadedModel:
    """A backbone as it comes from disk, before an engine mode touches it."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    sha256: str
    eos_ids: frozenset[int]
    assets: dict[str, str]


@dataclass(frozen=True)
class Engine:
    """Everything that decodes: the runner both arms share, the tokenizer, and what the record needs to know of them."""

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
        """Bytes of the backbone's weights that one decoding step reads (an embedding table is read by rows, not whole)."""
        model = self.loaded.model
        counted = {parameter.data_ptr(): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
        embedding, lm_head = embedding_weights(model)
        if embedding.data_ptr() != lm_head.data_ptr():
            counted.pop(embedding.data_ptr(), None)
        return sum(counted.values())

    @property
    def heads_bytes(self) -> int:
        """Bytes that one evaluation of all heads reads: their own weights and, where shared, the LM head."""
        if self.runner.heads is None:
            return 0
        own = sum(parameter.numel() * parameter.element_size() for parameter in self.runner.heads.parameters())
        _, lm_head = embedding_weights(self.loaded.model)
        return own + (lm_head.numel() * lm_head.element_size() if self.runner.heads.architecture == "shared" else 0)


def embedding_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the weights of the token embedding and of the LM head, `[V, H]` each; tied models return one tensor twice."""
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()
    return embedding.weight, lm_head.weight


def best_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(spec: ModelSpec, *, device: torch.device, allow_hub: bool = False) -> LoadedModel:
    """Load a backbone and its tokenizer from an asset, a local folder, or a tiny random configuration."""
    if spec.tiny is not None:
        return _tiny_model(spec.tiny, dtype=getattr(torch, spec.dtype))
    assets: dict[str, str] = {}
    if spec.asset is not None:
        specs = load_asset_specs()
        if spec.asset not in specs:
            raise UserError(found=f"model asset {spec.asset!r}", need=f"one of {sorted(specs)}", where="the suite")
        fetched: FetchedAsset = fetch_asset(specs[spec.asset], cache_dir=cache_dir(), allow_hub=allow_hub)
        folder, name = fetched.paths["model"], spec.asset
        assets = {spec.asset: f"{fetched.source} {' '.join(sorted(fetched.sha256s.values()))}"}
    else:
        assert spec.path is not None
        folder, name = Path(spec.path), Path(spec.path).name
        if not folder.is_dir():
            raise UserError(found=f"no folder {name!r}", need="a folder with a model in Hugging Face format", where="model.path")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            found=f"a model that does not load ({str(error).splitlines()[0]})", need="a whole model folder", where=name
        ) from error
    sha256 = tensors_sha256(folder)  # of the stored tensors: the same whatever dtype they are loaded in
    return LoadedModel(model=model.to(device).eval(), tokenizer=tokenizer, name=name, sha256=sha256, eos_ids=_eos_ids(model), assets=assets)


def load_engine(
    suite: SuiteSpec, loaded: LoadedModel, *, beside: Path | None, heads: MedusaHeads | None = None, mode: Mode | None = None
) -> Engine:
    """Put heads and an engine mode on a loaded model; `heads` stands in for the suite's checkpoint (tiny suites train theirs)."""
    provenance: Mapping[str, Any] = {}
    if heads is None and suite.heads.path is not None:
        heads, stored = load_heads(resolve_path(suite.heads.path, beside=beside), backbone_sha256=loaded.sha256)
        provenance = stored.model_dump(mode="json")
    digest = backbone_sha256(heads) if heads is not None else None
    runner = StepRunner(loaded.model, heads, mode=mode or suite.engine)
    return Engine(loaded=loaded, runner=runner, heads_sha256=digest, heads_provenance=provenance)


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
        model=model, tokenizer=None, name=f"tiny-random-{spec.seed}", sha256=backbone_sha256(model), eos_ids=frozenset(), assets={}
    )
