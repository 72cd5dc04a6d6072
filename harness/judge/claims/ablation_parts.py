"""The parts of findings on an ablation: what an arm gains, how far it went, what got worse.

Each part has its interval over texts and its figure by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.judge.ablation import Columns, TextKind, change_columns, kl_of
from harness.judge.claims.findings import Asked, Finding, NotTestable, above, below, holds, shown
from harness.judge.judgement import VerdictKind
from harness.records.ablation import AblationRecord, TextChange
from harness.specs.forms.training import HurtsMoreForm


def gain_parts(
    record: AblationRecord, arm: str, *, over: str, bound: float, columns: Callable[..., Columns]
) -> list[Finding]:
    """Return an arm's gain in tokens/step as two findings.

    One is on the text that each arm writes itself, the other on the original model's, which both read.
    """
    texts: tuple[tuple[TextKind, str], ...] = (
        ("own", "on each one's own text"),
        ("original", "on the original model's text"),
    )
    parts = []
    for text, where in texts:
        ours, theirs = (columns(record, name, text=text) for name in (arm, over))
        gain = ours.over(theirs, spec=record.spec.interval)
        seeds = _by_seed(record, arm, over=over, columns=(ours, theirs), relation=lambda a, b: a / b)
        kind = _agreed(above(gain, bound), [seed > bound for seed in seeds])
        reason = f"{holds(kind)} {where} ({_listed(seeds, 3)})"
        parts.append(
            Finding(
                kind=kind,
                ours=f"{shown(gain, 'x', digits=3)} {where}",
                reason=reason,
                figure_kind="replayed",
                asked=(Asked(gain, bound),),
            )
        )
    return parts


def divergence_part(arm: str, record: AblationRecord, *, max_kl: float) -> Finding:
    """Return whether an arm lies at most `max_kl` nats a token from the original."""
    columns = change_columns(record, arm, kl_of)
    kl = columns.interval(record.spec.interval)
    kind = _agreed(
        VerdictKind.REPRODUCED if kl.high <= max_kl else below(kl, max_kl),
        [seed <= max_kl for seed in columns.seeds],
    )
    reason = (
        f"{arm} lies at most {max_kl:g} nats a token from the original: {holds(kind)} "
        f"({_listed(columns.seeds, 4)})"
    )
    return Finding(
        kind=kind,
        ours=f"{arm} {shown(kl, ' nats', digits=4)}",
        reason=reason,
        figure_kind="measured",
        asked=(Asked(kl, max_kl, "below"),),
    )


def worse_part(
    form: HurtsMoreForm,
    record: AblationRecord,
    total: Callable[[TextChange], float],
    *,
    bound: float,
    description: str,
    references: bool,
) -> Finding:
    """Return whether one arm's texts have a larger total a position than another's, by more than `bound`.

    `description` says in the report what that means of the arm; `references` chooses texts by others instead
    of the original's held-out answers.
    """
    ours, theirs = (
        change_columns(record, arm, total, references=references) for arm in (form.arm, form.over)
    )
    difference = ours.less(theirs, spec=record.spec.interval)
    seeds = _by_seed(record, form.arm, over=form.over, columns=(ours, theirs), relation=lambda a, b: a - b)
    kind = _agreed(above(difference, bound), [seed > bound for seed in seeds])
    reason = (
        f"{form.arm} is {description} than {form.over}, by more than {bound:g} nats a token: {holds(kind)} "
        f"({_listed(seeds, 4)})"
    )
    return Finding(
        kind=kind,
        ours=f"{description}: {shown(difference, ' nats', digits=4)} more",
        reason=reason,
        figure_kind="measured",
        asked=(Asked(difference, bound),),
    )


def _by_seed(
    record: AblationRecord,
    arm: str,
    *,
    over: str,
    columns: tuple[Columns, Columns],
    relation: Callable[[float, float], float],
) -> list[float]:
    """Return how two arms compare in each seed's training.

    The start has no seed and is compared with each.
    """
    seeds = [[result.seed for result in record.of(name)] for name in (arm, over)]
    if None not in seeds[1] and seeds[0] != seeds[1]:
        raise NotTestable(f"{arm} was trained on the seeds {seeds[0]}, {over} on {seeds[1]}")
    ours, theirs = columns
    base = theirs.seeds * len(ours.seeds) if None in seeds[1] else theirs.seeds
    return [relation(one, other) for one, other in zip(ours.seeds, base, strict=True)]


def _agreed(kind: VerdictKind, seeds_hold: Sequence[bool]) -> VerdictKind:
    """Return an interval's verdict, unless a seed's training says the opposite: then the claim is open."""
    against = {VerdictKind.REPRODUCED: not all(seeds_hold), VerdictKind.NOT_REPRODUCED: any(seeds_hold)}
    return VerdictKind.INCONCLUSIVE if against.get(kind, False) else kind


def _listed(seeds: Sequence[float], digits: int) -> str:
    return f"by seed {', '.join(f'{seed:.{digits}f}' for seed in seeds)}"


def check_step_cost(record: AblationRecord, arm: str, *, over: str) -> None:
    """Refuse two arms whose steps do not cost the same.

    Raises: NotTestable with the reason.
    """
    recipes = [recipe_of(record, name) for name in (arm, over)]
    for name in ("num_heads", "num_layers", "architecture"):
        if recipes[0].get(name) != recipes[1].get(name):
            raise NotTestable(
                f"the heads of {arm} and {over} differ in {name}: a step does not cost both the same"
            )
    for name, recipe in zip((arm, over), recipes, strict=True):
        adapted = recipe.get("backbone") == "lora" and recipe.get("lora", {}).get("lm_head")
        if adapted and recipe.get("architecture") == "shared" and recipe.get("heads_lm_head") == "original":
            raise NotTestable(
                f"a step of {name} reads two LM heads, the adapted and the original: it costs more"
            )


def recipe_of(record: AblationRecord, arm: str) -> dict[str, Any]:
    """Return an arm's recipe as the record keeps it; empty for the start.

    Raises: NotTestable where the arm was not run.
    """
    results = record.of(arm)
    if not results:
        raise NotTestable(f"the record has no arm {arm}")
    return results[0].recipe or {}
