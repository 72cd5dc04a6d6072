"""LoRA adapters of the backbone: how they are added, saved and merged.

Paper: Appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from medusa_impl.checkpoints.tensors import read_safetensors, share_like, tensors_sha256
from medusa_impl.errors import UserError
from medusa_impl.recipes import LoraSettings

ADAPTER_FILE = "adapter_model.safetensors"


def untie_lm_head(model: PreTrainedModel) -> None:
    """Give the LM head its own copy of the weight, if it shares that of the embedding.

    peft merges an adapter of a tied LM head into the embedding as well, with no more than a warning. Every
    logit would be wrong.
    """
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = lm_head.get_parameter("weight")
    if weight is embedding.get_parameter("weight"):
        lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False


def add_adapter(model: PreTrainedModel, recipe: LoraSettings) -> Any:
    """Return the model with a LoRA adapter; only the adapter's matrices learn.

    If the LM head is adapted, it is untied from the embedding first.

    Raises: UserError if a target is not the name of a linear layer.
    Paper: Appendix B.
    """
    from peft import LoraConfig, get_peft_model  # imported here because it takes seconds

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
            need=f"names from {sorted(names)}",
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

    Raises: UserError if the folder holds no readable adapter.
    """
    return tensors_sha256(read_safetensors(folder / ADAPTER_FILE)[0])


@dataclass(frozen=True)
class TunedModel:
    """A model with an adapter merged into it.

    `original_lm_head` is the LM head before the merge, or None if the adapter did not change it.
    """

    model: PreTrainedModel
    adapter_sha256: str
    original_lm_head: nn.Module | None


def save_adapter(folder: Path, model: Any, *, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the hash of a peft model's adapter after writing it to a folder.

    The files hold no embeddings and no path of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    # peft would write the folder that the model was loaded from, which is a path of this machine.
    model.peft_config["default"].base_model_name_or_path = ""
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    share_like(folder / "adapter_config.json")
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
    return adapter_sha256(folder)


def load_adapter(model: PreTrainedModel, folder: Path) -> TunedModel:
    """Return the model with an adapter merged into it, ready for decoding; the given model is changed.

    If the adapter changes the LM head, it is untied from the embedding first.

    Raises: UserError if the folder holds no adapter, or one that does not fit the model.
    """
    from peft import PeftConfig, PeftModel  # imported here because it takes seconds

    # First, so that a folder that does not exist is refused: peft would look for it on the Hugging Face hub.
    digest = adapter_sha256(folder)
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
