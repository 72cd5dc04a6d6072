"""`trace` and `search-tree`: how heads rank a text, and the trees that are grown on that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from harness.cli.find import find_suite
from harness.cli.marked import marked_lines
from harness.cli.options import HubOption, SuiteArgument, UnsealedOption, console
from harness.compose.composer import Composer, KnotPrices, shared_knots, step_contexts
from harness.compose.devices import DEFAULT_SHAPE, PredictedCurve, StepTimes, find_curves
from harness.compose.plan import search_both
from harness.compose.prices.fitted import step_models
from harness.compose.prices.measured import timed_curves
from harness.compose.prices.table import banded, divided, tells
from harness.compose.replay import ReplayIndex
from harness.compose.search import CostChoice, SearchSpace, cached_choices
from harness.compose.trees import grow
from harness.errors import ExitCode, UserError
from harness.files import write_bytes
from harness.paths import cache_dir, default_results, resolve_path
from harness.records.opened import open_trace, seal_fault_of
from harness.records.step_model import StepModel
from harness.records.trace import Trace
from harness.report.formatting import WITHHELD, ratio_interval
from harness.specs.latency import HeadsForm
from harness.specs.suite import IntervalSpec
from harness.stats import Interval
from medusa_impl.tree import DraftTree


def print_search(
    trace: Trace, *, num_nodes: int, values: str, check: Trace | None, console: Console
) -> DraftTree:
    """Print what grown trees of nested sizes up to `num_nodes` promise and yield; return the largest.

    The expectation weighs all positions alike and, for `marginals`, takes heads as independent; the replay on
    `check` (or, without it, on the calibration trace itself, which flatters) is what decoding would do.
    """
    grown = grow(trace, num_nodes=num_nodes, values=values, num_heads=trace.num_heads)
    own, other = ReplayIndex(trace), ReplayIndex(check) if check is not None else None
    table = Table("nodes", "depth", "expected acceptance length", "replayed, calibration", "replayed, check")
    sizes = sorted({size for size in (2, 4, 8, 16, 32, 64, 128, 256) if size < num_nodes} | {num_nodes})
    for size in sizes:
        tree = grown.nested(size)
        realised = f"{other.replay(tree).tokens_per_step:.3f}" if other is not None else "-"
        expected = grown.expected_acceptance_length(size)
        table.add_row(
            str(size), str(tree.depth), f"{expected:.3f}", f"{own.replay(tree).tokens_per_step:.3f}", realised
        )
    console.print(table)
    console.print(grown.tree.draw(), markup=False, highlight=False)
    return grown.tree


@dataclass(frozen=True)
class PricedChoice:
    """The fastest tree that one search found at a curve's prices, and what a vanilla step costs there.

    `composed` is its speedup step by step on the calibration text. The interval draws prompts, and the rounds
    in which the curve was timed where these show its error.
    """

    curve: StepTimes
    choice: CostChoice
    vanilla_s: float
    composed: Interval

    @property
    def provenance(self) -> dict[str, str | float]:
        """Return what a tree's file says of where the tree comes from."""
        label = self.curve.label
        return {
            "device": label.device,
            "shape": label.shape,
            "dtype": label.dtype,
            "curve": label.kind,
            "method": self.choice.method,
            "step_s": self.choice.step_s,
        }

    def speedup(self, index: ReplayIndex) -> float:
        """Return the tokens a second that the tree promises over vanilla's."""
        return index.replay(self.choice.tree()).tokens_per_step * self.vanilla_s / self.choice.step_s

    def is_told(self, index: ReplayIndex) -> bool:
        """Return whether the step times are measured, or their error is smaller than what the tree gains."""
        if not isinstance(self.curve, PredictedCurve):
            return True
        band = self.curve.model.overhead_band if self.curve.model is not None else None
        return tells(divided(self.speedup(index), banded(1.0, band)))


def print_device_search(
    calibration: Trace,
    *,
    device: str,
    shape: str | None,
    dtype: str | None,
    max_nodes: int,
    check: Trace | None,
    results: Path,
    cache: Path | None,
    console: Console,
    model: StepModel | None = None,
) -> PricedChoice:
    """Print the fastest tree by both searches for every curve that the device's name means.

    Returned is the tree of the most tokens a second, among measured curves where there are any. A tree whose
    predicted gain is smaller than the prediction's error is neither shown nor returned.
    Choices are kept in `cache` by curve and trace. Predictions take `model`, or without one the roofline,
    whose error is not known.
    Raises: UserError for an unknown device, a curve that does not cover a vanilla step, or predictions none
    of which tells whether a tree pays.
    """
    index = ReplayIndex(calibration)
    other = ReplayIndex(check) if check is not None else None
    curves = find_curves(
        device,
        results=results,
        shape=shape,
        dtype=dtype,
        heads=HeadsForm(architecture="shared"),
        model=model,
    )
    found = fastest_trees(index, curves, max_nodes=max_nodes, cache=cache)
    console.print(_table_of(found, index=index, other=other))
    told = [one for one in found if one.is_told(index)]
    if not told:
        promised = max(one.speedup(index) for one in found)
        raise UserError(
            found=f"a predicted speedup of {promised:.2f}, whose error is larger",
            need="step times that tell whether a tree pays",
            where=found[0].curve.label.words,
            do="measure them there with medusa-repro latency",
        )
    measured = [one for one in told if one.curve.label.kind == "measured"]
    best = max(measured or told, key=lambda one: _tokens_per_s(one, index))
    console.print(f"the fastest: {best.curve.label.words}, {best.choice.method}", highlight=False)
    console.print(best.choice.tree().draw(), markup=False, highlight=False)
    return best


def _tokens_per_s(priced: PricedChoice, index: ReplayIndex) -> float:
    return index.replay(priced.choice.tree()).tokens_per_step / priced.choice.step_s


def fastest_trees(
    index: ReplayIndex, curves: Sequence[StepTimes], *, max_nodes: int, cache: Path | None
) -> list[PricedChoice]:
    """Return, curve by curve, the fastest tree by both searches.

    Steps are priced at the mean context of the calibration text's vanilla steps.
    Raises: UserError for a curve that does not cover a vanilla step.
    """
    lengths = step_contexts(index.replay(DraftTree.root_only()))
    knots, usual = np.array(shared_knots(curves, lengths), dtype=np.float64), float(np.mean(lengths))
    space = SearchSpace(index, max_nodes=max_nodes)
    composer = Composer(index.trace, knots=knots.tolist(), interval=IntervalSpec())
    found: list[PricedChoice] = []
    for curve in curves:
        prices = KnotPrices(curve, knots=knots, context="trace", batch=1)
        price = prices.price_at(usual)
        vanilla_s = price(1, 0)
        if vanilla_s is None:
            raise UserError(
                found="no vanilla step",
                need="a curve that covers one node at batch 1",
                where=curve.label.words,
                do="measure one with medusa-repro latency",
            )
        choices = cached_choices(
            space.key,
            curve_fingerprint=f"{curve.label.fingerprint} trace 1 {usual:.3f} {knots.tolist()}",
            folder=cache,
            search=partial(search_both, space, price),
        )
        found += [
            PricedChoice(curve, choice, vanilla_s, _composed(composer, choice.tree(), prices))
            for choice in choices
        ]
    return found


def _composed(composer: Composer, tree: DraftTree, prices: KnotPrices) -> Interval:
    """Return a chosen tree's composed speedup."""
    vanilla, drafted = (composer.seconds(one, prices) for one in (DraftTree.root_only(), tree))
    assert vanilla is not None and drafted is not None  # the search priced both
    resamples = composer.resamples(len(drafted.by_unit))
    return resamples.interval(vanilla.total / drafted.total, vanilla.draws / drafted.draws)


def _table_of(found: Sequence[PricedChoice], *, index: ReplayIndex, other: ReplayIndex | None) -> Table:
    """Return what each tree promises on the calibration trace and, where there is one, on the check trace."""
    table = Table(
        "curve",
        "search",
        "nodes",
        "depth",
        "tokens/step, calibration",
        "tokens/step, check",
        "step, ms",
        "speedup promised",
    )
    for priced in found:
        choice, tree = priced.choice, priced.choice.tree()
        own = index.replay(tree).tokens_per_step
        if not priced.is_told(index):
            table.add_row(priced.curve.label.words, choice.method, *["-"] * 5, WITHHELD)
            continue
        table.add_row(
            priced.curve.label.words,
            choice.method,
            str(tree.num_nodes),
            str(tree.depth),
            f"{own:.3f}",
            f"{other.replay(tree).tokens_per_step:.3f}" if other is not None else "-",
            f"{1000 * choice.step_s:.3g}",
            ratio_interval(priced.composed)
            if priced.curve.num_rounds is not None
            else f"{priced.speedup(index):.2f}, its error left out",
        )
    return table


def trace(
    suite: SuiteArgument,
    out: Annotated[Path, typer.Argument(help=".npz file to write the trace to")],
    limit: Annotated[int | None, typer.Option(help="answer only the first N prompts", min=1)] = None,
    hub: HubOption = False,
) -> None:
    """Answer a suite's prompts greedily and record how its heads rank the answers."""
    from harness.measure.trace import trace_suite

    spec, file = find_suite(suite)
    written = trace_suite(spec, suite_file=file, out=out, limit=limit, allow_hub=hub, console=console)
    print(
        json.dumps({"trace": out.name, "prompts": len(written.prompts), "positions": written.num_positions})
    )


def search_tree(
    calibration: Annotated[
        Path | None,
        typer.Argument(help="trace (.npz) to grow trees on; without it, that of the shipped heads"),
    ] = None,
    num_nodes: Annotated[
        int,
        typer.Option(help="nodes of the tree, root included; with --device the most that it may have", min=2),
    ] = 64,
    values: Annotated[
        str,
        typer.Option(
            help="joint (how often a whole path was right) or marginals (product of the heads' accuracies)"
        ),
    ] = "joint",
    check: Annotated[
        Path | None,
        typer.Option(help="second trace (.npz), of text that the trees were not grown on, to replay them"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the tree to")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="find the fastest tree on this device: a name in hardware.toml or a latency record"
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help=f"with --device, the shape of the model; without it, that of the record, or {DEFAULT_SHAPE}"
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="with --device, the only dtype to look at")] = None,
    unsealed: UnsealedOption = False,
) -> None:
    """Grow the best tree on a trace, or the fastest one for a device; print what it promises and yields."""
    if values not in ("joint", "marginals"):
        raise UserError(found=f"--values {values}", need="joint or marginals", where="the command line")
    file = calibration or resolve_path("embedded/calibration.npz", base_folder=None)
    trace = open_trace(file, unsealed=unsealed)
    checked = open_trace(check, unsealed=unsealed) if check is not None else None
    fault = seal_fault_of(file) or (seal_fault_of(check) if check is not None else None)
    with marked_lines(fault):
        if device is None:
            tree = print_search(trace, num_nodes=num_nodes, values=values, check=checked, console=console)
            origin: dict[str, str | float] = {"values": values, "num_nodes": num_nodes}
        else:
            best = _fastest_on(
                device, trace=trace, shape=shape, dtype=dtype, max_nodes=num_nodes, check=checked
            )
            tree, origin = best.choice.tree(), best.provenance
    _give_tree(tree, origin, out=out, fault=fault)


def _fastest_on(
    device: str,
    *,
    trace: Trace,
    shape: str | None,
    dtype: str | None,
    max_nodes: int,
    check: Trace | None,
) -> PricedChoice:
    """Print and return the fastest tree, with the results and the step model that lie on this machine."""
    results = default_results()
    return print_device_search(
        trace,
        device=device,
        shape=shape,
        dtype=dtype,
        max_nodes=max_nodes,
        check=check,
        results=results,
        cache=cache_dir() / "trees",
        console=console,
        model=step_models(timed_curves(results)).get("cuda"),
    )


def _give_tree(
    tree: DraftTree, origin: dict[str, str | float], *, out: Path | None, fault: str | None
) -> None:
    """Print a tree as JSON, and write it; one that was grown on an unsealed record says so."""
    text = tree.to_json(provenance=origin if fault is None else {**origin, "unsealed": fault})
    if out is not None:
        write_bytes(out, (text + "\n").encode())
    print(text)
    if fault is not None:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)
