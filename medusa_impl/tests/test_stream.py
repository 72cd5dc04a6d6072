"""Corpora: the same text of a seed whatever decodes next to it, and no question to the host in a step."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import medusa_impl.stream
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.runner import Mode, StepRunner
from medusa_impl.stream import StreamCompletion, decode_stream
from medusa_impl.stream_rows import DeviceRows, StreamRequest
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama

BUDGET = 14
EOS = frozenset({3, 11})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(seed=8)


@pytest.fixture(scope="module")
def backbone(model: LlamaForCausalLM) -> Backbone:
    return Backbone(tiny_llama(seed=8))


def _requests(count: int = 30) -> list[StreamRequest]:
    """Prompts of 1 to 70 tokens, greedy or sampled."""
    source = random.Random(2)
    return [
        StreamRequest(
            key=str(index),
            prompt_ids=[source.randrange(TINY_VOCAB) for _ in range(source.choice((1, 2, 5, 9, 30, 70)))],
            temperature=source.choice((0.0, 0.6, 1.0)),
            seed=source.randrange(2**40),
        )
        for index in range(count)
    ]


@torch.no_grad()
def _alone(model: LlamaForCausalLM, request: StreamRequest) -> tuple[list[int], str]:
    """Return a request's text as this project defines it: one uniform number a token, the law inverted.

    Nothing of the stream is used: the model reads the whole text anew for each token, without a cache.
    """
    generator = torch.Generator().manual_seed(request.seed)
    text, made = list(request.prompt_ids), list[int]()
    while True:
        logits = model(torch.tensor([text])).logits[0, -1]
        if request.temperature == 0:
            token = int(logits.argmax())
        else:
            uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
            law = torch.softmax(logits / request.temperature, dim=-1).cumsum(-1, dtype=torch.float64)
            token = int(torch.searchsorted(law, uniform * law[-1]).clamp_max(TINY_VOCAB - 1))
        made.append(token)
        text.append(token)
        if token in EOS:
            return made, "eos"
        if len(made) == BUDGET:
            return made, "budget"


def _stream(
    backbone: Backbone, requests: Sequence[StreamRequest], **options: Any
) -> dict[str, StreamCompletion]:
    done = decode_stream(
        backbone, requests, **{"num_rows": 4, "max_new_tokens": BUDGET, "eos_ids": EOS, **options}
    )
    made = list(done)
    assert len({completion.key for completion in made}) == len(made)
    return {completion.key: completion for completion in made}


@pytest.mark.parametrize(
    ("num_rows", "prefill_rows", "delay_steps"),
    [(1, 1, 0), (5, 1, 0), (5, 1, 1), (5, 4, 0), (7, 4, 1), (40, 16, 1), (3, 8, 3), (64, 64, 2)],
)
def test_a_text_is_that_of_its_seed_alone_however_it_is_batched(
    model: LlamaForCausalLM, backbone: Backbone, num_rows: int, prefill_rows: int, delay_steps: int
) -> None:
    """Rows alone or together, prompts read alone or padded in one pass, the host asked at once or later.

    The reference is the rule by which texts were chosen on the host, one row after another, before rows were
    chosen on the device.
    """
    requests = _requests()
    made = _stream(backbone, requests, num_rows=num_rows, prefill_rows=prefill_rows, delay_steps=delay_steps)
    expected = {request.key: _alone(model, request) for request in requests}
    assert {key: (done.token_ids, done.ended_by) for key, done in made.items()} == expected
    ends = Counter(ended_by for _, ended_by in expected.values())
    assert ends["eos"] > 3 and ends["budget"] > 3


@pytest.mark.parametrize(("prefill_rows", "delay_steps"), [(1, 0), (4, 1)])
def test_states_are_those_that_predicted_the_tokens(
    model: LlamaForCausalLM, backbone: Backbone, prefill_rows: int, delay_steps: int
) -> None:
    requests = [request for request in _requests() if request.temperature == 0]
    made = _stream(backbone, requests, keep_states=True, prefill_rows=prefill_rows, delay_steps=delay_steps)
    for request in requests:
        done = made[request.key]
        assert done.states is not None and done.states.dtype == torch.float16
        assert done.states.shape == (len(done.token_ids), backbone.hidden_size)
        text = torch.tensor([[*request.prompt_ids, *done.token_ids[:-1]]])
        with torch.no_grad():
            hidden = model.get_decoder()(text).last_hidden_state[0, len(request.prompt_ids) - 1 :]
        torch.testing.assert_close(done.states.float(), hidden, rtol=2e-3, atol=2e-3)


def test_numbers_drawn_at_once_are_those_drawn_one_by_one() -> None:
    """The texts of a seed rest on this: before, a row drew one number a token."""
    for seed, count in itertools.product((0, 7, 2**40 + 1), (1, 15, 16, 17, 160)):
        together = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        one = torch.Generator().manual_seed(seed)
        alone = [float(torch.rand((), generator=one, dtype=torch.float64)) for _ in range(count)]
        assert together.tolist() == alone


def test_a_row_that_ended_keeps_its_text_while_the_others_go_on(backbone: Backbone) -> None:
    """The host may look late: until then the row runs along, and none of its tokens changes."""
    rows = DeviceRows(2, max_new_tokens=3, eos_ids=frozenset({5}), hidden_size=4, device=torch.device("cpu"))
    for row in range(2):
        rows.start(row, StreamRequest(key=str(row), prompt_ids=[1], temperature=0.0, seed=0))
    laws = torch.eye(8)
    chosen = [(5, 1), (2, 2), (2, 6), (4, 4)]
    going = []
    for step, pair in enumerate(chosen):
        flags = rows.take(laws[list(pair)], torch.full((2, 4), float(step)))
        going.append(flags.tolist())
    assert going == [[False, True], [False, True], [False, False], [False, False]]
    (second, states), (first, first_states) = rows.answers([1, 0])
    assert first == [5] and first_states is not None and first_states.tolist() == [[0.0] * 4]
    assert second == [1, 2, 6] and states is not None and states[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert rows.next_ids.squeeze(1).tolist() == [5, 6]


def test_a_step_asks_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values, so whatever asks for one fails: there a GPU would have to wait.

    Only reading whether rows have ended asks, a step later; here the answer is made up.
    """
    tiny = tiny_llama(seed=8)
    Backbone(tiny)  # proves itself on values
    on_meta: Any = tiny
    backbone = Backbone(on_meta.to("meta"))
    asked: list[int] = []

    def ended_rows(outcome: Any) -> list[tuple[int, Any]]:
        assert outcome.going_on.device.type == "meta"
        asked.append(sum(owner is not None for owner in outcome.owners))
        return [(row, owner) for row, owner in enumerate(outcome.owners) if owner is not None][:1]

    monkeypatch.setattr(medusa_impl.stream._Outcome, "ended_rows", ended_rows)
    monkeypatch.setattr(DeviceRows, "answers", lambda rows, which, ready: [([row], None) for row in which])
    for keep_states, prefill_rows in ((True, 4), (False, 4), (False, 1)):
        made = _stream(
            backbone, _requests(9), keep_states=keep_states, prefill_rows=prefill_rows, delay_steps=2
        )
        assert len(made) == 9
    assert max(asked) == 4
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").tolist()  # what the made-up answer stands for


def test_the_host_looks_at_a_step_while_the_next_ones_run(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    take, settle = DeviceRows.take, medusa_impl.stream._Stream._settle

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(DeviceRows, "take", noted("step", take))
    monkeypatch.setattr(medusa_impl.stream._Stream, "_settle", noted("look", settle))
    _stream(backbone, _requests(3), delay_steps=2)
    assert order[:6] == ["step", "step", "step", "look", "step", "look"]


def test_prompts_that_need_a_longer_cache_wait_for_the_rows_in_flight(backbone: Backbone) -> None:
    """Two texts of two caches; without a delay's room the host's count would pass the end of the cache."""
    long = [StreamRequest(str(n), [1 + n] * length, 0.0, 0) for n, length in enumerate((2, 300, 400, 2))]
    for prefill_rows, delay_steps in ((1, 0), (4, 3)):
        made = _stream(
            backbone,
            long,
            num_rows=2,
            eos_ids=frozenset(),
            prefill_rows=prefill_rows,
            delay_steps=delay_steps,
        )
        assert {len(done.token_ids) for done in made.values()} == {BUDGET} and len(made) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
def test_a_gpu_makes_the_texts_of_a_cpu(model: LlamaForCausalLM, mode: Mode) -> None:
    """Its own defaults: prompts in one pass, ended rows read while the next step runs."""
    on_gpu: Any = tiny_llama(seed=8)
    backbone = StepRunner(on_gpu.to("cuda"), None, mode=mode).backbone
    requests = _requests()
    expected = {request.key: _alone(model, request) for request in requests}
    for keep_states in (False, True):
        made = _stream(backbone, requests, num_rows=8, keep_states=keep_states)
        assert {key: (done.token_ids, done.ended_by) for key, done in made.items()} == expected
