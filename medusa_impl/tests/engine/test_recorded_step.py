"""A decoding step is one function of tensors: it needs no values, and replays as it was recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medusa_impl import acceptance
from medusa_impl import heads as heads_module
from medusa_impl.acceptance import AcceptanceRule, GreedyRule, RejectionRule, TypicalRule
from medusa_impl.decode import DecodingStep, TreeStep, decode_medusa, decode_vanilla
from medusa_impl.engine.backbone import Backbone
from medusa_impl.engine.captured_step import RecordedSteps
from medusa_impl.engine.meta_pass import host_question
from medusa_impl.engine.sections import no_section
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tests.engine.test_backbone import FAMILIES, build
from medusa_impl.tests.recorded_graphs import Launches, RecordedGraphs
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

TREE = DraftTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
TREES = {"tree": TREE, "chain": DraftTree.chain(2), "root alone": DraftTree.root_only()}
PROMPTS = [[3, 7, 11, 2], [5, 5, 9], [1, 2, 3, 4, 5, 6, 7, 8]]
EOS = frozenset([4, 17])


def rules(seed: int = 5) -> dict[str, AcceptanceRule]:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    typical = {"temperature": 0.9, "epsilon": 0.1, "delta": 0.7}
    return {
        "greedy": GreedyRule(),
        "rejection": RejectionRule(temperature=0.9, generator=generator()),
        "typical sampled": TypicalRule(**typical, root="sampled", generator=generator()),
        "typical greedy": TypicalRule(**typical, root="greedy", generator=None),
    }


def heads_of(backbone: Backbone, *, num_heads: int = 3) -> MedusaHeads:
    torch.manual_seed(3)
    heads = MedusaHeads(
        num_heads=num_heads,
        num_layers=1,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        architecture="shared",
    )
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.eval().to(backbone.dtype)


@pytest.fixture
def never_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step take the way that it takes on a GPU."""
    for module in (acceptance, heads_module):
        monkeypatch.setattr(module, "may_look", lambda device: False)


def take_all(backbone: Backbone, tree: DraftTree, rule: AcceptanceRule, **options: Any) -> list[DecodingStep]:
    law: dict[str, Any] = {"rule": rule, "max_new_tokens": 17, "eos_ids": EOS, **options}
    if tree.depth == 0:
        return list(decode_vanilla(backbone, PROMPTS, **law))
    heads = law.pop("heads", None) or heads_of(backbone)
    return list(decode_medusa(backbone, heads, tree, PROMPTS, **law))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", rules())
@pytest.mark.usefixtures("never_look")
def test_replays_decode_what_direct_steps_decode(tree: str, rule: str) -> None:
    """Ragged rows that end at different steps; every view is recorded once and replayed afterwards."""
    backbone = Backbone(tiny_llama(scale=0.35))
    expected = take_all(backbone, TREES[tree], rules()[rule])
    graphs = RecordedGraphs()
    backbone.launch = RecordedSteps(graphs)
    assert take_all(backbone, TREES[tree], rules()[rule]) == expected
    assert graphs.num_captures == graphs.num_warm_ups == 1 < len(expected)


@pytest.mark.usefixtures("never_look")
def test_a_second_generation_captures_nothing_and_draws_with_its_own_seed() -> None:
    backbone = Backbone(tiny_llama(scale=0.35))
    heads = heads_of(backbone)

    def texts() -> list[list[DecodingStep]]:
        return [take_all(backbone, TREE, rules(seed)["rejection"], heads=heads) for seed in range(4)]

    expected = texts()
    graphs = RecordedGraphs()
    backbone.launch = RecordedSteps(graphs)
    assert texts() == expected
    assert graphs.num_captures == 1 and len({str(steps) for steps in expected}) == 4


@pytest.mark.usefixtures("never_look")
def test_a_generator_goes_on_from_one_generation_to_the_next() -> None:
    """Two generations with one generator draw what they draw in direct steps; so does what comes after."""
    backbone = Backbone(tiny_llama(scale=0.35))
    heads = heads_of(backbone)

    def twice() -> tuple[list[list[DecodingStep]], float]:
        rule = rules()["rejection"]
        assert rule.generator is not None
        texts = [take_all(backbone, TREE, rule, heads=heads) for _ in range(2)]
        return texts, float(torch.rand((), generator=rule.generator))

    expected = twice()
    backbone.launch = RecordedSteps(RecordedGraphs())
    # The step is recorded with this rule, and goes on with the other one's draws.
    take_all(backbone, TREE, rules(seed=9)["rejection"], heads=heads)
    assert twice() == expected and expected[0][0] != expected[0][1]


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.usefixtures("never_look")
def test_each_generation_draws_from_its_own_generator(is_recorded: bool) -> None:
    """With generators A, B, A in turn, and two generations that go on by turns, over caches that are lent."""
    backbone = Backbone(tiny_llama(scale=0.35))
    heads = heads_of(backbone)

    def fresh(rule: AcceptanceRule) -> list[DecodingStep]:
        return take_all(Backbone(tiny_llama(scale=0.35)), TREE, rule, heads=heads)

    alone = rules(1)["rejection"]
    expected = [fresh(alone), fresh(rules(2)["rejection"]), fresh(alone)]
    if is_recorded:
        backbone.launch = RecordedSteps(RecordedGraphs())
    first, second = rules(1)["rejection"], rules(2)["rejection"]
    found = [take_all(backbone, TREE, rule, heads=heads) for rule in (first, second, first)]
    assert found == expected and expected[0] != expected[2]
    law: dict[str, Any] = {"max_new_tokens": 17, "eos_ids": EOS}
    by_turns = [
        decode_medusa(backbone, heads, TREE, PROMPTS, rule=rules(seed)["rejection"], **law) for seed in (3, 4)
    ]
    texts: list[list[DecodingStep]] = [[], []]
    while any(grown := [next(steps, None) for steps in by_turns]):
        for text, step in zip(texts, grown, strict=True):
            text.extend([step] if step is not None else [])
    assert texts == [fresh(rules(seed)["rejection"]) for seed in (3, 4)]


@pytest.mark.usefixtures("never_look")
def test_a_longer_view_is_a_graph_of_its_own_and_marked_parts_are_graphs_too() -> None:
    backbone = Backbone(tiny_llama(scale=0.35))
    options = {"max_new_tokens": 90, "eos_ids": frozenset[int]()}
    expected = take_all(backbone, TREE, GreedyRule(), **options)
    graphs, names = RecordedGraphs(), []
    backbone.launch = RecordedSteps(graphs)

    def section(name: str) -> Any:
        names.append(name)
        return no_section(name)

    assert take_all(backbone, TREE, GreedyRule(), **options) == expected
    assert graphs.num_captures == 2, "up to 64 slots, and up to 128"
    assert take_all(backbone, TREE, GreedyRule(), **options, section=section) == expected
    parts = ["heads", "candidates", "mask", "backbone", "acceptance", "cache"]
    assert graphs.num_captures == 2 + 2 * len(parts) and names == parts * (len(expected) - 1)


@pytest.mark.usefixtures("never_look")
def test_a_capture_that_fails_goes_on_directly_and_says_why() -> None:
    backbone = Backbone(tiny_llama(scale=0.35))
    expected = take_all(backbone, TREE, rules()["rejection"])
    backbone.launch = launch = RecordedSteps(RecordedGraphs(fails_at=frozenset([1])))
    assert take_all(backbone, TREE, rules()["rejection"]) == expected
    assert launch.failure == "operation not permitted when stream is capturing"


@pytest.mark.usefixtures("never_look")
def test_a_capture_that_fails_at_its_end_tells_the_cause_and_not_the_end() -> None:
    backbone = Backbone(tiny_llama(scale=0.35))

    class Broken(GreedyRule):
        num_calls = 0

        def verify(self, *arguments: Any) -> acceptance.Acceptance:
            Broken.num_calls += 1
            if Broken.num_calls == 4:  # after the warm-ups: amid the capture
                raise RuntimeError("cannot read a value while capturing")
            return super().verify(*arguments)

    expected = take_all(backbone, TREE, GreedyRule())
    backbone.launch = launch = RecordedSteps(RecordedGraphs(complains_at_the_end=True))
    assert take_all(backbone, TREE, Broken()) == expected
    assert launch.failure == "cannot read a value while capturing"


@pytest.mark.usefixtures("never_look")
def test_the_recorder_finds_a_step_that_the_host_decides() -> None:
    """The control: were the number of kept nodes baked in, the text would be another."""
    backbone = Backbone(tiny_llama(scale=0.35))

    class Deciding(GreedyRule):
        def verify(self, *arguments: Any) -> acceptance.Acceptance:
            found = super().verify(*arguments)
            return acceptance.Acceptance(
                nodes=found.nodes,
                num_kept=torch.tensor(found.num_kept.tolist()),
                last_node=found.last_node,
                next_token=found.next_token,
            )

    expected = take_all(backbone, TREE, Deciding())
    backbone.launch = RecordedSteps(RecordedGraphs())
    assert take_all(backbone, TREE, Deciding()) != expected


def on_meta(family: str, tree: DraftTree, rule: AcceptanceRule) -> Launches:
    """Take a step of a family over tensors without data; return what was launched."""
    # The experts' grouped product has no other dtype without data.
    backbone = Backbone(build(family).bfloat16())
    heads = heads_of(backbone)
    cache = backbone.new_cache(batch_size=2, max_length=80)
    step = TreeStep(backbone, heads, tree, rule=rule, num_eos=2, cache=cache)
    for row in range(2):
        backbone.prefill(torch.arange(5), cache=cache, row=row)
    launches = Launches()
    with torch.inference_mode():
        nn.Module.to(backbone.model, "meta"), heads.to("meta")
        for owner in (step, step.rows, cache, step.buffers, step.tables, *cache.layers):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    object.__setattr__(owner, name, value.to("meta"))
        cache.plan_step(num_new=tree.num_nodes)
        with launches:
            step()
    return launches


def without_generator(rule: AcceptanceRule) -> AcceptanceRule:
    rule.generator = None  # a generator of the CPU does not draw on meta
    return rule


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_needs_no_values(family: str) -> None:
    launches = on_meta(family, TREE, GreedyRule())
    assert launches.waits == [] and launches.count > 50


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", rules())
def test_a_step_under_every_rule_needs_no_values(tree: str, rule: str) -> None:
    assert on_meta("llama", TREES[tree], without_generator(rules()[rule])).waits == []


def above(event: Any) -> list[str]:
    """Return the names of the operators that an event ran in."""
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


@pytest.mark.parametrize("looks", [False, True])
def test_no_value_is_read_inside_an_operator_either(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the meta device cannot show: a read in an operator's own code, as `multinomial` once had one.

    The control is the way of a CPU, which does look at values: that is seen.
    """
    for module in (acceptance, heads_module):
        monkeypatch.setattr(module, "may_look", lambda device: looks)
    backbone = Backbone(tiny_llama(scale=0.35))
    rule = rules()["typical sampled"]
    cache = backbone.new_cache(batch_size=1, max_length=80)
    step = TreeStep(backbone, heads_of(backbone), TREE, rule=rule, num_eos=1, cache=cache)
    with torch.inference_mode():
        logits, states = backbone.prefill_rows(PROMPTS[:1], cache=cache)
        step.begin(rule.root(logits), states, max_new_tokens=9, eos_ids=frozenset([4]))
        cache.plan_step(num_new=TREE.num_nodes)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
    reads = [event for event in profiler.events() or () if event.name == "aten::_local_scalar_dense"]
    asked = [event.name for event in reads if "aten::_assert_async" not in above(event)]
    assert bool(asked) is looks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_we_know_may_be_recorded(family: str) -> None:
    assert host_question(build(family).bfloat16()) == ""


def test_a_model_that_asks_for_a_value_is_found_before_it_is_recorded() -> None:
    model = tiny_llama()
    plain: Any = type(model).forward

    class Asking(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            if int(options["position_ids"].max()) > 10**6:
                raise AssertionError
            return plain(self, *arguments, **options)

    assert host_question(model) == ""
    model.__class__ = Asking
    assert "meta" in host_question(model)


@pytest.mark.parametrize("batch", [1, 3])
def test_rejection_without_a_look_walks_as_the_loop_does(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit in one verification: the loop takes the same draws, and stops where none is needed."""
    torch.manual_seed(batch)
    buffers = tree_buffers(TREE, device=torch.device("cpu"))
    lengths = set()
    for case in range(150):
        logits = 2 * torch.randn(batch, TREE.num_nodes, TINY_VOCAB)
        logits[..., :6] += 8
        # As in a draft, siblings are different tokens.
        drafted = torch.stack([torch.randperm(6) for _ in range(batch * 4)]).view(batch, 4, 6)
        tokens = drafted[:, list(TREE.depths), [0, *TREE.ranks[1:]]]
        found = []
        for look in (True, False):
            monkeypatch.setattr(acceptance, "may_look", lambda device, look=look: look)
            rule = RejectionRule(temperature=0.9, generator=torch.Generator().manual_seed(case))
            one = rule.verify(logits, tokens, buffers)
            paths = [
                nodes[:kept] for nodes, kept in zip(one.nodes.tolist(), one.num_kept.tolist(), strict=True)
            ]
            found.append((paths, one.last_node.tolist(), one.next_token.tolist()))
            lengths.update(one.num_kept.tolist())
        assert found[0] == found[1]
    assert lengths == {1, 2, 3, 4}
