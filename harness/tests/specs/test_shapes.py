"""The shipped shapes against the parameter counts that the hub states, and the file's errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from harness.compose.roofline import step_seconds
from harness.errors import UserError
from harness.specs.hardware import Limits
from harness.specs.shapes import ShapeSpec, load_shapes

# Parameters of the published weights, as the hub counts them.
PUBLISHED_PARAMETERS = {
    "smollm2-135m-instruct": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "tinyllama-1.1b": 1_100_048_384,
    "vicuna-7b-v1.3": 6_738_415_616,
    "vicuna-7b-v1.5": 6_738_415_616,
    "mistral-7b-v0.1": 7_241_732_096,
    "zephyr-7b-beta": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3-8b": 8_030_261_248,
    "vicuna-13b-v1.3": 13_015_864_320,
    "vicuna-13b-v1.5": 13_015_864_320,
    "qwen2.5-14b": 14_770_033_664,
    "vicuna-33b-v1.3": 32_528_943_616,
    "llama-3.1-70b": 70_553_706_496,
}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "max_positions": 64,
    "rope_theta": 10000.0,
    "source": "a test",
}
# one block of it: query, key and value, output, up, gate and down
LINEAR = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16


def _tiny(**changes: Any) -> ShapeSpec:
    return ShapeSpec(**(TINY | {"name": "tiny"} | changes))


def test_every_shipped_shape_has_the_published_number_of_parameters() -> None:
    assert {name: shape.num_parameters for name, shape in load_shapes().items()} == PUBLISHED_PARAMETERS


def test_every_shipped_shape_is_named_by_its_key_and_its_repository() -> None:
    for name, shape in load_shapes().items():
        assert shape.name == name
        organisation, repository = shape.source.split("/")
        assert organisation and repository.lower().removeprefix("meta-").startswith(name)


@pytest.mark.parametrize(
    ("changes", "biases", "tables"),
    [
        ({}, 0, 2),
        ({"tie_word_embeddings": True}, 0, 1),
        ({"model_type": "mistral", "sliding_window": 16}, 0, 2),
        ({"model_type": "qwen2"}, (4 + 2 + 2) * 2, 2),
    ],
)
def test_parameters_and_bytes_add_up_by_hand(changes: dict[str, Any], biases: int, tables: int) -> None:
    shape = _tiny(**changes)
    blocks = 3 * (LINEAR + biases + 2 * 8) + 8
    assert shape.num_parameters == blocks + tables * 32 * 8
    # the unembedding, tied or not; an embedding table of its own is not read
    assert shape.step_weight_bytes(2) == 2 * (blocks + 32 * 8)
    # keys and values, layers, heads, size, ..
    assert shape.cache_bytes(10, batch=5, dtype_bytes=2) == 2 * 3 * 2 * 2 * 10 * 5 * 2


def test_a_step_of_one_token_moves_little_more_than_the_weights() -> None:
    bytes_only = Limits(bytes_per_s=1.0, flop_per_s=math.inf)
    for name, shape in load_shapes().items():
        moved = step_seconds(shape.roofline_shape, bytes_only, num_nodes=1, context_tokens=1)
        assert 0.99 < shape.step_weight_bytes(2) / moved < 1.0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "evenly"),
        ({"sliding_window": 16}, "no sliding window"),
        ({"num_layers": 0}, "num_layers"),
        ({"head_size": 3}, "head_size"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"hiden_size": 8}, "hiden_size"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(tomli_w.dumps({"schema_version": 1, "shapes": {"tiny": TINY | changes}}))
    with pytest.raises(UserError, match=message) as caught:
        load_shapes(path)
    assert "shapes.tiny" in caught.value.found and caught.value.where == "shapes.toml"


@pytest.mark.parametrize(
    "text", ["schema_version = 2\n[shapes]\n", "schema_version = 1\nshapes = 3\n", "[shapes\n", None]
)
def test_a_bad_shapes_file_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "shapes.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"shapes\.toml"):
        load_shapes(path)


def test_a_file_of_the_users_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps({"schema_version": 1, "shapes": {"tiny": TINY}}))
    assert load_shapes(path) == {"tiny": _tiny()}
