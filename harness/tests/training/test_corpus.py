"""The corpus: which prompts are answered how, when it is enough, and that it resumes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console

import harness.training.corpus
from harness.device.engine import Engine
from harness.errors import UserError
from harness.specs.recipe import CorpusSpec
from harness.tests.tiny_suite import QUIET
from harness.training.corpus import corpus_prompts, make_corpus, row_bytes, rows_that_fit, rows_together
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.stream import CACHE_SPARE_TOKENS
from medusa_impl.tests.conftest import tiny_llama
from medusa_impl.training.distill import CorpusPrompt, CorpusStore, generate_corpus


class WordTokenizer:
    """One id a word, no chat template."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [sum(map(ord, word)) % 128 for word in text.split()]}


SPEC = CorpusSpec(num_tokens=200, max_new_tokens=16, max_prompt_tokens=60, num_rows=4)


@pytest.fixture(scope="module")
def prompts() -> tuple[CorpusPrompt, ...]:
    return corpus_prompts(WordTokenizer(), spec=SPEC, num_prompts=300)


def test_sampling_follows_from_the_prompts_own_text(prompts: tuple[CorpusPrompt, ...]) -> None:
    """So more prompts, or workers that share them, change nothing for those there already."""
    assert (
        corpus_prompts(WordTokenizer(), spec=SPEC, num_prompts=100)
        == prompts[: len(corpus_prompts(WordTokenizer(), spec=SPEC, num_prompts=100))]
    )
    sampled = sum(prompt.temperature > 0 for prompt in prompts) / len(prompts)
    assert {prompt.temperature for prompt in prompts} == {0.0, SPEC.temperature}
    assert abs(sampled - SPEC.sampled_share) < 0.12  # 4 standard errors at 300 prompts
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    none = corpus_prompts(
        WordTokenizer(), spec=SPEC.model_copy(update={"sampled_share": 0.0}), num_prompts=100
    )
    assert {prompt.temperature for prompt in none} == {0.0}


def test_long_prompts_are_left_out(prompts: tuple[CorpusPrompt, ...]) -> None:
    short = corpus_prompts(
        WordTokenizer(), spec=SPEC.model_copy(update={"max_prompt_tokens": 20}), num_prompts=300
    )
    assert (
        {prompt.key for prompt in short}
        == {prompt.key for prompt in prompts if len(prompt.prompt_ids) <= 20}
        != {prompt.key for prompt in prompts}
    )


def fill(engine: Engine, prompts: tuple[CorpusPrompt, ...], folder: Path, *, spec: CorpusSpec = SPEC) -> int:
    rates = folder / "rate.txt"
    store = CorpusStore(folder)
    console: Console = QUIET
    backbone = engine.runner.backbone
    return make_corpus(
        backbone, prompts, store=store, spec=spec, eos_ids=frozenset(), console=console, rate_file=rates
    )


def test_corpus_stops_when_it_holds_enough_and_resumes(
    engine: Engine, prompts: tuple[CorpusPrompt, ...], tmp_path: Path
) -> None:
    held = fill(engine, prompts, tmp_path)
    samples = list(CorpusStore(tmp_path).samples())
    assert held == sum(len(sample.token_ids) for sample in samples) >= 200 > held - 16
    assert all(
        sample.states is not None and sample.states.shape == (len(sample.token_ids), 64) for sample in samples
    )
    assert float((tmp_path / "rate.txt").read_text()) > 0
    assert fill(engine, prompts, tmp_path) == held  # enough: nothing is generated
    more = fill(engine, prompts, tmp_path, spec=SPEC.model_copy(update={"num_tokens": 400}))
    again = list(CorpusStore(tmp_path).samples())
    assert more >= 400 and len({sample.key for sample in again}) == len(again)
    assert {sample.key: sample.token_ids for sample in samples}.items() <= {
        sample.key: sample.token_ids for sample in again
    }.items()


def test_only_own_prompts_count(engine: Engine, prompts: tuple[CorpusPrompt, ...], tmp_path: Path) -> None:
    """Workers share a folder: what another one wrote must not end this one's work."""
    fill(engine, prompts[:40], tmp_path)
    assert fill(engine, prompts[40:], tmp_path) >= 200


def test_a_prompt_without_room_for_its_answer_is_refused_before_anything_is_generated(
    engine: Engine, prompts: tuple[CorpusPrompt, ...], tmp_path: Path
) -> None:
    """Regression: a model was run past the positions that it knows, and its answers kept."""
    backbone = engine.runner.backbone
    assert backbone.max_positions is not None
    spare = backbone.max_positions - SPEC.max_new_tokens
    fitting, too_long = (
        CorpusPrompt(f"own-{length}", "own", (1,) * length, 0.0, 0) for length in (spare, spare + 1)
    )
    with pytest.raises(
        UserError, match=r"in the corpus; to mend it: lower max_prompt_tokens or max_new_tokens"
    ):
        fill(engine, (*prompts[:3], too_long), tmp_path)
    assert not CorpusStore(tmp_path).shard_files()
    assert fill(engine, (*prompts[:3], fitting), tmp_path) == 4 * SPEC.max_new_tokens


def test_no_more_than_two_caches_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: every cache that a longer one replaced stayed, since a cache and its layers name each
    other; on a GPU they add up.
    """
    backbone = Backbone(tiny_llama())
    made: list[weakref.ReferenceType[TreeCache]] = []
    held = []
    new_cache = backbone.new_cache

    def counting(*, batch_size: int, max_length: int) -> TreeCache:
        cache = new_cache(batch_size=batch_size, max_length=max_length)
        made.append(weakref.ref(cache))
        held.append(sum(one() is not None for one in made))
        return cache

    monkeypatch.setattr(backbone, "new_cache", counting)
    growing = [CorpusPrompt(f"own-{length}", "own", (1,) * length, 0.0, 0) for length in (5, 180, 380)]
    gc.disable()  # as if Python saw no reason to look: it seldom does while tensors alone grow
    try:
        for prompts in (growing, [CorpusPrompt("last", "own", (1, 2), 0.0, 0)]):
            generate_corpus(
                backbone,
                prompts,
                store=CorpusStore(tmp_path),
                num_rows=2,
                max_new_tokens=16,
                eos_ids=frozenset(),
            )
    finally:
        gc.enable()
    assert held == [1, 2, 2, 1]


def test_corpus_ends_with_its_prompts(
    engine: Engine, prompts: tuple[CorpusPrompt, ...], tmp_path: Path
) -> None:
    assert fill(engine, prompts[:5], tmp_path) == 5 * 16


def test_a_row_is_counted_as_its_cache_states_and_logits_are(prompts: tuple[CorpusPrompt, ...]) -> None:
    """Against the cache of a real model: a GPU's rows are taken from this."""
    backbone = Backbone(tiny_llama())
    slots = 50 + CACHE_SPARE_TOKENS
    cache = backbone.new_cache(batch_size=1, max_length=slots)
    backbone.prefill(torch.tensor([1, 2, 3]), cache=cache)
    without = row_bytes(backbone, 50, budget=0)
    assert without == cache.num_bytes + 16 * backbone.vocab_size
    assert row_bytes(backbone, 50, budget=7) == without + 7 * 2 * backbone.hidden_size
    assert rows_together(backbone, prompts, spec=SPEC, keep_states=True) == SPEC.num_rows  # on a CPU


def test_a_gpu_makes_as_many_answers_as_half_of_its_memory_holds() -> None:
    """At least the recipe's, which its author may have counted out, and at most 512."""
    assert rows_that_fit(48, row=10**6, free_bytes=500 * 10**6) == 250
    assert rows_that_fit(48, row=10**6, free_bytes=10**6) == 48
    assert rows_that_fit(48, row=1, free_bytes=10**12) == 512
    assert rows_that_fit(600, row=1, free_bytes=10**12) == 600


def test_the_rate_is_noted_once_a_second(
    engine: Engine, prompts: tuple[CorpusPrompt, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU ends hundreds of answers a second, and each note is a file."""
    now, notes = [0.0], list[str]()

    def monotonic() -> float:
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr("harness.training.corpus.time.monotonic", monotonic)
    monkeypatch.setattr(harness.training.corpus, "write_text", lambda path, text: notes.append(text))
    store = CorpusStore(tmp_path)
    make_corpus(
        engine.runner.backbone,
        prompts,
        store=store,
        spec=SPEC,
        eos_ids=frozenset(),
        console=QUIET,
        rate_file=tmp_path / "rate-0.txt",
    )
    answers = len(store.finished_keys())
    assert answers > 8 and 2 <= len(notes) <= answers // 4 + 1
