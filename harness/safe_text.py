"""Text of others made safe where it is shown: on a terminal, in a report's field, on a page of Markdown.

Prompt keys, the names of models, arms and claims, and what a record says of itself may come from anybody.
Shown as they are, they could move the cursor, turn the reading direction around, load a picture from another
machine, or link to a script. What is taken away stays readable: an escape character is shown as `\\x1b`.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but for tab and newline; what changes the reading direction or cannot be seen; line
# separators that only some programs take for one; halves of a character; invisible tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK = re.compile(r"\]\((?P<address>[^)\n]*)\)?")
_OWN_ADDRESS = re.compile(r"(?:[\w+-][\w.+-]*/)*[\w+-][\w.+-]*(?:#[\w-]*)?")  # of a file below the page
_DEFINITION = re.compile(r"^(\s*(?:[>*+-]\s*)*\[[^\]\n]*\])(?=:)", re.MULTILINE)
_ADDRESS = re.compile(r":(?=//)|(?<=\bwww)(?=\.)", re.IGNORECASE)


def terminal_text(text: str) -> str:
    """Return text for a terminal: what would steer it is written out, such as `\\x1b`."""
    return _UNSEEN.sub(_written_out, text)


def field_text(text: str) -> str:
    """Return text of others for a field of a report: one line without tag, address, or link to elsewhere."""
    line = _DEFINITION.sub(r"\1\\", _LINK.sub(_own_link, terminal_text(" ".join(text.split()))))
    return _TAG.sub("&lt;", _ADDRESS.sub(lambda match: match.group() + "\\", line))


def page_text(text: str) -> str:
    """Return a page of Markdown in which every link and picture is of a file below the page.

    It is the last look at a whole page, and at a block of a README: what a field let through ends here.
    """
    safe = _TAG.sub("&lt;", terminal_text(text))
    return _DEFINITION.sub(r"\1\\", _LINK.sub(_own_link, safe))


class SafeConsole(Console):
    """A console of rich's that writes out whatever would steer the terminal, whoever prints it.

    Names and paths of a user's hold brackets, so none is markup unless a call asks for it. It knows what was
    said last, and when (seconds of the monotonic clock).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, **options})
        self.said = ""
        self.said_s: float | None = None

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, and note a line of text as what was said last."""
        super().print(*objects, **options)
        self.said_s = time.monotonic()
        if len(objects) == 1 and isinstance(objects[0], str):
            self.said = objects[0]

    def whisper(self, line: str) -> None:
        """Print a line that does not count as said."""
        super().print(line, markup=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError where the reader is gone; rich would end the program with code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of what is printed; rich's own steering, such as of a bar, stays."""
        for segment in super().render(renderable, options):
            if segment.control is None and _UNSEEN.search(segment.text):
                yield Segment(terminal_text(segment.text), segment.style)
            else:
                yield segment


def _written_out(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


def _own_link(match: re.Match[str]) -> str:
    if _OWN_ADDRESS.fullmatch(match["address"]):
        return match.group()
    return "]\\" + match.group()[1:]
