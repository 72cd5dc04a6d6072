"""Joint training on transformers' Trainer, which runs on one process or many, plain, with FSDP or DeepSpeed.

This file adds what is Medusa's own: one loss of two terms, two learning rates, weights of the loss that
change from step to step, and a log of every step. `whole_checkpoints.py` saves and loads.

Paper: Section 2.2.2 and Appendix B.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.errors import UserError
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.losses import NUM_RANKS
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sequences import LikeLengthSampler, SequenceDataset, TrainingSequence, collate
from medusa_impl.training.sharding import check_deepspeed, under_fsdp
from medusa_impl.training.step_log import append_line, trim_log
from medusa_impl.training.whole_checkpoints import WholeCheckpointTrainer
from medusa_impl.training_log import STEP_LOG, JointStep


def process_state() -> PartialState:
    """Return which of how many processes this is."""
    # Without a GPU, and without `cpu`, each process would believe that it is the only one.
    return PartialState(cpu=not torch.cuda.is_available())


def end_processes() -> None:
    """Leave the group of processes, after the last work that they do together."""
    # If this is left to Python's exit, threads of the group may abort the process; so may those that still
    # talk to a process which has left, so all leave together.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def training_arguments(
    recipe: Medusa2Settings, *, folder: Path, save_steps: int, use_cpu: bool
) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe; the learning rates are not among them.

    Raises: UserError for a batch that cannot be divided among the processes, or several GPUs without a
    launcher.
    """
    batch_sequences, accumulation_steps = shared_batch(recipe, num_processes=process_state().num_processes)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_sequences,
        gradient_accumulation_steps=accumulation_steps,
        max_steps=recipe.num_steps if recipe.num_steps is not None else -1,
        num_train_epochs=recipe.num_epochs if recipe.num_epochs is not None else 1.0,
        max_grad_norm=recipe.max_gradient_norm,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        use_cpu=use_cpu,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_strategy="no",
        # `compute_loss` refuses what this looks for, waiting for the device twice in each part of a batch.
        logging_nan_inf_filter=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_drop_last=False,
        average_tokens_across_devices=True,
        # Otherwise FSDP keeps whole gradients of all layers until the last part of a batch.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": under_fsdp()}},
        # This asks for a sampler; `_get_train_sampler` gives our own. The Trainer's would begin with the
        # longest sequences.
        train_sampling_strategy="group_by_length",
        # In the first of two stages the backbone's parameters get no gradients.
        ddp_find_unused_parameters=recipe.warmup == "two_stage" and recipe.backbone != "frozen",
        ddp_broadcast_buffers=False,  # no buffer changes while training
    )
    if arguments.n_gpu > 1:
        raise UserError(
            found=f"{arguments.n_gpu} GPUs in one process",
            need="one process for each GPU",
            where="joint training",
            do="start it with `accelerate launch -m harness train ..`, or limit it to one GPU with "
            "CUDA_VISIBLE_DEVICES",
        )
    return arguments


def shared_batch(recipe: Medusa2Settings, *, num_processes: int) -> tuple[int, int]:
    """Return how many sequences each process takes at once, and how many times in a step.

    The processes together take the recipe's number of sequences a step, however many processes there are.

    Raises: UserError if neither of the recipe's two numbers can be divided by the number of processes.
    """
    if recipe.batch_sequences % num_processes == 0:
        return recipe.batch_sequences // num_processes, recipe.accumulation_steps
    if recipe.accumulation_steps % num_processes == 0:
        return recipe.batch_sequences, recipe.accumulation_steps // num_processes
    raise UserError(
        found=f"{recipe.accumulation_steps} times {recipe.batch_sequences} sequences for {num_processes} "
        "processes",
        need="batch_sequences or accumulation_steps to be a multiple of the number of processes",
        where="the recipe",
    )


class MedusaTrainer(WholeCheckpointTrainer):
    """transformers' Trainer with the loss, the two learning rates and the heads' warm-up of one recipe.

    Raises: UserError if the recipe asks for an optimiser that is not installed, if DeepSpeed's settings are
    not those of `suites/recipes/deepspeed.yaml`, or if a loss is not finite.
    Paper: Section 2.2.2, Eq. 2.
    """

    def __init__(
        self,
        model: MedusaTrainingModel,
        *,
        sequences: tuple[TrainingSequence, ...],
        arguments: TrainingArguments,
        on_step: Callable[[JointStep], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not any(sequence.num_targets for sequence in sequences):
            raise UserError(found="no answer to train on", need="sequences with answers", where="the corpus")
        self.recipe = model.recipe
        self._sampler: LikeLengthSampler | None = None
        self._lengths = [len(sequence.token_ids) for sequence in sequences]
        self._window: dict[str, Tensor] = {}
        self._gradient_norm: float | None = None
        self._rates: list[float] = []
        self._on_step, self._clock, self._mark = on_step, clock, clock()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=SequenceDataset(sequences),
            data_collator=collate,
            callbacks=[_StepLog(self)],
        )
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin)
        # So the Trainer counts the targets of all parts of a batch, on all processes.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the sequences.

        A batch, whose sequences have similar lengths, is what all processes together take in one step.
        """
        arguments = self.args
        if arguments.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self._sampler = LikeLengthSampler(self._lengths, batch_size=batch_size, seed=self.recipe.seed)
        return self._sampler

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return AdamW over two groups, heads first; `create_scheduler` sets their learning rates."""
        if self.optimizer is None:
            heads, backbone = self._training_model.parameter_groups()
            groups = [{"params": heads, "lr": 1.0}, *([{"params": backbone, "lr": 1.0}] if backbone else [])]
            self.optimizer = _optimizer_class(self.recipe)(
                groups, lr=1.0, weight_decay=self.recipe.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return the recipe's two learning rates as one schedule."""
        # The optimiser's own rates are 1, so the schedule's factors are the rates themselves.
        if self.lr_scheduler is None:
            rates = [
                lambda step: self.recipe.learning_rates(step, num_steps=num_training_steps)[0],
                lambda step: self.recipe.learning_rates(step, num_steps=num_training_steps)[1],
            ]
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = LambdaLR(chosen, rates[: len(chosen.param_groups)])
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one part of a batch, weighted as the recipe weights this step."""
        backbone_weight, heads_weight = self.recipe.loss_weights(
            self.state.global_step, num_steps=self.state.max_steps
        )
        result = model(
            **inputs, backbone_weight=backbone_weight, heads_weight=heads_weight, num_items=num_items_in_batch
        )
        loss = result.pop("loss")
        if not bool(torch.isfinite(loss.detach())):
            raise UserError(
                found=f"a loss of {float(loss.detach())} at step {self.state.global_step}",
                need="a finite one",
                where="joint training",
                do="lower the learning rates; the last checkpoint is kept",
            )
        for name, value in {**result, "loss": loss.detach()}.items():
            self._window[name] = self._window[name] + value if name in self._window else value
        # The loss is divided by the targets of all processes, and then the gradients are averaged over them:
        # this undoes one of the two.
        return loss * self.accelerator.num_processes

    @property
    def log_file(self) -> Path:
        """Return the path of the log of steps."""
        return Path(str(self.args.output_dir)) / STEP_LOG

    def take_step_record(self) -> JointStep | None:
        """Return the log's line of the step just taken, from sums over all processes.

        Only the first process gets it, but all must call this together.
        """
        # In sorted order, so that all processes reduce the same sum at the same time.
        sums: dict[str, Tensor] = {
            name: self.accelerator.reduce(value, reduction="sum")
            for name, value in sorted(self._window.items())
        }
        self._window = {}
        if not self.is_world_process_zero():
            return None
        now, step = self._clock(), self.state.global_step
        elapsed, self._mark = now - self._mark, now
        backbone_weight, heads_weight = self.recipe.loss_weights(step - 1, num_steps=self.state.max_steps)
        positions = int(sums["positions"])
        targets = sums["head_targets"].tolist()
        hits = sums["head_ranks"].cumsum(-1).tolist()
        return JointStep(
            step=step,
            num_steps=self.state.max_steps,
            loss=float(sums["loss"]),
            backbone_loss=float(sums["backbone_loss"]) / positions if "backbone_loss" in sums else None,
            agreement_rate=float(sums["agreements"]) / positions if "agreements" in sums else None,
            head_losses=tuple(
                total / n if n else None
                for total, n in zip(sums["head_losses"].tolist(), targets, strict=True)
            ),
            head_accuracies=tuple(
                tuple(row[rank] / n if n else None for rank in range(NUM_RANKS))
                for row, n in zip(hits, targets, strict=True)
            ),
            backbone_weight=backbone_weight,
            lambda_0=heads_weight,
            heads_learning_rate=self._rates[0],
            backbone_learning_rate=self._rates[1] if len(self._rates) > 1 else 0.0,
            gradient_norm=self._gradient_norm,
            num_positions=positions,
            positions_per_s=positions / elapsed if elapsed > 0 else None,
            memory_bytes=peak_memory_bytes(self.args.device),
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._gradient_norm = float(norm) if norm is not None else None
        return norm

    def begin_step(self) -> None:
        """Note the learning rates of the step that begins.

        If the recipe's second stage is a training of its own, the optimiser forgets the first one's moments
        here. The heads' weight in the loss falls between the stages, and the large old moments would make the
        heads' steps too small.
        """
        step, recipe = self.state.global_step, self.recipe
        optimizer: Any = self.optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if (
            recipe.schedule == "each_stage"
            and step
            and step == recipe.first_backbone_step(self.state.max_steps)
        ):
            getattr(optimizer, "optimizer", optimizer).state.clear()  # accelerate may have wrapped it


class _StepLog(TrainerCallback):
    """Writes every step to the log."""

    def __init__(self, trainer: MedusaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            trim_log(self._trainer.log_file, last_step=state.global_step)
        self._trainer._mark = self._trainer._clock()
        reset_peak_memory(args.device)  # so that the peak of loading does not count

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._sampler is not None:
            # accelerate sets the epoch too, but not in a resumed run of several processes.
            self._trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        record = self._trainer.take_step_record()
        if record is not None:
            append_line(self._trainer.log_file, record.model_dump_json())
            if self._trainer._on_step is not None:
                self._trainer._on_step(record)


def _optimizer_class(recipe: Medusa2Settings) -> Any:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            found="no bitsandbytes",
            need="bitsandbytes, which has the 8-bit optimiser",
            where="the recipe",
            do="install it, or set optimizer = 'adamw'",
        ) from error
    return AdamW8bit
