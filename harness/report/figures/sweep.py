"""A sweep's figures, as SVG and PNG: pure functions of the record.

Every figure says on itself what is replayed, composed, predicted or measured, in which units, and what its
bars are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.compose.appendix_g import AppendixG, simulate
from harness.compose.roofline import linear_intensity
from harness.judge.claims.findings import NotTestable
from harness.judge.claims.sweep import sampled_counts, shared_prompts, threshold_cells
from harness.judge.sweep import (
    best_by_heads,
    decoded_checks,
    dense_points,
    drawn_cell,
    sparse_points,
    told_speedup,
)
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import ComposedCell, SampledCell
from harness.report.figures.canvas import (
    bar_lengths,
    bars,
    new_figure,
    plain_ticks,
    save_figure,
    styled,
    tree_layout,
)
from harness.report.figures.schedule import draw_schedule
from harness.specs.hardware import load_hardware
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio

FORMATS = ("svg", "png")
_BLUE, _ORANGE, _GREY, _GREEN = "#1f5a99", "#c8641b", "#7a7a7a", "#2e7d4f"
_STYLE: Any = {
    "svg.hashsalt": "medusa-repro",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DPI = 140
_LABELLED_NODES = 40  # in larger trees the ranks that are written on the nodes overlap
Draw = Callable[[Any, SweepRecord], bool]


def draw_figures(
    record: SweepRecord, folder: Path, *, names: Sequence[str] | None = None, formats: Sequence[str] = FORMATS
) -> tuple[Path, ...]:
    """Draw a record's figures into a folder and return the files of the first format.

    All those that the record has data for are drawn, or those named.
    Raises: UserError without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in _FIGURES if names is None else names:
        with styled(_STYLE):
            figure = new_figure(width=7.2, height=3.6)
            if _FIGURES[name](figure, record):
                for suffix in formats:
                    save_figure(figure, folder / f"{name}.{suffix}", dpi=_DPI)
                written.append(folder / f"{name}.{formats[0]}")
    return tuple(written)


def draw_nodes(figure: Any, record: SweepRecord) -> bool:
    """Draw tokens/step, and speed on one device, against nodes (Fig. 4).

    Grown and random dense trees are shown.
    """
    one = drawn_cell(record)
    sparse, dense = sparse_points(record, cell=one), dense_points(record, cell=one)
    if not sparse:
        return False
    left, right = figure.subplots(1, 2)
    for points, colour, name, mark in (
        (sparse, _BLUE, "grown (sparse)", "o-"),
        (dense, _ORANGE, "random dense", "x"),
    ):
        if points:
            sizes, intervals = (
                [point.num_nodes for point in points],
                [point.tokens_per_step for point in points],
            )
            if points is sparse:
                bars(left, sizes, intervals, mark=mark, colour=colour, name=name)
            else:  # many at one size: the spread of the points says more than the bars of each would
                left.plot(
                    sizes, [one.estimate for one in intervals], mark, color=colour, label=name, markersize=4
                )
            fast = [
                (point.num_nodes, point.tokens_per_s) for point in points if point.tokens_per_s is not None
            ]
            if fast:
                right.plot(*zip(*fast, strict=True), mark, color=colour, label=name, markersize=4)
    left.set(xlabel="tree nodes, root included", ylabel="tokens/step (replayed)", xscale="log")
    right.set(xlabel="tree nodes, root included", ylabel="tokens/s", xscale="log")
    if one is not None:
        right.axhline(one.vanilla_tokens_per_s, color=_GREY, linestyle=":", label="vanilla")
        right.set_title(f"{one.kind}: {one.curve.device}, {one.curve.dtype}", fontsize=8)
    else:
        right.remove()  # there is no speed that may be told
    for axes in (left, right) if one is not None else (left,):
        plain_ticks(axes, [1, 2, 4, 8, 16, 32, 64, 128, 256])
        axes.legend(frameon=False)
    left.set_title(_bars_note(record), fontsize=8)
    return True


def draw_thresholds(figure: Any, record: SweepRecord) -> bool:
    """Draw tokens/step and likelihood against the threshold, with the other rules (Fig. 5)."""
    cells = threshold_cells(record)
    temperatures = sorted({cell.setting.temperature for cell in cells})
    at = max(temperatures, key=lambda t: sum(cell.setting.temperature == t for cell in cells), default=None)
    cells = [cell for cell in cells if cell.setting.temperature == at]
    if len(cells) < 2:
        return False
    others = [cell for cell in record.sampled if cell.setting.rule in ("greedy", "rejection", "vanilla")]
    others = [cell for cell in others if cell.setting.temperature in (0, at)]
    try:
        prompts = shared_prompts([*cells, *others])
    except NotTestable:
        return False
    rates, likelihoods = figure.subplots(1, 2)
    epsilons = [cell.setting.epsilon for cell in cells]
    for axes, top, bottom in ((rates, 0, 1), (likelihoods, 3, 2)):
        intervals = [
            _sampled_interval(cell, prompts, top=top, bottom=bottom, spec=record.spec.interval)
            for cell in cells
        ]
        name = f"typical, T {at:g}, delta = sqrt(epsilon)"
        bars(axes, epsilons, intervals, mark="o-", colour=_BLUE, name=name)
        for other, colour in zip(others, (_GREY, _ORANGE, _GREEN, "black"), strict=False):
            if other.setting.rule == "vanilla" and top == 0:
                continue  # one token a step, by definition
            level = _sampled_interval(other, prompts, top=top, bottom=bottom, spec=record.spec.interval)
            axes.axhline(level.estimate, color=colour, linestyle="--", label=other.setting.words)
        axes.set_xlabel("epsilon")
        axes.legend(frameon=False, fontsize=7)
    rates.set_ylabel("tokens/step (measured)")
    likelihoods.set_ylabel("log-likelihood under the backbone, nats/token")
    rates.set_title(f"{_bars_note(record, num_prompts=len(prompts))}", fontsize=8)
    return True


def draw_heads(figure: Any, record: SweepRecord) -> bool:
    """Draw tokens/step against the number of heads, for several sizes."""
    axes = figure.subplots()
    drawn = False
    for size, colour in ((8, _GREY), (16, _GREEN), (32, _ORANGE), (64, _BLUE)):
        found = best_by_heads(record, num_nodes=size)
        if found:
            bars(
                axes,
                list(found),
                [point.tokens_per_step for point in found.values()],
                mark="o-",
                colour=colour,
                name=f"{size} nodes",
            )
            drawn = True
    axes.set(
        xlabel="draft heads that the tree may use", ylabel="tokens/step (replayed)", title=_bars_note(record)
    )
    axes.set_xticks(sorted(record.spec.num_heads))
    axes.legend(frameon=False)
    return drawn


def draw_chosen_tree(figure: Any, record: SweepRecord) -> bool:
    """Draw the tree that the search chose for one device, node by node (Fig. 6)."""
    one = drawn_cell(record)
    if one is None:
        return False
    tree = record.trees.trees[one.best.tree].tree()
    axes = figure.subplots()
    across = tree_layout(tree)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            axes.plot(
                [across[parent], across[node]],
                [-tree.depths[parent], -tree.depths[node]],
                color=_GREY,
                linewidth=0.7,
                zorder=1,
            )
    axes.scatter(across, [-depth for depth in tree.depths], s=14, color=_BLUE, zorder=2)
    if tree.num_nodes <= _LABELLED_NODES:
        for node in range(1, tree.num_nodes):
            axes.annotate(
                str(tree.ranks[node]),
                (across[node], -tree.depths[node]),
                (0, -9),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_yticks(
        [-depth for depth in range(tree.depth + 1)],
        ["root", *(f"head {depth}" for depth in range(1, tree.depth + 1))],
    )
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    labels = "; numbers are ranks in their head" if tree.num_nodes <= _LABELLED_NODES else ""
    axes.set_title(
        f"{tree.num_nodes} nodes, depth {tree.depth}{labels}\nchosen for {one.curve.words}", fontsize=8
    )
    return True


def draw_roofline(figure: Any, record: SweepRecord) -> bool:
    """Draw what devices can do against operational intensity, with steps of several sizes (Figs 9 to 17)."""
    axes = figure.subplots()
    devices = load_hardware()
    keys = dict.fromkeys(cell.curve.device for cell in record.composed if cell.curve.device in devices)
    wanted = [
        key for key in ("a100-80gb-pcie", "h100-80gb-sxm", "a6000", "rtx-4090", "t4") if key in keys
    ] or list(keys)[:5]
    if not wanted:
        return False
    intensities = np.geomspace(0.5, 2000, 200)
    for key, colour in zip(wanted, (_BLUE, _ORANGE, _GREEN, _GREY, "black"), strict=False):
        limits = devices[key].limits
        axes.plot(
            intensities,
            np.minimum(intensities * limits.bytes_per_s, limits.flop_per_s) / 1e12,
            color=colour,
            label=key,
        )
    for size in (1, 16, 64, 256):
        axes.axvline(linear_intensity(size, batch=1), color="#d0d0d0", linewidth=0.8, zorder=0)
        axes.annotate(
            f"{size} node{'s' if size > 1 else ''}",
            (linear_intensity(size, batch=1), 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
        )
    axes.set(xlabel="operational intensity, flop/byte", ylabel="TFLOP/s, at most", xscale="log", yscale="log")
    axes.set_title(
        "predicted: data sheets; vertical lines: Llama-33B's MLP at batch 1, 2 bytes a weight", fontsize=8
    )
    axes.legend(frameon=False, fontsize=7)
    return True


def draw_heat_map(figure: Any, record: SweepRecord) -> bool:
    """Draw the speedup of each device's own tree, by device and model shape.

    What is hypothetical is hatched; a prediction whose error is larger than its effect is left out.
    """
    cells = [
        cell
        for cell in record.composed
        if cell.batch == 1 and cell.context == "trace" and told_speedup(cell, record) is not None
    ]
    if len(cells) < 2:
        return False
    rows = list(dict.fromkeys(_row_name(cell) for cell in cells))
    columns = list(dict.fromkeys(cell.curve.shape for cell in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    figure.set_size_inches(2.6 + 1.15 * len(columns), 1.6 + 0.24 * len(rows))
    axes = figure.subplots()
    for cell in cells:
        values[rows.index(_row_name(cell)), columns.index(cell.curve.shape)] = cell.best.speedup.estimate
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = float(np.nanmean(values))
    for cell in cells:
        row, column = rows.index(_row_name(cell)), columns.index(cell.curve.shape)
        nodes = len(record.trees.trees[cell.best.tree].paths)
        colour = "white" if values[row, column] < middle else "black"
        axes.text(
            column,
            row,
            f"{values[row, column]:.2f}x, {nodes}",
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
        )
        if cell.kind == "hypothetical":
            axes.fill(
                [column - 0.5, column + 0.5, column + 0.5, column - 0.5],
                [row - 0.5, row - 0.5, row + 0.5, row + 0.5],
                **_HATCH,
            )
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    figure.colorbar(image, ax=axes, label="speedup over vanilla, batch 1")
    axes.set_title(
        "speedup and nodes of the chosen tree; hatched: another model's trace, hypothetical", fontsize=8
    )
    return True


def draw_decoded(figure: Any, record: SweepRecord) -> bool:
    """Draw composed against measured speedups of the points that were decoded for real."""
    checks = decoded_checks(record)
    if not checks:
        return False
    axes = figure.subplots()
    measured = [check.measured for check in checks]
    low, high = bar_lengths(measured)
    axes.errorbar(
        [check.composed for check in checks],
        [one.estimate for one in measured],
        yerr=[low, high],
        fmt="o",
        color=_BLUE,
        capsize=2,
    )
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color=_GREY, linestyle=":")
    axes.set(
        xlabel="speedup, composed",
        ylabel="speedup, measured",
        title=_bars_note(record, num_prompts=measured[0].num_prompts),
    )
    return True


def draw_simulated(figure: Any, record: SweepRecord) -> bool:
    """Draw Appendix G's speedup against candidates, batch and sequence length (Figs 21 to 23)."""
    simulated: AppendixG = simulate()
    first, second, third = figure.subplots(1, 3, sharey=True)
    first.plot(
        [row.num_nodes for row in simulated.by_candidates],
        [row.speedup for row in simulated.by_candidates],
        "o-",
        color=_BLUE,
    )
    second.plot(
        [row.batch for row in simulated.by_batch],
        [row.speedup for row in simulated.by_batch],
        "o-",
        color=_ORANGE,
    )
    third.plot(
        [row.context_tokens for row in simulated.by_length],
        [row.speedup for row in simulated.by_length],
        "o-",
        color=_GREEN,
    )
    first.set(xlabel="candidates", ylabel="simulated speedup")
    second.set(xlabel="batch", xscale="log")
    third.set(xlabel="sequence length, tokens", xscale="log")
    for axes in (first, second, third):
        axes.axhline(1.0, color=_GREY, linestyle=":")
    plain_ticks(second, [row.batch for row in simulated.by_batch])
    plain_ticks(third, [row.context_tokens for row in simulated.by_length][::2])
    second.set_title(f"predicted: roofline of {simulated.device}, one block of Llama-7B", fontsize=8)
    return True


def _row_name(cell: ComposedCell) -> str:
    mode = f" {cell.curve.mode}" if cell.curve.mode is not None else ""
    return f"{cell.curve.device} {cell.curve.dtype}{mode} ({cell.curve.kind})"


def _sampled_interval(
    cell: SampledCell, prompts: Sequence[str], *, top: int, bottom: int, spec: IntervalSpec
) -> Interval:
    counts = sampled_counts(cell, prompts=prompts)
    return bootstrap_ratio(counts[top], counts[bottom], spec=spec, rng=np.random.default_rng(spec.seed))


def _bars_note(record: SweepRecord, *, num_prompts: int | None = None) -> str:
    prompts = record.origin.trace.num_prompts if num_prompts is None else num_prompts
    return f"bars: {100 * record.spec.interval.level:g} % bootstrap over {prompts} prompts"


_HATCH: dict[str, Any] = {"fill": False, "hatch": "////", "edgecolor": (1, 1, 1, 0.35), "linewidth": 0}
_FIGURES: dict[str, Draw] = {
    "fig4_nodes": draw_nodes,
    "fig5_thresholds": draw_thresholds,
    "heads": draw_heads,
    "fig6_tree": draw_chosen_tree,
    "roofline": draw_roofline,
    "devices": draw_heat_map,
    "schedule": draw_schedule,
    "decoded": draw_decoded,
    "appendix_g": draw_simulated,
}
