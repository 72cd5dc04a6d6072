"""Verdicts: every claim of a registry judged on one record, as a pure function of both.

A claim is judged by its literal form where the record is the paper's own run, else by its transfer form
where the record allows it, else by its paper-only form; where none decides, the verdict is `not tested` and
says what it would take. Its other forms follow, with verdicts of their own that do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from harness.judge.claims.evidence import Evidence
from harness.judge.claims.findings import Finding, not_tested, tested
from harness.judge.claims.literal import judge_literal
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.claims.run import judge_transfer
from harness.judge.judgement import ClaimVerdict, FormName, VerdictKind
from harness.specs.claims import ClaimSpec, Kind
from harness.specs.forms.paper import Form

# Statements that this project derived from the paper's figures: checked, and no claim of the paper's.
_OURS: tuple[Kind, ...] = ("derived", "inconsistency")


def evaluate_claims(claims: Sequence[ClaimSpec], evidence: Evidence) -> tuple[ClaimVerdict, ...]:
    """Return the verdict of each claim, in the order of the registry, with those of its further forms.

    What the evidence lacks makes a verdict `not tested` with the reason; a further form is left out then.
    Raises: UserError for a record file that cannot be read.
    """
    figures = Figures({claim.id: claim for claim in claims})
    return tuple(row for claim in claims for row in _judge(claim, evidence, figures=figures))


def verdict(
    claim: ClaimSpec, form: FormName, finding: Finding, *, by: Form | None = None, decides: bool = True
) -> ClaimVerdict:
    """Return a claim's verdict by one of its forms: what the registry states, and what a test found.

    Where the form `by` which it was tested states something else, that stands in; its effects give the power.
    """
    return ClaimVerdict(
        claim_id=claim.id,
        stated=(by.states if by is not None else None) or claim.stated,
        place=claim.place,
        paper_figure=claim.figure,
        form=form,
        kind=finding.kind,
        ours=finding.ours,
        figure_kind=finding.figure_kind,
        reason=finding.reason,
        turns=finding.turns,
        power=finding.power(by.effects if by is not None else ()),
        prompts_needed=finding.prompts_needed,
        decides=decides,
        is_ours=claim.kind in _OURS,
        is_claim=claim.kind == "claim",
    )


def _judge(claim: ClaimSpec, evidence: Evidence, *, figures: Figures) -> Iterator[ClaimVerdict]:
    tried = [(name, form, tested(test)) for name, form, test in _tests(claim, evidence, figures)]
    shown = [one for one in tried if one[2].kind is not VerdictKind.NOT_TESTED]
    first = next((one for one in shown if one[1] not in claim.also), None)
    if first is None:
        yield verdict(claim, *_untested(claim, tried))
    for one in sorted(shown, key=lambda one: one is not first):
        name, tested_form, finding = one
        yield verdict(claim, name, finding, by=tested_form, decides=one is first)


def _tests(
    claim: ClaimSpec, evidence: Evidence, figures: Figures
) -> Iterator[tuple[FormName, Form, Callable[[], Finding]]]:
    """Yield the forms of a claim that a run's record may decide, then those that are only shown."""
    if claim.literal is not None:
        yield "literal", claim.literal, partial(judge_literal, claim, claim.literal, evidence=evidence)
    if claim.transfer is not None:
        yield "transfer", claim.transfer, partial(judge_transfer, claim.transfer, evidence=evidence)
    if claim.paper_only is not None:
        yield (
            "paper-only",
            claim.paper_only,
            partial(judge_paper_only, claim, claim.paper_only, figures=figures),
        )
    for form in claim.also:
        yield "transfer", form, partial(judge_transfer, form, evidence=evidence)


def _untested(claim: ClaimSpec, tried: Sequence[tuple[FormName, Form, Finding]]) -> tuple[FormName, Finding]:
    """Return the form that a record came nearest to deciding, and why no form decides.

    Any record can be held against a transfer form, so what that one lacks is told first.
    """
    missing = [(name, found.reason) for name, form, found in tried if form not in claim.also]
    missing.sort(key=lambda one: one[0] == "literal")
    reasons = [reason for _, reason in missing]
    if all(name == "literal" for name, _ in missing):
        reasons.append(claim.needs or "")
    return (missing[0][0] if missing else "none"), not_tested("; ".join(filter(None, reasons)))
