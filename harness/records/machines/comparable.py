"""May figures of two records be held against each other, as far as the machine goes?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.records.machines.identity import identity_of, machine_slug
from harness.records.probes import DeviceLimits
from harness.records.provenance import DeviceInfo

MAX_BANDWIDTH_RATIO = 1.3
"""How far apart the measured read bandwidths of one machine may lie.

A step of vanilla decoding waits for the weights, so this is also how far its time may be off. The committed
records of one H200 lie within 1.21 of each other, and what went by the one name AMD EPYC lies 2.3 apart
(`test_comparable.py` forms both from them). It is no wider than the gap between the bands of `claims.toml`,
which end at 45 and 60 GB/s.
"""


@dataclass(frozen=True)
class MeasuredMachine:
    """A machine by what it says of itself and by the bytes that it was measured to read a second.

    The second is None where no record measured it.
    """

    device: DeviceInfo
    read_bytes_per_s: float | None = None

    @staticmethod
    def of(device: DeviceInfo, limits: Iterable[DeviceLimits | None] = ()) -> MeasuredMachine:
        """Return a machine with the best of the read bandwidths that were measured on it, whatever dtype."""
        known = (one.read_bandwidth_bytes_per_s for one in limits if one is not None)
        return MeasuredMachine(device, max(known, default=None))

    @property
    def which(self) -> str:
        """Return in words which of the machines of its device's name it is, as far as that is known."""
        rate = f"reads {self.read_bytes_per_s / 1e9:,.1f} GB/s" if self.read_bytes_per_s is not None else ""
        is_told = identity_of(self.device).are_details_told or not rate
        return ", ".join(filter(None, (machine_slug(self.device) if is_told else "", rate)))


def not_comparable(one: MeasuredMachine, other: MeasuredMachine) -> str | None:
    """Return in words why times of two machines must not be compared; None where they may.

    They may where both are known to be one machine: no fact of their identity differs, and the measured read
    bandwidths lie within `MAX_BANDWIDTH_RATIO`. Where one does not tell all that the other tells of itself,
    as older records do not, or where both tell nothing, the bandwidths have to say it, and without both of
    them nothing does. Counts of tokens and steps are no times: no machine bends them.
    """
    mine, theirs = identity_of(one.device), identity_of(other.device)
    if differing := mine.differences(theirs):
        return f"another machine: {'; '.join(differing)}"
    if one.read_bytes_per_s is not None and other.read_bytes_per_s is not None:
        rates = one.read_bytes_per_s, other.read_bytes_per_s
        if max(rates) <= MAX_BANDWIDTH_RATIO * min(rates):
            return None
        told = " and ".join(f"{rate / 1e9:,.1f}" for rate in rates)
        return (
            f"one machine name, but measured bandwidths {told} GB/s, more than {MAX_BANDWIDTH_RATIO} times "
            "apart"
        )
    untold = mine.untold(theirs)
    if not untold and mine.are_details_told:
        return None
    what = f"one does not tell its {', '.join(untold)}" if untold else "neither tells more than its name"
    return f"perhaps another machine of that name: {what}, and not both measured their bandwidth"
