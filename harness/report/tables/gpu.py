"""The acceptance of a GPU machine as Markdown, as lines on a terminal, and as one line of JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from harness.records.gpu.parts import ACCEPTED
from harness.records.gpu.record import GpuRecord
from harness.report.formatting import cell, count, heading, page, section, significant, table
from harness.report.kernels import render_kernel_races
from harness.report.provenance import (
    how_to_repeat,
    origin_facts,
    path_within,
    relative_folder,
)

_DEPTH = 4  # of a record below the results folder: gpu, plan, machine, time
_NOTE = (
    "*ok*: the part did all that it was asked. *short*: it ended by its own time budget, and its record says "
    "what is left out. *invalid*: its record fails a check. *failed*: it ended with an error. *stopped*: it "
    "ran over its limit. *skipped*: too little time was left to begin it."
)


def render_gpu_report(record: GpuRecord) -> str:
    """Return the whole report of an acceptance."""
    origin = record.origin
    return page(
        heading(
            f"A GPU machine: plan `{record.spec.name}`",
            record.spec.description,
            origin_facts(origin, record.manifest),
        ),
        section("Parts", f"{_parts(record)}\n\n{_NOTE}"),
        section("Device limits", _limits(record)),
        section("Tests that failed", _failed(record)),
        section("Corpus and training", _rates(record)),
        section(
            "Races of kernels", render_kernel_races(record.kernels) if record.kernels is not None else ""
        ),
        section("Again", how_to_repeat(origin, where=" on a machine of this kind")),
    )


def print_gpu(console: Console, record: GpuRecord) -> None:
    """Print one line a part."""
    for result in record.parts:
        console.print(
            f"{result.part}: {result.outcome} in {result.elapsed_s:.0f} s: {result.told}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def gpu_headline(record: GpuRecord, *, base: Path | None = None) -> dict[str, Any]:
    """Return the one JSON object that ends a run's output: every part, its outcome, seconds and record.

    A part whose files lie in this record names this one. Records are named by their path from `base`, the
    working folder by default, or where they lie elsewhere from the folder that holds the results.
    """
    results = record.folder.resolve().parents[_DEPTH - 1]

    def named(folder: Path) -> str:
        return path_within(folder, base=base or Path.cwd()) or relative_folder(folder, base=results.parent)

    home = named(record.folder)
    return {
        "gpu": record.spec.name,
        "device": record.origin.device.name,
        "accepted": is_accepted(record),
        "seconds": round(sum(result.elapsed_s for result in record.parts), 1),
        "parts": [
            {
                "part": result.part,
                "outcome": result.outcome,
                "seconds": round(result.elapsed_s, 1),
                "record": named(results / result.record)
                if result.record is not None
                else home
                if result.files
                else None,
            }
            for result in record.parts
        ],
        "record": home,
    }


def is_accepted(record: GpuRecord) -> bool:
    """Return whether every part of the plan was run and ended well."""
    ended_well = [result.part for result in record.parts if result.outcome in ACCEPTED]
    return sorted(ended_well) == sorted(one.part for one in record.spec.parts)


def _parts(record: GpuRecord) -> str:
    rows = [
        (
            result.part,
            result.outcome,
            f"{result.elapsed_s:.0f}",
            f"{result.limit_s:.0f}",
            result.told,
            result.record if result.record is not None else "in this record" if result.files else "",
        )
        for result in record.parts
    ]
    return table(["part", "outcome", "s", "limit, s", "what it says", "record"], rows)


def _limits(record: GpuRecord) -> str:
    rows = [
        (
            dtype,
            significant(limits.read_bandwidth_bytes_per_s / 1e9),
            significant(limits.matmul_flop_per_s / 1e12),
            limits.method,
        )
        for dtype, limits in record.limits.items()
    ]
    return table(["dtype", "read, GB/s", "products, TFLOP/s", "how"], rows) if rows else ""


def _failed(record: GpuRecord) -> str:
    failed = record.tests.failed if record.tests is not None else ()
    return "\n".join(f"- `{cell(name)}`" for name in failed)


def _rates(record: GpuRecord) -> str:
    rows = []
    if (corpus := record.corpus) is not None:
        what = f"{count(corpus.num_answers, 'answer')}, {corpus.num_rows} together, {corpus.elapsed_s:.1f} s"
        rows.append((f"corpus of {corpus.recipe}", f"{corpus.tokens_per_s:,.0f} tokens", corpus.dtype, what))
    if (training := record.training) is not None:
        for stage in training.stages:
            rate = stage.num_positions / stage.median_step_s
            share = f"{100 * training.stage_share(stage):.1f} % of the matrix throughput"
            device = training.environment.device.kind
            rows.append(
                (f"training {training.recipe}, {stage.name}", f"{rate:,.0f} positions", device, share)
            )
    return table(["what", "a second", "dtype or device", "how"], rows) if rows else ""
