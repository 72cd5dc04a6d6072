"""One of two processes that train together, one job after another.

A launcher in training/test_trainer.py starts them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from medusa_impl.tests.training.test_trainer import SHARE, WEIGHTS, learning, make_case
from medusa_impl.training.trainer import MedusaTrainer, end_processes


def share(trainer: MedusaTrainer) -> tuple[float, int]:
    """Return the share of the weights that this process holds, and in how many parts it gathers the rest."""
    parameters = list(trainer._training_model.parameters())
    held = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in parameters)
    num_units = sum(isinstance(module, FSDPModule) for module in trainer._training_model.modules())
    return held / sum(one.numel() for one in parameters), num_units


def train(folder: Path, *, checkpoint: str | None = None, **case: Any) -> None:
    """Train, or continue from a checkpoint.

    The first process then writes the share of every process, and the weights that learnt.
    """
    trainer = make_case(folder, **case)
    trainer.train(resume_from_checkpoint=checkpoint)
    held = gather_object([share(trainer)])
    trainer.make_whole()
    if trainer.is_world_process_zero():
        (folder / SHARE).write_text(json.dumps(held))
        torch.save(learning(trainer), folder / WEIGHTS)


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        train(Path(job.pop("folder")), **job)
    end_processes()
