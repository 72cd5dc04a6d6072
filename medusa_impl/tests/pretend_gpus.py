"""Runs a module as `python -m` does, in processes that accelerate takes for processes with GPUs.

accelerate shards on GPUs only, and a test has CPUs. The device remains the CPU, and the processes communicate
by gloo. What shards, trains, saves and loads is the real FSDP.
"""

from __future__ import annotations

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend() -> None:
    """Have every state from now on report GPUs, after it has found its device and its process group."""
    find_device = PartialState.set_device

    def set_device(state: PartialState) -> None:
        find_device(state)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = set_device


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
