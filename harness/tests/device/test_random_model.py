"""Random models of tiny shapes: the right parameters, usable numbers, and nothing made on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.device.engine import embedding_weights
from harness.device.random_model import random_model, transformers_config
from harness.errors import UserError
from harness.specs.shapes import ShapeSpec, load_shapes

CPU = torch.device("cpu")


def _tiny(**changes: Any) -> ShapeSpec:
    sizes: dict[str, Any] = {
        "name": "tiny",
        "model_type": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,  # not hidden / heads
        "intermediate_size": 48,
        "vocab_size": 61,
        "tie_word_embeddings": False,
        "max_positions": 128,
        "rope_theta": 5000.0,
        "source": "a test",
    }
    return ShapeSpec(**(sizes | changes))


def _model(
    shape: ShapeSpec, *, dtype: torch.dtype = torch.float32, seed: int = 0, num_layers: int | None = None
) -> PreTrainedModel:
    return random_model(shape, dtype=dtype, device=CPU, seed=seed, num_layers=num_layers)


def _logits(model: PreTrainedModel) -> Tensor:
    run: Any = model
    with torch.inference_mode():
        logits: Tensor = run(input_ids=torch.arange(12)[None]).logits
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "qwen2"}, {"model_type": "mistral", "sliding_window": 8}]
)
def test_every_family_has_the_shapes_parameters_and_finite_logits(
    changes: dict[str, Any], tied: bool
) -> None:
    shape = _tiny(**changes, tie_word_embeddings=tied)
    model = _model(shape, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    embedding, lm_head = embedding_weights(model)
    assert (embedding.data_ptr() == lm_head.data_ptr()) is tied
    logits = _logits(model)
    assert logits.shape == (1, 12, shape.vocab_size)
    assert bool(logits.isfinite().all()) and float(logits.float().std()) > 0.01
    assert not model.training
    assert model.config.eos_token_id is None and model.generation_config.eos_token_id is None
    assert getattr(model.config, "sliding_window", None) == shape.sliding_window


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"model_type": "mistral"}])
def test_buffers_are_those_of_a_normally_built_model(changes: dict[str, Any]) -> None:
    shape = _tiny(**changes)
    built: Any = AutoModelForCausalLM.from_config(transformers_config(shape), dtype=torch.bfloat16)
    expected, ours = dict(built.named_buffers()), dict(_model(shape, dtype=torch.bfloat16).named_buffers())
    assert ours.keys() == expected.keys() and any("inv_freq" in name for name in ours)
    for name, buffer in ours.items():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name


def test_with_the_same_weights_it_computes_what_a_normally_built_model_does() -> None:
    shape = _tiny(model_type="qwen2")
    ours = _model(shape)
    built: Any = AutoModelForCausalLM.from_config(transformers_config(shape), dtype=torch.float32)
    built.load_state_dict(ours.state_dict())
    assert torch.equal(_logits(ours), _logits(built.eval()))


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn() -> None:
    shape = _tiny()
    state = torch.get_rng_state()
    first, again, other = (_logits(_model(shape, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


class _LargestFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest float32 tensor that any operator returns off the meta device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.device.type != "meta":
            self.numel = max(self.numel, result.numel())
        return result


def test_no_weight_is_ever_held_in_float32() -> None:
    shape = _tiny()
    with _LargestFloat32() as largest:
        _model(shape, dtype=torch.bfloat16)
    assert 0 < largest.numel <= shape.hidden_size  # rotary frequencies and one embedding row, but no matrix


@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_layers_are_built_on_demand(num_layers: int) -> None:
    shape = _tiny()
    shorter = shape.model_copy(update={"num_layers": num_layers})
    model = _model(shape, num_layers=num_layers)
    assert sum(parameter.numel() for parameter in model.parameters()) == shorter.num_parameters
    assert bool(_logits(model).isfinite().all())


@pytest.mark.parametrize("num_layers", [0, 3])
def test_a_number_of_layers_that_the_shape_has_not_is_refused(num_layers: int) -> None:
    with pytest.raises(UserError, match="1 to 2"):
        _model(_tiny(), num_layers=num_layers)


@pytest.mark.parametrize("shape", load_shapes().values(), ids=lambda shape: shape.name)
def test_a_published_shape_has_the_parameters_that_transformers_builds(shape: ShapeSpec) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(transformers_config(shape), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_no_more_memory_is_taken_than_the_weights_need() -> None:
    shape = load_shapes()["tinyllama-1.1b"]
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = random_model(shape, dtype=torch.bfloat16, device=device)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert torch.cuda.max_memory_allocated() - before < 1.01 * 2 * shape.num_parameters
