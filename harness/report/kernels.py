"""Races of kernels as a table: each way's time, rate and error, compared with the engine's."""

from __future__ import annotations

from statistics import median
from typing import Any

from harness.records.profiles.kernels import Contender, KernelRaces, Race
from harness.report.formatting import ABSENT, paragraphs, significant, table
from harness.report.provenance import describe_device

_HEADERS = ("computation", "size", "way", "us a call", "GB/s", "against the engine's", "error")
_NOTE = """\
Medians. The engine's way stands first. *GB/s*: the bytes that any way has to read over its time. *error*: the
largest difference from the result in float64; of ranks the number that differ."""


def render_kernel_races(races: KernelRaces) -> str:
    """Return the races as Markdown."""
    rows = [row for race in races.races for row in _rows(race)]
    where = f"{describe_device(races.origin)}, {races.dtype}, {races.calls_a_repeat} calls a time."
    return paragraphs(where, table(_HEADERS, rows), _NOTE, _left_out(races))


def _left_out(races: KernelRaces) -> str:
    total = len(races.races) + races.num_left_out
    return f"Of {total} races {races.num_left_out} were not run." if races.num_left_out else ""


def kernels_headline(races: KernelRaces) -> dict[str, Any]:
    """Return what the last JSON line says: of each race the fastest way and its time over the engine's."""
    return {
        "dtype": races.dtype,
        "num_left_out": races.num_left_out,
        "races": [
            {"computation": race.computation, "shape": race.shape, **_fastest(race)} for race in races.races
        ],
    }


def _fastest(race: Race) -> dict[str, Any]:
    ran = [one for one in race.contenders if one.call_s]
    if not ran:
        return {"fastest": None, "of_engine": None}
    best, engine = min(ran, key=_call_s), race.contenders[0]
    return {"fastest": best.name, "of_engine": _call_s(best) / _call_s(engine) if engine.call_s else None}


def _rows(race: Race) -> list[tuple[object, ...]]:
    engine, rows = race.contenders[0], list[tuple[object, ...]]()
    for one in race.contenders:
        what = (race.computation, race.shape, one.name)
        if not one.call_s:
            rows.append((*what, f"did not run: {one.failure}", ABSENT, ABSENT, ABSENT))
            continue
        rows.append(
            (
                *what,
                significant(1e6 * _call_s(one)),
                significant(race.read_bytes / _call_s(one) / 1e9),
                significant(_call_s(one) / _call_s(engine)) if engine.call_s else ABSENT,
                significant(one.max_error),
            )
        )
    return rows


def _call_s(one: Contender) -> float:
    return median(one.call_s)
