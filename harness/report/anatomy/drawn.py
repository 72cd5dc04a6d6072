"""One step of Medusa decoding, drawn for a terminal: guesses, tree, mask, and what was kept and why."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from harness.records.profiles.drawn import DrawnNode, DrawnStep
from harness.safe_text import terminal_text

_LARGEST_MASK = 32  # nodes whose mask still fits a terminal


def quoted(text: str) -> str:
    """Return a token's text so that blanks and line ends can be seen."""
    return json.dumps(terminal_text(text), ensure_ascii=False)


def why(node: DrawnNode, *, parent: DrawnNode | None) -> str:
    """Return in words why a node was kept, or why not."""
    if parent is None:
        return "the step before chose it"
    if node.is_kept:
        return "the model says so too"
    if not parent.is_kept:
        return "not reached"
    return f"the model says {quoted(parent.wanted)}"


def print_drawn_step(console: Console, step: DrawnStep) -> None:
    """Print a step in four parts: drafts, verification, what is accepted, what it yielded."""
    by_path = {node.path: node for node in step.nodes}
    console.print(Text(f"{step.model}; text so far: ..{terminal_text(step.before)}"))
    console.print(Text(f"root: {quoted(by_path[()].text)}, known from the step before\n"))
    console.print(Text("1. Draft. The heads read the state that predicted the root; their best guesses:"))
    for number, guesses in enumerate(step.heads, 1):
        told = ", ".join(f"{quoted(one.text)} {100 * one.probability:.0f} %" for one in guesses)
        console.print(Text(f"   head {number}: {told}"))
    console.print(
        Text(f"\n2. Verify. One pass of the model scores all {len(step.nodes)} nodes of this tree:")
    )
    console.print(_tree(step))
    if len(step.nodes) <= _LARGEST_MASK:
        console.print(
            Text("\n   Each node sees itself and the nodes above it (and all text before the root):")
        )
        for row in mask_rows(step):
            console.print(Text(f"   {row}"))
    kept = [quoted(node.text) for node in step.nodes if node.is_kept and node.path]
    console.print(Text("\n3. Accept. The longest path on which every token is the model's own choice:"))
    console.print(Text(f"   {' > '.join([quoted(by_path[()].text), *kept])}"))
    console.print(Text(f"4. Yielded: {quoted(step.kept)}, {step.num_tokens} tokens for one pass."))
    console.print(Text(f"   Next root: {quoted(step.bonus)}, what the model puts after that path."))


def mask_rows(step: DrawnStep) -> list[str]:
    """Return the tree's attention mask, a row a node: `x` where it sees the node of the column."""
    paths = [node.path for node in step.nodes]
    return [" ".join("x" if path[: len(seen)] == seen else "." for seen in paths) for path in paths]


def _tree(step: DrawnStep) -> Tree:
    by_path = {node.path: node for node in step.nodes}
    drawn: dict[tuple[int, ...], Tree] = {}
    root = Tree(_label(by_path[()], parent=None))
    drawn[()] = root
    for node in step.nodes:
        if node.path:
            parent = by_path[node.path[:-1]]
            drawn[node.path] = drawn[node.path[:-1]].add(_label(node, parent=parent))
    return root


def _label(node: DrawnNode, *, parent: DrawnNode | None) -> Text:
    chance = "" if node.probability is None else f" {100 * node.probability:.0f} %"
    label = Text(f"{quoted(node.text)}{chance}  ", style="bold green" if node.is_kept else "")
    label.append(why(node, parent=parent), style="dim")
    return label
