"""What a CPU says of itself, read from small copies of what Linux tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.device.processor import cpu_details, cpu_name

CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2 avx512f hypervisor

processor\t: 1
cpu family\t: 99
"""


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "32768K")]
    ):
        folder = tmp_path / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(value + "\n")
    (tmp_path / "cache" / "index9").mkdir()
    return tmp_path / "cache"


def test_a_processor_is_told_by_its_own_facts_of_the_first_core(tmp_path: Path, caches: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    assert cpu_name(file) == "AMD EPYC"
    assert cpu_details(file, caches=caches) == {
        "family": "25",
        "model": "17",
        "stepping": "1",
        "instruction sets": "avx2, avx512f",
        "hypervisor": "yes",
        "cache level 1": "32K",
        "cache level 3": "32768K",
    }


def test_a_system_that_tells_nothing_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    assert cpu_details(tmp_path / "none", caches=tmp_path / "none") == {}
    assert cpu_name(tmp_path / "none")
    plain = tmp_path / "cpuinfo"
    plain.write_text("flags : fpu\n")
    assert cpu_details(plain, caches=tmp_path / "none") == {"instruction sets": "none", "hypervisor": "no"}


def test_no_fact_names_a_path_or_a_host() -> None:
    for name, value in cpu_details().items():
        assert "/" not in name + value
