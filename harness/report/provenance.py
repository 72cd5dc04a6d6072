"""Where a record comes from and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.paths import without_paths
from harness.records.provenance import Environment
from harness.records.run import RunRecord
from harness.report.formatting import ABSENT, count, finished_words, megabytes, table


def describe_commit(environment: Environment) -> str:
    """Return the commit in words: its id, whether the tree was altered, or that there was no checkout."""
    return describe_commit_of(environment.commit, environment.dirty)


def describe_commit_of(commit: str | None, dirty: bool | None) -> str:
    """Return a commit in words, as `describe_commit` does."""
    if commit is None:
        return "unknown: this run was made outside a git checkout, so its code cannot be named"
    if dirty is None:
        return f"`{commit[:12]}` (whether files were altered is not known)"
    return f"`{commit[:12]}`" + (
        " **with uncommitted changes**: the commit alone does not give this code" if dirty else ""
    )


def describe_device(environment: Environment) -> str:
    """Return the device under test with its cores, threads and memory."""
    device = environment.device
    memory = f"{device.memory_bytes / 1e9:.1f} GB"
    return (
        f"{device.name} ({device.kind}, {count(device.num_cores, 'core')}, "
        f"{count(device.num_threads, 'thread')}, {memory})"
    )


def render_provenance(record: RunRecord) -> str:
    """Return the record's origin: command, code, versions, device, settings, hashes, and how to repeat the
    run.
    """
    environment = record.environment
    rows: list[tuple[str, object]] = [
        ("command", f"`{environment.command}`"),
        ("commit", describe_commit(environment)),
        *_times(record),
        ("device", describe_device(environment)),
        *((f"device: {name}", value) for name, value in sorted(environment.device.details.items())),
        *_limits(record),
        ("engine", f"{environment.engine}, {environment.dtype}"),
        ("linear algebra", environment.blas),
        ("variables", _pairs(environment.variables)),
        ("Python", environment.python),
        ("packages", _pairs(environment.packages)),
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
        ("intervals", _intervals(record)),
        ("record", record.folder.name),
    ]
    return "\n\n".join([table(["", ""], rows), _how_to_repeat(record)])


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
            ("finished", "not finished: the record has no manifest and no seal"),
        ]
    done = (
        f"{manifest.num_generations:,} generations and {count(manifest.num_failures, 'failure')} of "
        f"{manifest.num_planned:,} planned trials"
    )
    finished = finished_words(
        record.environment.started_utc, manifest.finished_utc, elapsed_s=manifest.elapsed_s
    )
    return [
        ("started, finished", f"{record.environment.started_utc}, {finished}"),
        ("trials", done),
        ("peak memory", f"{megabytes(manifest.peak_memory_bytes)} MB"),
    ]


def _limits(record: RunRecord) -> list[tuple[str, object]]:
    limits = record.device_limits
    if limits is None or not record.suite.reports_speed:
        return []
    figures = (
        f"{limits.read_bandwidth_bytes_per_s / 1e9:,.1f} GB/s read, "
        f"{limits.matmul_flop_per_s / 1e9:,.0f} GFLOP/s"
    )
    return [("device limits", f"{figures} ({limits.method})")]


def _intervals(record: RunRecord) -> str:
    spec = record.suite.interval
    return (
        f"{100 * spec.level:g} % bootstrap over prompts, {spec.num_resamples:,} resamples, seed {spec.seed}"
    )


def _how_to_repeat(record: RunRecord) -> str:
    environment = record.environment
    checkout = (
        f"git checkout {environment.commit}"
        if environment.commit
        else "# the commit is not known; take the current code"
    )
    steps = [checkout, without_paths(environment.command)]
    return (
        "To repeat it, in a checkout of this repository on a device of the same kind:\n\n```\n"
        + "\n".join(steps)
        + "\n```"
    )


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or ABSENT


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
