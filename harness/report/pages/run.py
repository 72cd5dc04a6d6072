"""A run as one page for a browser: verdicts that unfold, figures, tables that sort, and texts step by step.

It is one file that loads nothing, so that it can be sent, kept and opened anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from harness.judge.anatomy.acceptance import acceptances
from harness.judge.anatomy.oracle import oracles
from harness.judge.judgement import ClaimVerdict, Judgement, VerdictKind, by_test
from harness.records.run import RunRecord
from harness.records.trials import Generation
from harness.report.anatomy.oracle import oracle_sentence
from harness.report.figures.canvas import tree_layout
from harness.report.figures.run import ACCEPTANCE_FILE, SPEED_FILE, acceptance_title, speed_title
from harness.report.formatting import ABSENT, count, rate_interval, ratio, ratio_interval
from harness.report.pages.shared import Cell, SortedTable, plain, rendered, safe
from harness.report.provenance import describe_origin
from harness.report.tables.ending import answer
from harness.report.tables.run import comparisons_by_arm, headline_arm
from harness.report.tables.words import WORDS_NOTE, shown
from medusa_impl.tree import DraftTree

PAGE_FILE = "report.html"
MOST_GENERATIONS = 40
_MARKS = {
    VerdictKind.REPRODUCED: ("✓", "reproduced"),
    VerdictKind.NOT_REPRODUCED: ("✗", "failed"),
    VerdictKind.INCONCLUSIVE: ("?", "open"),
    VerdictKind.NOT_DECIDABLE: ("·", "dimmed"),
}
_ACROSS, _DOWN = 14, 26  # of the drawn tree: units between leaves, and between depths
_LARGEST_TREE = 128  # nodes that can still be told apart


def render_page(record: RunRecord, judgement: Judgement) -> str:
    """Return a run's page; its figures are those that lie next to its report."""
    best = _headline_oracle(record, judgement)
    return rendered(
        "run.html.j2",
        title=safe(f"Medusa claims tested: suite {record.suite.name}"),
        answer=safe(answer(record, judgement)),
        about=safe(f"Measured with {describe_origin(record.environment)}.".replace("`", "")),
        oracle=best,
        words_note=plain(WORDS_NOTE),
        verdicts=_verdicts(judgement),
        figures=_figures(record, judgement),
        tables=tuple(
            filter(None, (_arms_table(record, judgement), _acceptance_table(record), _checks(judgement)))
        ),
        player=player_data(record) if judgement.valid_texts else None,
        player_note=_player_note(record),
    )


def _headline_oracle(record: RunRecord, judgement: Judgement) -> str:
    arm = headline_arm(record, judgement)
    found = next((one for one in oracles(record) if arm is not None and one.arm == arm.arm), None)
    return oracle_sentence(found) if found is not None else ""


def _verdicts(judgement: Judgement) -> list[dict[str, Any]]:
    groups = [group for group in by_test(judgement.verdicts) if group[0].kind in _MARKS]
    groups.sort(key=lambda group: (group[0].form == "paper-only", group[0].is_ours))
    return [_verdict(group) for group in groups]


def _verdict(group: Sequence[ClaimVerdict]) -> dict[str, Any]:
    first = group[0]
    mark, style = _MARKS[first.kind]
    return {
        "mark": mark,
        "style": style,
        "ids": safe(", ".join(dict.fromkeys(one.claim_id for one in group))),
        "stated": safe(first.stated),
        "shown": shown(first) if first.decides else f"also: {shown(first)}",
        "ours": safe(first.ours),
        "reason": safe(first.reason[:1].upper() + first.reason[1:]),
        "paper": safe(", ".join(dict.fromkeys(one.paper_figure for one in group if one.paper_figure))),
        "place": safe("; ".join(dict.fromkeys(one.place for one in group))),
        "form": first.form,
        "figure_kind": first.figure_kind,
        "power": first.power,
    }


def _figures(record: RunRecord, judgement: Judgement) -> list[dict[str, Any]]:
    """Return the figures next to the report, inline; they are files that this program drew."""
    found = acceptances(record)
    captions = {
        SPEED_FILE: speed_title(record, judgement),
        ACCEPTANCE_FILE: acceptance_title(found) if found else "",
    }
    drawn = []
    for name, caption in captions.items():
        path = record.folder / "figures" / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            drawn.append({"svg": Markup(text[text.index("<svg") :]), "caption": " ".join(caption.split())})
    return drawn


def _arms_table(record: RunRecord, judgement: Judgement) -> SortedTable | None:
    compared = comparisons_by_arm(judgement)
    rows = []
    for arm in judgement.arms:
        against = compared.get(arm.arm)
        rate = arm.acceleration_rate
        rows.append(
            (
                Cell(safe(arm.arm)),
                Cell(against.baseline if against is not None else ABSENT),
                Cell(str(arm.num_nodes), arm.num_nodes),
                Cell(ratio_interval(rate), rate.estimate),
                Cell(ratio_interval(against.overhead), against.overhead.estimate)
                if against is not None and record.reports_speed
                else Cell(ABSENT),
                Cell(ratio_interval(against.speedup), against.speedup.estimate)
                if against is not None and record.reports_speed
                else Cell(ABSENT),
                Cell(rate_interval(arm.tokens_per_s), arm.tokens_per_s.estimate)
                if arm.tokens_per_s is not None and record.reports_speed
                else Cell(ABSENT),
            )
        )
    headers = ("arm", "against", "nodes", "tokens/step", "overhead", "speedup", "tokens/s")
    note = (
        "Tokens/step: tokens that one decoding step yields on average. Overhead: its mean step against the "
        "baseline's. Speedup: tokens/s against the baseline, from the first token on. Brackets hold "
        "intervals over prompts."
    )
    return SortedTable("Arms", headers, tuple(rows), note) if rows else None


def _acceptance_table(record: RunRecord) -> SortedTable | None:
    found = acceptances(record)
    if not found:
        return None
    depth = max(len(one.conditional) for one in found)
    rows = []
    for one in found:
        rates = [one.conditional[level] if level < len(one.conditional) else None for level in range(depth)]
        rows.append(
            (
                Cell(safe(one.arm)),
                Cell(ratio(one.num_accepted / one.num_steps), one.num_accepted / one.num_steps),
                *(
                    Cell(ratio_interval(rate), rate.estimate) if rate is not None else Cell(ABSENT)
                    for rate in rates
                ),
            )
        )
    headers = ("arm", "accepted a step", *(f"depth {level + 1}" for level in range(depth)))
    note = (
        "Depth d: of the steps that accepted a draft at the depth before (at depth 1: of all), the share "
        "that accepted one here as well."
    )
    return SortedTable("Acceptance by depth", headers, tuple(rows), note)


def _checks(judgement: Judgement) -> SortedTable | None:
    rows = tuple(
        (Cell(one.name), Cell(one.status.value), Cell(safe(one.found)), Cell(safe(one.need)))
        for one in judgement.checks
    )
    return SortedTable("Checks", ("check", "outcome", "found", "need"), rows) if rows else None


def chosen_generations(record: RunRecord) -> list[tuple[Generation, str]]:
    """Return what a page shows, with why: of each arm that drafts the first, the worst and the median.

    Worst and median are by tokens/step; one that is chosen twice stands once. There are at most
    `MOST_GENERATIONS`.
    """
    chosen: list[tuple[Generation, str]] = []
    for arm in (arm for arm in record.suite.arms if arm.method == "medusa"):
        mine = [one for one in record.generations if one.trial.arm == arm.name and one.num_steps]
        if not mine:
            continue
        ranked = sorted(mine, key=lambda one: ((one.num_tokens - 1) / one.num_steps, one.order))
        picks = (
            (mine[0], "the first of its arm"),
            (ranked[0], "the fewest tokens/step of its arm"),
            (ranked[(len(ranked) - 1) // 2], "the median tokens/step of its arm"),
        )
        seen: set[int] = set()
        for one, why in picks:
            if id(one) not in seen:
                seen.add(id(one))
                chosen.append((one, why))
    return chosen[:MOST_GENERATIONS]


def player_data(record: RunRecord) -> dict[str, Any] | None:
    """Return the player's texts, their steps and times, and the trees; None without token texts."""
    if record.token_texts is None:
        return None
    chosen = chosen_generations(record)
    generations, used = [], set[int]()
    for one, why in chosen:
        baseline = record.suite.arm(one.trial.arm).baseline
        vanilla = next(
            (
                other
                for other in record.generations
                if other.trial == one.trial.model_copy(update={"arm": baseline})
            ),
            None,
        )
        shown_texts = [one, *([vanilla] if vanilla is not None else [])]
        used.update(token for text in shown_texts for token in text.token_ids)
        generations.append(
            {
                "label": safe(f"{one.trial.arm}, {one.trial.prompt_key}"),
                "why": f"{safe(one.category or 'a prompt')}: {why}",
                "arm": one.trial.arm,
                "tokens_per_step": ratio((one.num_tokens - 1) / one.num_steps),
                **_steps(one),
                "paths": accepted_paths(record, one),
                "vanilla": {"arm": vanilla.trial.arm, **_steps(vanilla)} if vanilla is not None else None,
            }
        )
    names = {one.trial.arm for one, _ in chosen}
    return {
        "generations": generations,
        "texts": {token: safe(text) for token, text in record.token_texts.texts.items() if token in used},
        "trees": {name: drawn for name in sorted(names) if (drawn := _drawn(record.trees[name].tree()))},
    }


def _steps(one: Generation) -> dict[str, Any]:
    return {
        "ids": list(one.token_ids),
        "kept": list(one.step_tokens),
        "ms": [round(1000 * seconds, 2) for seconds in one.step_times_s],
    }


def accepted_paths(record: RunRecord, one: Generation) -> list[list[int]] | None:
    """Return the accepted path of each step, as ranks from the root; None where no trace tells it.

    The trace holds how the heads rank greedy vanilla's text, so it tells of arms that decode the same one.
    """
    trace = record.trace_of(record.suite.arm(one.trial.arm).backbone)
    if trace is None or one.trial.seed is not None:
        return None
    known = next((prompt for prompt in trace.prompts if prompt.key == one.trial.prompt_key), None)
    if known is None or tuple(known.tokens.tolist()) != one.token_ids:
        return None
    paths, place = [], 0  # of the last known token, from 0
    for kept in one.step_tokens:
        paths.append([int(rank) for rank in known.ranks[place][: kept - 1]])
        place += kept
    return paths


def _drawn(tree: DraftTree) -> dict[str, Any] | None:
    """Return where a tree's nodes lie when it is drawn; None where it is too large."""
    if tree.num_nodes > _LARGEST_TREE:
        return None
    across = tree_layout(tree)
    nodes = [
        {
            "path": list(path),
            "parent": parent if path else None,
            "x": round(across[node] * _ACROSS, 1),
            "y": len(path) * _DOWN,
        }
        for node, (path, parent) in enumerate(zip(tree.paths, tree.parents, strict=True))
    ]
    return {"nodes": nodes, "size": [round(max(across) * _ACROSS, 1), tree.depth * _DOWN]}


def _player_note(record: RunRecord) -> str:
    shown_number, number = len(chosen_generations(record)), len(record.generations)
    return (
        f"{shown_number} of {count(number, 'generation')}: of each arm that drafts the first, "
        "the one with the fewest tokens/step and the median one. Each colour is one step's tokens; the lit "
        "path of the tree is what the step accepted, where the trace of the greedy text tells it. Arrow keys "
        "go a step on or back, the space bar plays. All generations are in generations.jsonl next to this "
        "page."
    )
