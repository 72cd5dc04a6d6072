"""Planted registries: for each paper-only form, the paper's figures on either side of the bound.

`plant` changes a copy of the registry, by claim id, for the claim that is judged. The simulations have the
paper's figure in the form itself, so that there the form of the claim is changed.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, Literal

from harness.compose.roofline import attention_intensity
from harness.specs.claims import ClaimSpec
from harness.tests.judge.claims.planted.planting import Planting, Sides, number

Registry = dict[str, ClaimSpec]


def _within(tolerance: str, *, share: float = 0.1) -> tuple[Sides, Sides]:
    """Return figures a little nearer than the form's tolerance, and a little further, to both sides."""

    def near(form: Any) -> tuple[float, ...]:
        return tuple(side * (1 - share) * getattr(form, tolerance) for side in (1, -1))

    def far(form: Any) -> tuple[float, ...]:
        return tuple(side * (1 + share) * getattr(form, tolerance) for side in (1, -1))

    return near, far


def _number(registry: Registry, claim_id: str) -> float:
    value = registry[claim_id].value
    assert isinstance(value, float)
    return value


def _change(registry: Registry, claim_id: str, **values: Any) -> None:
    registry[claim_id] = registry[claim_id].model_copy(update=values)


def _change_form(registry: Registry, claim_id: str, **values: Any) -> None:
    form = registry[claim_id].paper_only
    assert form is not None
    _change(registry, claim_id, paper_only=form.model_copy(update=values))


def _change_cell(
    registry: Registry,
    claim_id: str,
    value: float,
    *,
    grid: Literal["intensity", "tflop_per_s"],
    row: int,
    column: int,
) -> None:
    table = registry[claim_id].table
    assert table is not None
    rows = [list(one) for one in getattr(table, grid)]
    rows[row][column] = value
    changed = table.model_copy(update={grid: tuple(map(tuple, rows))})
    _change(registry, claim_id, table=changed)


def _bound_above_lowest(form: Any, above: float, registry: Registry, claim_id: str) -> None:
    lowest = min(_number(registry, one) for one in form.figures)
    _change(registry, form.bound_claim, value=lowest + above)


def _quotient_off(form: Any, error: float, registry: Registry, claim_id: str) -> None:
    model = form.models[0]
    quotient = _number(registry, f"{model}-acc") / _number(registry, f"{model}-ovh")
    _change(registry, f"{model}-S", value=quotient / (1 + error))


def _overheads_apart(form: Any, count: float, registry: Registry, claim_id: str) -> None:
    for place, (other, model) in enumerate(form.pairs):
        value = registry[other].value
        assert isinstance(value, dict)
        rate, speedup = value["rate"], value["speedup"]
        assert isinstance(rate, float) and isinstance(speedup, float)
        _change(registry, f"{model}-ovh", value=rate / speedup + (0.03 if place < count else 0.0))


def _say(form: Any, num_things: float, registry: Registry, claim_id: str) -> None:
    words = [f"trained in way {min(place, int(num_things) - 1)}" for place in range(len(form.statements))]
    said = [one.model_copy(update={"says": word}) for one, word in zip(form.statements, words, strict=True)]
    _change_form(registry, claim_id, statements=tuple(said))


def _overall_off(form: Any, apart: float, registry: Registry, claim_id: str) -> None:
    mean = fmean(_number(registry, one) for one in registry if one.startswith(form.prefix))
    _change(registry, form.overall, value=mean + apart)


def _intensity_off(form: Any, error: float, registry: Registry, claim_id: str) -> None:
    table = registry[form.by_length].table
    assert table is not None
    exact = attention_intensity(table.columns[0], context_tokens=table.rows[0])
    _change_cell(registry, form.by_length, exact + error, grid="intensity", row=0, column=0)


def _quotient_of_cells(grid: Literal["intensity", "tflop_per_s"], stated: str) -> Any:
    """Let a quotient of the table lie so far from the stated whole factor."""

    def plant(form: Any, apart: float, registry: Registry, claim_id: str) -> None:
        table, value = registry[form.table].table, registry[claim_id].value
        assert table is not None and isinstance(value, dict)
        row, column = table.rows.index(form.row), table.columns.index(form.column)
        one, factor = getattr(table, grid)[row][table.columns.index(1)], value[stated]
        assert isinstance(factor, float)
        _change_cell(registry, form.table, one * (factor + apart), grid=grid, row=row, column=column)

    return plant


def _latency_off(form: Any, error: float, registry: Registry, claim_id: str) -> None:
    table, value = registry[form.table].table, registry[claim_id].value
    assert table is not None and isinstance(value, dict)
    speeds, nodes = table.tflop_per_s[table.rows.index(form.row)], table.columns[-1]
    exact = nodes * speeds[table.columns.index(1)] / speeds[-1]
    _change(registry, claim_id, value={**value, str(nodes): exact + error})


def _rate_off(form: Any, error: float, registry: Registry, claim_id: str) -> None:
    fitted = max(form.slope * math.log(form.num_nodes, base) for base in form.bases)
    _change(registry, form.rate, value=fitted / (1 + error))


def _in_form(field: str) -> Any:
    """Let the paper's figure in the form itself be another one."""

    def plant(form: Any, figure: float, registry: Registry, claim_id: str) -> None:
        _change_form(registry, claim_id, **{field: int(figure) if figure == int(figure) else figure})

    return plant


def _intensity_moves(form: Any, half_units: float, registry: Registry, claim_id: str) -> None:
    table = registry[form.table].table
    assert table is not None
    printed = table.intensity[0][0]
    _change_cell(
        registry, form.table, printed + half_units * form.half_unit, grid="intensity", row=-1, column=0
    )


def _limit_off(limit: str) -> Any:
    def plant(form: Any, error: float, registry: Registry, claim_id: str) -> None:
        makers = {name: getattr(form, name) for name in ("gb_per_s", "tflop_per_s")}
        _change(registry, claim_id, value={**makers, limit: makers[limit] * (1 + error)})

    return plant


def _pair(figure: str, plant: Any, sides: tuple[Sides, Sides], *differ: str) -> Planting:
    return Planting(figure=figure, plant=plant, holds=sides[0], fails=sides[1], differ=differ)


FIGURES: dict[str, tuple[Planting, ...]] = {
    "bound_missed": (
        _pair(
            "the stated bound less the lowest figure",
            _bound_above_lowest,
            (number(0.0), number(-0.01)),
            "{bound_claim}",
        ),
    ),
    "quotients": (
        _pair(
            "a quotient over its printed speedup, less one",
            _quotient_off,
            _within("tolerance"),
            "{models[0]}-S",
        ),
    ),
    "implied_overheads": (
        _pair(
            "models whose printed overhead is not the implied one",
            _overheads_apart,
            (lambda form: (form.min_apart,), lambda form: (form.min_apart - 1,)),
            "{pairs[2][1]}-ovh",
        ),
    ),
    "statements_differ": (
        _pair("different things that the places say", _say, (number(2), number(1)), "{claim}"),
    ),
    "category_means": (
        _pair(
            "overall figure less the arithmetic mean of the categories",
            _overall_off,
            (lambda form: (1.2 * form.half_unit,), lambda form: (0.8 * form.half_unit,)),
            "{overall}",
        ),
    ),
    "closed_forms": (
        _pair("error of one printed intensity", _intensity_off, _within("tolerance"), "{by_length}"),
    ),
    "table_ratios": (
        _pair(
            "quotient of throughputs less the stated factor",
            _quotient_of_cells("tflop_per_s", "throughput"),
            (number(0.45, -0.45), number(0.55, -0.55)),
            "{table}",
        ),
        _pair(
            "quotient of intensities less the stated factor",
            _quotient_of_cells("intensity", "intensity"),
            (number(0.45, -0.45), number(0.55, -0.55)),
            "{table}",
        ),
    ),
    "relative_latency": (
        _pair("error of one stated latency", _latency_off, _within("tolerance"), "{claim}"),
    ),
    "log_constant": (
        _pair(
            "the nearest fitted rate over that of Table 1, less one",
            _rate_off,
            _within("tolerance"),
            "{rate}",
        ),
    ),
    "simulated_peak": (
        _pair(
            "stated candidates, where the roofline peaks at 170",
            _in_form("num_nodes"),
            (number(137, 220), number(135, 230)),
            "{claim}",
        ),
    ),
    "simulated_batch": (
        _pair(
            "stated batch up to which there is a gain",
            _in_form("batch"),
            (number(32), number(16, 64)),
            "{claim}",
        ),
        _pair(
            "slope of the rate against the logarithm, which shifts where the gain ends",
            _in_form("slope"),
            (number(0.44, 0.52), number(0.41, 0.55)),
            "{claim}",
        ),
    ),
    "simulated_length": (_pair("stated batch", _in_form("batch"), (number(4, 8), number(1, 16)), "{claim}"),),
    "regimes": (
        _pair(
            "half units by which the batch moves a printed intensity",
            _intensity_moves,
            (number(1.9), number(2.1)),
            "{table}",
        ),
        _pair(
            "largest batch whose steps are to be bound by memory; the device does 161 operations a byte",
            _in_form("batch"),
            (number(160), number(170)),
            "{claim}",
        ),
        _pair(
            "tokens of the prefill that is asked to be bound by arithmetic",
            _in_form("prefill_tokens"),
            (number(170), number(160)),
            "{claim}",
        ),
    ),
    "vendor_limits": tuple(
        _pair(
            f"plotted {limit} over the maker's, less one", _limit_off(limit), _within("tolerance"), "{claim}"
        )
        for limit in ("gb_per_s", "tflop_per_s")
    ),
}
