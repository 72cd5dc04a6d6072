"""What a CPU says of itself: the facts that tell two machines of one marketing name apart."""

from __future__ import annotations

import platform
from pathlib import Path

from harness.errors import UserError
from harness.files import lines_of, read_text
from harness.records.machines.identity import CACHE, INSTRUCTION_SETS

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Instruction sets with kernels of their own in PyTorch's libraries, by the name that Linux gives them.
_INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve", "sve2"),  # of ARM
)
# What x86 and ARM call a fact in /proc/cpuinfo.
_TOLD = (
    ("family", ("cpu family", "CPU implementer")),
    ("model", ("model", "CPU part")),
    ("stepping", ("stepping", "CPU revision")),
)


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the processor's own name, else the platform's word for it."""
    return _facts(cpuinfo).get("model name") or platform.processor() or platform.machine()


def cpu_details(cpuinfo: Path = _CPUINFO, *, caches: Path = _CACHES) -> dict[str, str]:
    """Return what `records/machines/identity.py` knows a processor by, each where it can be read.

    It is architecture, family, model, stepping, instruction sets, hypervisor and caches, of the first core.
    """
    facts = _facts(cpuinfo)
    details = {"architecture": platform.machine()} if platform.machine() else {}
    details |= {name: facts[key] for name, keys in _TOLD for key in keys if key in facts}
    flags = facts.get("flags", facts.get("Features"))
    if flags is not None:
        known = flags.split()
        details[INSTRUCTION_SETS] = ", ".join(name for name in _INSTRUCTION_SETS if name in known) or "none"
    if "flags" in facts:  # ARM does not tell
        details["hypervisor"] = "yes" if "hypervisor" in facts["flags"].split() else "no"
    for folder in sorted(caches.glob("index*")):
        try:
            level, kind, size = (read_text(folder / name).strip() for name in ("level", "type", "size"))
        except UserError:
            continue
        if kind != "Instruction":
            details[f"{CACHE}{level}"] = size
    return details


def host_processor(cpuinfo: Path = _CPUINFO) -> str:
    """Return in a few words the processor that launches a GPU's kernels: name, family, model and stepping."""
    details = cpu_details(cpuinfo)
    return ", ".join(
        [cpu_name(cpuinfo), *(f"{name} {details[name]}" for name, _ in _TOLD if name in details)]
    )


def _facts(cpuinfo: Path) -> dict[str, str]:
    """Return what the kernel tells of the first processor, by its names."""
    try:
        text = read_text(cpuinfo)
    except UserError:
        return {}
    pairs = [line.split(":", 1) for line in lines_of(text.strip().split("\n\n")[0]) if ":" in line]
    return {name.strip(): value.strip() for name, value in pairs}
