"""Lossless first: greedy Medusa yields vanilla's tokens whatever the tree and whatever the heads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medusa_impl.acceptance import GreedyRule, RejectionRule, TypicalRule
from medusa_impl.decode import DecodingStep, decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.stream import decode_stream
from medusa_impl.stream_rows import StreamRequest
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tree import DraftTree

NO_EOS: frozenset[int] = frozenset()
PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8]]


class ScriptedHeads(MedusaHeads):
    """Heads that propose given tokens: `script[step][k]` is the best token of head k + 1 at a step.

    The next-best tokens follow in the order of their ids.
    """

    def __init__(self, backbone: Backbone, *, script: list[list[int]]) -> None:
        super().__init__(
            num_heads=len(script[0]),
            num_layers=1,
            hidden_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            architecture="shared",
        )
        self.script = script
        self.step = 0

    def forward(self, hidden: Tensor, *, lm_head: nn.Module, num_heads: int | None = None) -> Tensor:
        row = self.script[min(self.step, len(self.script) - 1)]
        self.step += 1
        logits = torch.zeros(hidden.shape[0], len(row), self.vocab_size)
        for k, token in enumerate(row):
            logits[:, k] = -torch.arange(self.vocab_size, dtype=torch.float32)
            logits[:, k, token % self.vocab_size] = 1.0
        return logits[:, :num_heads]


def random_heads(backbone: Backbone, *, seed: int, num_heads: int = 4) -> MedusaHeads:
    torch.manual_seed(seed)
    heads = MedusaHeads(
        num_heads=num_heads,
        num_layers=1,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        architecture="shared",
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads.eval()


def tokens_of(steps: Sequence[DecodingStep]) -> list[list[int]]:
    return [[token for step in steps for token in step.tokens[row]] for row in range(len(steps[0].tokens))]


def vanilla(
    backbone: Backbone, prompts: list[list[int]], *, budget: int = 24, eos_ids: frozenset[int] = NO_EOS
) -> list[list[int]]:
    return tokens_of(
        list(decode_vanilla(backbone, prompts, rule=GreedyRule(), max_new_tokens=budget, eos_ids=eos_ids))
    )


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    paths: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(1, 12))):
        parents = [(), *(path for path in sorted(paths) if len(path) < 4)]
        parent = parents[draw(st.integers(0, len(parents) - 1))]
        paths.add((*parent, draw(st.integers(0, 11))))
    return DraftTree.from_paths(paths)


@settings(max_examples=25, deadline=None)
@given(tree=trees(), seed=st.integers(0, 1000))
def test_greedy_medusa_equals_vanilla_for_random_trees(tree: DraftTree, seed: int) -> None:
    backbone = Backbone(tiny_llama(seed=seed % 3))
    prompt = [[(seed * 7 + i) % TINY_VOCAB for i in range(1 + seed % 9)]]
    steps = list(
        decode_medusa(
            backbone,
            random_heads(backbone, seed=seed),
            tree,
            prompt,
            rule=GreedyRule(),
            max_new_tokens=17,
            eos_ids=NO_EOS,
        )
    )
    assert tokens_of(steps) == vanilla(backbone, prompt, budget=17)


@pytest.mark.parametrize("offset", [0, 1], ids=["always right", "always wrong"])
def test_scripted_heads_reach_full_depth_or_nothing(backbone: Backbone, offset: int) -> None:
    """Heads that know the future have whole chains accepted; heads that are always wrong lose nothing.

    In both cases the text is vanilla's. With wrong heads every step yields one token.
    """
    expected = vanilla(backbone, PROMPTS[:1], budget=25)[0]
    depth, hop = 3, 4 if offset == 0 else 1
    script = [[(expected[min(i + k, 24)] + offset) for k in range(1, depth + 1)] for i in range(0, 25, hop)]
    heads = ScriptedHeads(backbone, script=script)
    steps = list(
        decode_medusa(
            backbone,
            heads,
            DraftTree.chain(depth),
            PROMPTS[:1],
            rule=GreedyRule(),
            max_new_tokens=25,
            eos_ids=NO_EOS,
        )
    )
    assert tokens_of(steps)[0] == expected
    assert [len(step.tokens[0]) for step in steps] == [1] + [hop] * (24 // hop)


def test_ended_by_eos_in_the_middle_of_an_accepted_path(backbone: Backbone) -> None:
    """Tokens after the first end-of-sequence are cut before they are counted, even if they were accepted."""
    expected = vanilla(backbone, PROMPTS[:1], budget=20)[0]
    eos = expected[6]
    stop = expected.index(eos) + 1
    script = [[expected[min(i + k, 19)] for k in range(1, 5)] for i in range(0, 20, 5)]
    steps = list(
        decode_medusa(
            backbone,
            ScriptedHeads(backbone, script=script),
            DraftTree.chain(4),
            PROMPTS[:1],
            rule=GreedyRule(),
            max_new_tokens=20,
            eos_ids=frozenset([eos]),
        )
    )
    assert tokens_of(steps)[0] == expected[:stop]
    assert steps[-1].ended == ("eos",)
    assert tokens_of(steps) == vanilla(backbone, PROMPTS[:1], budget=20, eos_ids=frozenset([eos]))


def test_token_id_zero_is_not_padding(backbone: Backbone) -> None:
    """Regression: candidates were padded with id 0, and a backbone that predicts 0 accepted the padding."""
    model = tiny_llama(seed=4)
    with torch.no_grad():
        model.lm_head.weight[0] = model.lm_head.weight.abs().sum(0) * 0
        model.lm_head.weight[1:] *= 1e-4
    zero = Backbone(model)
    tree = DraftTree.from_paths([(0,), (1,), (1, 0), (1, 0, 0)])
    steps = list(
        decode_medusa(
            zero,
            random_heads(zero, seed=1),
            tree,
            PROMPTS[:1],
            rule=GreedyRule(),
            max_new_tokens=12,
            eos_ids=NO_EOS,
        )
    )
    assert tokens_of(steps) == vanilla(zero, PROMPTS[:1], budget=12)
    assert all(len(step.tokens[0]) <= tree.depth + 1 for step in steps)


def test_batch_rows_equal_their_batch_one_runs(backbone: Backbone) -> None:
    heads = random_heads(backbone, seed=3)
    tree = DraftTree.cartesian([3, 2, 1])
    steps = list(
        decode_medusa(backbone, heads, tree, PROMPTS, rule=GreedyRule(), max_new_tokens=15, eos_ids=NO_EOS)
    )
    assert tokens_of(steps) == [vanilla(backbone, [prompt], budget=15)[0] for prompt in PROMPTS]
    assert tokens_of(steps) == vanilla(backbone, PROMPTS, budget=15)


def test_a_row_that_overruns_its_budget_leaves_room_for_the_others(backbone: Backbone) -> None:
    """Regression: a row that ended in the middle of a path left too little of the cache for other rows.

    It had kept more than prompt and budget, and the next step of the others was refused.
    """
    prompts = [PROMPTS[2], PROMPTS[1]]
    expected = vanilla(backbone, prompts, budget=12)
    script = [
        [vanilla(backbone, prompts, budget=20)[0][min(i + k, 19)] for k in range(1, 5)]
        for i in range(0, 20, 5)
    ]
    heads = ScriptedHeads(backbone, script=script)
    steps = list(
        decode_medusa(
            backbone, heads, DraftTree.chain(4), prompts, rule=GreedyRule(), max_new_tokens=12, eos_ids=NO_EOS
        )
    )
    assert tokens_of(steps) == expected
    assert [len(step.tokens[0]) for step in steps[:4]] == [1, 5, 5, 1] and len(steps) > 5


def test_budget_is_exact_and_steps_are_verifications(backbone: Backbone) -> None:
    steps = list(decode_vanilla(backbone, PROMPTS[:1], rule=GreedyRule(), max_new_tokens=9, eos_ids=NO_EOS))
    assert len(steps) == 9 and steps[-1].ended == ("budget",)
    assert sum(len(step.tokens[0]) for step in steps) == 9


def test_tree_deeper_than_the_heads_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="heads"):
        list(
            decode_medusa(
                backbone,
                random_heads(backbone, seed=0, num_heads=2),
                DraftTree.chain(3),
                PROMPTS[:1],
                rule=GreedyRule(),
                max_new_tokens=4,
                eos_ids=NO_EOS,
            )
        )


def test_prompt_longer_than_the_model_is_refused(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="512 positions"):
        list(decode_vanilla(backbone, [[1] * 510], rule=GreedyRule(), max_new_tokens=9, eos_ids=NO_EOS))


@pytest.mark.parametrize("rule_name", ["rejection", "typical"])
def test_seeds_matter_and_repeat(backbone: Backbone, rule_name: str) -> None:
    def run(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        rule = (
            RejectionRule(temperature=1.0, generator=generator)
            if rule_name == "rejection"
            else TypicalRule(temperature=1.5, epsilon=0.02, delta=0.9, root="sampled", generator=generator)
        )
        steps = decode_medusa(
            backbone,
            random_heads(backbone, seed=3),
            DraftTree.cartesian([3, 2]),
            PROMPTS[:1],
            rule=rule,
            max_new_tokens=20,
            eos_ids=NO_EOS,
        )
        return tokens_of(list(steps))

    assert run(1) == run(1)
    assert len({tuple(run(seed)[0]) for seed in range(6)}) > 1


def test_stream_equals_vanilla_with_refilled_rows(backbone: Backbone) -> None:
    """With more prompts than rows, each text equals that of a batch of one.

    The states that are returned are those from which the tokens were predicted.
    """
    expected = {str(i): vanilla(backbone, [prompt], budget=10)[0] for i, prompt in enumerate(PROMPTS * 2)}
    requests = [
        StreamRequest(key=str(i), prompt_ids=prompt, temperature=0.0, seed=0)
        for i, prompt in enumerate(PROMPTS * 2)
    ]
    completions = list(
        decode_stream(backbone, requests, num_rows=2, max_new_tokens=10, eos_ids=NO_EOS, keep_states=True)
    )
    assert {completion.key: completion.token_ids for completion in completions} == expected
    for completion in completions:
        assert completion.states is not None and completion.states.shape == (10, backbone.hidden_size)
        logits = backbone.lm_head(completion.states.float())
        assert logits.argmax(-1).tolist() == completion.token_ids


def test_stream_row_text_depends_on_its_own_seed_only(backbone: Backbone) -> None:
    def text(num_rows: int, seed: int) -> list[int]:
        requests = [
            StreamRequest(key=str(i), prompt_ids=PROMPTS[i % 3], temperature=1.0, seed=seed if i == 1 else 99)
            for i in range(4)
        ]
        done = decode_stream(backbone, requests, num_rows=num_rows, max_new_tokens=12, eos_ids=NO_EOS)
        return next(completion.token_ids for completion in done if completion.key == "1")

    assert text(1, 5) == text(3, 5)
    assert text(3, 5) != text(3, 6)
