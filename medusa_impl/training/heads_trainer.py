"""Medusa-1 on transformers' Trainer: a batch of rows a step, one learning rate, a log line every few steps.

Paper: Section 2.2.1 and Appendix B.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from medusa_impl.errors import UserError
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.batches import Batches
from medusa_impl.training.losses import Medusa1Loss
from medusa_impl.training.states import StateSource
from medusa_impl.training.step_log import append_line, trim_log
from medusa_impl.training.whole_checkpoints import WholeCheckpointTrainer
from medusa_impl.training_log import TrainingStep

LOG_FILE = "training-log.jsonl"
_COUNTS_FILE = "counts.json"


class StepItems(Dataset[dict[str, Any]]):
    """What each step of a training needs on the device, by the step's number.

    So the order of the data is a function of the step alone, and a resumed run goes on with the next one.
    """

    def __init__(self, source: StateSource, batches: Batches, *, num_steps: int) -> None:
        self._source, self._batches, self._num_steps = source, batches, num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self._source.item(self._batches.rows(step))


def check_one_process(num_processes: int) -> None:
    """Refuse to train heads alone in several processes: each would train the same, into the same files.

    Raises: UserError that names what can be shared.
    """
    if num_processes > 1:
        raise UserError(
            found=f"{num_processes} processes",
            need="one process",
            where="training heads alone",
            do='start it without a launcher, or take trains = "heads_and_backbone" with backbone = "frozen", '
            "which several processes share",
        )


def heads_arguments(
    recipe: Medusa1Settings, *, folder: Path, num_steps: int, save_steps: int, device: torch.device
) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe of heads alone.

    Of several GPUs it takes one.
    Raises: UserError for several processes.
    """
    on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one step's batch
        max_steps=num_steps,
        max_grad_norm=recipe.max_gradient_norm,
        seed=recipe.seed,
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # we look ourselves, before the heads learn from it
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        # On a GPU another process makes the next steps' items, in memory from which copies need no wait.
        dataloader_num_workers=1 if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
    )
    check_one_process(arguments.world_size)
    if arguments.n_gpu > 1:
        # Else the Trainer would copy the model to every GPU that it sees.
        arguments._n_gpu = 1
    return arguments


class HeadsTrainer(WholeCheckpointTrainer):
    """transformers' Trainer with the loss, the learning rate and the log of Medusa-1.

    `model` is a module that returns a `Medusa1Loss` for a step's item, and knows each step's vocabulary.

    Raises: UserError if a loss or a gradient is not finite.
    """

    def __init__(
        self,
        model: Any,
        *,
        items: StepItems,
        arguments: TrainingArguments,
        recipe: Medusa1Settings,
        on_step: Callable[[TrainingStep], None] | None = None,
        log_every_steps: int = 10,
        clock: Callable[[], float],
    ) -> None:
        self.recipe, self.num_steps = recipe, len(items)
        self.num_positions_seen = self.num_targets_outside = 0
        self.last_loss = math.nan
        self._loss: Medusa1Loss | None = None
        self._gradient_norm = math.nan
        self._on_step, self._log_every_steps = on_step, log_every_steps
        self._clock, self._mark = clock, clock()
        self._window = _Window(recipe.num_heads)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=items,
            data_collator=_only_one,
            callbacks=[_HeadsLog(self)],
        )
        self.remove_callback(PrinterCallback)  # what it would print on stdout is in the log

    @property
    def log_file(self) -> Path:
        """Return the path of the log."""
        return Path(str(self.args.output_dir)) / LOG_FILE

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Return AdamW over all parameters of the heads; `create_scheduler` sets its learning rate."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self._training_model.parameters(),
                lr=1.0,
                betas=self.recipe.betas,
                weight_decay=self.recipe.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return the recipe's learning rate as a schedule."""
        # The optimiser's own rate is 1, so the schedule's factors are the rates themselves.
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = LambdaLR(
                chosen, lambda step: self.recipe.learning_rate_at(step, num_steps=self.num_steps)
            )
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the steps in order: an item is a step's whole batch."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a step's batch, over the vocabulary of that step."""
        self._loss = model(inputs, vocabulary=self._training_model.vocabulary(self.state.global_step))
        return self._loss.loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradient; stop before heads and optimiser take up a number that is not finite."""
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        assert self._loss is not None
        self._gradient_norm, self.last_loss = float(norm), float(self._loss.loss.detach())
        if not (math.isfinite(self.last_loss) and math.isfinite(self._gradient_norm)):
            raise UserError(
                found=f"a loss of {self.last_loss} and a gradient norm of {self._gradient_norm} at step "
                f"{self.state.global_step}",
                need="finite ones",
                where="the training of the heads",
                do="lower the learning rate, or look for states that are not finite; the last good state "
                "is kept",
            )
        return norm

    def end_step(self) -> None:
        """Count the step just taken, and write a line of the log where one is due."""
        assert self._loss is not None
        step, model = self.state.global_step, self._training_model
        self.num_positions_seen += self._loss.num_positions
        self.num_targets_outside += self._loss.num_outside
        self._window.add(self._loss, self.last_loss)
        self._loss = None
        # No line of the log mixes losses of both vocabularies: they are not comparable.
        due = step % self._log_every_steps == 0 or step == self.num_steps
        if due or model.vocabulary(step) != model.vocabulary(step - 1):
            now = self._clock()
            record = self._window.record(
                self, vocabulary=model.vocabulary(step - 1), elapsed_s=now - self._mark
            )
            append_line(self.log_file, record.model_dump_json())
            self._window, self._mark = _Window(self.recipe.num_heads), now
            if self._on_step is not None:
                self._on_step(record)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the heads, and what was counted up to here."""
        super().save_model(output_dir, _internal_call)
        counts = {
            "num_positions_seen": self.num_positions_seen,
            "num_targets_outside": self.num_targets_outside,
            "last_loss": self.last_loss,
        }
        (Path(output_dir or str(self.args.output_dir)) / _COUNTS_FILE).write_text(
            json.dumps(counts), encoding="utf-8"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the heads, and what had been counted.

        Raises: UserError for a checkpoint that cannot be read.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / _COUNTS_FILE
        try:
            counts = json.loads(file.read_text(encoding="utf-8"))
            self.num_positions_seen = int(counts["num_positions_seen"])
            self.num_targets_outside = int(counts["num_targets_outside"])
            self.last_loss = float(counts["last_loss"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                found=f"no readable {_COUNTS_FILE} ({type(error).__name__})",
                need="a complete checkpoint",
                where=file.parent.name,
                do="remove it to start from the beginning",
            ) from error

    def begin(self) -> None:
        """Drop the log's lines of steps that are taken again, and start the clock."""
        trim_log(self.log_file, last_step=self.state.global_step)
        self._mark = self._clock()


class _HeadsLog(TrainerCallback):
    """Tells the trainer when a training and a step begin and end."""

    def __init__(self, trainer: HeadsTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.end_step()


class _Window:
    """Sums over the steps since the last line of the log; those of the heads stay on the device."""

    def __init__(self, num_heads: int) -> None:
        self.loss_sum, self.num_positions = 0.0, 0
        self.loss_sums: Tensor = torch.zeros(num_heads, dtype=torch.float64)
        self.num_targets: Tensor = torch.zeros(num_heads, dtype=torch.long)
        self.num_hits: Tensor = torch.zeros(num_heads, dtype=torch.long)

    def add(self, loss: Medusa1Loss, value: float) -> None:
        self.loss_sum += value * loss.num_positions
        self.num_positions += loss.num_positions
        self.loss_sums = self.loss_sums.to(loss.loss_sums.device) + loss.loss_sums
        self.num_targets = self.num_targets.to(loss.num_targets.device) + loss.num_targets
        self.num_hits = self.num_hits.to(loss.num_hits.device) + loss.num_hits

    def record(self, trainer: HeadsTrainer, *, vocabulary: Any, elapsed_s: float) -> TrainingStep:
        """Return the line of the log for these steps, of which the last has just been taken."""
        step, recipe = trainer.state.global_step, trainer.recipe
        targets = self.num_targets.tolist()
        return TrainingStep(
            step=step,
            num_steps=trainer.num_steps,
            vocabulary=vocabulary,
            loss=self.loss_sum / max(self.num_positions, 1),
            head_losses=_rates(self.loss_sums.tolist(), targets),
            head_hit_rates=_rates(self.num_hits.tolist(), targets),
            learning_rate=recipe.learning_rate_at(step - 1, num_steps=trainer.num_steps),
            gradient_norm=trainer._gradient_norm,
            num_positions_seen=trainer.num_positions_seen,
            num_targets_outside=trainer.num_targets_outside,
            positions_per_s=self.num_positions / elapsed_s if elapsed_s > 0 else None,
        )


def _rates(totals: list[float], counts: list[int]) -> tuple[float | None, ...]:
    return tuple(total / count if count else None for total, count in zip(totals, counts, strict=True))


def _only_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item
