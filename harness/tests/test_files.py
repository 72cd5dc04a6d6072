"""Files that are written: whole or not at all, and for whom the user's umask lets read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.files import write_bytes
from harness.report.figures.canvas import new_figure, save_figure
from harness.tests.fake_sweep import made_up_trace
from medusa_impl.checkpoints.tensors import write_by_rename


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "record.json": lambda path: write_bytes(path, b"{}"),
    "trace.npz": lambda path: made_up_trace(seed=1).save(path),
    "heads.safetensors": lambda path: write_by_rename(
        path, lambda part: save_file({"weight": torch.zeros(2)}, part)
    ),
    "picture.svg": lambda path: save_figure(new_figure(width=1, height=1), path, dpi=72),
}


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_written_with_the_umask(name: str, umask: int, tmp_path: Path) -> None:
    """Records were once readable for their owner alone, so that nobody else could validate a shared one."""
    WRITERS[name](tmp_path / name)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
