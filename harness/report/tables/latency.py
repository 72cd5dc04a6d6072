"""What a latency record's page says of how its points were timed."""

from __future__ import annotations

from collections.abc import Sequence

from harness.compose.prices.redrawn import num_rounds
from harness.records.latency import LatencyPoint
from harness.report.formatting import count

_FOLLOW = {
    "decoding": "A visit's steps follow each other over a growing text, as in decoding, from another length "
    "about the context each time.",
    "fixed": "Every step comes after the same context.",
}


def render_timing(points: Sequence[LatencyPoint]) -> str:
    """Return in how many rounds points were timed, and how steps followed each other; empty without any."""
    timed = [point for point in points if point.skipped is None and point.backbone_s]
    if not timed:
        return ""
    rounds = sorted({num_rounds(point) for point in timed})
    told = " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))
    sizes = f"Sizes after one context take turns, in {told} {'round' if rounds[-1] == 1 else 'rounds'}."
    first = " One node is timed before each other size." if all(one.times_a_round for one in timed) else ""
    visits = " ".join(words for kind, words in _FOLLOW.items() if kind in {one.timing for one in timed})
    return f"{count(len(timed), 'point')}. {sizes}{first} {visits}"
