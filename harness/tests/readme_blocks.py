"""Whether a README shows exactly what a block gives."""

from __future__ import annotations

from pathlib import Path

from harness.report.readme import Block, replace_block


def shows(readme: Path, block: Block) -> bool:
    """Return whether writing the block again would leave the README as it is."""
    text = readme.read_text()
    return replace_block(text, name=block.name, content=block.render(readme.parent)) == text
