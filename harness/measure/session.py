"""One session on a device: a model, its arms, and what their trials share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from harness.device.engine import Engine, LoadedModel, load_engine
from harness.device.gpu.watch import GpuWatch
from harness.device.locks import device_turns
from harness.device.prompts import Prompt, warmup_prompts
from harness.errors import UserError
from harness.records.store import Store
from harness.records.trials import Failure, Generation, GpuObservation
from harness.specs.suite import ArmSpec, BackboneName, SuiteSpec
from harness.training.tiny_heads import train_tiny_heads
from medusa_impl.engine.runner import Mode


@dataclass
class Session:
    """A suite on a device: its engines, its prompts, and the store that its outcomes go to."""

    suite: SuiteSpec
    engines: Mapping[BackboneName, Engine]
    prompts: tuple[Prompt, ...]
    warmup: tuple[Prompt, ...]
    store: Store[Generation | Failure]
    console: Console
    clock: Callable[[], float]
    device: torch.device
    gpu: GpuWatch | None = None

    @property
    def engine(self) -> Engine:
        """The engine of the original backbone."""
        return self.engines["original"]


def greedy_vanilla(suite: SuiteSpec, backbone: BackboneName = "original") -> ArmSpec:
    """Return the arm whose texts are traced and scored against.

    Raises: UserError where the suite has none.
    """
    found = (
        arm
        for arm in suite.arms
        if arm.method == "vanilla" and not arm.stochastic and arm.backbone == backbone
    )
    arm = next(found, None)
    if arm is None:
        what = f"no greedy vanilla arm on the {backbone} backbone"
        raise UserError(found=what, need="one: its texts are the reference", where=f"suite {suite.name!r}")
    return arm


def suite_engine(
    suite: SuiteSpec,
    loaded: LoadedModel,
    *,
    base_folder: Path | None,
    mode: Mode | None = None,
    allow_hub: bool = False,
) -> Engine:
    """Return the engine of a suite's own heads, which are trained here where it says so."""
    heads = None
    if suite.heads.train_steps is not None:
        heads = train_tiny_heads(loaded, suite, prompts=warmup_prompts(suite, loaded))
    return load_engine(suite, loaded, base_folder=base_folder, heads=heads, mode=mode, allow_hub=allow_hub)


def device_turn(session: Session) -> contextlib.AbstractContextManager[None]:
    """Hold the device for one timed block.

    A suite that reports no speed disturbs nobody's figures and waits for nobody.
    """
    if not session.suite.reports_speed:
        return contextlib.nullcontext()
    return device_turns(session.device, console=session.console)()


def tell_of_others(console: Console, seen: GpuObservation | None) -> None:
    """Say that another process uses the GPU, where one was seen; what was timed meanwhile is marked."""
    if seen is not None and seen.is_shared:
        console.print("another process uses the GPU: what was just timed is marked in the record")
