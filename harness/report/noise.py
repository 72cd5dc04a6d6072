"""What was seen of a GPU over the trials, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.records.noise import GpuObservation
from harness.report.formatting import count, percent


def gpu_rows(seen: Sequence[GpuObservation | None], *, noun: str) -> list[tuple[str, str]]:
    """Return rows on how a GPU fared over trials, and who else used it; none where nothing was observed."""
    known = [one for one in seen if one is not None]
    if not known:
        return []
    return [
        ("GPU", _state(known)),
        ("GPU: clocks lowered by", _throttling(known, noun=noun)),
        ("GPU: other processes", _others(known, noun=noun)),
    ]


def _state(known: Sequence[GpuObservation]) -> str:
    """Return clocks, temperature and power, each from the lowest to the highest."""
    figures = (
        ("multiprocessors at ", [one.sm_clock_mhz for one in known], "MHz"),
        ("memory at ", [one.memory_clock_mhz for one in known], "MHz"),
        ("", [one.temperature_c for one in known], "°C"),
        ("", [one.power_w for one in known], "W"),
    )
    return ", ".join(
        f"{words}{span} {unit}" for words, values, unit in figures if (span := _span(values))
    ) or ("not known")


def _span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):,.0f}", f"{max(known):,.0f}"
    return low if low == high else f"{low} to {high}"


def _throttling(known: Sequence[GpuObservation], *, noun: str) -> str:
    told = [one.throttle_reasons for one in known if one.throttle_reasons is not None]
    if not told:
        return "not known"
    reasons = Counter(reason for reasons in told for reason in reasons)
    of_all = f"of {count(len(told), noun)}"
    named = (f"{reason} ({number} {of_all})" for reason, number in reasons.most_common())
    return ", ".join(named) or f"nothing, at the end {of_all}"


def _others(known: Sequence[GpuObservation], *, noun: str) -> str:
    """Return in how many trials other processes were seen, or that this cannot be known."""
    of_all = f"of {count(len(known), noun)}"
    if shared := [one for one in known if one.is_shared]:
        most = max(one.num_others or 1 for one in shared)
        shares = [one.others_share for one in shared if one.others_share is not None]
        busy = f", whose kernels ran for up to {percent(max(shares))} of the time" if shares else ""
        return (
            f"**seen in {len(shared)} {of_all}**, which the record marks: at most "
            f"{count(most, 'process', plural='processes')}{busy}"
        )
    unknown = [one for one in known if one.num_others is None and one.others_share is None]
    if not unknown:
        return f"none, {of_all}"
    has_memory = any(one.others_memory_bytes is not None for one in unknown)
    return f"cannot be known in {len(unknown)} {of_all}: the driver does not tell which process is ours" + (
        "; no other memory was in use" if has_memory else ""
    )
