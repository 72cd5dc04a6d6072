"""Acceptance rules against their exact laws on tiny vocabularies.

The distribution tests are chi-square tests of many independent draws with fixed seeds. Over the choice of
seed, each fails a correct rule with probability FALSE_ALARM. Tests of the same size on wrong rules show that
they can fail.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from medusa_impl.acceptance import (
    Acceptance,
    AcceptanceRule,
    GreedyRule,
    RejectionRule,
    TypicalRule,
    first_choice,
)
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import TreeBuffers, tree_buffers

VOCAB = 5
FALSE_ALARM = 1e-6
CPU = torch.device("cpu")
Tokens = tuple[int, ...]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def p_value(counts: Mapping[Hashable, int], law: Mapping[Hashable, float]) -> float:
    """Return the chi-square p-value of counts under a law; 0 if something impossible occurred.

    Cells with an expected count below 5 are pooled.
    """
    if any(law.get(outcome, 0.0) == 0 for outcome in counts):
        return 0.0
    total = sum(counts.values())
    cells = sorted(
        (probability * total, counts.get(outcome, 0))
        for outcome, probability in law.items()
        if probability > 0
    )
    while len(cells) > 2 and cells[0][0] < 5:
        (first_expected, first), (second_expected, second), *rest = cells
        cells = sorted([(first_expected + second_expected, first + second), *rest])
    scale = total / sum(expected for expected, _ in cells)
    return float(chisquare([count for _, count in cells], [expected * scale for expected, _ in cells]).pvalue)


def backbone_logits(history: Tokens) -> Tensor:
    """Return logits as a deterministic function of the tokens so far: a pretended backbone."""
    seed = sum((token + 1) * 31**place for place, token in enumerate(history)) % 100_003
    return torch.randn(VOCAB, generator=generator(seed), dtype=torch.float64).mul(1.2).float()


def law_of(history: Tokens, *, temperature: float) -> list[float]:
    probabilities: list[float] = torch.softmax(backbone_logits(history).double() / temperature, -1).tolist()
    return probabilities


def histories(tree: DraftTree, tokens: list[int]) -> list[Tokens]:
    """Return for every node the tokens from the root to it."""
    return [tuple(tokens[tree.index[path[:depth]]] for depth in range(len(path) + 1)) for path in tree.paths]


def emitted(acceptance: Acceptance, tokens: Tensor) -> list[Tokens]:
    """Return the tokens that each row gains after the root: its kept nodes, then the next root."""
    rows = zip(
        acceptance.nodes.tolist(), acceptance.num_kept.tolist(), acceptance.next_token.tolist(), strict=True
    )
    return [
        (*(int(tokens[row, node]) for node in nodes[1:kept]), bonus)
        for row, (nodes, kept, bonus) in enumerate(rows)
    ]


# One tree for the sampling tests: siblings at both depths, children under two of the three, a childless
# sibling.
TREE = DraftTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
TREE_TOKENS = [3, 1, 4, 0, 2, 4, 4]  # in canonical order; the siblings' tokens differ, cousins may agree


def repeated(tree: DraftTree, tokens: list[int], *, rows: int) -> tuple[Tensor, Tensor, TreeBuffers]:
    logits = torch.stack([backbone_logits(history) for history in histories(tree, tokens)])
    return logits.expand(rows, -1, -1), torch.tensor(tokens).expand(rows, -1), tree_buffers(tree, device=CPU)


def sequential_law(tree: DraftTree, tokens: list[int], *, temperature: float) -> dict[Hashable, float]:
    """Return the law of what one verification emits if it samples exactly.

    Token after token is drawn, and the first one outside the tree is the last.
    """
    known = set(histories(tree, tokens))
    law: dict[Hashable, float] = {}

    def extend(history: Tokens, probability: float) -> None:
        for token, p in enumerate(law_of(history, temperature=temperature)):
            longer = (*history, token)
            if longer in known:
                extend(longer, probability * p)
            else:
                law[longer[1:]] = probability * p

    extend((tokens[0],), 1.0)
    assert math.isclose(sum(law.values()), 1.0)
    return law


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_rejection_emits_what_sequential_sampling_emits(temperature: float) -> None:
    """40,000 verifications of a tree with siblings, shared nodes and two levels; false alarm 1e-6."""
    logits, tokens, buffers = repeated(TREE, TREE_TOKENS, rows=40_000)
    rule = RejectionRule(temperature=temperature, generator=generator(1))
    acceptance = rule.verify(logits, tokens, buffers)
    counts = Counter[Hashable](emitted(acceptance, tokens))
    assert p_value(counts, sequential_law(TREE, TREE_TOKENS, temperature=temperature)) > FALSE_ALARM
    assert p_value(counts, sequential_law(TREE, TREE_TOKENS, temperature=temperature + 0.1)) < FALSE_ALARM, (
        "the test has no power"
    )
    assert set(acceptance.num_kept.tolist()) == {1, 2, 3}


def test_rejection_over_two_steps_follows_the_backbones_law() -> None:
    """The next two tokens have the law of sequential sampling, whether one verification yields both or not.

    The second draft is another tree, whose tokens depend on the text so far, as those of heads do. False
    alarm 1e-6.
    """
    rows, temperature = 30_000, 1.0
    logits, tokens, buffers = repeated(TREE, TREE_TOKENS, rows=rows)
    rule = RejectionRule(temperature=temperature, generator=generator(2))
    texts = [(TREE_TOKENS[0], *new) for new in emitted(rule.verify(logits, tokens, buffers), tokens)]
    second = DraftTree.from_paths([(0,), (1,)])
    second_buffers = tree_buffers(second, device=CPU)
    finished: list[Tokens] = [text[1:3] for text in texts if len(text) >= 3]
    for text, count in Counter(text for text in texts if len(text) == 2).items():
        drafted = [text[-1], text[-1], (text[-1] + 2) % VOCAB]
        verified = torch.stack(
            [backbone_logits((*text[:-1], *history)) for history in histories(second, drafted)]
        )
        draft = torch.tensor(drafted).expand(count, -1)
        acceptance = rule.verify(verified.expand(count, -1, -1), draft, second_buffers)
        finished += [(text[1], new[0]) for new in emitted(acceptance, draft)]
    root = (TREE_TOKENS[0],)
    law: dict[Hashable, float] = {
        (a, b): law_of(root, temperature=temperature)[a] * law_of((*root, a), temperature=temperature)[b]
        for a, b in itertools.product(range(VOCAB), repeat=2)
    }
    assert len(finished) == rows
    assert p_value(Counter[Hashable](finished), law) > FALSE_ALARM


def test_a_shared_node_is_judged_once() -> None:
    """Regression: with one draw for each leaf, a node that n candidates share passed n times as easily.

    Its probability was 1 - (1 - p)^n instead of p. False alarm 1e-6.
    """
    tree = DraftTree.from_paths([(0,), *((0, rank) for rank in range(4))])
    tokens_of_tree = [2, 1, 0, 2, 3, 4]
    logits, tokens, buffers = repeated(tree, tokens_of_tree, rows=20_000)
    rule = RejectionRule(temperature=1.0, generator=generator(3))
    kept = Counter[Hashable](
        bool(length > 1) for length in rule.verify(logits, tokens, buffers).num_kept.tolist()
    )
    p = law_of((2,), temperature=1.0)[1]
    assert 0.05 < p < 0.95
    assert p_value(kept, {True: p, False: 1 - p}) > FALSE_ALARM
    per_leaf = 1 - (1 - p) ** 4
    assert p_value(kept, {True: per_leaf, False: 1 - per_leaf}) < FALSE_ALARM


def test_rejection_root_follows_the_law() -> None:
    """20,000 draws; false alarm 1e-6."""
    rule = RejectionRule(temperature=0.6, generator=generator(4))
    drawn = rule.root(backbone_logits((1, 2)).expand(20_000, -1)).tolist()
    assert p_value(Counter[Hashable](drawn), dict(enumerate(law_of((1, 2), temperature=0.6)))) > FALSE_ALARM


def test_duplicate_tokens_among_siblings_do_no_harm() -> None:
    """Two siblings with the same token, a mistake of the caller, leave the law exact; false alarm 1e-6."""
    tree, tokens_of_tree = DraftTree.from_paths([(0,), (1,)]), [0, 3, 3]
    logits, tokens, buffers = repeated(tree, tokens_of_tree, rows=20_000)
    acceptance = RejectionRule(temperature=1.0, generator=generator(5)).verify(logits, tokens, buffers)
    first = Counter[Hashable](new[0] for new in emitted(acceptance, tokens))
    assert p_value(first, dict(enumerate(law_of((0,), temperature=1.0)))) > FALSE_ALARM


def hand_threshold(
    logits: Tensor, *, temperature: float, epsilon: float, delta: float
) -> tuple[list[float], float]:
    """Return a law and its threshold in plain Python floats: min(epsilon, delta * exp(-H))."""
    weights = [math.exp(value / temperature) for value in logits.double().tolist()]
    total = sum(weights)
    law = [weight / total for weight in weights]
    entropy = -sum(p * math.log(p) for p in law if p > 0)
    return law, min(epsilon, delta * math.exp(-entropy))


def typical(
    *,
    root: str = "sampled",
    seed: int = 0,
    temperature: float = 1.0,
    epsilon: float = 0.3,
    delta: float = 0.6,
) -> TypicalRule:
    return TypicalRule(
        temperature=temperature,
        epsilon=epsilon,
        delta=delta,
        root="sampled" if root == "sampled" else "greedy",
        generator=generator(seed) if root == "sampled" else None,
    )


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 0.09), (0.5, 0.9)])
def test_thresholds_by_hand(epsilon: float, delta: float) -> None:
    """The laws go from flat to peaked, and both arguments of the minimum occur."""
    rule = typical(epsilon=epsilon, delta=delta)
    for sharpness in (0.0, 0.5, 2.0, 30.0):
        logits = torch.linspace(-1, 1, 8) * sharpness
        _, expected = hand_threshold(logits, temperature=1.0, epsilon=epsilon, delta=delta)
        assert float(rule.thresholds(torch.log_softmax(logits, -1))) == pytest.approx(expected, rel=1e-5)
    assert float(rule.thresholds(torch.log_softmax(torch.linspace(-1, 1, 8) * 200, -1))) == pytest.approx(
        min(epsilon, delta), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_the_float32_threshold(dtype: torch.dtype) -> None:
    """Regression: in half precision, the entropy of log(p + 1e-5) moves the threshold by up to 1.24 times.

    A flat law over 30,000 tokens has H = log(30,000). A node passes by the threshold of its rounded logits,
    computed in float64.
    """
    logits = (torch.randn(1, 30_000, generator=generator(6)) * 0.5).to(dtype)
    _, expected = hand_threshold(logits[0], temperature=0.8, epsilon=0.3, delta=0.6)
    rule = typical(temperature=0.8)
    assert float(rule.thresholds(torch.log_softmax(logits.float() / 0.8, -1))) == pytest.approx(
        expected, rel=1e-4
    )
    law, _ = hand_threshold(logits[0], temperature=0.8, epsilon=0.3, delta=0.6)
    near = sorted(range(30_000), key=lambda token: abs(law[token] / expected - 1))
    below = next(token for token in near if law[token] < 0.999 * expected)
    above = next(token for token in near if law[token] > 1.001 * expected)
    assert law[above] < 1.1 * expected and law[below] > 0.9 * expected
    tree = tree_buffers(DraftTree.chain(1), device=CPU)
    for token, length in ((below, 1), (above, 2)):
        acceptance = rule.verify(logits[None].expand(1, 2, -1), torch.tensor([[0, token]]), tree)
        assert acceptance.num_kept.tolist() == [length]


@pytest.mark.parametrize(
    ("temperature", "epsilon", "delta"), [(1.0, 0.3, 0.6), (1.0, 0.12, 0.9), (2.0, 0.3, 0.3)]
)
def test_sampled_root_follows_the_truncated_law(temperature: float, epsilon: float, delta: float) -> None:
    """20,000 draws against the tokens that pass, renormalised; false alarm 1e-6.

    Some token must fail, or nothing is tested.
    """
    logits = torch.tensor([2.0, 1.4, 0.9, -0.2, -1.5, -3.0, -6.0])
    law, threshold = hand_threshold(logits, temperature=temperature, epsilon=epsilon, delta=delta)
    passing = {token: p for token, p in enumerate(law) if p > threshold}
    assert 1 < len(passing) < len(law)
    truncated: dict[Hashable, float] = {token: p / sum(passing.values()) for token, p in passing.items()}
    rule = typical(seed=7, temperature=temperature, epsilon=epsilon, delta=delta)
    drawn = Counter[Hashable](rule.root(logits.expand(20_000, -1)).tolist())
    assert p_value(drawn, truncated) > FALSE_ALARM
    assert p_value(drawn, dict(enumerate(law))) < FALSE_ALARM, (
        "the test cannot tell the truncated law from the whole one"
    )


def test_the_bonus_token_comes_from_the_root_law_of_the_last_kept_node() -> None:
    """20,000 verifications that keep the same node; false alarm 1e-6. A greedy root gives its argmax."""
    tree = DraftTree.chain(1)
    logits, _, buffers = repeated(tree, [0, 1], rows=20_000)
    best = int(backbone_logits((0,)).argmax())
    logits, tokens, buffers = repeated(tree, [0, best], rows=20_000)
    law, threshold = hand_threshold(backbone_logits((0, best)), temperature=1.0, epsilon=0.3, delta=0.6)
    mass = sum(p for p in law if p > threshold)
    truncated: dict[Hashable, float] = {token: p / mass for token, p in enumerate(law) if p > threshold}
    acceptance = typical(seed=8).verify(logits, tokens, buffers)
    assert set(acceptance.num_kept.tolist()) == {2}
    assert p_value(Counter[Hashable](acceptance.next_token.tolist()), truncated) > FALSE_ALARM
    greedy = typical(root="greedy").verify(logits, tokens, buffers).next_token
    assert set(greedy.tolist()) == {int(backbone_logits((0, best)).argmax())}


def test_typical_keeps_exactly_the_nodes_above_the_threshold() -> None:
    """Every token in turn is the only child, at two temperatures, and is compared with a hand calculation."""
    buffers = tree_buffers(DraftTree.chain(1), device=CPU)
    lengths = set()
    for temperature in (0.7, 1.5):
        logits = backbone_logits((4, 2))
        law, threshold = hand_threshold(logits, temperature=temperature, epsilon=0.3, delta=0.6)
        for token in range(VOCAB):
            acceptance = typical(temperature=temperature).verify(
                logits.expand(1, 2, -1), torch.tensor([[0, token]]), buffers
            )
            assert acceptance.num_kept.tolist() == [2 if law[token] > threshold else 1]
            lengths.add(int(acceptance.num_kept))
    assert lengths == {1, 2}


def test_argmax_always_passes_below_delta_one() -> None:
    """For delta < 1 every law, even a flat one, has a token that passes: exp(-H) is at most the largest p."""
    logits = torch.cat(
        [torch.randn(500, 8, generator=generator(9)) * 3, torch.zeros(1, 8), torch.full((1, 8), -40.0)]
    )
    best = logits.argmax(-1)
    rule = typical(delta=0.999, epsilon=0.999)
    log_probs = torch.log_softmax(logits, -1)
    assert bool((log_probs.exp().gather(-1, best[:, None]).squeeze(-1) > rule.thresholds(log_probs)).all())
    tokens = torch.stack([torch.zeros_like(best), best], dim=1)
    acceptance = rule.verify(
        logits[:, None].expand(-1, 2, -1), tokens, tree_buffers(DraftTree.chain(1), device=CPU)
    )
    assert set(acceptance.num_kept.tolist()) == {2}


def test_where_nothing_passes_the_root_is_the_argmax() -> None:
    """With delta >= 1 no token of a law with a flat top passes.

    The root must then be the argmax, and not a draw from nothing.
    """
    logits = torch.tensor([[0.0, 0.001, 0.0, 0.0]])
    _, threshold = hand_threshold(logits[0], temperature=1.0, epsilon=1.0, delta=1.5)
    assert threshold > 0.3
    assert set(typical(delta=1.5, epsilon=1.0).root(logits.expand(50, -1)).tolist()) == {1}


def test_impossible_tokens_are_neither_kept_nor_drawn() -> None:
    """Logits of minus infinity (a masked vocabulary) do not lead to NaN."""
    logits = torch.tensor([1.0, -torch.inf, 0.9, -torch.inf])
    buffers = tree_buffers(DraftTree.from_paths([(0,), (1,), (1, 0)]), device=CPU)
    acceptance = typical().verify(
        logits.expand(200, 4, -1), torch.tensor([[0, 1, 2, 3]]).expand(200, -1), buffers
    )
    assert set(acceptance.num_kept.tolist()) == {2} and {nodes[1] for nodes in acceptance.nodes.tolist()} == {
        2
    }
    assert set(acceptance.next_token.tolist()) == {0, 2}


def test_ties_in_length_go_to_the_likelier_path() -> None:
    """Of two accepted leaves at one depth, the one with the higher sum of log-probabilities wins.

    Its index does not matter, and the greedy part of the rule cannot decide.
    """
    tree = DraftTree.from_paths([(0,), (1,), (0, 0), (1, 0)])
    buffers = tree_buffers(tree, device=CPU)
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    at_root = torch.tensor([-9.0, 0.1, 0.0, -9.0, -9.0])  # token 1 a little likelier than token 2
    sure, unsure = torch.tensor([-9.0, -9.0, -9.0, 2.0, 2.5]), torch.tensor([1.0, 1.0, 1.0, 1.1, 1.1])
    rule = typical(epsilon=0.1, delta=0.2)
    for below_first, below_second, last in ((sure, sure, 4), (sure, unsure, 3), (unsure, sure, 4)):
        logits = torch.stack([at_root, below_first, below_second, at_root, at_root])[None]
        first, second = (
            float(torch.log_softmax(row, -1)[token]) for row, token in ((below_first, 3), (below_second, 4))
        )
        assert (math.exp(0.1) * math.exp(first) > math.exp(second)) == (last == 3)
        acceptance = rule.verify(logits, tokens, buffers)
        assert acceptance.num_kept.tolist() == [3] and acceptance.last_node.tolist() == [last]


def test_a_longer_path_beats_a_likelier_one() -> None:
    tree = DraftTree.from_paths([(0,), (1,), (1, 0)])
    logits = torch.tensor([[5.0, 4.0, 0.0], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.0]])[None]
    acceptance = typical(epsilon=0.05, delta=0.2).verify(
        logits, torch.tensor([[0, 0, 1, 2]]), tree_buffers(tree, device=CPU)
    )
    assert acceptance.nodes[0, :3].tolist() == [0, 2, 3] and acceptance.num_kept.tolist() == [3]


def test_greedy_follows_argmax_ids_through_equal_logits() -> None:
    """Regression: equal logits have equal softmax values.

    A rule that compares values accepts a token that vanilla decoding would not emit.
    """
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, :, 1] = logits[0, :, 3] = 2.0
    assert int(logits[0, 0].argmax()) == 1
    buffers = tree_buffers(DraftTree.from_paths([(0,), (1,)]), device=CPU)
    for drafted, length, last in (([0, 3, 1], 2, 2), ([0, 1, 3], 2, 1), ([0, 3, 4], 1, 0)):
        acceptance = GreedyRule().verify(logits, torch.tensor([drafted]), buffers)
        assert acceptance.num_kept.tolist() == [length] and acceptance.last_node.tolist() == [last]
        assert acceptance.next_token.tolist() == [1]


def test_greedy_stops_at_the_first_wrong_node() -> None:
    """A right token after a wrong one does not count: the accepted part of a path is a prefix of it."""
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, torch.arange(4), torch.tensor([1, 2, 3, 4])] = 1.0
    chain = tree_buffers(DraftTree.chain(3), device=CPU)
    for drafted, length in (([0, 1, 2, 3], 4), ([0, 1, 0, 3], 2), ([0, 0, 2, 3], 1)):
        acceptance = GreedyRule().verify(logits, torch.tensor([drafted]), chain)
        assert acceptance.num_kept.tolist() == [length] and acceptance.nodes[0, :length].tolist() == list(
            range(length)
        )
        assert acceptance.next_token.tolist() == [length]


@pytest.mark.parametrize("rule_name", ["greedy", "typical", "rejection"])
def test_padding_is_never_accepted(rule_name: str) -> None:
    """Regression: short candidates were padded with token id 0 or index -1; the backbone predicts id 0."""
    rules: dict[str, AcceptanceRule] = {
        "greedy": GreedyRule(),
        "typical": typical(),
        "rejection": RejectionRule(temperature=1.0, generator=generator(10)),
    }
    tree = DraftTree.from_paths([(0,), (1,), (1, 0), (1, 0, 0)])
    logits = torch.zeros(4, 5, VOCAB)
    logits[..., 0] = 200.0
    tokens = torch.tensor([[0, 0, 1, 0, 0], [0, 3, 2, 0, 0], [0, 1, 0, 0, 2], [0, 2, 0, 0, 0]])
    acceptance = rules[rule_name].verify(logits, tokens, tree_buffers(tree, device=CPU))
    kept = [
        nodes[:length]
        for nodes, length in zip(acceptance.nodes.tolist(), acceptance.num_kept.tolist(), strict=True)
    ]
    assert kept == [[0, 1], [0], [0, 2, 3], [0, 2, 3, 4]]
    assert acceptance.next_token.tolist() == [0] * 4
    assert acceptance.last_node.tolist() == [1, 0, 3, 4]


@pytest.mark.parametrize("rule_name", ["greedy", "typical"])
def test_rows_of_a_batch_do_not_see_each_other(rule_name: str) -> None:
    """A batch of random rows gives what each row gives alone."""
    rule = GreedyRule() if rule_name == "greedy" else typical(root="greedy", epsilon=0.1, delta=0.3)
    buffers = tree_buffers(TREE, device=CPU)
    logits = torch.randn(40, TREE.num_nodes, VOCAB, generator=generator(11)) * 2
    tokens = torch.randint(VOCAB, (40, TREE.num_nodes), generator=generator(12))
    whole = rule.verify(logits, tokens, buffers)
    for row in range(40):
        alone = rule.verify(logits[row : row + 1], tokens[row : row + 1], buffers)
        assert int(alone.num_kept) == int(whole.num_kept[row]) and int(alone.next_token) == int(
            whole.next_token[row]
        )
        assert int(alone.last_node) == int(whole.last_node[row])
    assert len(set(whole.num_kept.tolist())) == 3


def test_rejection_rows_are_independent() -> None:
    """The rows of a batch are independent: pairs follow the product of their laws; false alarm 1e-6."""
    tree, drafted = DraftTree.chain(1), [1, 2]
    logits, tokens, buffers = repeated(tree, drafted, rows=40_000)
    acceptance = RejectionRule(temperature=1.0, generator=generator(13)).verify(logits, tokens, buffers)
    new = emitted(acceptance, tokens)
    law = sequential_law(tree, drafted, temperature=1.0)
    pairs: dict[Hashable, float] = {(a, b): law[a] * law[b] for a in law for b in law}
    assert p_value(Counter[Hashable](zip(new[::2], new[1::2], strict=True)), pairs) > FALSE_ALARM


@pytest.mark.parametrize("vocab_size", [1, 31, 64, 256, 4096, 50_257, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_choice_is_the_greatest_logit_and_the_lowest_id_of_equals(
    vocab_size: int, dtype: torch.dtype
) -> None:
    """Vocabularies that can be divided into blocks, and some that cannot.

    There are so few levels that ties occur within blocks and across them.
    """
    for levels in (3, 10**6):
        logits = torch.randint(-levels, levels, (2, 3, vocab_size), generator=generator(vocab_size)).to(dtype)
        expected = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(first_choice(logits), expected)
    strided = torch.randn(4, 5, vocab_size, generator=generator(1))[:, -1]
    assert torch.equal(first_choice(strided), strided.argmax(-1))
