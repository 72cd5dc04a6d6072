"""LoRA adapters of the backbone: how they are added, saved and merged.

Paper: Appendix B.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    If the adapter has matrices of the LM head or of the embedding, the two are untied first: the merge of one
    of them would change the other as well.

    Raises: UserError if the folder holds no adapter, one that does not fit the model, or one that cannot be
    merged: its LM head and embedding are adapted as one.
    """
    from peft import PeftConfig, PeftModel  # imported here because it takes seconds

    # First, so that a folder that does not exist is refused: peft would look for it on the Hugging Face hub.
    tensors = read_safetensors(folder / ADAPTER_FILE)[0]
    before = _lm_head_copy(model)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if _adapts_the_vocabulary(model, tensors):
            _check_separate(model, config, where=folder.name)
            untie_lm_head(model)
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # what peft raises on a damaged configuration has no common class
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            found=f"an adapter that does not fit ({why})",
            need="the adapter of this model",
            where=folder.name,
        ) from error
    # Compared, not read off the configuration: an LM head can be named there in many ways, or be saved whole.
    is_changed = not torch.equal(merged.get_output_embeddings().weight, before.weight)
    return TunedModel(
        model=merged.eval().requires_grad_(False),
        adapter_sha256=tensors_sha256(tensors),
        original_lm_head=before if is_changed else None,
    )


def _lm_head_copy(model: PreTrainedModel) -> nn.Linear:
    """Return a frozen copy of a model's LM head."""
    lm_head: Any = model.get_output_embeddings()
    weight = lm_head.weight.detach()
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    copy.load_state_dict({"weight": weight})
    return copy.requires_grad_(False)


def _adapts_the_vocabulary(model: PreTrainedModel, tensors: Iterable[str]) -> bool:
    """Return whether an adapter has low-rank matrices of the LM head or of the embedding."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"base_model.model.{name}." for name, module in model.named_modules() if module in ends]
    return any("lora_" in tensor and tensor.startswith(tuple(names)) for tensor in tensors)


def _check_separate(model: PreTrainedModel, config: Any, *, where: str) -> None:
    """Refuse an adapter that changes a tied LM head and embedding as one: peft merges it twice."""
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = lm_head.get_parameter("weight") is embedding.get_parameter("weight")
    if is_tied and getattr(config, "ensure_weight_tying", False):
        raise UserError(
            found="an adapter with ensure_weight_tying, for a model whose LM head is its embedding",
            need="an adapter that changes the two apart, or neither of them",
            where=where,
            do="train it again without ensure_weight_tying",
        )
