"""Machines as they describe themselves: what Linux tells of two processors, and devices made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.device.processor import cpu_details, cpu_name
from harness.records.provenance import DeviceInfo

# As Linux 6 writes it on virtual machines of two cores; of the flags not all. The second core is left to
# `cpuinfo`.
EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9554 64-Core Processor
stepping\t: 1
microcode\t: 0xa101148
cpu MHz\t\t: 3096.548
cache size\t: 1024 KB
physical id\t: 0
siblings\t: 2
core id\t\t: 0
cpu cores\t: 1
fpu\t\t: yes
cpuid level\t: 13
flags\t\t: fpu vme de pse tsc msr cx8 sse sse2 ht syscall nx mmxext rdtscp lm rep_good pni ssse3 fma \
sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand hypervisor lahf_lm svm sse4a bmi1 avx2 smep bmi2 \
avx512f avx512dq adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl avx512_bf16 clzero \
avx512vbmi avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq rdpid fsrm
bugs\t\t: sysret_ss_attrs spectre_v1 spectre_v2 spec_store_bypass srso
bogomips\t: 6190.68
power management:
"""
XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
stepping\t: 8
microcode\t: 0xffffffff
cpu MHz\t\t: 2700.000
cache size\t: 107520 KB
physical id\t: 0
siblings\t: 2
core id\t\t: 0
cpu cores\t: 1
fpu\t\t: yes
cpuid level\t: 31
flags\t\t: fpu vme de pse tsc msr cx8 sse sse2 ss ht syscall nx pdpe1gb rdtscp lm constant_tsc pni ssse3 \
fma sse4_1 sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand hypervisor lahf_lm bmi1 hle avx2 smep bmi2 \
rtm avx512f avx512dq adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl avx_vnni avx512_bf16 \
avx512vbmi avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg rdpid fsrm serialize amx_bf16 \
avx512_fp16 amx_tile amx_int8 arch_capabilities
bugs\t\t: spectre_v1 spectre_v2 spec_store_bypass swapgs eibrs_pbrsb
bogomips\t: 5400.00
address sizes\t: 46 bits physical, 57 bits virtual
power management:
"""
EPYC_CACHES = {"1": "32K", "2": "1024K", "3": "262144K"}
XEON_CACHES = {"1": "48K", "2": "2048K", "3": "107520K"}


def cpuinfo(folder: Path, text: str, caches: Mapping[str, str]) -> tuple[Path, Path]:
    """Write what Linux tells of two cores and of their caches; return the file and the caches' folder."""
    file, home = folder / "cpuinfo", folder / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n" + text.replace("processor\t: 0", "processor\t: 1"))
    for index, (level, size) in enumerate(caches.items()):
        (home / f"index{index}").mkdir(parents=True)
        for name, value in (
            ("level", level),
            ("type", "Data" if level == "1" else "Unified"),
            ("size", size),
        ):
            (home / f"index{index}" / name).write_text(value + "\n")
    return file, home


def cpu(folder: Path, text: str, caches: Mapping[str, str], *, num_cores: int = 2) -> DeviceInfo:
    """Return the device that a machine with this processor is."""
    file, home = cpuinfo(folder, text, caches)
    return DeviceInfo(
        kind="cpu",
        name=cpu_name(file),
        num_cores=num_cores,
        num_threads=2,
        memory_bytes=8_000_000_000,
        details={"capability": "AVX512", **cpu_details(file, caches=home)},
    )
