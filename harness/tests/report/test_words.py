"""Verdicts in the words of a reader: what is stored as reproduced is shown as what it means."""

from __future__ import annotations

import pytest

from harness.judge.judgement import FormName, VerdictKind
from harness.report.tables.words import exported, shown
from harness.tests.fake_judgement import verdict


@pytest.mark.parametrize(
    ("kind", "form", "needed", "words", "logged"),
    [
        (VerdictKind.REPRODUCED, "literal", None, "figure reached", "verified"),
        (VerdictKind.REPRODUCED, "transfer", None, "direction holds", "verified at toy scale"),
        (VerdictKind.REPRODUCED, "paper-only", None, "holds", "verified"),
        (VerdictKind.NOT_REPRODUCED, "transfer", None, "fails", "falsified"),
        (VerdictKind.INCONCLUSIVE, "transfer", None, "open", "inconclusive"),
        (VerdictKind.INCONCLUSIVE, "transfer", 41, "open, needs about 41 prompts", "inconclusive"),
        (VerdictKind.INCONCLUSIVE, "transfer", 4649, "open, needs about 4,700 prompts", "inconclusive"),
        (VerdictKind.INCONCLUSIVE, "transfer", 7, "open, needs about 7 prompts", "inconclusive"),
        (VerdictKind.NOT_DECIDABLE, "transfer", None, "cannot be decided here", "-"),
        (VerdictKind.NOT_TESTED, "none", None, "not tested", "-"),
    ],
)
def test_each_verdict_has_its_words(
    kind: VerdictKind, form: FormName, needed: int | None, words: str, logged: str
) -> None:
    one = verdict("X9", kind=kind, form=form, prompts_needed=needed)
    assert shown(one) == words and exported(one) == logged
