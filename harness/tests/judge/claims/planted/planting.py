"""What a planted record is: one figure set on either side of the bound that a claim's form states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.tests.fake_record import FakeParts

Sides = Callable[[Any], tuple[float, ...]]  # from a form, with its shipped bound, to figures


@dataclass(frozen=True)
class Planting:
    """One figure of a form's test, and how a record comes to have it.

    `plant` makes what the form is judged on, from the form and the figure; that differs from kind to kind of
    form. With the figures of `holds` the claim is reproduced, with those of `fails` it is not, and with those
    of `cannot` it is not decidable there. `differ` names all that may differ between two of these records,
    with the form's fields filled in. `where` leaves out forms that do not ask for the figure.
    """

    figure: str
    plant: Callable[..., Any]
    holds: Sides
    fails: Sides
    differ: tuple[str, ...]
    cannot: Sides = lambda form: ()
    where: Callable[[Any], bool] = lambda form: True

    def may_differ(self, form: Any, *, claim: str = "") -> set[str]:
        """Return the names of what may differ, for one form and the claim that it is of."""
        return {name.format(claim=claim, **dict(form)) for name in self.differ}


@dataclass(frozen=True)
class RunPlanting(Planting):
    """A figure of a run's record; `plant` changes the parts of the made-up one.

    `calibrate` changes another made-up record, whose trace is the calibration text.
    """

    num_prompts: int = 80
    calibrate: Callable[[FakeParts], object] | None = None


def number(*figures: float) -> Sides:
    """Return sides that no bound of the form moves."""
    return lambda form: figures
