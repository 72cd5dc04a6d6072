"""Output that says on every line that a record is not as it was sealed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import IO, Any

from harness.safe_text import field_text

MARK = "UNSEALED: "


class _Marked:
    """A stream that begins each line with the mark; all else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._at_start = stream, True

    def write(self, text: str) -> int:
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            self._stream.write((MARK if self._at_start else "") + line)
            self._at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def marked_lines(reason: str | None) -> Iterator[None]:
    """Mark every line that is printed within, the first one with the reason; without one, print as always."""
    if reason is None:
        yield
        return
    out, errors = _Marked(sys.stdout), _Marked(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        print(field_text(reason), file=sys.stderr)
        yield
