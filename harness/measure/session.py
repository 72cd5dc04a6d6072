"""One session on a device: a model, its arms, and what their trials share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console

from harness.device.engine import Engine
from harness.device.locks import device_turns
from harness.device.prompts import SuitePrompt
from harness.errors import UserError
from harness.records.run import Failure, Generation
from harness.records.store import Store
from harness.specs.suite import ArmSpec, BackboneName, SuiteSpec


@dataclass
class Session:
    """A suite on a device: the engines of its backbones, its prompts, and the store that its outcomes go
    to.
    """

    suite: SuiteSpec
    engines: Mapping[BackboneName, Engine]
    prompts: tuple[SuitePrompt, ...]
    warmup: tuple[SuitePrompt, ...]
    store: Store[Generation | Failure]
    console: Console
    clock: Callable[[], float]
    device: torch.device

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


def device_turn(session: Session) -> contextlib.AbstractContextManager[None]:
    """Hold the device for one timed block.

    A suite that reports no speed disturbs nobody's figures and waits for nobody.
    """
    if not session.suite.reports_speed:
        return contextlib.nullcontext()
    return device_turns(session.device, console=session.console)()
