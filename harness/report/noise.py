"""What was seen of the machine over the trials, in words: of its cores, and of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.records.latency import LatencyPoint, LatencyRecord
from harness.records.run import RunRecord
from harness.records.trials import BlockTry, GpuObservation, MachineObservation, ProcessorObservation
from harness.report.formatting import cell, count, paragraphs, percent, table
from harness.specs.disturbance import DisturbanceRule, OthersRule

_MOST_TRIES = 20  # that the report lists; all are in the record
_FIRST_REASONS = 2


def processor_rows(seen: Sequence[ProcessorObservation | None], *, noun: str) -> list[tuple[str, str]]:
    """Return rows on what the host's cores did besides our work; none where nothing was observed."""
    known = [one for one in seen if one is not None]
    if not known:
        return []
    shares = sorted(one.others_share for one in known)
    stolen = [one.steal_s for one in known if one.steal_s is not None]
    forced = [one.forced_switches for one in known if one.forced_switches is not None]
    clocks = _span([one.clock_mhz for one in known])
    told = f"others used {percent(shares[len(shares) // 2])} of all cores in the middle one of "
    told += f"{count(len(known), noun)}, at most {percent(shares[-1])}"
    if stolen:
        told += f"; the hypervisor gave {sum(stolen):.1f} s of cores to other machines"
    if forced:
        told += f"; {sum(forced):,} times a thread of ours had to leave its core"
    return [("Cores", told + (f"; at {clocks} MHz" if clocks else ""))]


def render_disturbance(record: RunRecord) -> str:
    """Return the rule by which blocks count as disturbed, and the blocks that did; empty without a rule."""
    rule = record.suite.disturbance
    if rule is None or not record.suite.reports_speed:
        return ""
    cut = [one for one in record.tries if not one.is_quiet]
    rows = [_try_row(one) for one in cut[:_MOST_TRIES]]
    more = f"\n\n{len(cut) - _MOST_TRIES} further ones are in the record." if len(cut) > _MOST_TRIES else ""
    tries = table(["prompt", "round", "trials", "disturbed by"], rows) + more if rows else ""
    repeats = len(record.tries) - len({(one.prompt_key, one.round) for one in record.tries})
    told = f"{len(record.tries) - len(cut)} of {len(record.tries)} blocks were quiet, {repeats} are repeats."
    return "\n\n".join(filter(None, (_rule(rule), told, tries)))


def render_latency_disturbance(record: LatencyRecord) -> str:
    """Return the rule by which times of a latency record were taken again, and what it did; empty without."""
    rule = record.spec.disturbance
    if rule is None:
        return ""
    told = (
        "Set before the run: a sitting (one round over sizes that share a cache, one text in all modes, or "
        f"one batch) is disturbed if others used {_others_bound(rule)}, or another process or heat held the "
        f"GPU back. It is timed again at once, up to {count(rule.max_repeats, 'time')}; the last times are "
        f"used, and all are kept. Times are withheld where less than {percent(rule.min_quiet_share)} of all "
        f"sizes and trials are quiet. {cell(rule.reason)}"
    )
    tables = [one for one in (record.modes, record.batches) if one is not None]
    trials = [trial for one in tables for trial in one.trials]
    timed = [point for point in record.points if point.backbone_s]
    rows = [
        ("sizes", len(timed), sum(len(one.disturbed) for one in timed), _disturbed(timed, rule)),
        (
            "trials of the tables",
            len(trials),
            sum(len(one.disturbed) for one in tables),
            _disturbed([trial.machine for trial in trials], rule),
        ),
    ]
    headers = ["what", "timed", "taken again", "still disturbed"]
    return paragraphs(told, table(headers, [row for row in rows if row[1]]))


def _disturbed(seen: Sequence[LatencyPoint | MachineObservation], rule: OthersRule) -> int:
    return sum(bool(one.disturbances(rule)) for one in seen)


def _others_bound(rule: OthersRule) -> str:
    share = percent(rule.max_others_share)
    return f"more than {share} of all cores, or more than {rule.max_others_cores:g} cores"


def _rule(rule: DisturbanceRule) -> str:
    return (
        "Set before the run: a block (one prompt, all arms) is disturbed if in one of its trials others used "
        f"{_others_bound(rule)}, or more than "
        f"{percent(rule.max_long_share)} of the decoding time lay in steps of over {rule.long_step:g} times "
        "the median of the steps around them, or another process or heat held the GPU back. It is repeated "
        f"up to {count(rule.max_repeats, 'time')} while there is time; both tries are kept. Speeds come from "
        f"quiet blocks, and are withheld where less than {percent(rule.min_quiet_share)} of the prompts have "
        f"one. {cell(rule.reason)}"
    )


def _try_row(one: BlockTry) -> tuple[object, ...]:
    first, more = one.disturbances[:_FIRST_REASONS], len(one.disturbances) - _FIRST_REASONS
    told = "; ".join(first) + (f"; and {more} more" if more > 0 else "")
    return one.prompt_key, one.round, len(one.outcomes), cell(told) if told else "a kill cut it"


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
