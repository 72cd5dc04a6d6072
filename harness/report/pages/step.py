"""One step of Medusa decoding as a page: guesses, tree, mask, and what was kept and why."""

from __future__ import annotations

from typing import Any

from harness.records.profiles.drawn import DrawnNode, DrawnStep
from harness.report.anatomy.drawn import mask_rows, quoted, why
from harness.report.pages.shared import rendered, safe


def render_drawn_step(step: DrawnStep) -> str:
    """Return the page of one step."""
    by_path = {node.path: node for node in step.nodes}
    kept = [quoted(node.text) for node in step.nodes if node.is_kept]
    return rendered(
        "step.html.j2",
        title=safe(f"One step of Medusa decoding: {step.model}"),
        step={"before": safe(step.before), "num_tokens": step.num_tokens},
        root=quoted(by_path[()].text),
        most=max((len(head) for head in step.heads), default=0),
        heads=[
            [{"text": quoted(one.text), "chance": f"{100 * one.probability:.0f} %"} for one in head]
            for head in step.heads
        ],
        nodes=step.nodes,
        tree=_branch(step, by_path[()], by_path),
        mask=[[mark == "x" for mark in row.split()] for row in mask_rows(step)],
        kept=kept,
        yielded=quoted(step.kept),
        bonus=quoted(step.bonus),
    )


def _branch(step: DrawnStep, node: DrawnNode, by_path: dict[tuple[int, ...], DrawnNode]) -> dict[str, Any]:
    children = [one for one in step.nodes if one.path and one.path[:-1] == node.path]
    return {
        "text": quoted(node.text),
        "chance": "" if node.probability is None else f"{100 * node.probability:.0f} %",
        "is_kept": node.is_kept,
        "why": why(node, parent=by_path[node.path[:-1]] if node.path else None),
        "children": [_branch(step, one, by_path) for one in children],
    }
