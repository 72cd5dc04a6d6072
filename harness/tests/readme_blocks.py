"""Whether a block of a README shows exactly what its record gives."""

from __future__ import annotations

from pathlib import Path

from harness.report.readme import Block, replace_block


def shows(readme: Path, block: Block) -> bool:
    """Return whether writing the block again would leave the README as it is."""
    text = readme.read_text(encoding="utf-8")
    return replace_block(text, name=block.name, content=block.render(readme.parent)) == text
