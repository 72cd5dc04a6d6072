"""Named parts of a decoding step, which a profiler can time.

The method itself never reads a clock. A profiler passes its own `Section`, a context manager for each part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

Section = Callable[[str], contextlib.AbstractContextManager[None]]


def no_section(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a context that does nothing, for runs without a profiler."""
    return contextlib.nullcontext()
