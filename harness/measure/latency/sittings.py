"""Time something, and again while others used the machine, by the rule that the spec sets before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from harness.device.gpu.watch import GpuWatch
from harness.device.noise import ProcessorMoment
from harness.records.latency import DisturbedTimes, LatencyPoint
from harness.records.trials import MachineObservation
from harness.specs.disturbance import OthersRule

Timed = TypeVar("Timed")
# torch.compile starts processes of its own, which the operating system counts as others
_MODES_THAT_COMPILE = ("compiled", "fused_graph")


@dataclass(frozen=True)
class Sitting(Generic[Timed]):
    """What was timed in one go, and what the machine did meanwhile."""

    timed: Timed
    machine: MachineObservation


@dataclass(frozen=True)
class Watch:
    """How a run watches the machine. Nothing is timed again after `ends`, in monotonic seconds."""

    rule: OthersRule | None = None
    gpu: GpuWatch | None = None
    ends: float = math.inf
    note: Callable[[str], None] = lambda _: None

    def sittings(
        self, measure: Callable[[], Timed], *, what: str, modes: tuple[str, ...]
    ) -> list[Sitting[Timed]]:
        """Measure until it is quiet or the rule's repeats or the time are used up; the last one counts.

        `what` says in words what is measured. Where one of the `modes` compiles, the cores are not looked at.
        """
        found: list[Sitting[Timed]] = []
        while True:
            before = ProcessorMoment.now()
            timed = measure()
            seen = before.until(ProcessorMoment.now())
            compiles = any(mode in _MODES_THAT_COMPILE for mode in modes)
            gpu = self.gpu.observe() if self.gpu is not None else None
            machine = MachineObservation(processor=None if compiles else seen, gpu=gpu)
            found.append(Sitting(timed, machine))
            why = machine.disturbances(self.rule)
            is_last = self.rule is None or len(found) > self.rule.max_repeats
            if not why:
                return found
            repeats = not is_last and time.monotonic() < self.ends
            self.note(f"{what}: {', '.join(why)}{'; timing it again' if repeats else ''}")
            if not repeats:
                return found


def points_of(sittings: Sequence[Sitting[tuple[LatencyPoint, ...]]]) -> tuple[LatencyPoint, ...]:
    """Return the points of the last sitting, each with what was seen and the times of the ones before."""
    *earlier, last = sittings
    points = []
    for index, point in enumerate(last.timed):
        disturbed = tuple(
            DisturbedTimes(
                backbone_s=before.backbone_s,
                heads_s=before.heads_s,
                step_s=before.step_s,
                machine=one.machine,
            )
            for one in earlier
            if (before := one.timed[index]).skipped is None
        )
        cores = last.machine.processor
        seen = (cores,) if cores is not None and point.skipped is None else ()
        told = {"processor": seen, "gpu": last.machine.gpu, "disturbed": disturbed}
        points.append(point.model_copy(update=told))
    return tuple(points)
