"""What a decoding step is to the engine, and the plainest way to run one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.sections import Section, no_section


class Step(Protocol):
    """One decoding step as a function of tensors at fixed addresses: nothing in it is decided on the host.

    Besides keys and values of the cache it changes `state` alone, and it draws from `generator`. `recorded`
    is for the launcher, which may keep there what it made of the step.
    """

    cache: TreeCache
    recorded: dict[Any, Any]

    @property
    def state(self) -> tuple[Tensor, ...]:
        """Return all that a call changes, the cache's keys and values apart."""
        ...

    @property
    def generator(self) -> torch.Generator | None:
        """Return where the step draws from, if it does."""
        ...

    def __call__(self, section: Section = no_section) -> None: ...


Launcher = Callable[[Step, Section], None]


def run_directly(step: Step, section: Section) -> None:
    """Take a step kernel by kernel, as Python calls them."""
    step(section)
