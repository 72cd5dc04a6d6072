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


def is_marking(section: Section) -> bool:
    """Return whether a profiler looks at this step; one that looks away for some steps has an `on`."""
    return section is not no_section and bool(getattr(section, "on", True))
