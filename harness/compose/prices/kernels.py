"""A step's time with what the roofline leaves out: launches, small kernels, and limits that are not reached.

The roofline asks only how many bytes and operations a matrix product needs. A real product is started first,
has small kernels around it (norms, rotary positions, activations, copies), and reads at less than the full
bandwidth. So each product of a step takes

    operator_s + max(bytes / (product_share x bandwidth), operations / (arithmetic_share x throughput))

and attention likewise with its own share; a tree's step takes `tree_layer_s` more in each layer, for the
mask; and candidates, acceptance and bookkeeping are one constant a step. Small models are bound by the first
term, large ones by the second:

    seconds
      |                      /
      |                     /    arithmetic, at its attained share
      |___________________ /
      |  bytes, at their attained share
      |- - - - - - - - - - - -    the roofline's bytes
      |  operators x operator_s
      +----------------------- nodes

All shares are at most 1 and no time is negative, so no step is faster than the roofline. What the model does
not know: caches, clocks that fall under load, the steps in which kernels' sizes come, other programs.
"""

from __future__ import annotations

from harness.compose.roofline import StepWork, Work, heads_work, step_work
from harness.records.latency import DTYPE_BYTES
from harness.records.step_model import EngineCosts
from harness.specs.hardware import Limits
from harness.specs.latency import DtypeName, HeadsForm
from harness.specs.shapes import ModelShape

ROOFLINE = EngineCosts(
    operator_s=0,
    tree_layer_s=0,
    product_share=1,
    arithmetic_share=1,
    attention_share=1,
    tree_attention_share=1,
    vanilla_own_s=0,
    tree_own_s=0,
)


class KernelTimes:
    """The step times of one shape on one device, as the model has them.

    Units: all answers in seconds.
    """

    def __init__(
        self,
        shape: ModelShape,
        limits: Limits,
        *,
        costs: EngineCosts,
        heads: HeadsForm,
        dtype: DtypeName,
    ) -> None:
        self._shape, self._limits, self._costs, self._heads = shape, limits, costs, heads
        self._bytes = DTYPE_BYTES[dtype]

    def backbone_seconds(self, *, num_nodes: int, context_tokens: int, batch: int = 1) -> float:
        """Return the backbone's pass over `num_nodes` a row, after `context_tokens` kept ones.

        Raises: UserError on a count below 1.
        """
        costs = self._costs
        work = step_work(
            self._shape,
            num_nodes=num_nodes,
            context_tokens=context_tokens + num_nodes,
            batch=batch,
            dtype_bytes=self._bytes,
        )
        share = costs.attention_share if num_nodes == 1 else costs.tree_attention_share
        attention_s = sum(count * one.seconds(self._limits) for count, one in work.attention) / share
        mask_s = self._shape.num_layers * costs.tree_layer_s if num_nodes > 1 else 0.0
        launches_s = work.num_operators * costs.operator_s
        return launches_s + self._products_seconds(work) + attention_s + mask_s

    def heads_seconds(self, *, num_heads: int, batch: int = 1) -> float:
        """Return one evaluation of all draft heads, at one state a row.

        Raises: UserError on a batch below 1, or below 0 heads.
        """
        work = heads_work(
            self._shape,
            num_heads=num_heads,
            num_layers=self._heads.num_layers,
            architecture=self._heads.architecture,
            batch=batch,
            dtype_bytes=self._bytes,
        )
        return work.num_operators * self._costs.operator_s + self._products_seconds(work)

    def own_seconds(self, *, num_nodes: int) -> float:
        """Return what a step takes outside of backbone and heads."""
        return self._costs.vanilla_own_s if num_nodes == 1 else self._costs.tree_own_s

    def step_seconds(self, *, num_nodes: int, num_heads: int, context_tokens: int, batch: int = 1) -> float:
        """Return a whole step of the decoding loop."""
        return (
            self.backbone_seconds(num_nodes=num_nodes, context_tokens=context_tokens, batch=batch)
            + self.heads_seconds(num_heads=num_heads, batch=batch)
            + self.own_seconds(num_nodes=num_nodes)
        )

    def _products_seconds(self, work: StepWork) -> float:
        return sum(count * self._product_seconds(one) for count, one in work.products)

    def _product_seconds(self, one: Work) -> float:
        read_s = one.num_bytes / (self._costs.product_share * self._limits.bytes_per_s)
        return max(read_s, one.flop / (self._costs.arithmetic_share * self._limits.flop_per_s))
