"""What a CPU says of itself: the facts that tell two machines of one marketing name apart."""

from __future__ import annotations

import platform
from pathlib import Path

from harness.errors import UserError
from harness.files import lines_of, read_text

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Instruction sets with kernels of their own in PyTorch's libraries, by the name that Linux gives them.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the processor's own name, else the platform's word for it."""
    return _facts(cpuinfo).get("model name") or platform.processor() or platform.machine()


def cpu_details(cpuinfo: Path = _CPUINFO, *, caches: Path = _CACHES) -> dict[str, str]:
    """Return family, model, stepping, instruction sets, hypervisor and caches, each where it can be read."""
    facts = _facts(cpuinfo)
    details = {
        name: facts[told]
        for name, told in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        if told in facts
    }
    if "flags" in facts:
        flags = facts["flags"].split()
        details["instruction sets"] = ", ".join(name for name in _INSTRUCTION_SETS if name in flags) or "none"
        details["hypervisor"] = "yes" if "hypervisor" in flags else "no"
    for folder in sorted(caches.glob("index*")):
        try:
            level, kind, size = (read_text(folder / name).strip() for name in ("level", "type", "size"))
        except UserError:
            continue
        if kind != "Instruction":
            details[f"cache level {level}"] = size
    return details


def _facts(cpuinfo: Path) -> dict[str, str]:
    """Return what the kernel tells of the first processor, by its names."""
    try:
        text = read_text(cpuinfo)
    except UserError:
        return {}
    pairs = [line.split(":", 1) for line in lines_of(text.strip().split("\n\n")[0]) if ":" in line]
    return {name.strip(): value.strip() for name, value in pairs}
