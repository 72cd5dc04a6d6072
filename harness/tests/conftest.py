"""Fixtures of the device half: one trained tiny engine, one smoke run and one small run serve all tests of a
session.

Imports stand in the fixtures, so that tests of the pure half start without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

if TYPE_CHECKING:
    from harness.device.engine import Engine, LoadedModel
    from harness.tests.tiny_suite import MicroRun, SmokeRun


@pytest.fixture(scope="session")
def tiny() -> tuple[LoadedModel, Engine]:
    """The smoke model and an engine with trained heads; nothing may change their weights."""
    from harness.tests.tiny_suite import train_tiny_engine

    return train_tiny_engine()


@pytest.fixture(scope="session")
def engine(tiny: tuple[LoadedModel, Engine]) -> Engine:
    """The tiny engine alone."""
    return tiny[1]


@pytest.fixture(scope="session")
def heads_file(tiny: tuple[LoadedModel, Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny engine's heads as a checkpoint."""
    from harness.tests.tiny_suite import save_tiny_heads

    path = tmp_path_factory.mktemp("heads") / "tiny.safetensors"
    save_tiny_heads(path, tiny[1].heads, backbone_sha256=tiny[0].sha256)
    return path


@pytest.fixture(scope="session")
def steady_checkout() -> Iterator[None]:
    """Let runs of this session see one state of the checkout: a file saved meanwhile is another code, which a
    resume rightly refuses.
    """
    from harness.device.machine import git_state

    with patch("harness.device.machine.git_state", cache(git_state)):
        yield


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """The smoke suite, run once through the command line."""
    from harness.tests.tiny_suite import run_smoke

    return run_smoke(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="session")
def micro(heads_file: Path, steady_checkout: None, tmp_path_factory: pytest.TempPathFactory) -> MicroRun:
    """A finished run of four prompts and four trials each."""
    from harness.records.run import RunRecord
    from harness.tests.tiny_suite import MicroRun, micro_data, run

    data = micro_data(heads_file)
    return MicroRun(data=data, record=RunRecord(run(data, tmp_path_factory.mktemp("micro"))))
