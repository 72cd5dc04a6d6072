"""Verdicts on a sweep's sampled cells: thresholds, rules and temperatures.

Every figure is paired by prompt: the bootstrap draws prompts whole, with all settings and seeds of a prompt
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.compose.appendix_g import VERDICTS
from harness.judge.claims.evidence import EQUIVALENCE_LEVEL
from harness.judge.claims.findings import (
    Asked,
    Finding,
    NotTestable,
    combined,
    holds,
    shown,
    tested,
)
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.claims.verdicts import verdict
from harness.judge.judgement import ClaimVerdict
from harness.records.sweep import SweepRecord
from harness.records.sweep_cells import SampledCell
from harness.specs.claims import ClaimSpec
from harness.specs.forms.claims import (
    TemperatureTrendForm,
    ThresholdTrendForm,
    TypicalBeatsRejectionForm,
)
from harness.stats import Interval, bootstrap_ratio_of_ratios, bootstrap_totals

Floats = NDArray[np.float64]


def sampled_counts(cell: SampledCell, *, prompts: Sequence[str]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return a cell's decoded tokens, steps, all tokens and summed log-likelihood by prompt.

    All seeds of a prompt count together; decoded tokens leave out each text's first, which the prefill made.
    Shapes: [prompts] each.
    """
    index = {key: number for number, key in enumerate(prompts)}
    table = np.zeros((4, len(prompts)))
    for row in cell.rows:
        figures = (row.num_tokens - 1, len(row.step_tokens), row.num_tokens, row.log_likelihood)
        table[:, index[row.prompt_key]] += figures
    return table[0], table[1], table[2], table[3]


def shared_prompts(cells: Sequence[SampledCell]) -> tuple[str, ...]:
    """Return the prompts on which every cell took a step.

    Raises: NotTestable where there is none.
    """
    keys = [{row.prompt_key for row in cell.rows if row.step_tokens} for cell in cells]
    common = set.intersection(*keys) if keys else set()
    if not common:
        raise NotTestable("the settings share no prompt on which each took a step")
    return tuple(
        row.prompt_key
        for row in cells[0].rows
        if row.prompt_key in common and row.seed == cells[0].rows[0].seed
    )


def slope(values: Sequence[Floats], at: Sequence[float]) -> Floats:
    """Return the least-squares slope of values over `at`.

    Shapes: one array for each entry of `at`, all alike; the result is like them.
    """
    values_at = np.asarray(at, dtype=np.float64)
    centred = values_at - values_at.mean()
    return np.asarray(
        sum(weight * value for weight, value in zip(centred / (centred @ centred), values, strict=True))
    )


def sweep_verdicts(record: SweepRecord, *, claims: Sequence[ClaimSpec]) -> tuple[ClaimVerdict, ...]:
    """Return one verdict for each claim that has a form for sweeps, then those on the simulations."""
    figures = Figures({claim.id: claim for claim in claims})
    decided = [
        verdict(claim, "transfer", tested(partial(_TESTS[type(form)], form, record)), by=form)
        for claim in claims
        if (form := claim.sweep) is not None
    ]
    simulated = [
        verdict(claim, "paper-only", tested(partial(judge_paper_only, claim, alone, figures=figures)))
        for claim in claims
        if claim.id in VERDICTS and (alone := claim.paper_only) is not None
    ]
    return (*decided, *simulated)


def _threshold_trend(form: ThresholdTrendForm, record: SweepRecord) -> Finding:
    cells = [cell for cell in threshold_cells(record) if cell.setting.temperature == form.temperature]
    if len(cells) < form.min_epsilons:
        raise NotTestable(
            f"{len(cells)} thresholds with delta = sqrt(epsilon) at T {form.temperature:g}, "
            f"{form.min_epsilons} are needed"
        )
    at = [_epsilon(cell) for cell in cells]
    rate, likelihood = _trends(record, cells, at)
    found = _part(
        Asked(rate, 0.0, "below"), f"tokens/step {shown(rate)} a unit of epsilon", name="tokens/step falls"
    )
    return replace(
        found,
        reason=f"{found.reason}; not judged: the likelihood under the backbone moves by {shown(likelihood)} "
        "nats a unit, as a stricter threshold makes it by construction; quality needs a judge",
    )


def threshold_cells(record: SweepRecord) -> list[SampledCell]:
    """Return the typical cells whose delta is the square root of epsilon.

    They come in order of temperature and epsilon.
    """
    cells = [
        cell
        for cell in record.sampled
        if cell.setting.epsilon is not None
        and cell.setting.delta is not None
        and math.isclose(cell.setting.delta, math.sqrt(cell.setting.epsilon))
    ]
    return sorted(cells, key=lambda cell: (cell.setting.temperature, _epsilon(cell)))


def _typical_beats_rejection(form: TypicalBeatsRejectionForm, record: SweepRecord) -> Finding:
    typical = _find(record, "typical", form.temperature, epsilon=form.epsilon, delta=form.delta)
    rejection = _find(record, "rejection", form.temperature)
    prompts, spec = shared_prompts([typical, rejection]), record.spec.interval
    ours, theirs = (sampled_counts(cell, prompts=prompts) for cell in (typical, rejection))
    rate = bootstrap_ratio_of_ratios(
        ours[0],
        ours[1],
        base_numerator=theirs[0],
        base_denominator=theirs[1],
        spec=spec,
        rng=np.random.default_rng(spec.seed),
    )
    apart = bootstrap_totals(
        lambda a, b, c, d: a / b - c / d,
        ours[3],
        ours[2],
        theirs[3],
        theirs[2],
        spec=spec.model_copy(update={"level": EQUIVALENCE_LEVEL}),
        rng=np.random.default_rng(spec.seed),
    )
    parts = [
        _part(
            Asked(rate, form.bound),
            f"tokens/step {shown(rate, 'x')}",
            name="typical over rejection in tokens/step",
        ),
        _part(
            Asked(apart, form.margin, "within"),
            f"likelihood {shown(apart)} nats a token",
            name=f"as likely to within {form.margin:g} nats, by the 90 % interval",
        ),
    ]
    return combined(parts)


def _temperature_trend(form: TemperatureTrendForm, record: SweepRecord) -> Finding:
    parts = []
    wanted: tuple[tuple[str, float | None, float | None, Literal["above", "below"], str], ...] = (
        ("typical", form.epsilon, form.delta, "above", "typical rises with T"),
        ("rejection", None, None, "below", "rejection falls with T"),
    )
    for rule, epsilon, delta, side, name in wanted:
        cells = [
            cell
            for cell in record.sampled
            if (cell.setting.rule, cell.setting.epsilon, cell.setting.delta) == (rule, epsilon, delta)
            and cell.setting.temperature > 0
        ]
        cells.sort(key=lambda cell: cell.setting.temperature)
        if len(cells) < form.min_temperatures:
            raise NotTestable(f"{len(cells)} temperatures of {rule}, {form.min_temperatures} are needed")
        rate, _ = _trends(record, cells, [cell.setting.temperature for cell in cells])
        parts.append(
            _part(Asked(rate, 0.0, side), f"{rule} {shown(rate)} tokens/step a unit of T", name=name)
        )
    return combined(parts)


def _trends(
    record: SweepRecord, cells: Sequence[SampledCell], at: Sequence[float]
) -> tuple[Interval, Interval]:
    """Return the slopes of tokens/step and of mean log-likelihood over the cells.

    Their intervals are over prompts.
    """
    prompts, spec = shared_prompts(cells), record.spec.interval
    counts = [sampled_counts(cell, prompts=prompts) for cell in cells]

    def trend(top: int, bottom: int) -> Interval:
        columns = [column for count in counts for column in (count[top], count[bottom])]

        def statistic(*totals: Floats) -> Floats:
            return slope(
                [
                    numerator / denominator
                    for numerator, denominator in zip(totals[::2], totals[1::2], strict=True)
                ],
                at,
            )

        return bootstrap_totals(statistic, *columns, spec=spec, rng=np.random.default_rng(spec.seed))

    return trend(0, 1), trend(3, 2)


def _find(
    record: SweepRecord,
    rule: str,
    temperature: float,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
) -> SampledCell:
    wanted = (rule, temperature, epsilon, delta)
    for cell in record.sampled:
        setting = cell.setting
        if (setting.rule, setting.temperature, setting.epsilon, setting.delta) == wanted:
            return cell
    thresholds = (
        f", epsilon {epsilon:g}, delta {delta:g}" if epsilon is not None and delta is not None else ""
    )
    raise NotTestable(f"the sweep has no {rule} at T {temperature:g}{thresholds}")


def _epsilon(cell: SampledCell) -> float:
    assert cell.setting.epsilon is not None
    return cell.setting.epsilon


def _part(asked: Asked, ours: str, *, name: str) -> Finding:
    reason = f"{name}: {holds(asked.kind)}"
    return Finding(kind=asked.kind, ours=ours, reason=reason, figure_kind="measured", asked=(asked,))


_TESTS: dict[type, Callable[..., Finding]] = {
    ThresholdTrendForm: _threshold_trend,
    TypicalBeatsRejectionForm: _typical_beats_rejection,
    TemperatureTrendForm: _temperature_trend,
}
