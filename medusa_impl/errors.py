"""The one exception for mistakes that a user can correct.

Every layer raises it; the command line prints it once, without a traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in input or configuration: what was found, what is needed, where, and what to do."""

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
