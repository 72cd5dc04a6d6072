"""Text files, read in one way: UTF-8 whatever the locale, and lines that end at newlines alone."""

from __future__ import annotations

import errno
from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, without a byte-order mark.

    Raises: OSError, and UnicodeDecodeError, which is a ValueError.
    """
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise OSError(errno.EINVAL, "no regular file", path.name)
    return path.read_text(encoding="utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file. Raises: as `read_text` does.

    `splitlines` also splits at form feeds, U+0085, U+2028 and U+2029, which may stand raw in a JSON string.
    """
    *lines, tail = read_text(path).split("\n")
    return [*lines, tail] if tail else lines
