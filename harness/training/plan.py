"""What training heads alone will need, counted before anything is loaded: memory, operations, time.

    on the device      weights of the backbone, the unembedding once more where it is cast, heads, their
                       gradients, AdamW's two moments, activations, and with features = "device" the states
                       of all answers
    on the disk        the states as they were computed, and once more as one table (features = "file")

The model is built on the meta device, so its parameters are counted exactly, whatever its architecture. Heads
and optimiser are exact too; activations are a bound, from the tensors that one step keeps at its peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from harness.device.engine import heads_like, model_without_weights
from harness.device.loading.tiny import tiny_model
from harness.device.random_model import shape_without_weights
from harness.errors import UserError
from harness.specs.hardware import DeviceSpec
from harness.specs.shapes import load_shapes
from harness.specs.suite import ModelSpec
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import FeaturesWay, Medusa1Settings
from medusa_impl.training.losses import logits_bytes
from medusa_impl.training.states import PASS_TOKENS

MEMORY_SHARE = 0.9  # of a device's memory that a plan may fill: the rest is the allocator's and the driver's
FEATURE_BYTES = 2  # of one number of a kept state: float16
_FLOAT, _INT = 4, 4  # bytes


@dataclass(frozen=True)
class CorpusSize:
    """How much text there is to learn from: tokens of all answers, and of prompts with answers.

    They may be upper bounds, where the text is still to be made. Of a text that `is_there` not, they are
    those of one step.
    """

    num_answers: int
    num_answer_tokens: int
    num_tokens: int
    is_there: bool = True

    @property
    def num_rows(self) -> int:
        """Positions with a target for head 1: every token of an answer but its first."""
        return max(0, self.num_answer_tokens - self.num_answers)


@dataclass(frozen=True)
class HeadsPlan:
    """What one way of training heads alone takes.

    Units: device and disk in bytes by what they hold; step_flops, subset_flops and once_flops in operations
    of matrix products, by the dtype of their factors: of one step over the whole vocabulary, of one over the
    subset, and of the pass over the corpus before the first step. num_steps is None where the text is not
    there.
    """

    model: str
    way: FeaturesWay
    device: dict[str, int]
    disk: dict[str, int]
    num_steps: int | None
    num_subset_steps: int
    step_flops: dict[str, int]
    subset_flops: dict[str, int]
    once_flops: dict[str, int]

    @property
    def device_bytes(self) -> int:
        """All that is on the device at the peak of a step."""
        return sum(self.device.values())

    @property
    def disk_bytes(self) -> int:
        """All that is written to the disk, checkpoints left out."""
        return sum(self.disk.values())

    def total_flops(self) -> dict[str, int]:
        """Operations of the whole training, by dtype; of one step where the text is not there."""
        dtypes = sorted({*self.step_flops, *self.once_flops})
        parts = (
            ((self.num_steps or 1) - self.num_subset_steps, self.step_flops),
            (self.num_subset_steps, self.subset_flops),
            (1, self.once_flops),
        )
        return {dtype: sum(count * flops.get(dtype, 0) for count, flops in parts) for dtype in dtypes}

    def seconds(self, flop_per_s: dict[str, float]) -> float | None:
        """Return the time at a device's full throughput, or None where a dtype's is not known."""
        total = self.total_flops()
        if not all(dtype in flop_per_s for dtype in total):
            return None
        return sum(count / flop_per_s[dtype] for dtype, count in total.items())


@dataclass(frozen=True)
class DeviceRoom:
    """How much a device, and the disk of the work folder, can hold."""

    name: str
    memory_bytes: int
    disk_bytes: int | None = None


def planned_model(spec: ModelSpec, *, shape: str | None = None, allow_hub: bool = False) -> PreTrainedModel:
    """Return a recipe's model on the meta device, or one of a published shape in its place.

    An asset that has a published shape's name is not looked for, and neither is a folder of that name that is
    not there: the shape tells all that is counted.
    Raises: UserError for an unknown shape, or a model that is not there.
    """
    shapes = load_shapes()
    if shape is not None and shape not in shapes:
        raise UserError(
            found=f"no shape {shape!r}", need=f"one of {', '.join(sorted(shapes))}", where="the command line"
        )
    for named in (shape, spec.asset, _missing_folder(spec)):
        if named in shapes:
            return shape_without_weights(shapes[named])
    if spec.tiny is not None:
        tiny: Any = tiny_model(spec.tiny, dtype=torch.float32)
        on_meta: PreTrainedModel = tiny.to("meta")
        return on_meta
    return model_without_weights(spec, allow_hub=allow_hub)


def _missing_folder(spec: ModelSpec) -> str | None:
    """Return the name of a model's folder where it is not there yet."""
    return None if spec.path is None or Path(spec.path).exists() else Path(spec.path).name


def plan_heads(
    model: PreTrainedModel,
    recipe: Medusa1Settings,
    *,
    name: str,
    dtype: torch.dtype,
    corpus: CorpusSize,
    way: FeaturesWay,
    device: torch.device,
) -> HeadsPlan:
    """Return what a recipe takes on a model of these sizes, whose weights are of `dtype`."""
    with torch.device("meta"):
        heads = heads_like(model, recipe)
    num_parameters = sum(parameter.numel() for parameter in heads.parameters())
    table = corpus.num_rows * _table_row_bytes(heads)
    on_device = {
        "weights": _weight_bytes(model, dtype),
        "unembedding, cast": _unembedding_bytes(heads, recipe, dtype),
        "heads": _FLOAT * num_parameters,
        "gradients": _FLOAT * num_parameters,
        # Two moments a parameter, and a count of steps a tensor.
        "optimiser": 2 * _FLOAT * num_parameters + _FLOAT * len(list(heads.parameters())),
        "states": table if way == "device" else 0,
        "activations": activation_bytes(model, heads, recipe, dtype=dtype, way=way, device=device),
    }
    states = corpus.num_answer_tokens * heads.hidden_size * FEATURE_BYTES
    kept = {"states as computed": states} if way != "none" else {}
    mapped = {"states as one table": corpus.num_rows * heads.hidden_size * FEATURE_BYTES}
    tokens = -(-corpus.num_tokens * recipe.batch_positions // max(corpus.num_rows, 1))
    reading = {_word(dtype): backbone_flops(model, tokens)}
    step = heads_flops(heads, recipe, vocab_size=heads.vocab_size)
    subset = min(recipe.subset_size or heads.vocab_size, heads.vocab_size)
    num_steps = recipe.steps_for(max(corpus.num_rows, 1)) if corpus.is_there else None
    reads = reading if way == "none" else {}
    return HeadsPlan(
        model=name,
        way=way,
        device=on_device,
        disk=kept | (mapped if way == "file" else {}),
        num_steps=num_steps,
        num_subset_steps=recipe.subset_steps(num_steps or 0) if subset < heads.vocab_size else 0,
        step_flops=_sum(step, reads),
        subset_flops=_sum(heads_flops(heads, recipe, vocab_size=subset), reads),
        once_flops={} if way == "none" else {_word(dtype): backbone_flops(model, corpus.num_tokens)},
    )


def check_fits(plan: HeadsPlan, room: DeviceRoom) -> None:
    """Refuse a training for which a device, or the disk, is too small.

    Raises: UserError that names the largest parts.
    """
    limit = MEMORY_SHARE * room.memory_bytes
    check_memory(plan.device, room, model=plan.model, do=_remedy(plan, limit=limit))
    if room.disk_bytes is not None and plan.disk_bytes > room.disk_bytes:
        raise UserError(
            found=f"states of {plan.disk_bytes / 1e9:.1f} GB",
            need=f"at most the {room.disk_bytes / 1e9:.1f} GB that are free on the disk",
            where="the plan of the training",
            do='set features = "none" in the recipe, which keeps none',
        )


def check_memory(parts: dict[str, int], room: DeviceRoom, *, model: str, do: str) -> None:
    """Refuse what does not fit into a device's memory. Raises: UserError that names the largest parts."""
    needed = sum(parts.values())
    if needed > MEMORY_SHARE * room.memory_bytes:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
        raise UserError(
            found=f"{model} with its heads, which needs {needed / 1e9:.1f} GB ({named})",
            need=f"at most {MEMORY_SHARE:g} of the {room.memory_bytes / 1e9:.1f} GB of {room.name}",
            where="the plan of the training",
            do=do,
        )


def _remedy(plan: HeadsPlan, *, limit: float) -> str:
    if plan.device_bytes - plan.device["states"] <= limit:
        return 'set features = "file" or "none" in the recipe'
    if plan.device_bytes - plan.device["states"] - plan.device["activations"] <= limit:
        return "lower batch_positions in the recipe"
    return "take a device with more memory, fewer heads, or shared unembeddings"


def choose_way(plans: dict[FeaturesWay, HeadsPlan], room: DeviceRoom) -> FeaturesWay:
    """Return the first way that fits: on the device, from a file, or without kept states.

    Raises: UserError, that of the last, if none does.
    """
    ways: tuple[FeaturesWay, ...] = ("device", "file")
    for way in ways:
        try:
            check_fits(plans[way], room)
        except UserError:
            continue
        return way
    check_fits(plans["none"], room)
    return "none"


def activation_bytes(
    model: PreTrainedModel,
    heads: MedusaHeads,
    recipe: Medusa1Settings,
    *,
    dtype: torch.dtype,
    way: FeaturesWay,
    device: torch.device,
) -> int:
    """Return a bound of what a step holds at its peak, besides parameters, gradients and optimiser.

    T positions of K heads with L layers, in float32: the states; each layer's product (kept for the
    gradient of its SiLU) and, but for the last, its output; the heads' states; their gradients, twice while
    they are handed on. `own` unembeddings keep the heads' states once more, by chunk. Then the chunks of
    logits: value, softmax, gradient and one more.
    """
    positions = recipe.batch_positions
    state = _FLOAT * positions * heads.hidden_size
    layers, own = heads.num_layers, heads.architecture == "own"
    of_heads = heads.num_heads * state * (2 * layers - 1 + 1 + 2 + (1 if own else 0))
    chunk_rows = max(1, logits_bytes(device) // (_FLOAT * heads.vocab_size))
    logits = 4 * _FLOAT * min(chunk_rows, heads.num_heads * positions) * heads.vocab_size
    # A chunk's gradient of an own unembedding, before it joins the others, and a cast copy of the weight.
    weight = 2 * _FLOAT * heads.vocab_size * heads.hidden_size if own else 0
    step = 2 * state + of_heads + logits + weight
    # The backbone's pass is over before the heads' begins.
    return step if way != "none" else max(step, 2 * state + _pass_bytes(model, dtype))


def _pass_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return what the backbone holds in one pass without gradients: some tensors of the layer that runs.

    Six as wide as the states, and three as wide as the layer's inside.
    """
    config: Any = model.config
    inner = int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    return PASS_TOKENS * (6 * int(config.hidden_size) + 3 * inner) * _bytes(dtype)


def heads_flops(heads: MedusaHeads, recipe: Medusa1Settings, *, vocab_size: int) -> dict[str, int]:
    """Return the operations of a step's products over so many tokens of the vocabulary, by dtype.

    A product of m x n by n x k has 2 m n k. A block: forward, the weight's gradient, and the input's but for
    the first block of a head. A shared unembedding: logits and the states' gradient. One of its own: logits,
    logits once more for the backward pass, and both gradients. Each head is counted with a target at every
    position; the last few of an answer have none for the later heads, and a subset lacks some.
    """
    positions, hidden = recipe.batch_positions, heads.hidden_size
    block = 2 * positions * heads.num_heads * hidden * hidden
    unembedding = 2 * positions * heads.num_heads * hidden * vocab_size
    products = 4 if heads.architecture == "own" else 2
    blocks = block * (3 * heads.num_layers - 1)
    return _sum({"float32": blocks}, {recipe.matmul_dtype: products * unembedding})


def backbone_flops(model: PreTrainedModel, tokens: int) -> int:
    """Return the operations of one pass of the decoder over so many tokens, attention scores left out."""
    linear = sum(
        module.weight.numel() for module in model.get_decoder().modules() if isinstance(module, nn.Linear)
    )
    return 2 * linear * tokens


def device_flop_per_s(device: DeviceSpec) -> dict[str, float]:
    """Return a device's published matrix throughput, that of half precision, for every dtype.

    None is faster, so a time from it is no longer than that of any.
    """
    return dict.fromkeys(("float32", "bfloat16", "float16"), device.limits.flop_per_s)


def _weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    # Buffers (rotary frequencies) keep float32.
    parameters = sum(parameter.numel() for parameter in model.parameters()) * _bytes(dtype)
    return parameters + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _unembedding_bytes(heads: MedusaHeads, recipe: Medusa1Settings, dtype: torch.dtype) -> int:
    """Return the copies of the LM head's weight that shared heads learn against.

    It is kept in float32 for the evaluation, in the products' dtype, and cut to the subset.
    """
    if heads.architecture == "own":
        return 0
    size = heads.vocab_size * heads.hidden_size
    product = 2 if recipe.matmul_dtype == "bfloat16" else _FLOAT
    subset = min(recipe.subset_size or 0, heads.vocab_size)
    cut = subset * heads.hidden_size * product if 0 < subset < heads.vocab_size else 0
    return (0 if dtype == torch.float32 else _FLOAT * size) + (0 if product == _FLOAT else 2 * size) + cut


def _table_row_bytes(heads: MedusaHeads) -> int:
    return heads.hidden_size * FEATURE_BYTES + heads.num_heads * _INT


def _bytes(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sum(*counts: dict[str, int]) -> dict[str, int]:
    return {dtype: sum(one.get(dtype, 0) for one in counts) for dtype in sorted({*counts[0], *counts[-1]})}
