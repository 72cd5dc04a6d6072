"""A trace's file is read whole or refused in one line: its numbers are in bounds, its size is, and it is a
file.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import UserError
from harness.records.trace import Trace
from harness.tests.fake_sweep import made_up_trace

Parts = dict[str, Any]


def spoilt(path: Path, change: Callable[[Parts, Parts], None]) -> Path:
    """Write a trace whose header and arrays are changed."""
    made_up_trace(1).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    rows = len(arrays["tokens"])
    arrays["gaps"] = np.ones(rows, dtype=np.float32)
    arrays["nll"] = np.where(arrays["ranks"] < 0, np.nan, 1).astype(np.float32)
    change(header, arrays)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez_compressed(path, **arrays)
    return path


def put(name: str, value: float) -> Callable[[Parts, Parts], None]:
    def change(header: Parts, arrays: Parts) -> None:
        arrays[name] = arrays[name].astype(np.float64 if name in ("gaps", "nll") else np.int64)
        arrays[name].flat[0] = value

    return change


def ties(name: str, listed: Any) -> Callable[[Parts, Parts], None]:
    def change(header: Parts, arrays: Parts) -> None:
        header["provenance"]["extra"][name] = listed

    return change


def test_a_trace_with_gaps_likelihoods_and_ties_is_read(tmp_path: Path) -> None:
    for change in (
        ties("head_ties", [["p0", 1, 4], ["p0", 3, 1, 0, 2], ["left out of this trace", 900, 9, 1, 1]]),
        ties("text_ties", [["p1", 2, 7, 9], ["p1", 4]]),
    ):
        assert Trace.load(spoilt(tmp_path / "trace.npz", change)).prompts[0].gaps is not None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (put("gaps", float("nan")), "a gap that is negative or no finite number"),
        (put("gaps", float("inf")), "a gap that is negative or no finite number"),
        (put("gaps", -1.0), "a gap that is negative or no finite number"),
        (put("nll", float("inf")), "a likelihood that is no finite number"),
        (put("tokens", -1), "a token id or a rank out of bounds"),
        (put("ranks", 2**32), "a token id or a rank out of bounds"),
        (ties("head_ties", [["p0", 10**6, 1, 0, 1]]), "head_ties with"),
        (ties("head_ties", [["p0", 1, 99, 0, 1]]), "head_ties with"),
        (ties("head_ties", [["p0", 1, 1, 5, 2]]), "head_ties with"),
        (ties("head_ties", [["p0"]]), "head_ties with"),
        (ties("head_ties", [[]]), "head_ties with"),
        (ties("text_ties", [["p0", 1, float("nan")]]), "text_ties with"),
        (ties("text_ties", "all"), "text_ties with"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    tmp_path: Path, change: Callable[[Parts, Parts], None], found: str
) -> None:
    with pytest.raises(UserError) as refused:
        Trace.load(spoilt(tmp_path / "trace.npz", change))
    assert refused.value.found.startswith(found) and "trace.npz" in str(refused.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trace.npz")
    with pytest.raises(UserError, match="found a pipe; need a regular file"):
        Trace.load(tmp_path / "trace.npz")
    with pytest.raises(UserError, match="no such file"):
        Trace.load(tmp_path / "nowhere.npz")


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", b"")
    size, other = (0).to_bytes(4, "little"), (2**31 + 1).to_bytes(4, "little")
    listed = path.read_bytes()
    directory = listed.rindex(b"PK\x01\x02")
    at = directory + 24  # the size that the directory gives
    assert listed[at : at + 4] == size
    path.write_bytes(listed[:at] + other + listed[at + 4 :])
    with pytest.raises(UserError, match=r"arrays of 2147483649 bytes"):
        Trace.load(path)
