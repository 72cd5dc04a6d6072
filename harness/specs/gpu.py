"""The acceptance of a GPU machine as data: its parts in order of worth, each with its time limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.errors import UserError
from harness.files import DataFile, DataPath, parse_toml, read_toml
from harness.specs.bounds import Many, PromptCount, Repeats, Some, SomeDistinct, Spec
from harness.specs.latency import DtypeName

PartName = Literal["tests", "limits", "latency", "suite", "rates", "kernels"]
_Limit = Annotated[float, Field(gt=0, le=3600)]
_Word = Annotated[str, Field(pattern=r"^[a-z_]+$")]


class _Part(Spec):
    """What every part says: after `limit_s` it is stopped; with less than `least_s` left it is not begun.

    Time that the parts before left over makes the limit longer, up to `most_s` where that is given.
    """

    limit_s: _Limit
    least_s: _Limit = 5.0
    most_s: _Limit | None = None


class TestsPart(_Part):
    """Tests of the checkout: those with a marker, or whole files, named from the checkout's folder.

    Without `files` it is all files that use the marker.
    """

    __test__ = False  # no test, whatever pytest takes from its name
    part: Literal["tests"]
    marker: _Word | None = None
    files: Many[DataPath] = ()

    @model_validator(mode="after")
    def _some_tests(self) -> TestsPart:
        if self.marker is None and not self.files:
            raise ValueError("give a marker, files, or both")
        return self


class LimitsPart(_Part):
    """What the device can do at most: read bandwidth and matrix throughput in each dtype."""

    part: Literal["limits"]
    dtypes: SomeDistinct[DtypeName]


_LEAST_BUDGET_S = 6.0  # the shortest time budget that commands take


class _BudgetPart(_Part):
    """A part whose command ends by itself: `reserve_s` before its limit it begins nothing more."""

    reserve_s: _Limit

    @model_validator(mode="after")
    def _some_time(self) -> _BudgetPart:
        if self.least_s - self.reserve_s < _LEAST_BUDGET_S:
            raise ValueError(f"least_s has to be {_LEAST_BUDGET_S:g} s more than reserve_s, to measure in")
        return self


class LatencyPart(_BudgetPart):
    """A latency run."""

    part: Literal["latency"]
    spec: DataPath


class SuitePart(_BudgetPart):
    """A suite on its first prompts."""

    part: Literal["suite"]
    suite: DataPath
    num_prompts: PromptCount


class RatesPart(_Part):
    """How fast a recipe's corpus is made, for `corpus_s` seconds, and how fast its heads train.

    A recipe without a packed corpus trains on what was just made.
    """

    part: Literal["rates"]
    recipe: DataPath
    corpus_s: _Limit
    num_steps: Repeats


class KernelsPart(_BudgetPart):
    """Races of several ways to compute a part of a step, which only a device can decide."""

    part: Literal["kernels"]


Part = Annotated[
    TestsPart | LimitsPart | LatencyPart | SuitePart | RatesPart | KernelsPart, Field(discriminator="part")
]


class GpuSpec(DataFile):
    """A plan for the acceptance of a machine: what is run on which device, in order of worth.

    `minutes` is the time of all parts together. What a part leaves over goes to the next one.
    """

    kind: Literal["gpu"] = "gpu"
    description: str
    device: Literal["cuda", "cpu"] = "cuda"
    minutes: float = Field(default=5.0, gt=0, le=24 * 60)
    parts: Some[Part]

    @model_validator(mode="after")
    def _each_once(self) -> GpuSpec:
        names = [one.part for one in self.parts]
        if len(set(names)) != len(names):
            raise ValueError(f"parts {names}, need each at most once")
        return self


def load_gpu_spec(path: Path) -> GpuSpec:
    """Return the plan in a file. Raises: UserError as `read_toml` does."""
    return read_toml(path, GpuSpec, noun="a plan for a GPU machine", kind="gpu")


def parse_gpu_spec(text: str, *, where: str) -> GpuSpec:
    """Return the plan that a record keeps. Raises: UserError as `parse_toml` does."""
    return parse_toml(text, GpuSpec, noun="a plan for a GPU machine", where=where)


def chosen_parts(
    spec: GpuSpec, *, only: str | None = None, skip: str | None = None, minutes: float | None = None
) -> GpuSpec:
    """Return a plan with some of its parts, and another time for all of them.

    `only` and `skip` are names with commas between them; the order stays the plan's.
    Raises: UserError for a name that the plan has no part of, or where none is left.
    """
    names = [one.part for one in spec.parts]
    wanted, unwanted = _names(only, names), _names(skip, names) or ()
    left = [one for one in spec.parts if one.part in (wanted or names) and one.part not in unwanted]
    if not left:
        raise UserError(
            found="no part left to run", need=f"at least one of {', '.join(names)}", where="--only and --skip"
        )
    return spec.model_copy(
        update={"parts": tuple(left), "minutes": spec.minutes if minutes is None else minutes}
    )


def allotted_s(limits_s: Sequence[float], *, left_s: float) -> float:
    """Return how long the first of these parts may take: its own limit, and what the later ones do without.

    Units: seconds, of all parts that are still to run and of the time left for them.
    """
    return max(0.0, min(left_s, max(limits_s[0], left_s - sum(limits_s[1:]))))


def time_for(parts: Sequence[Part], *, left_s: float) -> float:
    """Return the seconds that the first of these parts may take: as `allotted_s` says, its most at most."""
    given_s = allotted_s([one.limit_s for one in parts], left_s=left_s)
    return given_s if parts[0].most_s is None else min(given_s, parts[0].most_s)


def schedule(spec: GpuSpec) -> dict[str, float | None]:
    """Return the seconds that each part gets where every part takes all it gets; None for one not begun."""
    left_s = 60 * spec.minutes
    planned: dict[str, float | None] = {}
    for index, one in enumerate(spec.parts):
        given_s = time_for(spec.parts[index:], left_s=left_s)
        planned[one.part] = given_s if given_s >= one.least_s else None
        left_s -= planned[one.part] or 0.0
    return planned


def _names(text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(
                found=f"no part {name!r}", need=f"some of {', '.join(known)}", where="--only and --skip"
            )
    return names
