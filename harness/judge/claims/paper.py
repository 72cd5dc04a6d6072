"""Paper-only forms: arithmetic on the paper's own figures, and the roofline of Appendix G.

The figures are taken from the registry of claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, harmonic_mean

from harness.compose.appendix_g import simulation
from harness.compose.roofline import Simulation, attention_intensity, linear_intensity
from harness.judge.claims.findings import Finding, NotTestable, varied
from harness.judge.judgement import VerdictKind
from harness.specs.claims import ClaimSpec, OperatorTable
from harness.specs.forms.paper import (
    BoundMissedForm,
    CategoryMeansForm,
    ClosedFormsForm,
    ImpliedOverheadsForm,
    LogConstantForm,
    PaperOnlyForm,
    QuotientsForm,
    RegimesForm,
    RelativeLatencyForm,
    SimulatedBatchForm,
    SimulatedLengthForm,
    SimulatedPeakForm,
    StatementsDifferForm,
    TableRatiosForm,
    VendorLimitsForm,
)
from harness.specs.hardware import load_hardware


@dataclass(frozen=True)
class Figures:
    """The registry's figures by claim id; a figure that is not there makes a form not testable."""

    claims: Mapping[str, ClaimSpec]

    def claim(self, claim_id: str) -> ClaimSpec:
        """Return the claim of that id."""
        if claim_id not in self.claims:
            raise NotTestable(f"the registry has no claim {claim_id}")
        return self.claims[claim_id]

    def number(self, claim_id: str) -> float:
        """Return the figure of a claim that has exactly one."""
        value = self.claim(claim_id).value
        if not isinstance(value, int | float):
            raise NotTestable(f"the registry gives claim {claim_id} no single figure")
        return float(value)

    def part(self, claim_id: str, key: str) -> float:
        """Return one figure of a claim that has several by name."""
        value = self.claim(claim_id).value
        part = value.get(key) if isinstance(value, dict) else None
        if not isinstance(part, int | float):
            raise NotTestable(f"the registry gives claim {claim_id} no figure {key}")
        return float(part)

    def table(self, claim_id: str) -> OperatorTable:
        """Return the table of a claim."""
        table = self.claim(claim_id).table
        if table is None:
            raise NotTestable(f"the registry gives claim {claim_id} no table")
        return table


def judge_paper_only(claim: ClaimSpec, form: PaperOnlyForm, *, figures: Figures) -> Finding:
    """Return what arithmetic finds on one claim; it is exact, so never inconclusive.

    Raises: NotTestable if a figure that the form needs is not in the registry.
    """
    return varied(form, lambda one: _TESTS[type(one)](claim, one, figures))


def _exact(holds: bool, *, ours: str, reason: str, predicted: bool = False) -> Finding:
    kind = VerdictKind.REPRODUCED if holds else VerdictKind.NOT_REPRODUCED
    return Finding(kind=kind, ours=ours, reason=reason, figure_kind="predicted" if predicted else "computed")


def _bound_missed(claim: ClaimSpec, form: BoundMissedForm, figures: Figures) -> Finding:
    bound = figures.number(form.bound_claim)
    values = {claim_id: figures.number(claim_id) for claim_id in form.figures}
    below = [claim_id for claim_id, value in values.items() if value <= bound]
    reason = f"not above the stated {bound:g}: {', '.join(below) or 'no figure'}"
    return _exact(bool(below), ours=", ".join(f"{value:g}x" for value in values.values()), reason=reason)


def _quotients(claim: ClaimSpec, form: QuotientsForm, figures: Figures) -> Finding:
    quotients = {
        model: figures.number(f"{model}-acc") / figures.number(f"{model}-ovh") for model in form.models
    }
    errors = [abs(quotient / figures.number(f"{model}-S") - 1) for model, quotient in quotients.items()]
    reason = (
        f"the quotients differ from the printed speedups by at most {max(errors):.2%}, allowed "
        f"{form.tolerance:.0%}"
    )
    return _exact(
        max(errors) <= form.tolerance, ours=", ".join(f"{q:.3f}" for q in quotients.values()), reason=reason
    )


def _implied_overheads(claim: ClaimSpec, form: ImpliedOverheadsForm, figures: Figures) -> Finding:
    implied, apart = [], []
    half = form.half_unit
    for other, model in form.pairs:
        rate, speedup = figures.part(other, "rate"), figures.part(other, "speedup")
        printed = figures.number(f"{model}-ovh")
        implied.append(rate / speedup)
        low, high = (rate - half) / (speedup + half), (rate + half) / (speedup - half)
        if high < printed - half or low > printed + half:
            apart.append(other)
    reason = (
        f"{len(apart)} of {len(form.pairs)} differ from the printed overhead by more than rounding "
        f"({', '.join(apart)}); {form.min_apart} are needed"
    )
    return _exact(
        len(apart) >= form.min_apart, ours=", ".join(f"{value:.3f}" for value in implied), reason=reason
    )


def _statements_differ(claim: ClaimSpec, form: StatementsDifferForm, figures: Figures) -> Finding:
    said = {statement.says for statement in form.statements}
    ours = "; ".join(f"{statement.place}: {statement.says}" for statement in form.statements)
    return _exact(
        len(said) > 1,
        ours=ours,
        reason=f"{len(form.statements)} places in the paper say {len(said)} different things on {form.about}",
    )


def _category_means(claim: ClaimSpec, form: CategoryMeansForm, figures: Figures) -> Finding:
    values = [figures.number(claim_id) for claim_id in figures.claims if claim_id.startswith(form.prefix)]
    if not values:
        raise NotTestable(f"the registry has no claim {form.prefix}*")
    overall = figures.number(form.overall)
    means = fmean(values), harmonic_mean(values)
    apart = min(abs(mean - overall) for mean in means)
    reason = (
        f"the nearer mean of {len(values)} categories is {apart:.3f} from the overall {overall:g}; "
        f"rounding explains {form.half_unit:g}"
    )
    return _exact(
        apart > form.half_unit, ours=f"{means[0]:.3f} arithmetic, {means[1]:.3f} harmonic", reason=reason
    )


def _closed_forms(claim: ClaimSpec, form: ClosedFormsForm, figures: Figures) -> Finding:
    errors = list(_intensity_errors(form, figures))
    worst = max(errors)
    count = claim.value
    complete = not isinstance(count, int | float) or len(errors) == count
    reason = (
        f"largest error {worst:.4f} flop/byte over {len(errors)} printed figures, allowed {form.tolerance:g}"
    )
    # A printed figure may lie exactly half a unit away, which binary fractions miss by a hair.
    holds = complete and worst <= form.tolerance + 1e-9
    return _exact(holds, ours=f"{len(errors)} figures within {worst:.4f}", reason=reason)


def _intensity_errors(form: ClosedFormsForm, figures: Figures) -> Iterator[float]:
    closed: dict[str, Callable[[int, int], float]] = {
        form.by_length: lambda row, nodes: attention_intensity(nodes, context_tokens=row),
        form.by_batch: lambda row, nodes: attention_intensity(
            nodes, context_tokens=form.table_context_tokens
        ),
        form.linear: lambda row, nodes: linear_intensity(nodes, batch=row),
    }
    for claim_id, intensity in closed.items():
        table = figures.table(claim_id)
        for row, printed in zip(table.rows, table.intensity, strict=True):
            yield from (
                abs(intensity(row, nodes) - value)
                for nodes, value in zip(table.columns, printed, strict=True)
            )


def _table_ratios(claim: ClaimSpec, form: TableRatiosForm, figures: Figures) -> Finding:
    table = figures.table(form.table)
    if form.row not in table.rows or not {1, form.column} <= set(table.columns):
        raise NotTestable(f"{form.table} has no row {form.row} or no column 1 or {form.column}")
    row, one, many = table.rows.index(form.row), table.columns.index(1), table.columns.index(form.column)
    ratios = [grid[row][many] / grid[row][one] for grid in (table.tflop_per_s, table.intensity)]
    stated = [figures.part(claim.id, key) for key in ("throughput", "intensity")]
    holds = all(round(ratio) == value for ratio, value in zip(ratios, stated, strict=True))
    reason = (
        f"the quotients of {form.table} {'round' if holds else 'do not round'} to the stated "
        f"{stated[0]:g}x and {stated[1]:g}x"
    )
    return _exact(holds, ours=f"{ratios[0]:.1f}x, {ratios[1]:.1f}x", reason=reason)


def _relative_latency(claim: ClaimSpec, form: RelativeLatencyForm, figures: Figures) -> Finding:
    table = figures.table(form.table)
    if form.row not in table.rows or 1 not in table.columns:
        raise NotTestable(f"{form.table} has no row {form.row} or no column 1")
    speeds = dict(zip(table.columns, table.tflop_per_s[table.rows.index(form.row)], strict=True))
    latencies = {nodes: nodes * speeds[1] / speed for nodes, speed in speeds.items()}
    worst = max(abs(latency - figures.part(claim.id, str(nodes))) for nodes, latency in latencies.items())
    reason = f"largest difference from the stated ratios {worst:.4f}, allowed {form.tolerance:g}"
    ours = ", ".join(f"{nodes}: {latency:.3f}" for nodes, latency in latencies.items())
    return _exact(worst <= form.tolerance, ours=ours, reason=reason)


def _log_constant(claim: ClaimSpec, form: LogConstantForm, figures: Figures) -> Finding:
    rate = figures.number(form.rate)
    fitted = [form.slope * math.log(form.num_nodes, base) for base in form.bases]
    best = min(fitted, key=lambda value: abs(value - rate))
    reason = (
        f"the nearest, {best:.2f}, is {abs(best / rate - 1):.0%} from {rate:g} of {form.rate}, "
        f"allowed {form.tolerance:.0%}"
    )
    ours = ", ".join(f"base {base:.3g}: {value:.2f}" for base, value in zip(form.bases, fitted, strict=True))
    return _exact(
        abs(best / rate - 1) <= form.tolerance, ours=f"{ours} at {form.num_nodes} nodes", reason=reason
    )


def _simulation(form: SimulatedPeakForm | SimulatedBatchForm | SimulatedLengthForm) -> Simulation:
    if form.device not in load_hardware():
        raise NotTestable(f"hardware.toml has no device {form.device}")
    return simulation(form)


def _simulated_peak(claim: ClaimSpec, form: SimulatedPeakForm, figures: Figures) -> Finding:
    best, speedup = _simulation(form).best(context_tokens=form.context_tokens, batch=form.batch)
    holds = abs(best / form.num_nodes - 1) <= form.tolerance
    reason = (
        f"on the ideal roofline the speedup peaks at {best} candidates, where the linear layers reach the "
        f"ridge; {form.num_nodes} is stated, {form.tolerance:.0%} off is allowed"
    )
    return _exact(holds, ours=f"peak {speedup:.2f}x at {best} candidates", reason=reason, predicted=True)


def _simulated_batch(claim: ClaimSpec, form: SimulatedBatchForm, figures: Figures) -> Finding:
    simulated = _simulation(form)
    batches = [2**power for power in range(form.batch.bit_length() + 1)]
    best = {batch: simulated.best(context_tokens=form.context_tokens, batch=batch)[1] for batch in batches}
    falls = all(best[more] < best[less] for less, more in pairwise(batches))
    crosses = all((speedup > 1) == (batch <= form.batch) for batch, speedup in best.items())
    trend, crossing = ("falls" if falls else "does not fall"), ("crosses" if crosses else "does not cross")
    reason = f"the best speedup {trend} with the batch and {crossing} 1 past {form.batch}"
    ours = ", ".join(f"batch {batch}: {speedup:.2f}x" for batch, speedup in best.items())
    return _exact(falls and crosses, ours=ours, reason=reason, predicted=True)


def _simulated_length(claim: ClaimSpec, form: SimulatedLengthForm, figures: Figures) -> Finding:
    simulated = _simulation(form)
    best = [simulated.best(context_tokens=length, batch=form.batch) for length in form.context_tokens]
    sizes, speedups = [nodes for nodes, _ in best], [speedup for _, speedup in best]
    same = max(sizes) / min(sizes) - 1 <= form.tolerance
    falls = all(more < less for less, more in pairwise(speedups))
    trend = "falls" if falls else "does not fall"
    reason = (
        f"best sizes {min(sizes)} to {max(sizes)}, where {form.tolerance:.0%} apart is allowed; the speedup "
        f"{trend} with length"
    )
    ours = (
        f"{speedups[0]:.2f}x at {form.context_tokens[0]} to {speedups[-1]:.2f}x at "
        f"{form.context_tokens[-1]} tokens"
    )
    return _exact(same and falls, ours=ours, reason=reason, predicted=True)


def _regimes(claim: ClaimSpec, form: RegimesForm, figures: Figures) -> Finding:
    if form.device not in load_hardware():
        raise NotTestable(f"hardware.toml has no device {form.device}")
    device, table = load_hardware()[form.device], figures.table(form.table)
    ridge = device.dense_fp16_tflop_per_s * 1e3 / device.read_bandwidth_gb_per_s
    step = max(
        attention_intensity(1, context_tokens=form.context_tokens), linear_intensity(1, batch=form.batch)
    )
    prefill = linear_intensity(form.prefill_tokens, batch=1)
    spread = max(max(column) - min(column) for column in zip(*table.intensity, strict=True))
    reason = (
        f"{device.name} does {ridge:.0f} operations in the time of a byte; a step of one token does at "
        f"most {step:.1f} a byte up to batch {form.batch}, the linear layers of {form.prefill_tokens} tokens "
        f"{prefill:.0f}; over the batches of {form.table} attention's printed intensity moves by {spread:.3f}"
    )
    holds = step < ridge < prefill and spread <= 2 * form.half_unit + 1e-9
    ours = f"{step:.1f} and {prefill:.0f} operations a byte around {ridge:.0f}"
    return _exact(holds, ours=ours, reason=reason)


def _vendor_limits(claim: ClaimSpec, form: VendorLimitsForm, figures: Figures) -> Finding:
    stated = {key: figures.part(claim.id, key) for key in ("gb_per_s", "tflop_per_s")}
    apart = {key: abs(value / getattr(form, key) - 1) for key, value in stated.items()}
    reason = (
        f"the maker states {form.gb_per_s:g} GB/s, {apart['gb_per_s']:.1%} from the paper's, and "
        f"{form.tflop_per_s:g} TFLOP/s, {apart['tflop_per_s']:.1%} from it; allowed {form.tolerance:.0%}"
    )
    return _exact(
        max(apart.values()) <= form.tolerance,
        ours=f"{form.gb_per_s:g} GB/s, {form.tflop_per_s:g} TFLOP/s",
        reason=reason,
    )


_TESTS: dict[type, Callable[..., Finding]] = {
    BoundMissedForm: _bound_missed,
    QuotientsForm: _quotients,
    ImpliedOverheadsForm: _implied_overheads,
    StatementsDifferForm: _statements_differ,
    CategoryMeansForm: _category_means,
    ClosedFormsForm: _closed_forms,
    TableRatiosForm: _table_ratios,
    RelativeLatencyForm: _relative_latency,
    LogConstantForm: _log_constant,
    SimulatedPeakForm: _simulated_peak,
    SimulatedBatchForm: _simulated_batch,
    SimulatedLengthForm: _simulated_length,
    RegimesForm: _regimes,
    VendorLimitsForm: _vendor_limits,
}
