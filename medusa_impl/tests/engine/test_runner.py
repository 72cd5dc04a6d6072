"""The engine's modes: packed equals eager, the stock model can be lent, missing operators mean eager."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import decode_medusa, decode_vanilla
from medusa_impl.engine import packed_linear, runner
from medusa_impl.engine.attention import GROUPED_ATTENTION
from medusa_impl.engine.backbone import BackboneOutput, StepInputs
from medusa_impl.engine.captured_step import CapturedSteps
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.runner import Mode, StepRunner
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.tests.engine.test_backbone import FAMILIES, build
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

PROMPT = [3, 7, 11, 2, 9]
TREE = DraftTree.cartesian([3, 2])
needs_packing = pytest.mark.skipif(
    not packed_linear.packing_available(torch.float32), reason="this PyTorch has no packed linear operators"
)


def make_heads() -> MedusaHeads:
    torch.manual_seed(5)
    heads = MedusaHeads(
        num_heads=2, num_layers=1, hidden_size=32, vocab_size=TINY_VOCAB, architecture="shared"
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.2)
    return heads


def medusa_tokens(engine: StepRunner, *, budget: int = 20) -> list[int]:
    assert engine.heads is not None
    steps = decode_medusa(
        engine.backbone,
        engine.heads,
        TREE,
        [PROMPT],
        rule=GreedyRule(),
        max_new_tokens=budget,
        eos_ids=frozenset(),
    )
    return [token for step in steps for token in step.tokens[0]]


def vanilla_tokens(engine: StepRunner, *, budget: int = 20) -> list[int]:
    steps = decode_vanilla(
        engine.backbone, [PROMPT], rule=GreedyRule(), max_new_tokens=budget, eos_ids=frozenset()
    )
    return [token for step in steps for token in step.tokens[0]]


def routed(model: nn.Module) -> int:
    """Return how many layers of a model run something else than the forward of their class."""
    return sum("forward" in module.__dict__ for module in model.modules())


@needs_packing
def test_packed_equals_eager() -> None:
    engines = {mode: StepRunner(tiny_llama(), make_heads(), mode=mode) for mode in ("eager", "packed")}
    assert [engine.mode for engine in engines.values()] == ["eager", "packed"]
    outputs = []
    for engine in engines.values():
        cache = engine.backbone.new_cache(batch_size=1, max_length=30)
        outputs.append(engine.backbone.prefill(torch.tensor(PROMPT), cache=cache))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].hidden, outputs[1].hidden, atol=1e-4, rtol=1e-4)
    texts = [tokens(engine) for engine in engines.values() for tokens in (medusa_tokens, vanilla_tokens)]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert engines["eager"].packed_bytes == 0 and routed(engines["eager"].backbone.model) == 0
    assert len(engines["packed"].available_modes()) >= 2
    linears = [
        module for module in engines["packed"].backbone.model.modules() if isinstance(module, nn.Linear)
    ]
    assert engines["packed"].packed_bytes == 4 * (
        sum(linear.weight.numel() for linear in linears) + 2 * 32 * 32
    )
    assert (
        routed(engines["packed"].backbone.model) == len(linears)
        and routed(engines["packed"].heads or nn.Identity()) == 2
    )


@pytest.mark.parametrize("mode", ["eager", pytest.param("packed", marks=needs_packing)])
def test_stock_lends_the_model_as_shipped_and_takes_it_back(mode: Mode) -> None:
    """Stock kernels and stock attention run inside the block, ours after it, even if the block raises.

    `generate` gives the same text.
    """
    engine = StepRunner(tiny_llama(), make_heads(), mode=mode)
    ours = routed(engine.backbone.model)
    before = medusa_tokens(engine)
    with engine.stock() as model:
        assert isinstance(model, LlamaForCausalLM)
        assert model.config._attn_implementation == "sdpa" and routed(model) == 0
        lent: Any = model
        text = lent.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, use_cache=True)
    assert text[0, len(PROMPT) :].tolist() == before
    with pytest.raises(KeyError), engine.stock() as model:
        assert routed(model) == 0
        raise KeyError("anything")
    assert engine.backbone.model.config._attn_implementation == GROUPED_ATTENTION
    assert routed(engine.backbone.model) == ours and (ours > 0) == (mode == "packed")
    assert medusa_tokens(engine) == before


@pytest.mark.parametrize(("asked", "noted"), [("packed", True), ("auto", False)])
def test_missing_operators_mean_eager_on_record(
    monkeypatch: pytest.MonkeyPatch, asked: Mode, noted: bool
) -> None:
    monkeypatch.setattr(runner, "packing_available", lambda dtype: False)
    engine = StepRunner(tiny_llama(), make_heads(), mode=asked)
    assert engine.mode == "eager" and engine.packed_bytes == 0 and routed(engine.backbone.model) == 0
    assert ("fell back to eager" in engine.note) == noted
    assert medusa_tokens(engine) == vanilla_tokens(engine)


def test_the_probe_answers_no_where_the_operator_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private operators may disappear, or compute something else; both count as not available."""

    class Wrong:
        @staticmethod
        def _reorder_linear_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
            return weight

        @staticmethod
        def _linear_pointwise(rows: torch.Tensor, packed: torch.Tensor, *rest: object) -> torch.Tensor:
            return rows @ packed.T + 1

    for operators in (Wrong, object):
        packed_linear.packing_available.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "mkldnn", operators)
            assert packed_linear.packing_available(torch.float32) is False
    packed_linear.packing_available.cache_clear()


@needs_packing
def test_auto_takes_the_packed_mode_and_eager_is_respected() -> None:
    assert StepRunner(tiny_llama(), None).mode == "packed"
    assert StepRunner(tiny_llama(), None, mode="eager").mode == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_half_precision_runs_and_agrees_where_the_gap_is_wide(mode: Mode, dtype: torch.dtype) -> None:
    """In half precision both arms run, the heads in the backbone's type, and the first token is float32's.

    The seed gives the two best logits a wide gap.
    """
    model: Any = tiny_llama()
    engine = StepRunner(model.to(dtype), make_heads(), mode=mode)
    assert engine.heads is not None and next(engine.heads.parameters()).dtype == dtype
    cache = engine.backbone.new_cache(batch_size=1, max_length=30)
    output = engine.backbone.prefill(torch.tensor(PROMPT), cache=cache)
    assert output.logits.dtype == dtype and bool(output.logits.isfinite().all())
    exact = StepRunner(tiny_llama(), None, mode="eager")
    expected = exact.backbone.prefill(
        torch.tensor(PROMPT), cache=exact.backbone.new_cache(batch_size=1, max_length=30)
    ).logits
    error = float((output.logits.float() - expected).abs().max())
    assert 0 < error < 0.05 * float(expected.abs().max())
    assert len(medusa_tokens(engine)) == len(vanilla_tokens(engine)) == 20
    best = expected[0, 0].topk(2)
    assert float(best.values[0] - best.values[1]) > 2 * error
    assert medusa_tokens(engine)[0] == int(best.indices[0])


def test_heads_of_another_backbone_are_refused() -> None:
    with pytest.raises(UserError, match="heads for hidden size 32 and vocabulary 61"):
        StepRunner(tiny_llama(vocab_size=40), make_heads())


needs_compiler = pytest.mark.skipif(
    not runner.compiling_available("cpu"), reason="no C++ compiler for torch.compile"
)
MODES = [
    "eager",
    pytest.param("packed", marks=needs_packing),
    pytest.param("cuda_graph", marks=pytest.mark.gpu),
    pytest.param("fused_graph", marks=pytest.mark.gpu),
]


def texts_of(engine: StepRunner, *, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Return what vanilla and Medusa decoding give for the same prompts in one batch."""
    assert engine.heads is not None
    law: dict[str, Any] = {"rule": GreedyRule(), "max_new_tokens": 12, "eos_ids": frozenset()}
    texts = []
    for steps in (
        decode_vanilla(engine.backbone, prompts, **law),
        decode_medusa(engine.backbone, engine.heads, TREE, prompts, **law),
    ):
        rows: list[list[int]] = [[] for _ in prompts]
        for step in steps:
            for row, tokens in zip(rows, step.tokens, strict=True):
                row.extend(tokens)
        texts.append(rows)
    return texts


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_decodes_the_same_texts(mode: Mode) -> None:
    """No mode is faster at the cost of other texts.

    For both arms, one row and unequal rows, the texts equal what stock kernels decode row by row.
    """
    device = torch.device("cuda" if mode in ("cuda_graph", "fused_graph") else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prompts = [PROMPT, [4, 4], [9, 1, 30, 2, 8, 8, 5]]
    plain = StepRunner(tiny_llama(), make_heads(), mode="eager")
    expected = [vanilla_tokens_of(plain, prompt) for prompt in prompts]
    engine = StepRunner(tiny_llama().to(device), make_heads(), mode=mode)  # type: ignore[arg-type]
    if mode not in engine.available_modes():
        pytest.skip(f"{mode} is not offered here")
    assert engine.mode == mode and engine.note == ""
    assert texts_of(engine, prompts=prompts) == [expected, expected]
    assert texts_of(engine, prompts=prompts[:1]) == [expected[:1], expected[:1]]
    engine.use("eager")
    assert engine.mode == "eager" and texts_of(engine, prompts=prompts) == [expected, expected]
    engine.use(mode)
    assert texts_of(engine, prompts=prompts) == [expected, expected]
    assert "failed" not in engine.note


@needs_compiler
def test_the_compiled_mode_decodes_the_same_texts() -> None:
    """Unequal rows of a model of one layer, because every shape takes time to compile."""
    prompts = [PROMPT, [4, 4]]
    plain = StepRunner(tiny_llama(num_layers=1), make_heads(), mode="eager")
    expected = [vanilla_tokens_of(plain, prompt) for prompt in prompts]
    engine = StepRunner(tiny_llama(num_layers=1), make_heads(), mode="compiled")
    assert engine.mode == "compiled" and engine.note == ""
    assert texts_of(engine, prompts=prompts) == [expected, expected]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"


def vanilla_tokens_of(engine: StepRunner, prompt: list[int]) -> list[int]:
    return texts_of(engine, prompts=[prompt])[0][0]


@needs_packing
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_packed_mode_takes_every_family(family: str) -> None:
    """One prompt and one tree step of each supported family: packed and joined products give stock logits."""
    buffers = tree_buffers(TREE, device=torch.device("cpu"))
    tokens = torch.arange(TREE.num_nodes)[None] % 11
    outputs = []
    for mode in ("eager", "packed"):
        engine = StepRunner(build(family), None, mode=mode)
        assert engine.mode == mode
        cache = engine.backbone.new_cache(batch_size=1, max_length=40)
        engine.backbone.prefill(torch.tensor(PROMPT), cache=cache)
        outputs.append(
            engine.backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache)
        )
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].hidden, outputs[1].hidden, atol=1e-4, rtol=1e-4)


@needs_packing
def test_small_projections_are_joined_as_the_model_itself_calls_them() -> None:
    """Query, key and value; gate and up; the first layers of the heads: found in a pass, not by name."""
    engine = StepRunner(tiny_llama(), make_heads(), mode="packed")
    joined = [owner for module in (engine.backbone.model, engine.heads) for owner in joint_products(module)]
    assert sorted(len(owner._widths) for owner in set(joined)) == [2, 2, 2, 3, 3]
    assert len(joined) == 2 * (3 + 2) + 2


def joint_products(module: nn.Module | None) -> list[Any]:
    assert module is not None
    bound = [getattr(layer.__dict__.get("forward"), "func", None) for layer in module.modules()]
    owners = [getattr(method, "__self__", None) for method in bound]
    return [owner for owner in owners if isinstance(owner, packed_linear._JointProduct)]


def test_a_mode_that_is_not_there_is_eager_with_a_note() -> None:
    engine = StepRunner(tiny_llama(), make_heads(), mode="cuda_graph")
    assert (
        engine.mode == "eager" and engine.note == "cuda_graph mode is not available here: fell back to eager"
    )
    engine.use("eager")
    assert engine.note == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_waits_for_the_host_once() -> None:
    """Every wait of the host raises a warning, and after the capture there is one a step."""
    engine = StepRunner(tiny_llama().to("cuda"), make_heads(), mode="cuda_graph")  # type: ignore[arg-type]
    assert engine.heads is not None
    for steps in (
        decode_vanilla(engine.backbone, [PROMPT], rule=GreedyRule(), max_new_tokens=12, eos_ids=frozenset()),
        decode_medusa(
            engine.backbone,
            engine.heads,
            TREE,
            [PROMPT],
            rule=GreedyRule(),
            max_new_tokens=12,
            eos_ids=frozenset(),
        ),
    ):
        next(steps), next(steps)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as caught:
                next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(caught) == 1


class _FakeGraphs:
    """Replaces PyTorch's CUDA graphs: it counts those alive, and notes one that is freed during a capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_alive = self.num_captured = 0
        self.is_capturing = self.freed_while_capturing = False

        class Graph:
            captured = False

            def replay(graph) -> None:
                assert graph.captured

            def __del__(graph) -> None:
                self.num_alive -= graph.captured
                self.freed_while_capturing |= self.is_capturing

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:  # without a pool: the graph's own
            self.is_capturing = True
            try:
                yield
            finally:
                self.is_capturing = False
            graph.captured = True
            self.num_alive += 1
            self.num_captured += 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr("torch.cuda.Stream", lambda: stream)
        monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
        monkeypatch.setattr("torch.cuda.stream", lambda chosen: contextlib.nullcontext())
        monkeypatch.setattr("torch.cuda.set_stream", lambda chosen: None)
        monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
        monkeypatch.setattr("torch.cuda.graph", capture)


def _take_step(steps: CapturedSteps, cache: TreeCache, *, num_new: int) -> None:
    tokens = torch.zeros(1, num_new, dtype=torch.long)
    mask = torch.zeros(1, 1, num_new, cache.begin_step(num_new=num_new))
    steps(StepInputs(token_ids=tokens, position_ids=tokens, mask=mask, num_logits=0), cache)


def _no_output(inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
    return BackboneOutput(logits=torch.empty(0), hidden=torch.empty(0))


def _small_cache() -> TreeCache:
    return TreeCache(num_layers=1, batch_size=1, max_length=64)


def test_graphs_go_with_their_cache_and_with_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: graphs once shared a memory pool, and the next capture crashed when its last graph was
    gone.
    """
    fake = _FakeGraphs(monkeypatch)
    steps = CapturedSteps(_no_output)
    first, second = _small_cache(), _small_cache()
    for cache, num_new in ((first, 1), (second, 1), (first, 4), (first, 1), (second, 6)):
        _take_step(steps, cache, num_new=num_new)
    assert (fake.num_captured, fake.num_alive) == (4, 4)
    del first
    gc.collect()
    assert fake.num_alive == 2, "those of the second cache"
    del second, cache
    gc.collect()
    assert fake.num_alive == 0


def test_no_old_graph_is_freed_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: on a GPU Python freed an old cache with its graphs during a capture, which failed.

    Here the last name of an old cache goes while the next one is captured; cycles enough make Python collect.
    """
    fake = _FakeGraphs(monkeypatch)
    rings: list[list[object]] = []

    def call(inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        if fake.is_capturing:
            rings.clear()
            for _ in range(5000):
                cycle: list[object] = []
                cycle.append(cycle)
        return _no_output(inputs, cache)

    steps = CapturedSteps(call)
    for _ in range(3):
        cache = _small_cache()
        _take_step(steps, cache, num_new=1)
        ring: list[object] = [cache]
        ring.append(ring)
        rings.append(ring)
        del cache, ring
    assert fake.num_captured == 3 and not fake.freed_while_capturing and gc.isenabled()


def test_a_capture_that_failed_leaves_the_next_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that runs out of memory is skipped, and the next one is captured."""
    fake = _FakeGraphs(monkeypatch)

    def call(inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        if inputs.token_ids.shape[1] > 8:
            raise torch.OutOfMemoryError
        return _no_output(inputs, cache)

    steps, cache = CapturedSteps(call), _small_cache()
    for num_new in (1, 2):
        with pytest.raises(torch.OutOfMemoryError):
            _take_step(steps, cache, num_new=9)
        assert gc.isenabled()
        _take_step(steps, cache, num_new=num_new)
    assert fake.num_captured == 2


@pytest.mark.gpu
def test_steps_are_captured_again_after_a_cache_was_freed() -> None:
    """The graphs of the generation before are gone with its cache when the next one captures."""
    expected = medusa_tokens(StepRunner(tiny_llama(), make_heads(), mode="eager"))
    engine = StepRunner(tiny_llama().to("cuda"), make_heads(), mode="cuda_graph")  # type: ignore[arg-type]
    assert engine.mode == "cuda_graph"
    for _ in range(3):
        assert medusa_tokens(engine) == expected == vanilla_tokens(engine)
        engine.backbone._free_caches.clear()
        gc.collect()
    assert engine.note == ""
