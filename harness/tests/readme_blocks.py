"""Which record a block of a README shows, and whether it shows exactly what that record gives."""

from __future__ import annotations

import re
from pathlib import Path

from harness.report.readme import Block, replace_block


def shows(readme: Path, block: Block) -> bool:
    """Return whether writing the block again would leave the README as it is."""
    text = readme.read_text(encoding="utf-8")
    return replace_block(text, name=block.name, content=block.render(readme.parent)) == text


def shown_record(readme: Path, name: str) -> Path:
    """Return the folder of the one record that a block links the report of."""
    text = readme.read_text(encoding="utf-8")
    block = text.split(f"<!-- begin:{name} -->")[1].split(f"<!-- end:{name} -->")[0]
    linked: list[str] = re.findall(r"\((results/[^)]+)/report\.md\)", block)
    assert len(linked) == 1, f"the block {name} links the one record that it shows"
    return readme.parent / linked[0]
