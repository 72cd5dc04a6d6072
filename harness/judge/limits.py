"""Was anything faster than what the device was measured to do? Then its limits were measured too low."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.judge.latency import mode_rows
from harness.judge.totals import timed_generations
from harness.records.latency import DTYPE_BYTES, LatencyRecord
from harness.records.probes import DeviceLimits
from harness.records.provenance import DeviceInfo, Environment, TunedOrigin
from harness.records.run import RunRecord

MAX_OVER_LIMIT = 1.1  # the 10 % are for the spread of the probe
# Fewer bytes of weights may lie in a cache, which is faster than the memory; the largest caches of servers'
# CPUs hold a small model in half precision.
CACHED_BYTES: Mapping[str, int] = {"cpu": 2**30, "cuda": 256 * 2**20}
_CACHE_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class LimitShare:
    """The least time that something could take at the measured limits, as a share of the time it took."""

    what: str
    share: float


def limits_outcome(name: str, limits: Iterable[DeviceLimits], shares: Iterable[LimitShare]) -> CheckOutcome:
    """Return whether nothing was faster than the limits; older limits are not held to that.

    Neither may products of one row read faster than plain reading does.
    """
    known = tuple(limits)
    if not known:
        return CheckOutcome(
            name=name, status=CheckStatus.SKIPPED, found="no limits were measured", need="nothing"
        )
    if any(one.are_under_measured for one in known):
        found = "limits under-measured: an earlier probe took them, which looked less far"
        return CheckOutcome(name=name, status=CheckStatus.SKIPPED, found=found, need="nothing")
    rows = (
        LimitShare("reading in products of one row", rate / one.read_bandwidth_bytes_per_s)
        for one in known
        if (rate := one.row_product_bytes_per_s) is not None
    )
    highest = max((*rows, *shares), key=lambda one: one.share)
    return CheckOutcome(
        name=name,
        status=CheckStatus.PASSED if highest.share <= MAX_OVER_LIMIT else CheckStatus.FAILED,
        found=f"{highest.what} at {highest.share:.2f} of the measured limit, the highest share",
        need=f"at most {MAX_OVER_LIMIT} of it",
    )


def bytes_in_cache(device: DeviceInfo) -> int:
    """Return how many bytes of weights may lie in a cache: twice the largest that a processor tells of.

    A part of what is larger still comes out of it; from twice its size on that part is less than half. Where
    a record holds no cache's size, it is as much as the largest of them have.
    """
    told = [
        int(size[:-1]) * _CACHE_UNITS[size[-1]]
        for name, size in device.details.items()
        if name.startswith("cache level") and size[-1:] in _CACHE_UNITS and size[:-1].isdigit()
    ]
    return min(2 * max(told), CACHED_BYTES[device.kind]) if told else CACHED_BYTES[device.kind]


def run_shares(record: RunRecord) -> Iterator[LimitShare]:
    """Yield the shares of the limits that a run's steps reached, decoded ones and separate ones.

    A step reads the backbone's weights at least once, and multiplies each with every node.
    """
    limits = record.device_limits
    if limits is None:
        return
    numbers = DTYPE_BYTES[record.environment.dtype]
    cached_bytes = bytes_in_cache(record.environment.device)
    for arm in record.suite.arms:
        times = [time for one in timed_generations(record, arm.name) for time in one.step_times_s]
        weight_bytes = _origin(record, arm.name).weight_bytes
        if times and weight_bytes >= cached_bytes and median(times) > 0:
            least_s = weight_bytes / limits.read_bandwidth_bytes_per_s
            yield LimitShare(f"reading of {arm.name}", least_s / median(times))
    for row in record.step_costs.costs if record.step_costs is not None else ():
        weight_bytes = _origin(record, row.arm).weight_bytes
        flop = 2 * weight_bytes / numbers * row.num_nodes
        yield LimitShare(
            f"products over {row.num_nodes} nodes", flop / limits.matmul_flop_per_s / median(row.backbone_s)
        )
        if weight_bytes >= cached_bytes:
            least_s = weight_bytes / limits.read_bandwidth_bytes_per_s
            yield LimitShare(f"reading over {row.num_nodes} nodes", least_s / median(row.backbone_s))


def latency_shares(record: LatencyRecord) -> Iterator[LimitShare]:
    """Yield the shares of the limits that the points and the modes of a latency record reached."""
    facts, cached_bytes = record.facts, bytes_in_cache(record.environment.device)
    for point in record.points:
        limits = record.limits(point.dtype)
        if limits is None or not point.backbone_s:
            continue
        taken_s = median(point.backbone_s)
        where = f"after {point.context_tokens} tokens, batch {point.batch}"
        name = f"{point.dtype} {point.mode} over {point.num_nodes} nodes {where}"
        flop = 2 * facts.step_parameters * point.num_nodes * point.batch
        yield LimitShare(f"products of {name}", flop / limits.matmul_flop_per_s / taken_s)
        read_bytes = facts.step_bytes(point.dtype)
        if read_bytes >= cached_bytes:
            kept = facts.cache_bytes(point.batch * point.context_tokens, dtype=point.dtype)
            least_s = (read_bytes + kept) / limits.read_bandwidth_bytes_per_s
            yield LimitShare(f"reading of {name}", least_s / taken_s)
    for row in mode_rows(record):
        if row.bandwidth_share is not None and facts.step_bytes(row.dtype) >= cached_bytes:
            yield LimitShare(f"reading of {row.dtype} {row.mode}", row.bandwidth_share)


def latency_within_limits(record: LatencyRecord) -> CheckOutcome:
    """Check that no step of a latency record was faster than the device was measured to be."""
    found = (record.limits(dtype) for dtype in record.spec.dtypes)
    limits = tuple(one for one in found if one is not None)
    return limits_outcome("within_limits", limits, latency_shares(record))


def _origin(record: RunRecord, arm: str | None) -> Environment | TunedOrigin:
    """Return where an arm's backbone comes from; steps of no arm are the original's."""
    environment = record.environment
    tuned = environment.tuned
    if arm is None or tuned is None or record.suite.arm(arm).backbone == "original":
        return environment
    return tuned
