"""What every picture shares: matplotlib or a refusal, and files that are written whole and always alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.stats import Interval
from medusa_impl.tree import DraftTree


@contextmanager
def styled(settings: Any) -> Iterator[None]:
    """Draw and save under some of matplotlib's settings.

    Raises: UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise _no_matplotlib() from error
    with matplotlib.rc_context(settings):
        yield


def new_figure(*, width: float, height: float) -> Any:
    """Return an empty figure of matplotlib's, in inches.

    Raises: UserError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _no_matplotlib() from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a figure as its file's ending says, whole or not at all; the same figure gives the same bytes."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    # Else matplotlib writes when it drew the picture and in which version, and no two files are alike.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(temporary, dpi=dpi, metadata=metadata)
    temporary.replace(path)


def bars(
    axes: Any, at: Sequence[Any], intervals: Sequence[Interval], *, mark: str, colour: str, name: str
) -> None:
    """Plot estimates with their intervals; an interval without bounds is drawn as a point."""
    low, high = bar_lengths(intervals)
    estimates = [one.estimate for one in intervals]
    axes.errorbar(
        at,
        estimates,
        yerr=[low, high],
        fmt=mark,
        color=colour,
        label=name,
        markersize=4,
        capsize=2,
        linewidth=1,
    )


def bar_lengths(intervals: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """Return how far intervals reach below and above their estimates; 0 where they have no bound."""
    low = [one.estimate - one.low if np.isfinite(one.low) else 0.0 for one in intervals]
    high = [one.high - one.estimate if np.isfinite(one.high) else 0.0 for one in intervals]
    return [max(0.0, value) for value in low], [max(0.0, value) for value in high]


def tree_layout(tree: DraftTree) -> list[float]:
    """Return how far to the right each node stands.

    Leaves stand one apart in the order of their paths, parents in the middle of their children.
    """
    across = [0.0] * tree.num_nodes
    leaves = sorted(tree.leaves, key=lambda leaf: tree.paths[leaf])
    for place, leaf in enumerate(leaves):
        across[leaf] = float(place)
    for node in range(tree.num_nodes - 1, -1, -1):
        if tree.children[node]:
            across[node] = sum(across[child] for child in tree.children[node]) / len(tree.children[node])
    return across


def plain_ticks(axes: Any, ticks: Sequence[int]) -> None:
    """Write whole numbers along the bottom of a logarithmic axis, those within its range."""
    low, high = axes.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.minorticks_off()


def _no_matplotlib() -> UserError:
    return UserError(
        found="no matplotlib",
        need="matplotlib for the figures",
        where="this environment",
        do="pip install 'medusa-repro[plots]'",
    )
