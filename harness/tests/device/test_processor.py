"""What a CPU says of itself, read from small copies of what Linux tells."""

from __future__ import annotations

import platform
from pathlib import Path

from harness.device.processor import cpu_details, cpu_name, host_processor
from harness.tests.processors import EPYC, EPYC_CACHES, XEON, XEON_CACHES, cpuinfo


def test_a_processor_is_told_by_its_own_facts_of_the_first_core(tmp_path: Path) -> None:
    file, caches = cpuinfo(tmp_path, EPYC, EPYC_CACHES)
    file.write_text(EPYC + "\n" + EPYC.replace("cpu family\t: 25", "cpu family\t: 99"))
    (caches / "index9").mkdir()  # of which nothing can be read
    (caches / "index1" / "type").write_text("Instruction\n")
    assert cpu_name(file) == "AMD EPYC 9554 64-Core Processor"
    assert cpu_details(file, caches=caches) == {
        "architecture": platform.machine(),
        "family": "25",
        "model": "17",
        "stepping": "1",
        "instruction sets": "avx2, avx512f, avx512_vnni, avx512_bf16",
        "hypervisor": "yes",
        "cache level 1": "32K",
        "cache level 3": "262144K",
    }
    assert host_processor(file) == "AMD EPYC 9554 64-Core Processor, family 25, model 17, stepping 1"


def test_amx_and_every_other_set_that_has_kernels_is_told(tmp_path: Path) -> None:
    file, caches = cpuinfo(tmp_path, XEON, XEON_CACHES)
    assert cpu_details(file, caches=caches)["instruction sets"] == (
        "avx2, avx_vnni, avx512f, avx512_vnni, avx512_bf16, amx_bf16, amx_int8"
    )
    assert host_processor(file) == (
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, family 6, model 143, stepping 8"
    )


def test_an_arm_processor_is_told_by_the_names_that_linux_has_for_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd asimddp sve i8mm bf16\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd4f\n"
        "CPU revision\t: 0\n"
    )
    found = cpu_details(file, caches=tmp_path / "none")
    assert found == {
        "architecture": platform.machine(),
        "family": "0x41",
        "model": "0xd4f",
        "stepping": "0",
        "instruction sets": "asimddp, bf16, i8mm, sve",
    }


def test_a_system_that_tells_nothing_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    architecture = {"architecture": platform.machine()}
    assert cpu_details(tmp_path / "none", caches=tmp_path / "none") == architecture
    assert cpu_name(tmp_path / "none") and host_processor(tmp_path / "none")
    plain = tmp_path / "cpuinfo"
    plain.write_text("flags : fpu\n")
    assert cpu_details(plain, caches=tmp_path / "none") == {
        **architecture,
        "instruction sets": "none",
        "hypervisor": "no",
    }


def test_no_fact_names_a_path_or_a_host() -> None:
    for name, value in (*cpu_details().items(), ("host", host_processor())):
        assert "/" not in name + value
