"""The settings of a training, as frozen data. This module needs no torch.

Paper: Section 2.2 and Appendix B. The defaults are those of this project; the shipped recipes set their own.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HeadsLmHead = Literal["original", "adapted"]

HeadArchitecture = Literal["own", "shared"]
FeaturesWay = Literal["device", "file", "none"]

# More than any heads that were published (5 of 1 layer), and few enough to be built without a second thought.
MAX_HEADS, MAX_LAYERS = 64, 64
MAX_STEPS = 10**9  # of a training
MAX_SEED = 2**32 - 1  # the greatest that every generator takes
_MAX_ROWS = 10**8  # positions, sequences or tokens of one batch
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_Beta = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """The base of recipes and logs: validated once, never changed, no unknown key, no infinite number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def cosine_share(step: int, *, num_steps: int, warmup_steps: int, ramp_steps: int) -> float:
    """Return the share of its peak that a learning rate has at step 0 .. num_steps - 1.

    The rate rises linearly in the warm-up, then falls along half a cosine to 0. The warm-up has
    `warmup_steps` steps, and step i of it has the share (i + 1) / ramp_steps. With ramp_steps = warmup_steps
    its last step has the whole rate (Medusa-1); with one more, the first step after it (Medusa-2).
    """
    if step < warmup_steps:
        return (step + 1) / ramp_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


class Medusa1Settings(Frozen):
    """All settings that decide the result of Medusa-1 training, given the features.

    num_epochs, num_steps: the length of the training; exactly one of the two is set.
    subset_size: most steps compute the loss over this many frequent tokens, which is cheaper. The last
    `full_vocabulary_rate` of the steps use the whole vocabulary. None uses it in all steps.
    matmul_dtype: the type of the products with the unembeddings. Weights, softmax and optimiser stay in
    float32.
    features: where the backbone's states come from: kept on the `device`, mapped from a `file`, or `none`
    kept, so that the frozen backbone runs with the heads. `auto` takes the first of the three that fits. The
    first two give the same heads. The third has batches of whole answers, about as large, not of single
    positions: the same loss of every position, in another order.
    device: where the heads learn; `auto` is the GPU where there is one.
    max_length: the tokens at which a conversation is cut.

    Paper: Section 2.2.1; Appendix B has AdamW, a cosine schedule and a warm-up.
    Departs: a step has a number of positions, not of conversations. The default rate is for `shared` heads on
    the embedded model, found by one short trial for each of a few rates; it was not tried on `own` heads.
    """

    num_heads: int = Field(default=5, ge=1, le=MAX_HEADS)
    num_layers: int = Field(default=1, ge=1, le=MAX_LAYERS)
    architecture: HeadArchitecture = "shared"
    lambda_base: float = Field(default=0.8, gt=0)  # lambda_k = 0.8^k in Section 2.2.1
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    batch_positions: int = Field(default=1024, ge=1, le=_MAX_ROWS)
    num_epochs: float | None = Field(default=6.0, gt=0, le=MAX_STEPS)
    num_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    warmup_steps: int = Field(default=40, ge=0, le=MAX_STEPS)  # Appendix B, 7B and 13B
    subset_size: int | None = Field(default=8192, ge=1, le=_MAX_ROWS)
    full_vocabulary_rate: float = Field(default=0.1, ge=0, le=1)
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    features: Literal["auto"] | FeaturesWay = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_length: int = Field(default=2048, ge=2, le=_MAX_ROWS)
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_length(self) -> Medusa1Settings:
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError("set exactly one of num_epochs and num_steps; the other must be null")
        return self

    def steps_for(self, num_rows: int) -> int:
        """Return the number of steps over `num_rows` training rows."""
        return self.steps_of(steps_per_epoch(num_rows, batch_positions=self.batch_positions))

    def steps_of(self, batches_per_epoch: int) -> int:
        """Return the number of steps where an epoch has so many batches."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return max(1, round(self.num_epochs * batches_per_epoch))

    def subset_steps(self, num_steps: int) -> int:
        """Return how many of the steps compute the loss over a subset of the vocabulary, if there is one."""
        return num_steps - math.ceil(num_steps * self.full_vocabulary_rate)

    def learning_rate_at(self, step: int, *, num_steps: int) -> float:
        """Return the learning rate of step 0 .. num_steps - 1."""
        share = cosine_share(
            step, num_steps=num_steps, warmup_steps=self.warmup_steps, ramp_steps=self.warmup_steps
        )
        return self.learning_rate * share


def steps_per_epoch(num_rows: int, *, batch_positions: int) -> int:
    """Return the number of whole batches in `num_rows`, at least 1.

    The rows left over are not used in an epoch. They are other rows in each epoch, since the order changes.
    """
    return max(1, num_rows // batch_positions)


class LoraSettings(Frozen):
    """The settings of the backbone's LoRA adapter.

    targets: the names of the linear layers to adapt, or all of them but the LM head.
    lm_head: whether the LM head is adapted too.

    Paper: Appendix B: rank 32, alpha 16, dropout 0.05, on every linear layer and the LM head.
    """

    rank: int = Field(default=32, ge=1, le=65_536)
    alpha: int = Field(default=16, ge=1, le=1_000_000)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    lm_head: bool = True


class Medusa2Settings(Frozen):
    """All settings that decide the result of joint training, given model, heads and sequences.

    backbone: which part of the backbone learns.
    target: what the backbone's own loss compares it with, the corpus' tokens or the original model (by KL).
    heads_lm_head: which LM head shared heads read, in training and in every later use.
    warmup: `two_stage` trains the heads alone for the first `stage_rate` of the steps. `ramped` raises
    lambda_0 from 0 along `ramp`, over the first `ramp_rate` of the steps. `none`, with lambda_0 = 1 and one
    learning rate, is direct fine-tuning, the control of Table 2.
    schedule: one cosine over the `whole` run, or over `each_stage`, as the paper's two stages are separate
    trainings. The second stage then also starts with a new optimiser.
    batch_sequences, accumulation_steps: their product is the number of sequences of a step, however many
    processes share them.
    subset_size: restricts the heads' loss to the most frequent tokens.
    gradient_checkpointing: keeps only each layer's input, and runs the layer again for its gradients. This
    takes less memory and more time, and gives the same result.
    num_epochs, num_steps: the length of the training; exactly one of the two is set.

    Paper: Section 2.2.2, Appendix B.
    Departs: the paper says that the backbone is trained first. This is an error, as its first author
    confirmed (FasterDecoding/Medusa, issue 74): the heads are.
    """

    num_heads: int = Field(default=5, ge=1, le=MAX_HEADS)
    num_layers: int = Field(default=1, ge=1, le=MAX_LAYERS)
    architecture: HeadArchitecture = "shared"
    backbone: Literal["frozen", "lora", "full"] = "lora"
    lora: LoraSettings = LoraSettings()
    target: Literal["tokens", "original"] = "original"
    heads_lm_head: HeadsLmHead = "original"
    warmup: Literal["none", "two_stage", "ramped"] = "ramped"
    stage_rate: float = Field(default=0.5, gt=0, lt=1)
    ramp: Literal["sine", "linear", "constant"] = "sine"
    ramp_rate: float = Field(default=1.0, gt=0, le=1)
    lambda_0: float = Field(default=0.2, gt=0)  # Appendix B, 7B and 13B; 0.01 for 33B
    lambda_base: float = Field(default=0.8, gt=0)  # lambda_k = 0.8^k in Section 2.2.1
    heads_learning_rate: float = Field(default=2e-3, gt=0)  # Appendix B: 4 times the backbone's
    backbone_learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=40, ge=0, le=MAX_STEPS)  # Appendix B, 7B and 13B
    schedule: Literal["whole", "each_stage"] = "whole"
    max_gradient_norm: float = Field(default=1.0, gt=0)
    batch_sequences: int = Field(default=8, ge=1, le=_MAX_ROWS)
    accumulation_steps: int = Field(default=1, ge=1, le=_MAX_ROWS)
    max_length: int = Field(default=2048, ge=2, le=_MAX_ROWS)
    num_epochs: float | None = Field(default=None, gt=0, le=MAX_STEPS)
    num_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    quantisation: Literal["4bit"] | None = None
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False
    subset_size: int | None = Field(default=None, ge=1, le=_MAX_ROWS)
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self) -> Medusa2Settings:
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError("set exactly one of num_epochs and num_steps")
        if self.quantisation is not None and self.backbone == "full":
            raise ValueError("a quantised backbone cannot be trained in full; take lora or frozen")
        if self.heads_lm_head == "adapted" and self.subset_size is not None:
            raise ValueError(
                "a subset of the vocabulary needs a frozen LM head: heads_lm_head must be original"
            )
        return self

    def loss_weights(self, step: int, *, num_steps: int) -> tuple[float, float]:
        """Return the weights of L_LM and of L1 at step 0 .. num_steps - 1.

        While only the heads learn, these are 0 and 1; later 1 and lambda_0. The sine ramp is a quarter of a
        period, from 0 to lambda_0.

        Paper: Section 2.2.2, where the loss is L_LM + lambda_0 L1.
        """
        if self.backbone == "frozen" or step < self.first_backbone_step(num_steps):
            return 0.0, 1.0
        if self.warmup == "ramped" and self.ramp != "constant":
            risen = min(1.0, step / num_steps / self.ramp_rate)
            return 1.0, self.lambda_0 * (math.sin(0.5 * math.pi * risen) if self.ramp == "sine" else risen)
        return 1.0, self.lambda_0

    def learning_rates(self, step: int, *, num_steps: int) -> tuple[float, float]:
        """Return the learning rates of heads and backbone at step 0 .. num_steps - 1.

        Each rises in a warm-up and falls along half a cosine. That of the backbone begins with its own first
        step.
        """
        start = self.first_backbone_step(num_steps)
        first, last = 0, num_steps
        if self.schedule == "each_stage" and start:
            first, last = (0, start) if step < start else (start, num_steps)
        heads = self.heads_learning_rate * self._share(step - first, num_steps=last - first)
        if self.backbone == "frozen" or step < start:
            return heads, 0.0
        backbone = self.backbone_learning_rate * self._share(step - start, num_steps=num_steps - start)
        return heads, backbone

    def _share(self, step: int, *, num_steps: int) -> float:
        return cosine_share(
            step, num_steps=num_steps, warmup_steps=self.warmup_steps, ramp_steps=self.warmup_steps + 1
        )

    def first_backbone_step(self, num_steps: int) -> int:
        """Return the first step in which the backbone learns."""
        # In floating point 0.28 * 100 is slightly more than 28; unrounded, it would become 29.
        return math.ceil(round(self.stage_rate * num_steps, 6)) if self.warmup == "two_stage" else 0
