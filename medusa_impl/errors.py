"""The one exception for mistakes that a user can correct.

Every layer raises it; the command line prints it once, without a traceback.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class UserError(Exception):
    """A mistake in input or configuration: what was found, what is needed, where, and what to do.

    It survives pickling, so that a process can raise what another one refused.
    """

    def __init__(self, *, found: str, need: str, where: str | None = None, do: str | None = None) -> None:
        self.found = found
        self.need = need
        self.where = where
        self.do = do
        parts = [f"found {found}", f"need {need}"]
        if where is not None:
            parts.append(f"in {where}")
        if do is not None:
            parts.append(f"to mend it: {do}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        # an exception is made again from its positional arguments, which this one has none of
        return partial(type(self), found=self.found, need=self.need, where=self.where, do=self.do), ()
