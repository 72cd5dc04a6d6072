"""What every picture shares: matplotlib or a refusal, and files that are written whole and always alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import UserError


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
    # matplotlib would write when it was drawn, and by which version
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(temporary, dpi=dpi, metadata=metadata)
    temporary.replace(path)


def _no_matplotlib() -> UserError:
    return UserError(
        found="no matplotlib",
        need="matplotlib for the figures",
        where="this environment",
        do="pip install 'medusa-repro[plots]'",
    )
