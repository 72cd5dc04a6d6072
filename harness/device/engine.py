"""From a suite's description to a loaded engine: model, tokenizer, heads, mode and hashes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.assets.chat import fix_date
from harness.assets.hashes import tensors_sha256
from harness.device.loading.behaviour import (
    adapter_behaviour,
    behaviour_of,
    check_pinned,
    differing,
    eos_ids_of,
)
from harness.device.loading.experts import step_numbers
from harness.device.loading.folder import (
    ModelFolder,
    asset_folder,
    check_folder,
    model_folder,
    require_trust,
)
from harness.device.loading.tiny import tiny_model
from harness.device.loading.weights import empty_model, load_folder, quantised_options
from harness.errors import UserError
from harness.files import canonical_sha256, read_text
from harness.paths import resolve_path
from harness.specs.suite import ModelSpec, SuiteSpec, TinyModelSpec
from medusa_impl.checkpoints.adapter import TunedModel, load_adapter
from medusa_impl.checkpoints.heads import HeadsProvenance, bind_heads
from medusa_impl.checkpoints.released import PublishedProvenance, open_heads
from medusa_impl.checkpoints.tensors import backbone_sha256
from medusa_impl.engine.runner import Mode, StepRunner
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings, Medusa2Settings

_LOG = logging.getLogger(__name__)
# What heads depend on: the states that they read, the tokens that they propose, the adapter under them.
_HEADS_PARTS = ("forward", "tokenizer", "adapter")


@dataclass(frozen=True)
class LoadedModel:
    """A backbone as it comes from disk, before an engine mode touches it.

    With an adapter merged into it, `sha256` stands for both, `base_sha256` for the backbone alone, and
    `original_lm_head` is the LM head that the adapter changed, None where it changed none. `behaviour` has
    the hash of each part of what the model does with its tensors; none if the model is from no folder.
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
    behaviour: Mapping[str, str] = field(default_factory=dict)

    @property
    def behaviour_sha256(self) -> str | None:
        """Return the hash that stands for all parts of the behaviour, or None where there are none."""
        return canonical_sha256(dict(self.behaviour)) if self.behaviour else None

    def require_known_ids(self, token_ids: Iterable[int], *, where: str) -> None:
        """Refuse token ids that the embedding has no row for: the tokenizer may know more words than it.

        Raises: UserError that names the largest id.
        """
        num_rows = embedding_weights(self.model)[0].shape[0]
        largest = max(token_ids, default=0)
        if largest >= num_rows:
            raise UserError(
                found=f"token id {largest}",
                need=f"ids below {num_rows}, the rows of the embedding of {self.name}",
                where=where,
                do="use the tokenizer that belongs to the model, or a chat template without that token",
            )


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

        An embedding table is read by rows, not whole; of a mixture only the experts of one token.
        """
        model = self.loaded.model
        numbers = step_numbers(model)
        counted = {
            parameter.data_ptr(): numbers[name] * parameter.element_size()
            for name, parameter in model.named_parameters()
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
    quantised = quantised_options(quantisation, device=device)  # before anything is fetched
    bare = _load_bare(spec, device=device, allow_hub=allow_hub, base_folder=base_folder, quantised=quantised)
    if spec.chat_template is not None and bare.tokenizer is not None:
        bare.tokenizer.chat_template = read_text(resolve_path(spec.chat_template, base_folder=base_folder))
        bare = replace(bare, behaviour=behaviour_of(bare.model, bare.tokenizer, eos_ids=bare.eos_ids))
    if spec.chat_date is not None and bare.tokenizer is not None:
        fix_date(bare.tokenizer, spec.chat_date)
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
        behaviour={**loaded.behaviour, "adapter": adapter_behaviour(folder)} if loaded.behaviour else {},
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
        _check_behaviour(provenance, loaded, where=path.name)
        bind_heads(heads, provenance, original_lm_head=loaded.original_lm_head)
    return heads, provenance


def _check_behaviour(provenance: HeadsProvenance, loaded: LoadedModel, *, where: str) -> None:
    """Refuse heads of a model with the same tensors that does something else with them."""
    if not loaded.behaviour:
        return
    if provenance.behaviour is None:
        _LOG.warning(
            "%s does not say which %s its model had: only the tensors were compared",
            where,
            ", ".join(part for part in _HEADS_PARTS if part in loaded.behaviour),
        )
        return
    if changed := differing(loaded.behaviour, provenance.behaviour, parts=_HEADS_PARTS):
        raise UserError(
            found=f"heads trained with another {' and '.join(changed)} of the same tensors",
            need="the configuration, tokenizer and adapter that they were trained with",
            where=where,
            do=f"restore the files of {loaded.name}, or train heads for it as it is",
        )


def _load_bare(
    spec: ModelSpec,
    *,
    device: torch.device,
    allow_hub: bool,
    base_folder: Path | None,
    quantised: dict[str, Any],
) -> LoadedModel:
    if spec.tiny is not None:
        return _tiny_model(spec.tiny, dtype=getattr(torch, spec.dtype))
    place = trusted_folder(spec, allow_hub=allow_hub, base_folder=base_folder)
    weights = load_folder(place, spec, quantised=quantised)
    placed: Any = weights.model
    placed = placed if quantised else placed.to(device)
    eos_ids = eos_ids_of(placed)
    behaviour = behaviour_of(placed, weights.tokenizer, eos_ids=eos_ids)
    check_pinned(behaviour, place.pinned_behaviour, name=place.name)
    return LoadedModel(
        model=placed.eval(),
        tokenizer=weights.tokenizer,
        name=place.name,
        sha256=weights.sha256,
        eos_ids=eos_ids,
        assets=dict(place.assets),
        behaviour=behaviour,
    )


def _tiny_model(spec: TinyModelSpec, *, dtype: torch.dtype) -> LoadedModel:
    model = tiny_model(spec, dtype=dtype)
    return LoadedModel(
        model=model,
        tokenizer=None,
        name=f"tiny-random-{spec.seed}",
        sha256=backbone_sha256(model),
        eos_ids=frozenset(),
        assets={},
    )


def trusted_folder(
    spec: ModelSpec, *, allow_hub: bool = False, base_folder: Path | None = None
) -> ModelFolder:
    """Return where a model lies, if the command line allows what the suite asks for.

    Raises: UserError for a folder that is not there, or code in it that was not trusted.
    """
    require_trust(spec)
    return model_folder(spec, allow_hub=allow_hub, base_folder=base_folder)


def model_sha256(spec: ModelSpec, *, allow_hub: bool = False, base_folder: Path | None = None) -> str:
    """Return the hash that the model would be known by, where it can be had without loading it."""
    if spec.tiny is not None or spec.adapter is not None:
        return load_model(
            spec, device=torch.device("cpu"), allow_hub=allow_hub, base_folder=base_folder
        ).sha256
    place = trusted_folder(spec, allow_hub=allow_hub, base_folder=base_folder)
    check_folder(place.path, name=place.name)
    return tensors_sha256(place.path)


def model_without_weights(
    spec: ModelSpec, *, allow_hub: bool = False, base_folder: Path | None = None
) -> PreTrainedModel:
    """Return the model of a local folder on the meta device. Raises: UserError as `load_model` does."""
    return empty_model(trusted_folder(spec, allow_hub=allow_hub, base_folder=base_folder), spec)


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
    runner = StepRunner(loaded.model, heads, mode=mode, clock=time.perf_counter)
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
    allow_hub: bool = False,
) -> Engine:
    """Return an engine of a loaded model, with a suite's heads and mode.

    `heads` stand in for the suite's checkpoint: tiny suites train theirs. `mode` stands in for its mode.
    Where the heads came from stands among the model's assets.
    """
    chosen = mode or suite.engine
    if heads is None and suite.heads.asset is not None:
        place = asset_folder(suite.heads.asset, allow_hub=allow_hub)
        loaded = replace(loaded, assets={**loaded.assets, **place.assets})
        return engine_from_heads(loaded, place.path, mode=chosen, num_heads=suite.heads.num_heads)
    if heads is None and suite.heads.path is not None:
        file = resolve_path(suite.heads.path, base_folder=base_folder)
        return engine_from_heads(loaded, file, mode=chosen, num_heads=suite.heads.num_heads)
    if heads is None and suite.heads.absent:
        # none of the arms drafts; probes and traces ask for a head
        heads = new_heads(loaded, Medusa1Settings(num_heads=1, architecture="shared"))
    digest = backbone_sha256(heads) if heads is not None else None  # before the runner casts them
    runner = StepRunner(loaded.model, heads, mode=chosen, clock=time.perf_counter)
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


def new_heads(loaded: LoadedModel, recipe: Medusa1Settings | Medusa2Settings) -> MedusaHeads:
    """Return untrained heads of a recipe's form for a model: each predicts what the model itself does."""
    return heads_like(loaded.model, recipe)


def heads_like(model: PreTrainedModel, recipe: Medusa1Settings | Medusa2Settings) -> MedusaHeads:
    """Return the same for a bare model, which may stand on the meta device."""
    lm_head: Any = model.get_output_embeddings()
    return MedusaHeads(
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        hidden_size=lm_head.weight.shape[1],
        vocab_size=lm_head.weight.shape[0],
        architecture=recipe.architecture,
        lm_head=lm_head,
    )
