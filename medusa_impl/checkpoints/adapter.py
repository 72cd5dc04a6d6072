"""An adapter of the backbone: added, saved, merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from medusa_impl.checkpoints.tensors import read_safetensors, tensors_sha256
from medusa_impl.errors import UserError
from medusa_impl.recipes import LoraRecipe

ADAPTER_FILE = "adapter_model.safetensors"


def untie_lm_head(model: PreTrainedModel) -> None:
    """Give a model whose LM head is its embedding a copy of its own.

    An adapter on a tied LM head is merged into the embedding too, with a warning at most: every logit would
    be wrong.
    """
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = lm_head.get_parameter("weight")
    if weight is embedding.get_parameter("weight"):
        lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False


def add_adapter(model: PreTrainedModel, recipe: LoraRecipe) -> Any:
    """Return the model with a LoRA adapter whose matrices alone learn; an LM head that is to be adapted is
    untied first.

    Raises: UserError where a target is not the name of a linear layer.
    """
    from peft import LoraConfig, get_peft_model  # here, since it takes seconds to import

    lm_head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not lm_head
    }
    head_name = next(name for name, module in model.named_modules() if module is lm_head)
    targets = sorted(names) if recipe.targets == "all-linear" else list(recipe.targets)
    if unknown := sorted(set(targets) - names):
        raise UserError(
            found=f"adapter targets {unknown}",
            need=f"some of {sorted(names)}",
            where="the recipe's lora.targets",
        )
    if recipe.lm_head:
        untie_lm_head(model)
        targets.append(head_name)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def adapter_sha256(folder: Path) -> str:
    """Return the hash of an adapter's tensors.

    Raises: UserError where the folder holds no readable adapter.
    """
    return tensors_sha256(read_safetensors(folder / ADAPTER_FILE)[0])


@dataclass(frozen=True)
class TunedModel:
    """A model with an adapter merged into it; `original_lm_head` is the LM head it had before, where the
    adapter changed it.
    """

    model: PreTrainedModel
    adapter_sha256: str
    original_lm_head: nn.Module | None


def save_adapter(folder: Path, model: Any, *, dtype: torch.dtype = torch.bfloat16) -> str:
    """Write a peft model's adapter, no embeddings and no place on this machine in it, and return its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    model.peft_config[
        "default"
    ].base_model_name_or_path = ""  # peft would write the folder that the model was loaded from
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card, to be filled in by hand
    return adapter_sha256(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> TunedModel:
    """Merge an adapter into a model, in place, and return it ready for decoding; an LM head that the adapter
    changes is untied first.

    Raises: UserError where the folder holds no adapter, or it does not fit the model.
    """
    from peft import PeftConfig, PeftModel  # here, since it takes seconds to import

    digest = adapter_sha256(folder)  # before peft, which would ask a hub for a folder that is not there
    lm_head: Any = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is lm_head)
    original: nn.Module | None = None
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if name in config.target_modules:
            untie_lm_head(model)
            weight = lm_head.weight.detach()
            original = nn.Linear(
                weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device
            )
            original.load_state_dict({"weight": weight})
            original.requires_grad_(False)
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            found=f"an adapter that does not fit ({str(error).splitlines()[0]})",
            need="the adapter of this model",
            where=folder.name,
        ) from error
    return TunedModel(
        model=merged.eval().requires_grad_(False), adapter_sha256=digest, original_lm_head=original
    )
