"""The one exception type for mistakes a user can mend, raised by every layer and rendered once at the command
line.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in input or configuration, told as what was found, what is needed, where, and what to do."""

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
