"""What the host's cores did over a stretch of time, besides our own work."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil

from harness.records.trials import ProcessorObservation


@dataclass(frozen=True)
class ProcessorMoment:
    """The counters of the operating system at one moment.

    Units: seconds; all but `clock_s` and `own_s` are of all cores together.
    """

    clock_s: float
    own_s: float
    busy_s: float
    steal_s: float | None
    forced_switches: int | None

    @staticmethod
    def now() -> ProcessorMoment:
        """Read the counters."""
        cores = psutil.cpu_times()
        idle_s = cores.idle + getattr(cores, "iowait", 0.0)
        steal_s = getattr(cores, "steal", None)
        guests_s = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # in user and nice, too
        return ProcessorMoment(
            clock_s=time.perf_counter(),
            own_s=time.process_time(),
            busy_s=sum(cores) - idle_s - guests_s - (steal_s or 0.0),
            steal_s=steal_s,
            forced_switches=_forced_switches(),
        )

    def until(self, after: ProcessorMoment) -> ProcessorObservation:
        """Return what the cores did between this moment and a later one."""
        steal_s, switches = None, None
        if self.steal_s is not None and after.steal_s is not None:
            steal_s = max(0.0, after.steal_s - self.steal_s)
        if self.forced_switches is not None and after.forced_switches is not None:
            switches = after.forced_switches - self.forced_switches
        return ProcessorObservation(
            clock_s=after.clock_s - self.clock_s,
            num_cores=psutil.cpu_count() or 1,
            others_s=(after.busy_s - self.busy_s) - (after.own_s - self.own_s),
            steal_s=steal_s,
            forced_switches=switches,
            clock_mhz=_clock_mhz(),
        )


def _forced_switches() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _clock_mhz() -> float | None:
    """Return the mean clock of the cores; None where the system shows none, as in many virtual machines."""
    try:
        current = float(psutil.cpu_freq().current)
    except (AttributeError, OSError, NotImplementedError, RuntimeError):  # there is no clock to read
        return None
    return current if current > 0 else None
