"""Literal forms: a record of the published weights, its figures against those that the paper prints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.judge.claims.evidence import EQUIVALENCE_LEVEL, Evidence
from harness.judge.claims.findings import (
    Asked,
    Finding,
    NotTestable,
    combined,
    equivalence,
    holds,
    percent,
    shown,
)
from harness.judge.totals import PromptTotals, column, prompt_totals
from harness.records.run import RunRecord
from harness.specs.claims import ClaimSpec
from harness.specs.forms.literal import LiteralForm, Measure, Metric, Setting
from harness.specs.suite import ArmSpec
from harness.stats import Interval, bootstrap_totals

Floats = NDArray[np.float64]
# As `harness.assets.fetch` writes the source of an asset that came from the hub.
_HUB_SOURCE = re.compile(r"hub (?P<repository>\S+)@\S+ \(commit ")


@dataclass(frozen=True)
class _Figure:
    """How a figure is formed from totals: of the arm alone, or of the arm and its baseline."""

    name: str
    unit: str
    digits: int
    columns: tuple[str, str]
    over_baseline: bool

    def of(self, *totals: Floats) -> Floats:
        """Return the figure: one ratio of totals, or one over the other."""
        own = totals[0] / totals[1]
        return own / (totals[2] / totals[3]) if self.over_baseline else own


def judge_literal(claim: ClaimSpec, form: LiteralForm, *, evidence: Evidence) -> Finding:
    """Return what a record of the paper's own run finds on one claim: its figures against the printed ones.

    A figure is the same where the 90 % interval of its relative difference lies within the form's tolerance.
    Raises: NotTestable with the first thing in which the record is not the paper's run.
    """
    if not claim.measures:
        raise NotTestable(claim.unmeasured or "the registry does not say which figure of a run to compare")
    if form.setting is None:
        raise NotTestable(f"{form.backbone} with {form.heads}, {form.device}, {form.benchmark}")
    for measure in claim.measures:
        _require_setting(form, form.setting, measure, evidence)
    parts = [_compared(claim, form, measure, form.setting, evidence) for measure in claim.measures]
    found = combined(parts)
    device = evidence.record.environment.device.name
    has_times = any(measure.holds_times for measure in claim.measures)
    notes = (
        f"timed on {device}, where the paper names no device"
        if has_times and form.setting.gpu_is == "assumed"
        else "",
        form.departs or "",
    )
    return replace(found, reason="; ".join(filter(None, (found.reason, *notes))))


def hub_repository(source: str) -> str | None:
    """Return the hub's repository that a record says an asset came from; None for any other source."""
    found = _HUB_SOURCE.match(source)
    return found["repository"] if found is not None else None


def _require_setting(form: LiteralForm, setting: Setting, measure: Measure, evidence: Evidence) -> None:
    """Refuse a record of another run than the paper's, by the first thing that differs."""
    record = evidence.record
    suite, environment = record.suite, record.environment
    drafts = any(arm.name == measure.arm and arm.method != "vanilla" for arm in suite.arms)
    _require_repository(record, suite.model.asset, setting.model, part="backbone", published=form.backbone)
    if suite.model.adapter is not None:
        raise NotTestable("an adapter is merged into the backbone, and the claim is about published weights")
    if drafts or measure.arm not in {arm.name for arm in suite.arms}:
        _require_repository(record, suite.heads.asset, setting.heads, part="heads", published=form.heads)
    if suite.prompts.source != setting.prompts:
        raise NotTestable(f"the prompts are those of {suite.prompts.source}, need {setting.prompts}")
    if suite.max_new_tokens < setting.min_new_tokens:
        raise NotTestable(
            f"answers are cut at {suite.max_new_tokens} tokens, need {setting.min_new_tokens} at least"
        )
    if environment.device.kind != "cuda":
        raise NotTestable(f"the device is a CPU ({environment.device.name}), need a CUDA GPU")
    if measure.holds_times:
        _require_device(setting, measure, record)
        evidence.require_speed()


def _require_repository(
    record: RunRecord, asset: str | None, wanted: str | None, *, part: str, published: str
) -> None:
    """Refuse weights that the record does not know to be a repository's of the hub.

    A folder can hold anything, whatever its name, and so can one that stands in for an asset.
    """
    if wanted is None:
        raise NotTestable(f"the registry knows no repository of the hub with the claim's {part}: {published}")
    source = record.environment.assets.get(asset, "") if asset is not None else ""
    if (found := hub_repository(source)) != wanted:
        what = f"asset {asset}" if asset is not None else "no asset of a suite"
        origin = found or " ".join(source.split()[:-1])
        came = f" from {origin}" if origin else ""
        verb = "are" if part == "heads" else "is"
        raise NotTestable(f"the {part} {verb} {what}{came}, need {wanted} from the hub")


def _require_device(setting: Setting, measure: Measure, record: RunRecord) -> None:
    """Refuse times of another precision, or of another device where the figure hangs on it."""
    environment = record.environment
    if environment.dtype not in setting.dtypes:
        raise NotTestable(f"the times are in {environment.dtype}, need {' or '.join(setting.dtypes)}")
    if setting.gpu in environment.device.name:
        return
    if setting.gpu_is == "stated":
        raise NotTestable(f"the GPU is {environment.device.name}, need the {setting.gpu} that is stated")
    if measure.metric == "tokens_per_s":
        raise NotTestable(
            f"the GPU is {environment.device.name}, and the paper names none: tokens/s are compared on an "
            f"{setting.gpu} alone"
        )


def _compared(
    claim: ClaimSpec, form: LiteralForm, measure: Measure, setting: Setting, evidence: Evidence
) -> Finding:
    figure = _figure(measure)
    own, base = _counted(measure, setting, evidence, over_baseline=figure.over_baseline)
    columns = [column(side, name) for side in (own, base) for name in figure.columns if side]
    spec = evidence.record.suite.interval
    rng = np.random.default_rng(spec.seed)
    interval = bootstrap_totals(figure.of, *columns, spec=spec, rng=rng)
    at_90 = bootstrap_totals(
        figure.of,
        *columns,
        spec=spec.model_copy(update={"level": EQUIVALENCE_LEVEL}),
        rng=np.random.default_rng(spec.seed),
    )
    printed = measure.printed(claim.value)
    apart = _apart(at_90, printed)
    kind = equivalence(apart, form.tolerance)
    on = f" on {measure.category}" if measure.category is not None else ""
    return Finding(
        kind=kind,
        ours=f"{figure.name} of {measure.arm} {shown(interval, figure.unit, digits=figure.digits)}",
        reason=(
            f"{figure.name} of {measure.arm}{on} is {percent(apart)} off the stated "
            f"{_printed(measure, printed)}, 90 % interval within +-{form.tolerance:.0%}: {holds(kind)}"
        ),
        figure_kind="measured",
        asked=(Asked(apart, form.tolerance, "within"),),
    )


def _counted(
    measure: Measure, setting: Setting, evidence: Evidence, *, over_baseline: bool
) -> tuple[list[PromptTotals], list[PromptTotals]]:
    """Return the totals of an arm and, where it is asked for, of its baseline on the same prompts."""
    record = evidence.record
    arm = _arm(measure, evidence, over_baseline=over_baseline)
    names = [arm.name, arm.baseline] if over_baseline and arm.baseline is not None else [arm.name]
    totals = [prompt_totals(record, name, timed=measure.holds_times) for name in names]
    keys = [key for key in totals[0] if all(key in side for side in totals)]
    if len(keys) < setting.num_prompts:
        raise NotTestable(
            f"{len(keys)} prompts of {' and '.join(names)} count, need the {setting.num_prompts} of "
            f"{setting.prompts}"
        )
    keys = [key for key in keys if measure.category in (None, totals[0][key].category)]
    keys = [key for key in keys if all(side[key].steps for side in totals)]
    if not keys:
        raise NotTestable(f"no prompt of category {measure.category} counts")
    own, *base = [[side[key] for key in keys] for side in totals]
    return own, base[0] if base else []


def _arm(measure: Measure, evidence: Evidence, *, over_baseline: bool) -> ArmSpec:
    """Return the arm of a figure.

    Raises: NotTestable for one that is not there, has no baseline, or does not decode as it should.
    """
    name = measure.arm
    arm = next((one for one in evidence.record.suite.arms if one.name == name), None)
    if arm is None:
        raise NotTestable(f"the suite has no arm {name}")
    if arm.backbone != "original" or arm.method not in ("vanilla", "medusa"):
        raise NotTestable(f"arm {name} decodes with other weights or another method than the claim's")
    if over_baseline and arm.baseline is None:
        raise NotTestable(f"arm {name} has no baseline")
    bugs = [one for one in evidence.parity.divergences if one.arm == name and one.kind == "bug"]
    if bugs:
        raise NotTestable(
            f"{len(bugs)} outputs of {name} differ from vanilla's other than at a tie, so that its figures "
            "are not the method's"
        )
    return arm


def _apart(interval: Interval, printed: tuple[float, float]) -> Interval:
    """Return how far a figure lies from the nearest that is printed, as a share of it; 0 between the two."""
    lowest, highest = printed

    def apart(value: float) -> float:
        if value > highest:
            return value / highest - 1
        return value / lowest - 1 if value < lowest else 0.0

    bounds: Sequence[float] = [apart(value) for value in (interval.estimate, interval.low, interval.high)]
    return interval.model_copy(update=dict(zip(("estimate", "low", "high"), bounds, strict=True)))


def _printed(measure: Measure, printed: tuple[float, float]) -> str:
    lowest, highest = printed
    words: dict[Literal["figure", "range", "at_least"], str] = {
        "figure": f"{lowest:g}",
        "range": f"{lowest:g} to {highest:g}",
        "at_least": f"{lowest:g} or more",
    }
    return words[measure.stated]


def _figure(measure: Measure) -> _Figure:
    on_clock = {"decode": ("decode_tokens", "decode_s"), "wall": ("kept_tokens", "wall_s")}[measure.clock]
    made: dict[Metric, Callable[[], _Figure]] = {
        "speedup": lambda: _Figure("speedup", "x", 2, on_clock, over_baseline=True),
        "overhead": lambda: _Figure("overhead", "x", 2, ("decode_s", "steps"), over_baseline=True),
        "acceleration_rate": lambda: _Figure(
            "tokens/step", "", 2, ("decode_tokens", "steps"), over_baseline=False
        ),
        "tokens_per_s": lambda: _Figure("tokens/s", "", 1, on_clock, over_baseline=False),
    }
    return made[measure.metric]()
