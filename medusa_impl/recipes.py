"""What a training is told: its settings, as frozen data. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HeadsLmHead = Literal["original", "adapted"]

HeadArchitecture = Literal["own", "shared"]


class Frozen(BaseModel):
    """Base of recipes and logs: no change after validation, no unknown key, no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def cosine_share(step: int, *, num_steps: int, warmup_steps: int, ramp_steps: int) -> float:
    """Return the share of its peak that a learning rate has at step 0..num_steps - 1: a linear ramp, then
    half a cosine down to 0.

    `ramp_steps` is where the ramp would reach 1: with `warmup_steps` the last step of the warm-up has the
    whole rate (Medusa-1), with one more the first step after it (Medusa-2).
    """
    if step < warmup_steps:
        return (step + 1) / ramp_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


class Medusa1Recipe(Frozen):
    """Everything that decides what Medusa-1 training yields, given the features.

    Exactly one of `num_epochs` and `num_steps` is set. `subset_size` tokens serve as vocabulary until the
    last `full_vocabulary_rate` of the steps, which use all of it; None means all of it throughout.
    `matmul_dtype` is that of the two products with the shared unembedding; weights, softmax and optimiser
    stay float32.
    Paper: Appendix B trains with AdamW, cosine schedule and warm-up. Departs: a step is a number of
    positions, not of conversations, and the rate is set for `shared` heads of the embedded model, from one
    short trial a rate; it was not tried on `own` ones.
    """

    num_heads: int = Field(default=5, ge=1)
    num_layers: int = Field(default=1, ge=1)
    architecture: HeadArchitecture = "shared"
    lambda_base: float = Field(default=0.8, gt=0)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    batch_positions: int = Field(default=1024, ge=1)
    num_epochs: float | None = Field(default=6.0, gt=0)
    num_steps: int | None = Field(default=None, ge=1)
    warmup_steps: int = Field(default=40, ge=0)
    subset_size: int | None = Field(default=8192, ge=1)
    full_vocabulary_rate: float = Field(default=0.1, ge=0, le=1)
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> Medusa1Recipe:
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError("set exactly one of num_epochs and num_steps; the other must be null")
        return self

    def steps_for(self, num_rows: int) -> int:
        """Return the number of steps over `num_rows` training rows."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return max(
            1, round(self.num_epochs * steps_per_epoch(num_rows, batch_positions=self.batch_positions))
        )

    def learning_rate_at(self, step: int, *, num_steps: int) -> float:
        """Return the rate of step 0..num_steps - 1: linear warm-up, then half a cosine down to 0 after the
        last step.
        """
        share = cosine_share(
            step, num_steps=num_steps, warmup_steps=self.warmup_steps, ramp_steps=self.warmup_steps
        )
        return self.learning_rate * share


def steps_per_epoch(num_rows: int, *, batch_positions: int) -> int:
    """Return the number of whole batches in `num_rows`; the remainder, another one each epoch, is left
    out.
    """
    return max(1, num_rows // batch_positions)


class LoraRecipe(Frozen):
    """The backbone's adapter. `targets` are names of linear layers, or all but the LM head; `lm_head` says
    whether that one is adapted.

    Paper: Appendix B, rank 32, alpha 16, dropout 0.05 on every linear layer and the LM head.
    """

    rank: int = Field(default=32, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    lm_head: bool = True


class Medusa2Recipe(Frozen):
    """Everything that decides what joint training yields, given model, heads and sequences.

    `backbone`: what of it learns. `target`: what its own loss asks for, the corpus' tokens or the original
    model's law (KL).
    `warmup`: `two_stage` trains the heads alone for the first `stage_rate` of the steps; `ramped` lets
    lambda_0 rise from 0 along `ramp` over the first `ramp_rate` of them; `none` with lambda_0 = 1 and one
    learning rate is direct fine-tuning, the control of Table 2.
    `schedule`: one cosine over the `whole` run, or, for runs of two stages that the paper starts apart, one
    over `each_stage`, the second with an optimiser that knows nothing of the first. `batch_sequences` x
    `accumulation_steps` sequences make a step, however many processes share them.
    `heads_lm_head`: which LM head shared heads read, while training and ever after. `subset_size` restricts
    the heads' vocabulary to the most frequent tokens. `gradient_checkpointing` keeps each layer's input alone
    and runs the layer again for its gradients: less memory, more time, the same result. Exactly one of
    `num_epochs` and `num_steps` is set.
    Paper: Section 2.2.2, Appendix B. The sentence that has the backbone trained first is an erratum: the
    heads are.
    """

    num_heads: int = Field(default=5, ge=1)
    num_layers: int = Field(default=1, ge=1)
    architecture: HeadArchitecture = "shared"
    backbone: Literal["frozen", "lora", "full"] = "lora"
    lora: LoraRecipe = LoraRecipe()
    target: Literal["tokens", "original"] = "original"
    heads_lm_head: HeadsLmHead = "original"
    warmup: Literal["none", "two_stage", "ramped"] = "ramped"
    stage_rate: float = Field(default=0.5, gt=0, lt=1)
    ramp: Literal["sine", "linear", "constant"] = "sine"
    ramp_rate: float = Field(default=1.0, gt=0, le=1)
    lambda_0: float = Field(default=0.2, gt=0)
    lambda_base: float = Field(default=0.8, gt=0)
    heads_learning_rate: float = Field(default=2e-3, gt=0)
    backbone_learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=40, ge=0)
    schedule: Literal["whole", "each_stage"] = "whole"
    max_gradient_norm: float = Field(default=1.0, gt=0)
    batch_sequences: int = Field(default=8, ge=1)
    accumulation_steps: int = Field(default=1, ge=1)
    max_length: int = Field(default=2048, ge=2)
    num_epochs: float | None = Field(default=None, gt=0)
    num_steps: int | None = Field(default=None, ge=1)
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    quantisation: Literal["4bit"] | None = None
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False
    subset_size: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Medusa2Recipe:
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
        """Return the weights of L_LM and of L1 at step 0..num_steps - 1.

        Paper: Section 2.2.2; the sine ramp is a quarter of a period, 0 to lambda_0.
        """
        if self.backbone == "frozen" or step < self.first_backbone_step(num_steps):
            return 0.0, 1.0
        if self.warmup == "ramped" and self.ramp != "constant":
            risen = min(1.0, step / num_steps / self.ramp_rate)
            return 1.0, self.lambda_0 * (math.sin(0.5 * math.pi * risen) if self.ramp == "sine" else risen)
        return 1.0, self.lambda_0

    def learning_rates(self, step: int, *, num_steps: int) -> tuple[float, float]:
        """Return the rates of heads and backbone at step 0..num_steps - 1: linear warm-up, then half a cosine
        down to 0.

        The backbone's begins where its own training does.
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
        # 0.28 x 100 is 28, not a hair more
        return math.ceil(round(self.stage_rate * num_steps, 6)) if self.warmup == "two_stage" else 0
