"""Verdicts: every claim of a registry judged on one record, as a pure function of both.

A claim is judged by its transfer form where the record allows it, else by its paper-only form; where neither
decides, the verdict is `not tested` and says what it would take. Literal forms are data so far: no suite of
this project runs the published weights yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.judge.claims.evidence import Evidence
from harness.judge.claims.findings import Finding, not_tested, tested
from harness.judge.claims.paper import Figures, judge_paper_only
from harness.judge.claims.run import judge_transfer
from harness.judge.judgement import ClaimVerdict, FormName, VerdictKind
from harness.specs.claim_forms import LiteralForm
from harness.specs.claims import ClaimSpec


def evaluate_claims(claims: Sequence[ClaimSpec], evidence: Evidence) -> tuple[ClaimVerdict, ...]:
    """Return one verdict a claim, in the order of the registry.

    What the evidence lacks makes a verdict `not tested` with the reason.
    Raises: UserError for a record file that cannot be read.
    """
    figures = Figures({claim.id: claim for claim in claims})
    return tuple(_judge(claim, evidence, figures=figures) for claim in claims)


def verdict(claim: ClaimSpec, form: FormName, finding: Finding) -> ClaimVerdict:
    """Return a claim's verdict by one of its forms: what the registry states, and what a test found."""
    return ClaimVerdict(
        claim_id=claim.id,
        stated=claim.stated,
        place=claim.place,
        paper_figure=claim.figure,
        form=form,
        kind=finding.kind,
        ours=finding.ours,
        figure_kind=finding.figure_kind,
        reason=finding.reason,
    )


def _judge(claim: ClaimSpec, evidence: Evidence, *, figures: Figures) -> ClaimVerdict:
    tries: list[tuple[FormName, Callable[[], Finding]]] = []
    if (transfer := claim.transfer) is not None:
        tries.append(("transfer", lambda: judge_transfer(transfer, evidence=evidence)))
    if (paper_only := claim.paper_only) is not None:
        tries.append(("paper-only", lambda: judge_paper_only(claim, paper_only, figures=figures)))
    missing = []
    for form, test in tries:
        finding = tested(test)
        if finding.kind is not VerdictKind.NOT_TESTED:
            return verdict(claim, form, finding)
        missing.append(finding.reason)
    form = tries[0][0] if tries else ("literal" if claim.literal is not None else "none")
    needs = "; ".join(missing) or claim.needs or _literal_needs(claim.literal)
    return verdict(claim, form, not_tested(needs))


def _literal_needs(form: LiteralForm | None) -> str:
    return "" if form is None else f"{form.backbone} with {form.heads}, {form.device}, {form.benchmark}"
