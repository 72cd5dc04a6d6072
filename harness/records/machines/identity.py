"""Who a machine is: what moves its figures and what it says of itself, as one value and as a folder's name.

Of a `DeviceInfo` this belongs to the identity, and nothing else does:

    a CPU   name, logical cores, architecture, family, model, stepping, instruction sets, hypervisor, caches
    a GPU   name, memory, power limit, and the processor and cores of its host, which launches its kernels

Drivers, CUDA, PyTorch's own word for the instruction sets, threads and the host's memory are provenance: a
record keeps them, and a machine stays itself when they change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.files import canonical_sha256
from harness.records.provenance import DeviceInfo

INSTRUCTION_SETS, HOST_PROCESSOR = "instruction sets", "host processor"
CACHE = "cache level "  # followed by the level
_OF_CPU = ("architecture", "family", "model", "stepping", INSTRUCTION_SETS, "hypervisor")
_OF_GPU = ("power limit", HOST_PROCESSOR)
# A driver keeps a little of a GPU's memory back, and how much changes with its version; so the size is
# rounded up: an A100 for which drivers tell 79.1 to 80.0 GiB is one of up to 80.
_MEMORY_STEP_BYTES = 8 * 2**30
_UNREADABLE = re.compile(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b")  # in a processor's name
_MOST_LETTERS, _DIGITS = 40, 8  # of a folder's name: of the device's own name, and of the hash


@dataclass(frozen=True)
class MachineIdentity:
    """What a machine is known by: `facts` by their names, those that it does not tell left out."""

    facts: Mapping[str, str]
    are_details_told: bool

    def differences(self, other: MachineIdentity) -> tuple[str, ...]:
        """Return in words each fact that both tell and that differs: this machine's, then the other's."""
        return tuple(
            _in_words(name, value, other.facts[name])
            for name, value in self.facts.items()
            if name in other.facts and other.facts[name] != value
        )

    def untold(self, other: MachineIdentity) -> tuple[str, ...]:
        """Return the names of the facts that one of the two does not tell."""
        return tuple(
            name
            for name in dict.fromkeys([*self.facts, *other.facts])
            if (name in self.facts) != (name in other.facts)
        )

    @property
    def digest(self) -> str:
        """Return a hash of all facts, which stays as long as they do."""
        return canonical_sha256(dict(self.facts))


def identity_of(device: DeviceInfo) -> MachineIdentity:
    """Return who a machine is, from what a record keeps of it.

    Older records kept no more than kind, name and cores: their `are_details_told` is false, and one of them
    may stand for several machines.
    """
    details = dict(_identifying(device))
    facts = {"kind": device.kind, "name": device.name, "cores": str(device.num_cores)}
    if device.kind == "cuda":
        steps = -(-device.memory_bytes // _MEMORY_STEP_BYTES)
        facts["memory"] = f"up to {steps * _MEMORY_STEP_BYTES >> 30} GiB"
    return MachineIdentity(facts | details, are_details_told=bool(details))


def device_differences(one: DeviceInfo, other: DeviceInfo) -> tuple[str, ...]:
    """Return in words all in which two devices differ, identity and provenance: one's, then the other's."""
    mine, theirs = _everything(one), _everything(other)
    return tuple(
        _in_words(name, mine.get(name, "not told"), theirs.get(name, "not told"))
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name)
    )


def machine_slug(device: DeviceInfo) -> str:
    """Return the name of a machine, which its folders bear: a few words to read, and a hash of its identity.

    Two machines that differ in any fact of their identity have two names, such as
    `cpu-amd-epyc-f25m17s1-2c-0123abcd` and `cuda-nvidia-h200-700w-16c-4567cdef`. A device that does not say
    who it is, as in older records, keeps the name of that time, `plain_slug`.
    """
    identity = identity_of(device)
    if not identity.are_details_told:
        return plain_slug(device)
    facts = identity.facts
    name = _slug(_UNREADABLE.sub(" ", device.name.lower()))[:_MOST_LETTERS]
    processor = "".join(
        f"{letter}{facts[field]}"
        for letter, field in (("f", "family"), ("m", "model"), ("s", "stepping"))
        if field in facts
    )
    words = (device.kind, name, processor, facts.get("power limit", "").replace(" ", ""))
    return _slug(f"{'-'.join(words)}-{device.num_cores}c-{identity.digest[:_DIGITS]}")


def plain_slug(device: DeviceInfo) -> str:
    """Return kind, device name and cores: the folder of machines that do not say more, and of a class."""
    return _slug(f"{device.kind}-{device.name}-{device.num_cores}c")


def machine_folders(device: DeviceInfo) -> tuple[str, ...]:
    """Return the folder names under which records of a machine may lie, its own first.

    The second is the one that older records of its name lie in, whichever machine made them.
    """
    return tuple(dict.fromkeys((machine_slug(device), plain_slug(device))))


def _identifying(device: DeviceInfo) -> Iterator[tuple[str, str]]:
    """Yield the details that belong to the identity, in a fixed order."""
    names = _OF_GPU if device.kind == "cuda" else _OF_CPU
    caches = sorted(name for name in device.details if name.startswith(CACHE)) if device.kind == "cpu" else []
    for name in (*names, *caches):
        if name in device.details:
            yield name, device.details[name]


def _everything(device: DeviceInfo) -> dict[str, str]:
    return {
        "kind": device.kind,
        "name": device.name,
        "cores": str(device.num_cores),
        "threads": str(device.num_threads),
        "bytes of memory": f"{device.memory_bytes:,}",
        **device.details,
    }


def _in_words(name: str, mine: str, theirs: str) -> str:
    """Return `stepping 1 against 2`; of instruction sets only those that not both have."""
    if name == INSTRUCTION_SETS:
        mine_alone, theirs_alone = _alone(mine, theirs), _alone(theirs, mine)
        return f"{name} besides those of both: {mine_alone} against {theirs_alone}"
    return f"{name} {mine} against {theirs}"


def _alone(listed: str, others: str) -> str:
    there = others.split(", ")
    return ", ".join(one for one in listed.split(", ") if one not in there and one != "none") or "none"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
