"""Where a record comes from and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.paths import without_paths
from harness.records.probes import DeviceLimits
from harness.records.provenance import Environment, Provenance
from harness.records.run import RunRecord
from harness.report.formatting import ABSENT, cell, count, describe_end, megabytes, pairs, paragraphs, table
from harness.report.limits import UNDER_MEASURED
from harness.report.noise import gpu_rows, processor_rows
from harness.specs.suite import IntervalSpec


class Finished(Protocol):
    """What the manifests of all kinds of record say of a run's end."""

    @property
    def finished_utc(self) -> str: ...
    @property
    def elapsed_s(self) -> float: ...


def describe_commit(origin: Provenance) -> str:
    """Return the commit in words: its id, whether the tree was altered, or that there was no checkout."""
    if origin.commit is None:
        return "unknown: this run was made outside a git checkout, so its code cannot be named"
    if origin.dirty is None:
        return f"`{origin.commit[:12]}` (whether files were altered is not known)"
    return f"`{origin.commit[:12]}`" + (
        " **with uncommitted changes**: the commit alone does not give this code" if origin.dirty else ""
    )


def describe_device(origin: Provenance) -> str:
    """Return the device under test with its cores, threads and memory."""
    device = origin.device
    memory = f"{device.memory_bytes / 1e9:.1f} GB"
    return (
        f"{device.name} ({device.kind}, {count(device.num_cores, 'core')}, "
        f"{count(device.num_threads, 'thread')}, {memory})"
    )


def describe_origin(environment: Environment) -> str:
    """Return in one line which model was measured, where, when and with which code."""
    return (
        f"{cell(environment.model_name)} on {cell(describe_device(environment))}, "
        f"{environment.started_utc[:10]}, commit {describe_commit(environment)}"
    )


def describe_finish(origin: Provenance, manifest: Finished | None) -> str:
    """Return when a run ended and how long it took, or that it has not ended."""
    if manifest is None:
        return "not finished: the record has no manifest and no seal"
    return describe_end(origin.started_utc, manifest.finished_utc, elapsed_s=manifest.elapsed_s)


def origin_facts(origin: Provenance, manifest: Finished | None) -> dict[str, str]:
    """Return what a report's heading says of where its record comes from, safe to be shown."""
    return {
        "Device": cell(describe_device(origin)),
        "Date": origin.started_utc[:10],
        "Commit": describe_commit(origin),
        "Finished": describe_finish(origin, manifest),
    }


def describe_limits(limits: DeviceLimits) -> str:
    """Return what the device can do and how that was measured."""
    rows = limits.row_product_bytes_per_s
    return (
        f"{limits.read_bandwidth_bytes_per_s / 1e9:,.1f} GB/s read, "
        + (f"{rows / 1e9:,.1f} GB/s in products of one row, " if rows is not None else "")
        + f"{limits.matmul_flop_per_s / 1e9:,.0f} GFLOP/s ({limits.method})"
        + (f"; **{UNDER_MEASURED}**" if limits.are_under_measured else "")
    )


def describe_intervals(spec: IntervalSpec, *, over: str = "prompts") -> str:
    """Return how a record's intervals are made."""
    return f"{100 * spec.level:g} % bootstrap over {over}, {spec.num_resamples:,} resamples"


def how_to_repeat(origin: Provenance, *, where: str) -> str:
    """Return the commands that make the record again; `where` says on what."""
    checkout = (
        f"git checkout {origin.commit}"
        if origin.commit
        else "# the commit is not known; take the current code"
    )
    return f"To repeat it{where}:\n\n```\n{checkout}\n{' '.join(without_paths(origin.command).split())}\n```"


def path_within(path: Path, *, base: Path) -> str | None:
    """Return a path as seen from a folder; None where it lies elsewhere."""
    absolute, start = path.resolve(), base.resolve()
    return absolute.relative_to(start).as_posix() if absolute.is_relative_to(start) else None


def relative_folder(folder: Path, *, base: Path) -> str:
    """Return a folder as seen from `base`, or its name alone where it lies elsewhere.

    So no report holds an absolute path.
    """
    return path_within(folder, base=base) or folder.resolve().name


def record_link(folder: Path, *, base: Path, label: str) -> str:
    """Return a line that links a record's report from a page in `base`, or that names the record alone."""
    name, link = folder.resolve().name, path_within(folder, base=base)
    return f"From the record `{name}`." if link is None else f"{label}: [`{name}`]({link}/report.md)."


def render_provenance(record: RunRecord) -> str:
    """Return the record's origin and how to repeat the run."""
    environment = record.environment
    rows: list[tuple[str, object]] = [
        ("command", f"`{environment.command}`"),
        ("commit", describe_commit(environment)),
        *_times(record),
        ("device", describe_device(environment)),
        *((f"device: {name}", value) for name, value in sorted(environment.device.details.items())),
        *_limits(record),
        *processor_rows([one.processor for one in record.generations], noun="trial"),
        *gpu_rows([one.gpu for one in record.generations], noun="trial"),
        ("engine", f"{environment.engine}, {environment.dtype}"),
        ("linear algebra", environment.blas),
        ("variables", pairs(environment.variables)),
        ("Python", environment.python),
        ("packages", pairs(environment.packages)),
        (
            "model",
            f"{environment.model_name}, {megabytes(environment.weight_bytes)} MB, SHA-256 "
            f"{_short(environment.backbone_sha256)}",
        ),
        (
            "draft heads",
            f"{megabytes(environment.heads_bytes)} MB read an evaluation, SHA-256 "
            f"{_short(environment.heads_sha256)}",
        ),
        *((f"draft heads: {name}", value) for name, value in _flat(environment.heads_provenance)),
        *_tuned(environment),
        ("prompts", f"{record.suite.prompts.source}, SHA-256 {_short(environment.prompts_sha256)}"),
        *(
            (f"tree of {arm}", f"{tree.tree().fingerprint}, {count(len(tree.paths), 'path')}, {tree.origin}")
            for arm, tree in record.trees.items()
        ),
        *((f"asset {name}", value) for name, value in sorted(environment.assets.items())),
        ("intervals", f"{describe_intervals(record.suite.interval)}, seed {record.suite.interval.seed}"),
        ("record", record.folder.name),
    ]
    where = ", in a checkout of this repository on a device of the same kind"
    return paragraphs(table(["", ""], rows), how_to_repeat(environment, where=where))


def _tuned(environment: Environment) -> list[tuple[str, object]]:
    tuned = environment.tuned
    if tuned is None:
        return []
    return [
        (
            "tuned backbone",
            f"the model with adapter SHA-256 {_short(tuned.adapter_sha256)}; heads SHA-256 "
            f"{_short(tuned.heads_sha256)}",
        ),
        *((f"tuned heads: {name}", value) for name, value in _flat(tuned.heads_provenance)),
    ]


def _times(record: RunRecord) -> list[tuple[str, object]]:
    manifest = record.manifest
    if manifest is None:
        return [
            ("started", record.environment.started_utc),
            ("finished", describe_finish(record.environment, None)),
        ]
    done = (
        f"{manifest.num_generations:,} generations and {count(manifest.num_failures, 'failure')} of "
        f"{manifest.num_planned:,} planned trials"
    )
    return [
        (
            "started, finished",
            f"{record.environment.started_utc}, {describe_finish(record.environment, manifest)}",
        ),
        ("trials", done),
        ("peak memory", f"{megabytes(manifest.peak_memory_bytes)} MB"),
    ]


def _limits(record: RunRecord) -> list[tuple[str, object]]:
    limits = record.device_limits
    if limits is None or not record.reports_speed:
        return []
    return [("device limits", describe_limits(limits))]


def _flat(values: Mapping[str, Any], *, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in sorted(values.items()):
        if isinstance(value, Mapping):
            rows += _flat(value, prefix=f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def _short(digest: str | None) -> str:
    return ABSENT if digest is None else digest[:16]
