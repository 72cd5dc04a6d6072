"""A Trainer whose checkpoints hold what the training changes, whole, and nothing else.

transformers' Trainer saves every weight, and under FSDP each process's part of it. The checkpoints here hold
the parameters that learn, and the optimiser's state, both whole. So they are small, and a training can go on
with another number of processes. DeepSpeed alone saves its own parts of the optimiser's state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from medusa_impl.errors import UserError
from medusa_impl.training.sharding import (
    cut_like,
    load_optimizer_state,
    make_whole,
    on_host,
    whole_optimizer_state,
)


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest whole checkpoint of a run."""

    folder: Path
    step: int
    is_finished: bool


def last_checkpoint(folder: Path) -> LastCheckpoint | None:
    """Return the newest checkpoint that was written to its end; one that a kill cut short is passed over."""
    found = []
    for state_file in folder.glob("checkpoint-*/trainer_state.json"):  # the Trainer writes this file last
        try:
            state = json.loads(state_file.read_text(encoding="utf-8"))
            step, num_steps = int(state["global_step"]), int(state["max_steps"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        found.append(LastCheckpoint(folder=state_file.parent, step=step, is_finished=step >= num_steps))
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


class WholeCheckpointTrainer(Trainer):
    """A Trainer that saves and loads only what learns of its model.

    The methods that the Trainer calls have its names and arguments.
    """

    @property
    def _training_model(self) -> Any:
        """Return the model without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Return the Trainer's result of a training from the start or from a checkpoint.

        Raises: UserError for a checkpoint whose optimiser state this launcher cannot read.
        """
        # The Trainer itself would silently begin with an empty optimiser.
        if isinstance(resume_from_checkpoint, str):
            parts = len(list(Path(resume_from_checkpoint).glob("global_step*/zero_pp_rank_*")))
            ours = self.args.world_size if self.is_deepspeed_enabled else 0
            if parts != ours:
                found, need = (
                    f"of DeepSpeed on {count} processes" if count else "of another launcher than DeepSpeed"
                    for count in (parts, ours)
                )
                raise UserError(
                    found=f"a checkpoint {found}",
                    need=f"one {need}",
                    where=Path(resume_from_checkpoint).name,
                    do="use the launcher that the training began with, or start from the beginning",
                )
        return super().train(resume_from_checkpoint, *arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the parameters that learn, whole.

        The frozen ones are the original model's. Some of them share memory, which safetensors refuses.
        """
        keep = self.args.should_save
        # On all processes, although one writes: each contributes its part.
        learning = {
            name: on_host(parameter, keep=keep).contiguous() for name, parameter in self._learning().items()
        }
        if keep:
            self._save(output_dir, state_dict=learning)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimiser's state and the schedule's, the first whole unless DeepSpeed saves it."""
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save and self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what `_save_optimizer_and_scheduler` has saved, for this number of processes.

        Raises: UserError for a checkpoint without them.
        """
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        # Always to the host first: transformers 5.17 names torch a device "cpu:0" here, which it cannot load
        # to, where several processes train on a CPU.
        sharded = self.is_fsdp_enabled
        states = []
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            file = Path(checkpoint) / name
            if not file.is_file():  # the Trainer itself would silently begin with an empty optimiser
                raise UserError(found=f"no {name}", need="a complete checkpoint", where=file.parent.name)
            states.append(torch.load(file, map_location="cpu", mmap=sharded, weights_only=True))
        if sharded:
            load_optimizer_state(self.optimizer, states[0])
        else:
            self.optimizer.load_state_dict(states[0])
        self.lr_scheduler.load_state_dict(states[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the parameters that learn.

        Raises: UserError for a checkpoint that cannot be read, or that holds other parameters.
        """
        file = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                found=f"no readable checkpoint ({error})", need="a complete one", where=file.parent.name
            ) from error
        learning = self._learning()
        if state.keys() != learning.keys():
            num_wrong = len(state.keys() ^ learning.keys())
            raise UserError(
                found=f"{num_wrong} tensors that only the checkpoint or the model has",
                need="a checkpoint of the same recipe",
                where=file.parent.name,
                do="start the training from the beginning",
            )
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(cut_like(state[name], parameter))

    def load_finished(self, checkpoint: Path) -> None:
        """Load the last checkpoint of a finished run, without taking any steps."""
        # FSDP shards the model only here; the Trainer would do it when it starts to train.
        if self.is_fsdp_enabled:
            self.accelerator.prepare(self.model, self.create_optimizer())
        self._load_from_checkpoint(str(checkpoint))

    def make_whole(self) -> None:
        """Give the first process whole weights on the host, if they are sharded.

        Afterwards the model cannot run any more. With an adapter only the weights that learn are made whole:
        the others are the original's, and no file holds them.
        """
        if self.is_fsdp_enabled:
            model = self._training_model
            every = model.recipe.backbone != "lora"
            make_whole(
                model,
                [model.heads, model.backbone],
                wanted=lambda parameter: every or parameter.requires_grad,
                keep=self.is_world_process_zero(),
            )

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that learn, by name."""
        return {
            name: parameter
            for name, parameter in self._training_model.named_parameters()
            if parameter.requires_grad
        }
