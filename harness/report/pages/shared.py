"""What pages share: templates, tables that sort, and text of others made safe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader
from markupsafe import Markup

from harness.safe_text import terminal_text

_HOME = Path(__file__).parent
_LONG = 40  # letters of a table's cell from which on it may wrap


@dataclass(frozen=True)
class Cell:
    """One cell of a table that sorts: what is shown, the number it sorts by, and a link to another page."""

    text: str
    number: float | None = None
    link: str = ""

    @property
    def is_long(self) -> bool:
        """Return whether the text may wrap."""
        return len(self.text) > _LONG


@dataclass(frozen=True)
class SortedTable:
    """A table of a page, with what its columns mean."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def rendered(template: str, **values: Any) -> str:
    """Return a page: one file with its own style and script; the template escapes what would be markup."""
    templates = Templates(loader=FileSystemLoader(_HOME), autoescape=True, trim_blocks=True)
    own = {name: Markup((_HOME / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    return templates.get_template(template).render(**own, **values)


def safe(text: str) -> str:
    """Return text of others without what would steer a reader's screen; tags are the template's business."""
    return terminal_text(text)


def plain(text: str) -> str:
    """Return a note of a Markdown page without its signs."""
    return " ".join(text.replace("*", "").replace("`", "").split())
