"""Planted records of ablations: for each form about training, its figure on either side of the bound.

`plant` returns what the made-up ablation is written with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.tests.fake_ablation import ARMS, ORIGINAL_NLL, FakeArm
from harness.tests.judge.claims.planted.planting import Planting, number

FAR_KL = 0.08  # nats a token, well beyond what any form allows
MEAN_OF_SEEDS = 1.05  # of the made-up divergences, over that of the first seed


def _arm(name: str, **changes: Any) -> dict[str, Any]:
    return {"arms": {**ARMS, name: replace(ARMS[name], **changes)}}


def _close_to(form: Any, kl: float) -> dict[str, Any]:
    """Let the arm that has to stay near the original lie so far from it, and the other much further."""
    arms: dict[str, FakeArm] = {**ARMS, form.arm: replace(ARMS[form.arm], kl=FAR_KL)}
    return {"arms": {**arms, form.over: replace(ARMS[form.over], kl=kl / MEAN_OF_SEEDS)}}


def _reference_nll(form: Any, worse: float) -> dict[str, Any]:
    over = ORIGINAL_NLL + 2 * MEAN_OF_SEEDS * ARMS[form.over].kl
    return _arm(form.arm, reference_nll=over + worse)


def _spare_head(form: Any, last_hits: float) -> dict[str, Any]:
    return {**_arm(form.arm, last_hits=last_hits), "num_heads": form.with_heads}


TRAININGS: dict[str, tuple[Planting, ...]] = {
    "more_tokens": (
        Planting(
            figure="right rows of ten, where the other arm has five",
            plant=lambda form, hits: _arm(form.arm, hits=hits),
            holds=number(5.3),
            fails=number(4.7),
            differ=("trace-{arm}", "trace-original-text-{arm}"),
        ),
        Planting(
            figure="right rows of ten on the original's text, where the other arm has five",
            plant=lambda form, hits: _arm(form.arm, original_hits=hits),
            holds=number(5.3),
            fails=number(4.7),
            differ=("trace-original-text-{arm}",),
        ),
    ),
    "keeps_quality": (
        Planting(
            figure="divergence from the original, nats a token",
            plant=lambda form, kl: _arm(form.arms[0], kl=kl / MEAN_OF_SEEDS),
            holds=lambda form: (0.88 * form.max_kl,),
            fails=lambda form: (1.18 * form.max_kl,),
            differ=("held_out of {arms[0]}", "references of {arms[0]}"),
        ),
        Planting(
            figure="right rows of ten, where heads alone have five",
            plant=lambda form, hits: _arm(form.arms[0], hits=hits),
            holds=number(5.3),
            fails=number(4.7),
            differ=("trace-{arms[0]}", "trace-original-text-{arms[0]}"),
            where=lambda form: form.gain == "judged",
        ),
    ),
    "unchanged": (
        Planting(
            figure="whether training changed a tensor of the backbone",
            plant=lambda form, changed: _arm(form.arm, changed=bool(changed)),
            holds=number(0),
            fails=number(1),
            differ=("backbone_sha256s of {arm}",),
        ),
    ),
    "hurts_more": (
        Planting(
            figure="divergence over the other arm's, nats a token",
            plant=lambda form, more: _arm(form.arm, kl=ARMS[form.over].kl + more),
            holds=lambda form: (form.bound + 0.001,),
            fails=lambda form: (form.bound - 0.001,),
            differ=("held_out of {arm}", "references of {arm}"),
        ),
        Planting(
            figure="divergence of the arm that is to do no harm, nats a token",
            plant=_close_to,
            holds=lambda form: (0.88 * form.max_kl,),
            fails=lambda form: (1.18 * form.max_kl,),
            differ=("held_out of {over}", "references of {over}"),
            where=lambda form: form.max_kl is not None,
        ),
        Planting(
            figure="nats a token more on texts by others than the other arm",
            plant=_reference_nll,
            holds=number(0.005),
            fails=number(-0.005),
            differ=("references of {arm}",),
            where=lambda form: form.on_references,
        ),
    ),
    "little_memory": (
        Planting(
            figure="memory over the other arm's, less one",
            plant=lambda form, share: _arm(
                form.arm, memory_mb=round(ARMS[form.over].memory_mb * (1 + share))
            ),
            holds=lambda form: (form.margin - 0.005,),
            fails=lambda form: (form.margin + 0.005,),
            differ=("memory_bytes of {arm}",),
        ),
    ),
    "head_order": (
        Planting(
            figure="rise of the loss from head to head, nats",
            plant=lambda form, rise: _arm(form.arm, rise=rise),
            holds=lambda form: (form.bound + 0.02,),
            fails=lambda form: (form.bound - 0.02,),
            differ=("trace-{arm}",),
        ),
    ),
    "spare_head": (
        Planting(
            figure="of ten rows where all other heads are right, those where the last one is",
            plant=_spare_head,
            holds=number(0.5),
            fails=number(6.0),
            differ=("trace-{arm}", "trace-original-text-{arm}"),
        ),
    ),
}
