"""Traces: ranks against their definition, losses and gaps against plain ones, replayed against decoded
steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.compose.replay import replay
from harness.device.arms import ArmRunner
from harness.device.engine import Engine, load_engine, load_model
from harness.device.prompts import Prompt, suite_prompts
from harness.device.trace import (
    HEAD_TIE_MARGIN,
    MAX_TREE_RANK,
    Text,
    kept_states,
    rank_rows,
    record_trace,
)
from harness.records.trace import Trace
from harness.tests.tiny_suite import SmokeRun, TickClock, smoke_suite
from medusa_impl.engine.runner import StepRunner
from medusa_impl.heads import MedusaHeads, ordered_topk
from medusa_impl.tree import DraftTree


def texts_of(engine: Engine, *, budget: int = 12, count: int = 3) -> list[Text]:
    arm = smoke_suite().arm("vanilla")
    runner = ArmRunner(engine, arm, tree=None, max_new_tokens=budget, max_prompt_tokens=40, clock=TickClock())
    texts = []
    for prompt in suite_prompts(smoke_suite(), engine.loaded)[:count]:
        result = runner.generate(prompt.prompt_ids, seed=None)
        texts.append(Text(prompt, result.token_ids, result.ended_by))
    return texts


def slow_rank(logits: Tensor, token: int) -> int:
    """The definition, one comparison at a time."""
    values = logits.tolist()
    return sum(
        value > values[token] or (value == values[token] and other < token)
        for other, value in enumerate(values)
    )


def heads_with_ties(*, num_heads: int, vocab_size: int, hidden_size: int) -> MedusaHeads:
    """Own unembeddings with small whole numbers, so that equal logits abound, also across positions of the
    chunk.
    """
    torch.manual_seed(3)
    heads = MedusaHeads(
        num_heads=num_heads, num_layers=1, hidden_size=hidden_size, vocab_size=vocab_size, architecture="own"
    )
    with torch.no_grad():
        for block, unembedding in zip(heads.blocks, heads.unembeddings, strict=True):
            for parameter in block.parameters():
                parameter.zero_()
            unembedding.get_parameter("weight").copy_(torch.randint(-1, 2, (vocab_size, hidden_size)).float())
    return heads.eval()


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 33, 70])
def test_ranks_follow_their_definition_ties_by_lower_id(num_tokens: int) -> None:
    heads = heads_with_ties(num_heads=3, vocab_size=40, hidden_size=6)
    states = torch.randint(
        -2, 3, (num_tokens, 6), generator=torch.Generator().manual_seed(num_tokens)
    ).float()
    tokens = torch.randint(0, 40, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    ranks, losses, ranges = rank_rows(heads, nn.Identity(), states, tokens)
    _, _, wide = rank_rows(heads, nn.Identity(), states, tokens, tie_margin=1.0)
    assert ranks.shape == losses.shape == (num_tokens, 3)
    with torch.inference_mode():
        logits = heads(states, lm_head=nn.Identity())
    ties = 0
    for row in range(num_tokens):
        for head in range(3):
            if row + 1 + head >= num_tokens:
                assert ranks[row, head] == -1 and torch.isnan(losses[row, head])
                assert ranges[row, head].tolist() == wide[row, head].tolist() == [-1, -1]
                continue
            token = tokens[row + 1 + head]
            assert ranks[row, head] == slow_rank(logits[row, head], token)
            assert losses[row, head].item() == pytest.approx(
                -torch.log_softmax(logits[row, head], -1)[token].item(), abs=1e-5
            )
            above, truth = int((logits[row, head] > logits[row, head, token]).sum()), logits[row, head, token]
            equal = int((logits[row, head] == truth).sum())
            assert ranges[row, head].tolist() == [above, above + equal - 1]  # whole numbers: near is equal
            assert wide[row, head].tolist() == [
                int((logits[row, head] > truth + 1).sum()),
                int((logits[row, head] >= truth - 1).sum()) - 1,
            ]
            ties += equal > 1
    assert ties or num_tokens < 33


def test_decoding_orders_candidates_by_the_same_rule() -> None:
    logits = torch.randint(0, 4, (20, 30), generator=torch.Generator().manual_seed(0)).float()
    best = ordered_topk(logits, 9)
    for row in range(20):
        assert [slow_rank(logits[row], token) for token in best[row].tolist()] == list(range(9))


def test_kept_states_are_those_of_the_stock_model(engine: Engine) -> None:
    text = texts_of(engine, count=1)[0]
    states, logits = kept_states(engine.runner.backbone, text)
    assert states.shape == (12, 64) and logits.shape == (12, 128)
    with engine.runner.stock() as model, torch.inference_mode():
        ids = torch.tensor([[*text.prompt.prompt_ids, *text.token_ids[:-1]]])
        reference = model(input_ids=ids, output_hidden_states=True)
    first = len(text.prompt.prompt_ids) - 1
    torch.testing.assert_close(logits, reference.logits[0, first:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, reference.hidden_states[-1][0, first:], rtol=1e-4, atol=1e-4)
    assert logits.argmax(-1).tolist() == list(text.token_ids)


def test_trace_holds_gaps_losses_and_origin(engine: Engine) -> None:
    texts = texts_of(engine)
    seen: list[int] = []
    trace = record_trace(
        engine, texts, max_new_tokens=12, extra={"suite": "x"}, on_text=lambda: seen.append(1)
    )
    assert len(seen) == len(trace.prompts) == 3
    for text, prompt in zip(texts, trace.prompts, strict=True):
        assert (prompt.key, prompt.category, prompt.prompt_tokens) == (
            text.prompt.key,
            text.prompt.category,
            len(text.prompt.prompt_ids),
        )
        assert prompt.tokens.tolist() == list(text.token_ids) and prompt.ranks.shape == (12, 4)
        _, logits = kept_states(engine.runner.backbone, text)
        best = logits.sort(-1, descending=True).values
        assert prompt.gaps is not None and prompt.nll is not None
        np.testing.assert_allclose(prompt.gaps, (best[:, 0] - best[:, 1]).numpy(), rtol=1e-4, atol=1e-4)
        assert (prompt.gaps > 0).all()
        assert np.array_equal(np.isnan(prompt.nll), prompt.ranks < 0)
    provenance = trace.provenance
    assert (provenance.model_hash, provenance.heads_hash) == (engine.loaded.sha256, engine.heads_sha256)
    assert (
        provenance.dtype == "float32" and provenance.extra["suite"] == "x" and "torch" in provenance.versions
    )
    assert provenance.extra["head_tie_margin"] == HEAD_TIE_MARGIN


def test_text_ties_are_the_tokens_near_the_best(engine: Engine) -> None:
    texts = texts_of(engine)
    assert "text_ties" not in record_trace(engine, texts, max_new_tokens=12, extra={}).provenance.extra
    rows = record_trace(engine, texts, max_new_tokens=12, extra={}, text_tie_margin=1.0).provenance.extra[
        "text_ties"
    ]
    expected = []
    for text in texts:
        _, logits = kept_states(engine.runner.backbone, text)
        for place, row in enumerate(logits.tolist()):
            near = [token for token, logit in enumerate(row) if logit >= max(row) - 1.0]
            if len(near) > 1:
                assert text.token_ids[place] in near
                expected.append([text.prompt.key, place + 1, *near])
    assert expected and rows == expected


def test_head_ties_are_listed_with_the_ranks_that_rounding_allows(engine: Engine) -> None:
    texts = texts_of(engine)
    wide = record_trace(engine, texts, max_new_tokens=12, extra={}, head_tie_margin=0.5)
    rows = wide.provenance.extra["head_ties"]
    assert isinstance(rows, list) and rows
    prompts = {prompt.key: prompt for prompt in wide.prompts}
    for row in rows:
        assert isinstance(row, list)
        key, position, head, lowest, highest = str(row[0]), *(int(str(cell)) for cell in row[1:])
        assert 0 <= lowest <= int(prompts[key].ranks[position - 1, head - 1]) <= highest and lowest < highest
        assert lowest <= MAX_TREE_RANK


def test_ranks_that_rounding_could_move_are_listed_by_prompt_position_and_head(engine: Engine) -> None:
    lm_head = engine.runner.backbone.lm_head
    heads = MedusaHeads(
        num_heads=2, num_layers=1, hidden_size=64, vocab_size=128, architecture="own", lm_head=lm_head
    )
    with torch.no_grad():
        weight = heads.unembeddings[1].get_parameter("weight")
        weight[64:] = weight[:64] * (1 + 1e-8)  # every token of head 2 has a twin
    tied = type(engine)(**{**vars(engine), "runner": StepRunner(engine.loaded.model, heads)})
    texts = texts_of(engine)
    trace = record_trace(tied, texts, max_new_tokens=12, extra={})
    listed = trace.provenance.extra["head_ties"]
    assert isinstance(listed, list)
    twins = [tie for tie in listed if isinstance(tie, list) and tie[2] == 2]
    reachable = [
        int((prompt.ranks[:, 1] >= 0).sum()) - int((prompt.ranks[:, 1] > MAX_TREE_RANK).sum())
        for prompt in trace.prompts
    ]
    assert len(twins) == sum(reachable) > 0 and {tie[0] for tie in twins} == {
        text.prompt.key for text in texts
    }


def test_trace_of_a_single_token(engine: Engine) -> None:
    text = texts_of(engine, count=1)[0]
    one = Text(Prompt(text.prompt.key, None, text.prompt.prompt_ids), text.token_ids[:1], "eos")
    (prompt,) = record_trace(engine, [one], max_new_tokens=12, extra={}).prompts
    assert prompt.ranks.tolist() == [[-1] * 4]


def test_replayed_steps_equal_decoded_steps_of_the_smoke_run(smoke: SmokeRun) -> None:
    record = smoke.record
    assert record.trace is not None
    keys = [prompt.key for prompt in record.trace.prompts]
    listed = record.trace.provenance.extra["head_ties"]
    assert isinstance(listed, list) and len(listed) < 10
    compared = 0
    for arm in ("vanilla", "chain", "cartesian"):
        tree = record.trees[arm].tree() if arm in record.trees else DraftTree.root_only()
        replayed = replay(record.trace, tree)
        for generation in record.generations:
            if generation.trial.arm == arm:
                number = keys.index(generation.trial.prompt_key)
                lengths = replayed.acceptance_lengths[replayed.offsets[number] : replayed.offsets[number + 1]]
                assert lengths.tolist() == list(generation.step_tokens)
                compared += 1
    assert compared == 3 * 8


def test_any_tree_decodes_as_it_replays(engine: Engine) -> None:
    trace = record_trace(engine, texts := texts_of(engine), max_new_tokens=12, extra={})
    for tree in (
        DraftTree.cartesian((4, 1, 2)),
        DraftTree.from_paths([(3,), (0,), (0, 1), (3, 0), (3, 0, 5)]),
        DraftTree.chain(1),
    ):
        arm = smoke_suite().arm("chain")
        runner = ArmRunner(engine, arm, tree=tree, max_new_tokens=12, max_prompt_tokens=40, clock=TickClock())
        decoded = [len(runner.generate(text.prompt.prompt_ids, seed=None).step_tokens) for text in texts]
        assert replay(trace, tree).num_steps.tolist() == decoded


def test_half_precision_model_is_traced_in_its_own_precision() -> None:
    """The tiny model once stayed in float32 whatever the suite said."""
    suite = smoke_suite()
    suite = suite.model_copy(update={"model": suite.model.model_copy(update={"dtype": "bfloat16"})})
    loaded = load_model(suite.model, device=torch.device("cpu"))
    assert loaded.model.dtype == torch.bfloat16
    heads = MedusaHeads(num_heads=3, num_layers=1, hidden_size=64, vocab_size=128, architecture="shared")
    engine = load_engine(suite, loaded, base_folder=None, heads=heads)
    texts = texts_of(engine, budget=8)
    trace: Trace = record_trace(engine, texts, max_new_tokens=8, extra={})
    assert trace.provenance.dtype == "bfloat16"
    for prompt in trace.prompts:
        assert prompt.nll is not None and prompt.gaps is not None
        assert prompt.nll.dtype == prompt.gaps.dtype == np.float32 and (prompt.gaps >= 0).all()
        assert prompt.ranks.max() < 128
    runner = ArmRunner(
        engine,
        suite.arm("chain"),
        tree=DraftTree.chain(3),
        max_new_tokens=8,
        max_prompt_tokens=40,
        clock=TickClock(),
    )
    assert len(runner.generate(texts[0].prompt.prompt_ids, seed=None).token_ids) == 8
