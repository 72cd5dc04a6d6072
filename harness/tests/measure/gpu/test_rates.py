"""The rate of a corpus: as many answers together as a real corpus has, and a clock that does not slow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.device.clock import Clock, device_clock
from harness.device.engine import load_model
from harness.measure.gpu import rates
from harness.paths import shipped
from harness.records.gpu.parts import CorpusRate
from harness.specs.recipe import load_recipe
from harness.tests.tiny_suite import QUIET
from medusa_impl.training.distill import CorpusStore

CPU = torch.device("cpu")


def rate_of(folder: Path, *, limit_s: float) -> tuple[CorpusRate, CorpusStore]:
    spec = load_recipe(shipped("recipes", "tiny.toml"))
    loaded, store = load_model(spec.model, device=CPU), CorpusStore(folder / "corpus")
    return rates.corpus_rate(spec, loaded, store=store, limit_s=limit_s, console=QUIET), store


def test_as_many_answers_are_made_together_as_for_a_real_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a corpus takes as many rows as its memory holds, while the rate was of the recipe's 48."""
    asked: list[dict[str, Any]] = []

    def fitting(backbone: object, prompts: object, **options: Any) -> int:
        asked.append(options)
        return 3

    monkeypatch.setattr(rates, "rows_together", fitting)
    rate, store = rate_of(tmp_path, limit_s=0.0)
    assert rate.num_rows == 3 and [one["keep_states"] for one in asked] == [True]
    assert rate.num_answers == len(list(store.samples(with_states=False))) == 1


def test_the_device_is_waited_for_at_both_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock was once read after each answer, so that the host never ran ahead of the device."""
    reads: list[float] = []

    def counting(device: torch.device) -> Clock:
        clock = device_clock(device)

        def now() -> float:
            reads.append(clock())
            return reads[-1]

        return now

    monkeypatch.setattr(rates, "device_clock", counting)
    rate, store = rate_of(tmp_path, limit_s=600.0)
    assert rate.num_answers > 2 and len(reads) == 2, "all prompts are answered long before the limit"
    assert rate.elapsed_s == pytest.approx(reads[1] - reads[0]) and rate.elapsed_s > 0
    stored = list(store.samples(with_states=False))
    assert rate.num_tokens == sum(len(sample.token_ids) for sample in stored)
