"""Training on several processes: which settings of the launcher are accepted, and sharded tensors.

Under FSDP each process holds a part of every weight. What is written to disk is always whole, so that a
training can go on with another number of processes, or under another launcher.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, str_to_bool
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from medusa_impl.errors import UserError

# Settings of accelerate, and what is needed instead of each.
_REFUSED_SETTINGS = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "every process to read the model, because all of them check its hash",
    "FSDP_ACTIVATION_CHECKPOINTING": "the recipe's gradient_checkpointing, which repeats the dropout masks",
    "FSDP_OFFLOAD_PARAMS": "weights that stay on their GPUs",
}


def under_fsdp() -> bool:
    """Return whether accelerate's launcher asks for FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def check_launcher(state: PartialState) -> None:
    """Refuse settings of accelerate's launcher that this training would not follow correctly.

    Raises: UserError for an autocast besides the recipe's, for DeepSpeed if it is not installed, for FSDP
    without GPUs, and for settings of FSDP that differ from those of `suites/recipes/fsdp.yaml`.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            found="no deepspeed",
            need="deepspeed, which this launcher uses",
            where="accelerate's settings",
            do="install medusa-repro[deepspeed]",
        )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise _refused(f"mixed_precision {precision}", need="no autocast but the recipe's")
    if not under_fsdp():
        return
    if state.distributed_type == DistributedType.MULTI_CPU:
        raise UserError(
            found="FSDP on CPUs, which accelerate ignores",
            need="GPUs, or data parallel",
            where="accelerate's settings",
            do="start it with `python -m torch.distributed.run --nproc_per_node N -m harness train ..`",
        )
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise _refused(
            f"fsdp_version {version}", need="fsdp_version 2, which shards each parameter on its own"
        )
    if (policy := os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")) != "TRANSFORMER_BASED_WRAP":
        raise _refused(
            f"fsdp_auto_wrap_policy {policy}",
            need="TRANSFORMER_BASED_WRAP, because otherwise all layers are gathered at once",
        )
    for name, need in _REFUSED_SETTINGS.items():
        if _is_set(name):
            raise _refused(name.lower(), need=need)


def check_deepspeed(plugin: Any) -> None:
    """Refuse settings of DeepSpeed that shard the weights themselves, or set other dtypes than the recipe.

    Raises: UserError for any stage of ZeRO but the second, for offloading, and for fp16 or bf16.
    """
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if plugin.zero_stage != 2:
        raise _refused(
            f"ZeRO stage {plugin.zero_stage}",
            need="stage 2, or FSDP, which shards the weights too",
            settings="deepspeed",
        )
    if lowered := [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled") is True]:
        raise _refused(
            f"{lowered[0]} of DeepSpeed", need="no autocast but the recipe's", settings="deepspeed"
        )
    if moved := [
        name
        for name in ("offload_optimizer", "offload_param")
        if zero.get(name, {}).get("device", "none") not in (None, "none")
    ]:
        raise _refused(moved[0], need="an optimiser that stays on its GPUs", settings="deepspeed")


def _is_set(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))


def _refused(found: str, *, need: str, settings: Literal["fsdp", "deepspeed"] = "fsdp") -> UserError:
    return UserError(
        found=found,
        need=need,
        where="accelerate's settings",
        do=f"start it with `accelerate launch --config_file suites/recipes/{settings}.yaml`",
    )


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded.

    All processes must call this together: each contributes its part.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, sharded in the same way as the parameter.

    All processes must call this together.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def whole_optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimiser's state with whole tensors on the host.

    All processes must call this together. With `keep` false this process only contributes its parts, and gets
    empty tensors.
    """
    # One tensor after another, so that never more than one is whole on the device.
    state: dict[str, Any] = tree_map(
        lambda one: on_host(one, keep=keep) if isinstance(one, Tensor) else one, optimizer.state_dict()
    )
    return state


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimiser; tensors that have their parameter's shape are sharded like it.

    All processes must call this together.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = cut_like(value, parameter)
    optimizer.load_state_dict(state)


def make_whole(
    root: nn.Module, parts: Iterable[nn.Module], *, wanted: Callable[[nn.Parameter], bool], keep: bool
) -> None:
    """Replace the wanted parameters of some parts of a sharded model by whole ones on the host.

    Afterwards the model cannot run any more. All processes must call this together. With `keep` false this
    process only contributes its shards, and its parameters stay as they are.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The last pass may have left weights whole. FSDP would shard them again later, and overwrite
            # those that are set here.
            module.reshard()
    made = dict[int, nn.Parameter]()
    for module in (module for part in parts for module in part.modules()):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor) or not wanted(parameter):
                continue
            if id(parameter) not in made:  # tied weights get one new parameter, and stay tied
                made[id(parameter)] = nn.Parameter(
                    on_host(parameter, keep=keep), requires_grad=parameter.requires_grad
                )
            if keep:
                module.register_parameter(name, made[id(parameter)])


def on_host(tensor: Tensor, *, keep: bool) -> Tensor:
    """Return the whole of a tensor that may be sharded, on the host; an empty tensor if `keep` is false.

    All processes must call this together.
    """
    full = whole(tensor)
    return full.cpu() if keep else torch.empty(0)
