"""Two runs never write to one folder, and never time on one device at once."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from harness.device.locks import device_held, folder_held
from harness.errors import UserError

CPU = torch.device("cpu")


def hold_device(started: object, hold_s: float, spans: object) -> None:
    with device_held(CPU):
        begun = time.monotonic()
        started.set()  # type: ignore[attr-defined]
        time.sleep(hold_s)
        spans.put((begun, time.monotonic()))  # type: ignore[attr-defined]


def hold_folder(folder: Path, started: object, done: object) -> None:
    with folder_held(folder):
        started.set()  # type: ignore[attr-defined]
        done.wait(60)  # type: ignore[attr-defined]


def test_a_second_run_waits_for_the_device_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    context = multiprocessing.get_context("spawn")
    started, spans = context.Event(), context.Queue()
    other = context.Process(target=hold_device, args=(started, 1.0, spans))
    other.start()
    assert started.wait(120)
    waited: list[bool] = []
    with device_held(CPU, on_wait=lambda: waited.append(True)):
        mine = time.monotonic()
    other.join()
    _, theirs = spans.get()
    assert waited == [True]
    assert mine >= theirs


def test_a_free_device_is_held_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    waited: list[bool] = []
    with device_held(CPU, on_wait=lambda: waited.append(True)):
        pass
    assert waited == []


def test_a_folder_takes_one_writer(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, done = context.Event(), context.Event()
    other = context.Process(target=hold_folder, args=(tmp_path, started, done))
    other.start()
    assert started.wait(120)
    with pytest.raises(UserError, match="another process"), folder_held(tmp_path):
        pass
    with folder_held(tmp_path / "elsewhere"):
        pass
    done.set()
    other.join()
    with folder_held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []  # a record seals every file of its folder
