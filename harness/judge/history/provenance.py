"""In what two records of one kind were made differently: code, machine, model, settings, trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from harness.judge.history.comparable import bandwidth_of
from harness.records.gate.folder import GateFolder
from harness.records.gpu.record import GpuRecord
from harness.records.latency import LatencyRecord
from harness.records.opened import AnyRecord
from harness.records.provenance import Provenance
from harness.records.run import RunRecord
from harness.records.sweep import SweepRecord

Group = Literal["code", "machine", "model", "settings", "trees"]
# Every record has its own, and no figure turns on them.
_OWN = ("started_utc", "schema_version")
_MACHINE = ("device", "variables", "blas")
_CODE = ("commit", "dirty", "command", "python", "packages")
_SAME_BANDWIDTH = 0.01  # measurements of one machine differ by about so much; less is not worth a line


@dataclass(frozen=True)
class Difference:
    """One thing in which two records differ; None where one of them lacks it."""

    group: Group
    name: str
    a: str | None
    b: str | None


def origin_of(record: AnyRecord) -> Provenance:
    """Return where a record of any kind comes from."""
    return record.origin if isinstance(record, SweepRecord | GpuRecord | GateFolder) else record.environment


def settings_of(record: AnyRecord) -> BaseModel:
    """Return what a record of any kind was asked to do, as it was run."""
    return record.suite if isinstance(record, RunRecord) else record.spec


def differences(a: AnyRecord, b: AnyRecord) -> tuple[Difference, ...]:
    """Return all in which two records of one kind were made differently, in a fixed order."""
    origins = [origin_of(record).model_dump(mode="json") for record in (a, b)]
    settings = [settings_of(record).model_dump(mode="json") for record in (a, b)]
    found = [
        *(Difference(_group_of(name), name, *values) for name, *values in _between(*origins)),
        *_bandwidths(a, b),
        *(Difference("settings", name, *values) for name, *values in _between(*settings)),
        *(
            Difference("trees", f"tree of {name}", *values)
            for name, *values in _between(_trees(a), _trees(b))
        ),
    ]
    order = ("code", "machine", "model", "settings", "trees")
    return tuple(sorted(found, key=lambda one: order.index(one.group)))


def _between(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], *, prefix: str = ""
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield dotted names whose values differ, with both values; a table that one side lacks is one name."""
    for name in dict.fromkeys([*mine, *theirs]):
        a, b = (_by_name(side.get(name)) for side in (mine, theirs))
        if a == b or name in _OWN:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _between(a, b, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, _told(a), _told(b)


def _by_name(value: Any) -> Any:
    """Return a list of tables that have names as one table of them; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return {one["name"]: one for one in value}
    return value


def _told(value: Any) -> str | None:
    """Return a value in words; of a table that the other side lacks, how many entries it has."""
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    return None if value is None else str(value)


def _group_of(name: str) -> Group:
    first = name.partition(".")[0]
    return "code" if first in _CODE else "machine" if first in _MACHINE else "model"


def _bandwidths(a: AnyRecord, b: AnyRecord) -> Iterator[Difference]:
    if not isinstance(a, RunRecord | LatencyRecord) or not isinstance(b, RunRecord | LatencyRecord):
        return
    rates = bandwidth_of(a), bandwidth_of(b)
    if rates[0] is None or rates[1] is None or abs(rates[0] / rates[1] - 1) > _SAME_BANDWIDTH:
        told = [None if rate is None else f"{rate / 1e9:,.3g} GB/s" for rate in rates]
        if told[0] != told[1]:
            yield Difference("machine", "measured read bandwidth", told[0], told[1])


def _trees(record: AnyRecord) -> dict[str, str]:
    """Return each arm's tree by its short name; how it was chosen stands in the settings."""
    if not isinstance(record, RunRecord):
        return {}
    return {
        name: f"{tree.tree().fingerprint}, {len(tree.paths)} nodes" for name, tree in record.trees.items()
    }
