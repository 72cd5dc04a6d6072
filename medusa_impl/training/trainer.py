"""Joint training on transformers' Trainer, which brings resuming, data parallel, FSDP and DeepSpeed through
accelerate.

What is Medusa's own stands here: one loss, two learning rates, a weight that rises, a log of every step, and
checkpoints of what learns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from medusa_impl.engine.memory import peak_memory_bytes, reset_peak_memory
from medusa_impl.errors import UserError
from medusa_impl.recipes import Medusa2Recipe
from medusa_impl.training.losses import NUM_RANKS
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.sequences import LikeLengthSampler, SequenceDataset, TrainingSequence, collate
from medusa_impl.training.sharding import (
    check_deepspeed,
    cut_like,
    load_optimizer_state,
    make_whole,
    on_host,
    under_fsdp,
    whole_optimizer_state,
)
from medusa_impl.training_log import STEP_LOG, JointStep


def process_state() -> PartialState:
    """Return which of how many processes this is; without a GPU each would take itself for the only one if
    not told so.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def end_processes() -> None:
    """Take leave of the other processes, after the last thing that all do together; left to Python's exit,
    their threads may abort it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def training_arguments(
    recipe: Medusa2Recipe, *, folder: Path, save_steps: int, use_cpu: bool
) -> TrainingArguments:
    """Return the Trainer's arguments that a recipe amounts to; learning rates are the recipe's own schedule.

    Raises: UserError for a batch that does not divide among the processes, or several GPUs without a
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
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_drop_last=False,
        average_tokens_across_devices=True,
        # FSDP keeps whole gradients of all layers from part to part of a batch unless they are cut after each
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": under_fsdp()}},
        # by our own sampler: the Trainer's would begin with the longest
        train_sampling_strategy="group_by_length",
        ddp_find_unused_parameters=recipe.warmup == "two_stage" and recipe.backbone != "frozen",
        ddp_broadcast_buffers=False,  # no buffer changes while training
    )
    if arguments.n_gpu > 1:
        raise UserError(
            found=f"{arguments.n_gpu} GPUs in one process",
            need="one process a GPU",
            where="joint training",
            do="start it with `accelerate launch -m harness train ..`, or show it one GPU by "
            "CUDA_VISIBLE_DEVICES",
        )
    return arguments


def shared_batch(recipe: Medusa2Recipe, *, num_processes: int) -> tuple[int, int]:
    """Return each process's sequences at once, and how many times it takes them a step: the step's batch
    stays the recipe's.

    Raises: UserError for a batch that does not divide.
    """
    if recipe.batch_sequences % num_processes == 0:
        return recipe.batch_sequences // num_processes, recipe.accumulation_steps
    if recipe.accumulation_steps % num_processes == 0:
        return recipe.batch_sequences, recipe.accumulation_steps // num_processes
    raise UserError(
        found=f"{recipe.accumulation_steps} times {recipe.batch_sequences} sequences for {num_processes} "
        "processes",
        need="batch_sequences or accumulation_steps that the processes divide",
        where="the recipe",
    )


class MedusaTrainer(Trainer):
    """transformers' Trainer with the loss of Eq. 2, two learning rates and the heads' warm-up of one recipe.

    Raises: UserError where the recipe asks for an optimiser that is not installed, DeepSpeed's settings are
    not those of `suites/recipes/deepspeed.yaml`, or a loss is not finite.
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
        self.model_accepts_loss_kwargs = (
            True  # the Trainer then counts the targets of all parts of a batch, on all processes
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the sequences; a batch of like lengths is what all processes see in one
        step.
        """
        arguments = self.args
        if arguments.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self._sampler = LikeLengthSampler(self._lengths, batch_size=batch_size, seed=self.recipe.seed)
        return self._sampler

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return AdamW over two groups, heads first; rates are set step by step."""
        if self.optimizer is None:
            heads, backbone = self._training_model.parameter_groups()
            groups = [{"params": heads, "lr": 1.0}, *([{"params": backbone, "lr": 1.0}] if backbone else [])]
            self.optimizer = _optimizer_class(self.recipe)(
                groups, lr=1.0, weight_decay=self.recipe.weight_decay
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return the recipe's two rates as one schedule."""
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
        # gradients are averaged over processes, and the count is that of all of them
        return loss * self.accelerator.num_processes

    @property
    def log_file(self) -> Path:
        """Where the steps are logged."""
        return Path(str(self.args.output_dir)) / STEP_LOG

    def take_step_record(self) -> JointStep | None:
        """Return the log line of the step just taken, summed over all processes, on the first of them."""
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

    @property
    def _training_model(self) -> MedusaTrainingModel:
        model: Any = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MedusaTrainingModel)
        return model

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self._gradient_norm = float(norm) if norm is not None else None
        return norm

    def begin_step(self) -> None:
        """Note the rates of the step that begins; where the second of two stages begins anew, so does the
        optimiser.
        """
        step, recipe = self.state.global_step, self.recipe
        optimizer: Any = self.optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        if (
            recipe.schedule == "each_stage"
            and step
            and step == recipe.first_backbone_step(self.state.max_steps)
        ):
            getattr(optimizer, "optimizer", optimizer).state.clear()  # accelerate wraps the optimiser

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train, or go on from a checkpoint.

        Raises: UserError for a checkpoint whose optimiser this launcher cannot read: it would begin anew
        without a word.
        """
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
                    do="go on as the training began, or start it anew",
                )
        return super().train(resume_from_checkpoint, *arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what learns, whole, nothing else: the frozen rest is the original model's, and its tensors may
        share memory.
        """
        keep = self.args.should_save
        # on all processes
        learning = {
            name: on_host(parameter, keep=keep).contiguous() for name, parameter in self._learning().items()
        }
        if keep:
            self._save(output_dir, state_dict=learning)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimiser's state whole, so that a run may go on under another number of processes;
        DeepSpeed saves its own parts.
        """
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
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = torch.load(
            Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True
        )
        load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what learns, all of it; the rest is there already."""
        file = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                found=f"no readable checkpoint ({error})", need="a whole one", where=file.parent.name
            ) from error
        learning = self._learning()
        if state.keys() != learning.keys():
            raise UserError(
                found=f"{len(state.keys() ^ learning.keys())} tensors that only one side has",
                need="a checkpoint of the same recipe",
                where=file.parent.name,
                do="start the training anew",
            )
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(cut_like(state[name], parameter))

    def load_finished(self, checkpoint: Path) -> None:
        """Load the end of a run that is over, whose steps need not be taken again."""
        if self.is_fsdp_enabled:
            self.accelerator.prepare(self.model, self.create_optimizer())
        self._load_from_checkpoint(str(checkpoint))

    def make_whole(self) -> None:
        """Give the first process whole weights, on the host, where each process held a part of them; the
        model is not run any more.

        Under an adapter these are the weights that learn: the rest is the original's, and files hold none of
        it.
        """
        if self.is_fsdp_enabled:
            model, every = self._training_model, self.recipe.backbone != "lora"
            make_whole(
                model,
                [model.heads, model.backbone],
                wanted=lambda parameter: every or parameter.requires_grad,
                keep=self.is_world_process_zero(),
            )

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self._training_model.named_parameters()
            if parameter.requires_grad
        }


class _StepLog(TrainerCallback):
    """Appends every step to the log; after a resume, what a later state had written is dropped first."""

    def __init__(self, trainer: MedusaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            path = self._trainer.log_file
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [
                line
                for line in lines
                if line.endswith("\n") and json.loads(line)["step"] <= state.global_step
            ]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(path)
        self._trainer._mark = self._trainer._clock()
        reset_peak_memory(args.device)  # of loading

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._sampler is not None:
            # accelerate does not reach it in a resumed run of several processes
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
            with self._trainer.log_file.open("a") as file:
                file.write(record.model_dump_json() + "\n")
            if self._trainer._on_step is not None:
                self._trainer._on_step(record)


def _optimizer_class(recipe: Medusa2Recipe) -> Any:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            found="no bitsandbytes",
            need="it for the 8-bit optimiser",
            where="the recipe",
            do="install it, or set optimizer = 'adamw'",
        ) from error
    return AdamW8bit
