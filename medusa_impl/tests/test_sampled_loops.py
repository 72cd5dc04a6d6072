"""Both decoding loops under sampling rules, draw for draw, against loops written here.

The references know the paper and the stock model only: no cache, no tree mask, no code of the rules. They
take one draw from the generator for every token that a rule has to draw. So a loop that draws a token twice,
or prints another than the one it goes on from, has another text from there on; a test of the law of one
verification cannot see that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medusa_impl.acceptance import AcceptanceRule, RejectionRule, TypicalRule
from medusa_impl.decode import decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tree import DraftTree

BUDGET = 20
PROMPT = [3, 7, 11, 2]
TREE = DraftTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
SCALE = 0.35  # a law that is neither flat nor certain, so that drafts pass and fail
EPSILON, DELTA, TEMPERATURE = 0.1, 0.7, 0.9


class Stock:
    """The stock model of the same weights: the logits and the state at the end of a text."""

    def __init__(self) -> None:
        self._model = tiny_llama(scale=SCALE)
        self._model.lm_head.register_forward_pre_hook(self._note)
        self._states: Tensor | None = None
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _note(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        self._states = inputs[0]

    @torch.inference_mode()
    def after(self, text: list[int]) -> tuple[Tensor, Tensor]:
        if (key := tuple(text)) not in self._known:
            logits = self._model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            assert self._states is not None
            self._known[key] = (logits, self._states[0, -1])
        return self._known[key]


def draw(weights: list[float], generator: torch.Generator) -> int:
    return int(torch.multinomial(torch.tensor(weights), 1, generator=generator))


def law_after(stock: Stock, text: list[int]) -> list[float]:
    """Return the backbone's law at the temperature; PyTorch's softmax, so that draws are rounded alike."""
    law: list[float] = torch.softmax(stock.after(text)[0] / TEMPERATURE, -1).tolist()
    return law


def passing(law: list[float]) -> set[int]:
    """Return the tokens whose probability is above min(epsilon, delta * exp(-H))."""
    entropy = -sum(p * math.log(p) for p in law if p > 0)
    threshold = min(EPSILON, DELTA * math.exp(-entropy))
    return {token for token, p in enumerate(law) if p > threshold}


def sampled_text(stock: Stock, seed: int) -> list[int]:
    """Return what sampling one token after the other gives."""
    generator, text = torch.Generator().manual_seed(seed), list(PROMPT)
    for _ in range(BUDGET):
        text.append(draw(law_after(stock, text), generator))
    return text[len(PROMPT) :]


def truncated_draw(stock: Stock, text: list[int], generator: torch.Generator) -> int:
    law = law_after(stock, text)
    allowed = passing(law)
    return draw([p if token in allowed else 0.0 for token, p in enumerate(law)], generator)


def truncated_text(stock: Stock, seed: int) -> list[int]:
    """Return what vanilla decoding under the root's law of typical acceptance gives."""
    generator, text = torch.Generator().manual_seed(seed), list(PROMPT)
    for _ in range(BUDGET):
        text.append(truncated_draw(stock, text, generator))
    return text[len(PROMPT) :]


def drafted(stock: Stock, heads: MedusaHeads, before_root: list[int]) -> list[list[int]]:
    """Return each head's tokens from the best on, read at the state that predicted the root."""
    with torch.inference_mode():
        logits = heads(stock.after(before_root)[1][None], lm_head=stock._model.lm_head)[0].tolist()
    # Equal ones keep their order in a reversed sort too: the lower id comes first.
    return [sorted(range(TINY_VOCAB), key=row.__getitem__, reverse=True) for row in logits]


def typical_text(stock: Stock, heads: MedusaHeads, seed: int) -> tuple[list[int], list[int]]:
    """Return the text of typical acceptance, and how many tokens each step gave."""
    generator, text, gains = torch.Generator().manual_seed(seed), list(PROMPT), []
    text.append(truncated_draw(stock, text, generator))
    while len(text) < len(PROMPT) + BUDGET:
        ranked = drafted(stock, heads, text[:-1])
        best: list[int] = []
        score = (0, 0.0)
        for path in TREE.paths[1:]:
            tokens: list[int] = []
            total = 0.0
            for head, rank in zip(ranked, path, strict=False):
                law = law_after(stock, [*text, *tokens])
                if head[rank] not in passing(law):
                    break
                total += math.log(law[head[rank]])
                tokens.append(head[rank])
            else:
                if (len(tokens), total) > score or not best:
                    best, score = tokens, (len(tokens), total)
        text += best
        text.append(truncated_draw(stock, text, generator))
        gains.append(len(best) + 1)
    return text[len(PROMPT) : len(PROMPT) + BUDGET], gains


@pytest.fixture(scope="module")
def stock() -> Stock:
    return Stock()


@pytest.fixture(scope="module")
def engine() -> tuple[Backbone, MedusaHeads]:
    backbone = Backbone(tiny_llama(scale=SCALE))
    torch.manual_seed(3)
    heads = MedusaHeads(
        num_heads=3,
        num_layers=1,
        hidden_size=backbone.hidden_size,
        vocab_size=TINY_VOCAB,
        architecture="shared",
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return backbone, heads.eval()


def rejection(seed: int) -> RejectionRule:
    return RejectionRule(temperature=TEMPERATURE, generator=torch.Generator().manual_seed(seed))


def typical(seed: int) -> TypicalRule:
    return TypicalRule(
        temperature=TEMPERATURE,
        epsilon=EPSILON,
        delta=DELTA,
        root="sampled",
        generator=torch.Generator().manual_seed(seed),
    )


def decoded(
    engine: tuple[Backbone, MedusaHeads], rule: AcceptanceRule, *, tree: DraftTree | None
) -> tuple[list[int], list[int]]:
    """Return the text, and how many tokens each step after the prefill gave, cut at the budget."""
    backbone, heads = engine
    eos: frozenset[int] = frozenset()
    if tree is None:
        steps = list(decode_vanilla(backbone, [PROMPT], rule=rule, max_new_tokens=BUDGET, eos_ids=eos))
    else:
        steps = list(
            decode_medusa(backbone, heads, tree, [PROMPT], rule=rule, max_new_tokens=BUDGET, eos_ids=eos)
        )
    return [token for step in steps for token in step.tokens[0]], [len(step.tokens[0]) for step in steps[1:]]


SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_vanilla_draws_one_token_after_the_other(
    seed: int, stock: Stock, engine: tuple[Backbone, MedusaHeads]
) -> None:
    assert decoded(engine, rejection(seed), tree=None)[0] == sampled_text(stock, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_rejection_draws_what_sampled_vanilla_draws(
    seed: int, stock: Stock, engine: tuple[Backbone, MedusaHeads]
) -> None:
    """On a CPU, token for token: with the root drawn twice, it did so in 0 of 20 texts instead of 20."""
    assert decoded(engine, rejection(seed), tree=TREE)[0] == sampled_text(stock, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_vanilla_under_the_law_of_typical_acceptance(
    seed: int, stock: Stock, engine: tuple[Backbone, MedusaHeads]
) -> None:
    assert decoded(engine, typical(seed), tree=None)[0] == truncated_text(stock, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_typical_acceptance_keeps_the_longest_path_and_draws_once_a_step(
    seed: int, stock: Stock, engine: tuple[Backbone, MedusaHeads]
) -> None:
    text, gains = decoded(engine, typical(seed), tree=TREE)
    expected, expected_gains = typical_text(stock, engine[1], seed)
    assert text == expected
    assert gains[:-1] == expected_gains[: len(gains) - 1]  # the last step is cut at the budget


def test_the_seeds_above_see_drafts_that_pass_and_fail(
    stock: Stock, engine: tuple[Backbone, MedusaHeads]
) -> None:
    """Otherwise nothing is tested: texts differ by seed, and steps by what they keep."""
    texts = {tuple(sampled_text(stock, seed)) for seed in SEEDS}
    assert len(texts) == len(SEEDS)
    for rule in (rejection, typical):
        gains = [gain for seed in SEEDS for gain in decoded(engine, rule(seed), tree=TREE)[1]]
        assert min(gains) == 1 and max(gains) > 2, rule.__name__
    laws = [law_after(stock, [*PROMPT, *text]) for text in texts]
    assert all(0 < len(passing(law)) < TINY_VOCAB for law in laws)
