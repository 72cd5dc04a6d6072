"""How drafts were accepted, as tables of a run's report and in the names that vLLM gives its counters."""

from __future__ import annotations

from typing import Any

from harness.judge.anatomy.acceptance import Acceptance, acceptances
from harness.records.run import RunRecord
from harness.report.formatting import ABSENT, cell, paragraphs, percent, ratio, ratio_interval, table

_NOTE = """\
A step keeps one token that the model itself is sure of, and the drafts that it accepts after it. *Depth d*:
of the steps that accepted a draft at the depth before (at depth 1: of all), the share that accepted one here
as well, with its interval over prompts. *Use*: accepted over drafted tokens; every node of the tree but its
root is drafted in every step."""


def render_acceptance(record: RunRecord) -> str:
    """Return how drafts were accepted in each Medusa arm; empty where none decoded a step."""
    found = acceptances(record)
    if not found:
        return ""
    depth = max(len(one.conditional) for one in found)
    counts = [
        (one.arm, f"{one.num_steps:,}", *(_share(one, drafts) for drafts in range(depth + 1)))
        for one in found
    ]
    rates = [(one.arm, *(_rate(one, level) for level in range(depth))) for one in found]
    uses = [
        (
            one.arm,
            sum(one.drafted),
            ratio(one.num_accepted / one.num_steps),
            percent(one.use_of_nodes),
            *(f"{ratio(rate)} ({cell(key)})" for key, rate in (one.lowest, one.highest)),
            *(ratio(part.tokens_per_step) for part in one.along),
        )
        for one in found
    ]
    along = [f"from token {part.start + 1}" for part in found[0].along]
    return paragraphs(
        "How many drafts a step accepted, in shares of its arm's steps:",
        table(
            [
                "arm",
                "steps",
                *(f"{drafts} drafts" if drafts != 1 else "1 draft" for drafts in range(depth + 1)),
            ],
            counts,
        ),
        "How acceptance falls with depth:",
        table(["arm", *(f"depth {level + 1}" for level in range(depth))], rates),
        "What became of the drafts, and tokens/step: of the worst and the best prompt, and along the text:",
        table(
            ["arm", "drafted a step", "accepted a step", "use", "lowest prompt", "highest prompt", *along],
            uses,
        ),
        _NOTE,
    )


def _share(one: Acceptance, drafts: int) -> str:
    return percent(one.histogram[drafts] / one.num_steps) if drafts < len(one.histogram) else ABSENT


def _rate(one: Acceptance, level: int) -> str:
    rate = one.conditional[level] if level < len(one.conditional) else None
    return ratio_interval(rate) if rate is not None else ABSENT


def vllm_counters(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Return by arm the counters that vLLM keeps of speculative decoding, under its names.

    A draft is one step's tree here, where vLLM drafts a chain: `num_draft_tokens` counts its nodes, and a
    position is a depth of the tree.
    """
    return {
        one.arm: {
            "num_drafts": one.num_steps,
            "num_draft_tokens": one.num_drafted,
            "num_accepted_tokens": one.num_accepted,
            "num_accepted_tokens_per_pos": list(one.reached),
            "mean_acceptance_length": 1 + one.num_accepted / one.num_steps,
            "per_position_acceptance_rate": [count / one.num_steps for count in one.reached],
            "draft_acceptance_rate": one.use_of_nodes,
        }
        for one in acceptances(record)
    }
