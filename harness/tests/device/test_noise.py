"""What the host's cores did besides our own work, from counters and next to a real neighbour."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from harness.device.noise import ProcessorMoment
from harness.records.trials import ProcessorObservation

BUSY = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def test_the_others_have_what_was_neither_idle_nor_ours() -> None:
    before = ProcessorMoment(clock_s=10.0, own_s=1.0, busy_s=40.0, steal_s=2.0, forced_switches=7)
    after = ProcessorMoment(clock_s=14.0, own_s=4.5, busy_s=45.0, steal_s=2.25, forced_switches=19)
    seen = before.until(after)
    assert (seen.clock_s, seen.others_s, seen.steal_s, seen.forced_switches) == (4.0, 1.5, 0.25, 12)
    assert seen.num_cores == psutil.cpu_count()


def test_what_the_system_does_not_tell_is_null() -> None:
    before, after = (
        ProcessorMoment(clock_s=at, own_s=at, busy_s=at, steal_s=None, forced_switches=None)
        for at in (1.0, 2.0)
    )
    seen = before.until(after)
    assert (seen.steal_s, seen.forced_switches, seen.others_s) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("others_s", "steal_s", "share"),
    # four seconds of two cores are 8; a tick of 10 ms a core is not certain
    [(0.82, None, 0.1), (0.42, 0.4, 0.1), (0.02, 0.0, 0.0), (-0.03, None, 0.0), (8.02, None, 1.0)],
)
def test_the_share_of_others(others_s: float, steal_s: float | None, share: float) -> None:
    seen = ProcessorObservation(
        clock_s=4.0, num_cores=2, others_s=others_s, steal_s=steal_s, forced_switches=0, clock_mhz=None
    )
    assert seen.others_share == pytest.approx(share)


def test_no_time_has_no_share() -> None:
    seen = ProcessorObservation(
        clock_s=0.0, num_cores=2, others_s=1.0, steal_s=None, forced_switches=None, clock_mhz=None
    )
    assert seen.others_share == 0.0


def test_a_neighbour_that_takes_a_core_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
        try:
            while psutil.Process(neighbour.pid).cpu_times().user < 0.1:
                time.sleep(0.01)
            before = ProcessorMoment.now()
            used_s = psutil.Process(neighbour.pid).cpu_times().user
            time.sleep(1.0)
            used_s = psutil.Process(neighbour.pid).cpu_times().user - used_s
            seen = before.until(ProcessorMoment.now())
        finally:
            neighbour.kill()
    assert seen.others_s >= 0.9 * used_s - 0.05 and used_s > 0.1


def test_our_own_work_is_not_that_of_others() -> None:
    """Other tests run beside this one, so what is ours is compared with our own clock of processor time."""
    before, own_s = ProcessorMoment.now(), time.process_time()
    while time.process_time() < own_s + 0.5:
        pass
    after = ProcessorMoment.now()
    assert after.own_s - before.own_s >= 0.5
    assert before.until(after).others_s == pytest.approx(
        after.busy_s - before.busy_s - (after.own_s - before.own_s)
    )
