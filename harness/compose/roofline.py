"""The roofline of Appendix G: what a step reads and computes, and how long a device needs at least.

Every figure from here is `predicted`: kernels reach neither the bandwidth nor the throughput that a data
sheet names. A step with n candidates reads the same weights as a step with one, so it costs almost as little
until n lifts the intensity over the device's ridge:

    seconds
      |                     /     compute: 2 n flop a weight over the throughput
      |                    /
      |___________________/       memory: the weights over the bandwidth
      +-------------------+---- n
                        ridge
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pydantic import Field

from harness.errors import UserError
from harness.files import Frozen
from harness.records.latency import DTYPE_BYTES, LatencyPoint, LatencyRecord
from harness.records.sweep import PredictionError
from harness.specs.hardware import Limits
from harness.specs.shapes import ModelShape

ATTENTION_HEAD_SIZE = 128  # paper, Tables 6 and 7: Llama-33B
LLAMA_33B_HIDDEN = 6656  # paper, Table 8
LLAMA_33B_INTERMEDIATE = 17920  # paper, Table 8


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done, of which an operator needs both."""

    num_bytes: float
    flop: float

    @property
    def intensity(self) -> float:
        """Return the operational intensity, flop/byte."""
        return self.flop / self.num_bytes

    def seconds(self, limits: Limits) -> float:
        """Return the least time: the slower of moving the bytes and doing the arithmetic.

        The two overlap.
        """
        return max(self.num_bytes / limits.bytes_per_s, self.flop / limits.flop_per_s)


def llama_7b_block() -> ModelShape:
    """Return one block of Llama-7B, the simplified model of the simulations in Appendix G.3."""
    return ModelShape(
        num_layers=1,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_size=128,
        intermediate_size=11008,  # all sizes here: config.json of the public Llama-7B weights
    )


def attention_intensity(
    num_tokens: int, *, context_tokens: int, head_size: int = ATTENTION_HEAD_SIZE
) -> float:
    """Return the operational intensity of one attention product: s q d / (s q + (s + q) d).

    It does not depend on the batch.
    Paper: Appendix G, Tables 5 to 7.
    """
    scores = context_tokens * num_tokens
    return scores * head_size / (scores + (context_tokens + num_tokens) * head_size)


def linear_intensity(
    num_tokens: int, *, batch: int, inputs: int = LLAMA_33B_HIDDEN, outputs: int = LLAMA_33B_INTERMEDIATE
) -> float:
    """Return the operational intensity of one linear layer: b q h i / (b q (h + i) + h i).

    The layer reads `batch` rows of `num_tokens`.
    Paper: Appendix G, Tables 5 and 8.
    """
    rows = batch * num_tokens
    return rows * inputs * outputs / (rows * (inputs + outputs) + inputs * outputs)


def linear_work(rows: int, *, inputs: int, outputs: int, dtype_bytes: int) -> Work:
    """Return the work of one linear layer: weights, inputs and outputs once each."""
    return Work(
        num_bytes=dtype_bytes * (rows * (inputs + outputs) + inputs * outputs),
        flop=2 * rows * inputs * outputs,
    )


def attention_work(
    shape: ModelShape, num_tokens: int, *, context_tokens: int, batch: int, dtype_bytes: int
) -> Work:
    """Return the work of either attention product of one block.

    Scores are written out, as in the paper's space column, and keys are read once a group.
    """
    scores = shape.num_attention_heads * context_tokens * num_tokens
    per_token = shape.num_key_value_heads * context_tokens + shape.num_attention_heads * num_tokens
    num_bytes = dtype_bytes * batch * (scores + per_token * shape.head_size)
    return Work(num_bytes=num_bytes, flop=2 * batch * scores * shape.head_size)


def step_seconds(
    shape: ModelShape,
    limits: Limits,
    *,
    num_nodes: int,
    context_tokens: int,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> float:
    """Return the predicted time of one backbone step over `num_nodes` tokens a row.

    Each operator takes its own roofline time and they add up. Softmax, norms, rotary positions, launches,
    heads and acceptance are left out, as in the paper; `context_tokens` are the keys read.
    Raises: UserError on a count below 1.
    Paper: Appendix G.3.
    """
    work = step_work(
        shape, num_nodes=num_nodes, context_tokens=context_tokens, batch=batch, dtype_bytes=dtype_bytes
    )
    return sum(count * operator.seconds(limits) for count, operator in (*work.attention, *work.products))


@dataclass(frozen=True)
class StepWork:
    """What one step consists of: each operator and how often it occurs.

    `products` multiply by weights; `attention` are the products of queries, keys and values.
    """

    products: tuple[tuple[int, Work], ...]
    attention: tuple[tuple[int, Work], ...] = ()

    @property
    def num_operators(self) -> int:
        """Return how many matrix products a step has."""
        return sum(count for count, _ in (*self.products, *self.attention))


def step_work(
    shape: ModelShape, *, num_nodes: int, context_tokens: int, batch: int, dtype_bytes: int
) -> StepWork:
    """Return what one backbone step consists of; `context_tokens` are the keys read.

    Raises: UserError on a count below 1.
    """
    if min(num_nodes, context_tokens, batch, dtype_bytes) < 1:
        raise UserError(
            found=f"{num_nodes} nodes, {context_tokens} keys, batch {batch}, {dtype_bytes} bytes",
            need="at least 1 of each",
        )
    rows = batch * num_nodes
    widths = [(shape.num_layers * count, *sizes) for sizes, count in shape.linear_widths.items()]
    if shape.vocab_size:
        widths.append((1, shape.hidden_size, shape.vocab_size))
    attention = attention_work(
        shape, num_nodes, context_tokens=context_tokens, batch=batch, dtype_bytes=dtype_bytes
    )
    return StepWork(
        products=tuple(
            (count, linear_work(rows, inputs=inputs, outputs=outputs, dtype_bytes=dtype_bytes))
            for count, inputs, outputs in widths
        ),
        attention=((2 * shape.num_layers, attention),),
    )


def heads_seconds(
    shape: ModelShape,
    limits: Limits,
    *,
    num_heads: int,
    num_layers: int = 1,
    architecture: Literal["own", "shared"],
    batch: int = 1,
    dtype_bytes: int = 2,
) -> float:
    """Return the predicted time of one evaluation of all draft heads, at one state a row.

    Raises: UserError on a count below 1, or below 0 heads.
    Departs: the paper's simulation leaves heads out.
    """
    work = heads_work(
        shape,
        num_heads=num_heads,
        num_layers=num_layers,
        architecture=architecture,
        batch=batch,
        dtype_bytes=dtype_bytes,
    )
    return sum(count * operator.seconds(limits) for count, operator in work.products)


def heads_work(
    shape: ModelShape,
    *,
    num_heads: int,
    num_layers: int = 1,
    architecture: Literal["own", "shared"],
    batch: int = 1,
    dtype_bytes: int = 2,
) -> StepWork:
    """Return what one evaluation of all draft heads consists of, at one state a row.

    Each head has `num_layers` residual blocks of hidden by hidden weights; then one product with the
    unembedding for all heads (`shared`), or one a head with its own weights (`own`). No head has no work.
    Raises: UserError on a count below 1, or below 0 heads.
    """
    if num_heads < 0 or min(num_layers, batch, dtype_bytes) < 1:
        found = f"{num_heads} heads of {num_layers} layers, batch {batch}, {dtype_bytes} bytes"
        raise UserError(found=found, need="no negative number of heads, at least 1 of the others")
    if num_heads == 0:
        return StepWork(products=())
    hidden, vocab = shape.hidden_size, shape.vocab_size
    block = linear_work(batch, inputs=hidden, outputs=hidden, dtype_bytes=dtype_bytes)
    products, rows = (1, batch * num_heads) if architecture == "shared" else (num_heads, batch)
    unembedding = linear_work(rows, inputs=hidden, outputs=vocab, dtype_bytes=dtype_bytes)
    return StepWork(products=((num_heads * num_layers, block), *([(products, unembedding)] if vocab else [])))


def step_cost(
    shape: ModelShape,
    limits: Limits,
    *,
    num_nodes: int,
    context_tokens: int,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> float:
    """Return the predicted step cost: a step of `num_nodes` over a step of one."""
    one_s, many_s = (
        step_seconds(
            shape,
            limits,
            num_nodes=nodes,
            context_tokens=context_tokens,
            batch=batch,
            dtype_bytes=dtype_bytes,
        )
        for nodes in (1, num_nodes)
    )
    return many_s / one_s


@dataclass(frozen=True)
class Simulation:
    """The paper's simulated speedup: an acceleration rate of slope x log(n) over the predicted step cost.

    Paper: Appendix G.3. The rate has no intercept, so it is 0 at one candidate; only ratios between settings
    mean much.
    """

    shape: ModelShape
    limits: Limits
    slope: float
    log_base: float
    max_nodes: int = 256

    def speedup(self, num_nodes: int, *, context_tokens: int, batch: int) -> float:
        """Return the simulated speedup with `num_nodes` candidates."""
        cost = step_cost(
            self.shape, self.limits, num_nodes=num_nodes, context_tokens=context_tokens, batch=batch
        )
        return self.slope * math.log(num_nodes, self.log_base) / cost

    def best(self, *, context_tokens: int, batch: int) -> tuple[int, float]:
        """Return the best number of candidates from 2 to `max_nodes`, and its speedup."""
        one_s = step_seconds(self.shape, self.limits, num_nodes=1, context_tokens=context_tokens, batch=batch)
        speedups: dict[int, float] = {}
        for nodes in range(2, self.max_nodes + 1):
            step_s = step_seconds(
                self.shape, self.limits, num_nodes=nodes, context_tokens=context_tokens, batch=batch
            )
            speedups[nodes] = self.slope * math.log(nodes, self.log_base) * one_s / step_s
        best = max(speedups, key=lambda nodes: speedups[nodes])
        return best, speedups[best]


class Prediction(Frozen):
    """One measured time and what the roofline predicts for it.

    The roofline is a lower bound, so `ratio` is seldom below 1.
    """

    measured_s: float = Field(gt=0, allow_inf_nan=False)
    predicted_s: float = Field(gt=0, allow_inf_nan=False)

    @property
    def ratio(self) -> float:
        """Return measured over predicted."""
        return self.measured_s / self.predicted_s

    @property
    def error(self) -> float:
        """Return the prediction's relative error, negative where the device is slower than predicted."""
        return self.predicted_s / self.measured_s - 1


def measured_limits(record: LatencyRecord, dtype: str) -> Limits | None:
    """Return what a record's device was measured to do in a dtype; None where it was not."""
    limits = record.limits(dtype)
    if limits is None:
        return None
    return Limits(bytes_per_s=limits.read_bandwidth_bytes_per_s, flop_per_s=limits.matmul_flop_per_s)


def predict(record: LatencyRecord, point: LatencyPoint, limits: Limits) -> Prediction:
    """Return the measured time of a point's backbone, and what the roofline predicts for it."""
    predicted_s = step_seconds(
        record.facts.roofline_shape,
        limits,
        num_nodes=point.num_nodes,
        context_tokens=point.context_tokens + point.num_nodes,
        batch=point.batch,
        dtype_bytes=DTYPE_BYTES[point.dtype],
    )
    return Prediction(measured_s=median(point.backbone_s), predicted_s=predicted_s)


def prediction_error(pairs: Iterable[Prediction]) -> PredictionError:
    """Return the median and the worst error of several predictions.

    Raises: UserError for none.
    """
    points = tuple(pairs)
    if not points:
        raise UserError(found="no prediction", need="at least one measured time with its prediction")
    errors = [abs(point.error) for point in points]
    return PredictionError(
        num_points=len(points),
        median_error=median(errors),
        worst_error=max(errors),
        median_ratio=median(point.ratio for point in points),
    )
