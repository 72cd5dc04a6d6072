"""Published model shapes as data: `suites/shapes.toml`, validated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from harness.files import read_toml
from harness.paths import shipped
from harness.specs.bounds import Size, Spec

SHAPES_FILE = shipped("shapes.toml")


class ShapeSpec(Spec):
    """The sizes of one published model.

    Weights of that shape cost what the model costs, whatever their values.
    `name` is the key in the file, `source` the hub repository whose config.json holds the figures.
    """

    name: str
    model_type: Literal["llama", "qwen2", "mistral"]
    num_layers: int = Field(ge=1, le=10_000)
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_size: int = Field(ge=2, le=65_536, multiple_of=2)
    intermediate_size: Size
    vocab_size: Size
    tie_word_embeddings: bool
    max_positions: Size
    rope_theta: float = Field(gt=0)
    sliding_window: Size | None = None
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ShapeSpec:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads do not share {self.num_key_value_heads} "
                "key-value heads evenly"
            )
        if self.sliding_window is not None and self.model_type != "mistral":
            raise ValueError(f"a {self.model_type} model has no sliding window")
        return self

    @property
    def roofline_shape(self) -> ModelShape:
        """The sizes as the roofline takes them, with the unembedding.

        It reads all keys, whatever the window.
        """
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_size=self.head_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
        )

    @property
    def num_parameters(self) -> int:
        """The number of all parameters.

        Linear layers, two norms a block and one after them, Qwen2's biases, and the embedding, once where
        tied.
        """
        linear = sum(
            count * inputs * outputs for (inputs, outputs), count in self.roofline_shape.linear_widths.items()
        )
        biases = (
            (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_size
            if self.model_type == "qwen2"
            else 0
        )
        blocks = self.num_layers * (linear + biases + 2 * self.hidden_size)
        return blocks + self.hidden_size + self._table_size * (1 if self.tie_word_embeddings else 2)

    def step_weight_bytes(self, dtype_bytes: int) -> int:
        """The bytes of weights that one decoding step reads.

        All of them, except an untied embedding table, which is read by rows.
        """
        return dtype_bytes * (self.num_parameters - (0 if self.tie_word_embeddings else self._table_size))

    def cache_bytes(self, tokens: int, *, batch: int, dtype_bytes: int) -> int:
        """Bytes of keys and values of `tokens` tokens in each of `batch` rows."""
        return 2 * dtype_bytes * batch * tokens * self.num_layers * self.num_key_value_heads * self.head_size

    @property
    def _table_size(self) -> int:
        return self.vocab_size * self.hidden_size


class _ShapesFile(Spec):
    schema_version: Literal[1]
    shapes: dict[str, ShapeSpec]

    @field_validator("shapes", mode="before")
    @classmethod
    def _named_by_key(cls, shapes: Any) -> Any:
        if not isinstance(shapes, dict):
            return shapes
        return {
            name: {**table, "name": name} if isinstance(table, dict) else table
            for name, table in shapes.items()
        }


def load_shapes(path: Path | None = None) -> dict[str, ShapeSpec]:
    """Return the shapes of a shapes file by name; without a path those that ship.

    Raises: UserError for an unreadable file, an unknown key or a size that is none.
    """
    return dict(read_toml(path or SHAPES_FILE, _ShapesFile, noun="a shapes file").shapes)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-shaped model that decide what a step costs.

    With `vocab_size` 0 the unembedding is left out.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int = 0

    @cached_property
    def linear_widths(self) -> Counter[tuple[int, int]]:
        """How often each (inputs, outputs) occurs among one block's linear layers.

        These are query, key, value, output, up, gate and down.
        """
        queries, keys = self.num_attention_heads * self.head_size, self.num_key_value_heads * self.head_size
        hidden, inner = self.hidden_size, self.intermediate_size
        return Counter(
            [
                (hidden, queries),
                (hidden, keys),
                (hidden, keys),
                (queries, hidden),
                (hidden, inner),
                (hidden, inner),
                (inner, hidden),
            ]
        )
