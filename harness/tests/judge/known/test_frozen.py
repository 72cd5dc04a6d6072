"""What the judging functions hand on cannot be changed by who reads it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.compose.replay import Replay, replay
from harness.files import Frozen
from harness.tests.fake_record import write_fake_record
from harness.tests.test_layers import module_of, source_files
from medusa_impl.tree import DraftTree


def judging_modules() -> list[str]:
    names = map(module_of, source_files())
    return [
        name
        for name in names
        if name.startswith("harness.judge") or name in ("harness.stats", "harness.compose.replay")
    ]


def classes() -> Iterator[type]:
    for name in judging_modules():
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and value.__module__ == name:
                yield value


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_every_model_and_dataclass_is_frozen(kind: type) -> None:
    if dataclasses.is_dataclass(kind):
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if issubclass(kind, Frozen):
        assert kind.model_config["frozen"]


def test_replays_are_told_apart_without_comparing_their_arrays(tmp_path: Path) -> None:
    trace = write_fake_record(tmp_path, rounds=1, num_prompts=4).trace
    assert trace is not None
    first, second = (replay(trace, DraftTree.chain(2)) for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2
    assert isinstance(first, Replay)
