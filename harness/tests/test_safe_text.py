"""Text of others on a terminal, in a report's field and on a page: it steers nothing and links nowhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table

from harness.report.formatting import cell, page, table
from harness.safe_text import SafeConsole, field_text, page_text, terminal_text

HOSTILE = (
    "a\x1b[2Jb",
    "a\x1b]0;title\x07",
    "a\u202eb",
    "a\u2066b",
    "a\x9b31m",
    "a\x08\x08b",
    "a\ud800b",
    "a\u200bb",
    "\U000e0041",
)
LINKS = (
    "![x](http://evil.example/p.png)",
    "[y](javascript:alert(1))",
    "[z]( //evil.example )",
    "[a](<http://evil.example>)",
    "[b](../../other.md)",
    "[c]: http://evil.example",
    "> [d]: javascript:alert(1)",
    "<img src=http://evil.example>",
    "<http://evil.example>",
    "<!-- end:results -->",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_steers_a_terminal_is_written_out(text: str) -> None:
    shown = terminal_text(text)
    assert shown.isprintable() and shown.isascii() and terminal_text(shown) == shown
    shown.encode("utf-8")


def test_words_of_every_language_stay() -> None:
    words = "größer, 日本語, ключ, \u05d0\u05d1, e\u0301 👩\u200d🔬 1–2\n\ttab"
    assert terminal_text(words) == words


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_writes_out_what_would_steer_it_and_keeps_its_own(text: str) -> None:
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=True, width=80, color_system="standard")
    console.print(text, style="red", markup=False)
    grid = Table("key")
    grid.add_row(text)
    console.print(grid)
    own = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    assert "\x1b[" in out.getvalue(), "its own colours stay"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", own)


@pytest.mark.parametrize("text", LINKS)
@pytest.mark.parametrize("show", [field_text, page_text, cell, page], ids=lambda show: show.__name__)
def test_nothing_of_others_is_a_link_a_picture_or_a_tag(show: object, text: str) -> None:
    shown = show(text)  # type: ignore[operator]
    assert not re.search(r"\]\((?!own)", shown) and not re.search(r"^\W*\[[^\]]*\]:", shown)
    assert not re.search("<[A-Za-z/!]", shown)


def test_an_address_in_a_field_is_no_link_of_itself() -> None:
    """Some readers of Markdown turn a bare address into a link."""
    shown = field_text("https://evil.example and www.evil.example")
    assert "://" not in shown and "www." not in shown


def test_our_own_links_and_pictures_stay() -> None:
    text = "![losses](curves.png) [`2026-a`](results/embedded/x-2c/2026-a/report.md#arms), 1.8 [1.7, 1.9] (x)"
    assert page_text(text) == text
    assert cell("[`a`](results/a.json)") == "[`a`](results/a.json)"
    assert "\\[" not in table(["a"], [["widths [21, 2]: best"]])
