"""Medusa-2: heads and backbone trained together, after the heads have been warmed up.

    L = L_LM + lambda_0 L1

L1 is the heads' loss of Medusa-1. L_LM keeps the backbone as good as it was. It is the cross-entropy on the
tokens, or, under self-distillation, KL(original || trained): the divergence from the original model. The
original is the same model with its adapter switched off.

    tokens --> backbone with adapter --> states --> LM head ------> L_LM <-- original's logits, or tokens
                                           |
                                           `------> heads --------> L1       gradients reach the backbone

Paper: Sections 2.2.2 and 2.3.2, Appendix B.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from medusa_impl.checkpoints.adapter import add_adapter
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.losses import (
    DEFAULT_LOGITS_BYTES,
    NO_TARGET,
    TokenSubset,
    head_weights,
    medusa1_loss,
    rank_counts,
)
from medusa_impl.training.sequences import answer_targets


def checkpoint_layers(model: Any) -> None:
    """Have each layer keep only its input in training, and run again when its gradients are computed.

    The second run draws the same dropout masks as the first.
    """
    # transformers has renamed the method; the old name disappears with version 6.
    name = (
        "activation_checkpointing_enable"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing_enable"
    )
    getattr(model, name)({"use_reentrant": False})


class MedusaTrainingModel(nn.Module):
    """Backbone and heads as one module with one loss, which a trainer can train.

    `forward` returns the loss of a batch, and sums for the log. The teacher of self-distillation is the
    original model: the same weights with the adapter off, or, if the whole backbone is trained, a frozen
    copy.

    Raises: UserError for a model whose logits are not those of its LM head on its last hidden states, because
    they are soft-capped or scaled.
    Paper: Section 2.2.2.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: MedusaHeads,
        *,
        recipe: Medusa2Settings,
        subset: TokenSubset | None = None,
    ) -> None:
        super().__init__()
        check_plain_lm_head(model)
        self.recipe = recipe
        self.heads = heads.float()  # small updates of new weights would be lost in half precision
        model.requires_grad_(recipe.backbone == "full")
        # An adapter can be switched off; weights that are trained themselves cannot.
        needs_copy = recipe.backbone == "full" and (
            recipe.target == "original" or recipe.heads_lm_head == "original"
        )
        self.original_model: Any = copy.deepcopy(model).requires_grad_(False) if needs_copy else None
        self.backbone: Any = add_adapter(model, recipe.lora) if recipe.backbone == "lora" else model
        if recipe.gradient_checkpointing:
            checkpoint_layers(model)
        if subset is not None:  # buffers move together with the model when it changes its device
            subset = subset.to(self.original_lm_head.weight.device)
            self.register_buffer("_subset_token_ids", subset.token_ids, persistent=False)
            self.register_buffer("_subset_local_ids", subset.local_ids, persistent=False)
            self.register_buffer(
                "_subset_weight", self.original_lm_head.weight.detach()[subset.token_ids], persistent=False
            )
        self.lambdas = head_weights(num_heads=heads.num_heads, lambda_base=recipe.lambda_base)
        layers = {type(module).__name__ for module in model.modules()}
        # The layers that FSDP shards and gathers as one unit.
        self._no_split_modules = sorted(layers & set(model._no_split_modules or ()))

    @property
    def model(self) -> PreTrainedModel:
        """Return the backbone itself, which contains the layers of the adapter."""
        base: PreTrainedModel = (
            self.backbone.get_base_model() if self.recipe.backbone == "lora" else self.backbone
        )
        return base

    @property
    def original_lm_head(self) -> Any:
        """Return the LM head of the original model, a linear layer.

        With an adapter it is the layer that the adapter wraps. If the backbone is trained in full it belongs
        to the copy, if it is frozen to the backbone itself.
        """
        lm_head: Any = (
            self.model if self.original_model is None else self.original_model
        ).get_output_embeddings()
        return getattr(lm_head, "base_layer", lm_head)

    @property
    def subset(self) -> TokenSubset | None:
        """Return the vocabulary that the heads are restricted to, on the model's device, or None."""
        buffers = dict(self.named_buffers(recurse=False))
        return TokenSubset(buffers["_subset_token_ids"], buffers["_subset_local_ids"]) if buffers else None

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return all parameters of the heads, and all those of the backbone that learn."""
        return list(self.heads.parameters()), [
            parameter for parameter in self.backbone.parameters() if parameter.requires_grad
        ]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        *,
        backbone_weight: float,
        heads_weight: float,
        num_items: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss` = backbone_weight L_LM + heads_weight L1, and sums for the log.

        Both terms are divided by the same number of positions, which is `num_items` if this is one part of a
        batch. If `backbone_weight` is 0, L_LM is not computed, and the backbone runs without gradients. L1 is
        always computed, for the log.

        Shapes: input_ids, attention_mask and labels `[B, T]`; sums: backbone_loss, agreements and positions
        scalar, head_losses and head_targets `[K]`, head_ranks `[K, R]`.
        Paper: Section 2.2.2.
        """
        # Autocast is switched on here and not by the launcher, since accelerate leaves it out under FSDP.
        with torch.autocast(
            input_ids.device.type, dtype=torch.bfloat16, enabled=self.recipe.autocast is not None
        ):
            targets = answer_targets(labels, num_heads=self.heads.num_heads).flatten(0, 1)
            # Only positions with a target go on: prompts and padding cost no logits.
            rows = (targets[:, 0] != NO_TARGET).nonzero().squeeze(1)
            targets = targets[rows]
            count = len(rows) if num_items is None else num_items
            with contextlib.nullcontext() if backbone_weight else torch.no_grad():
                states = self._hidden(self.model, input_ids, attention_mask).flatten(0, 1)[rows]
            loss = states.new_zeros(())
            sums: dict[str, Tensor] = {"positions": torch.tensor(len(rows), device=states.device)}
            if backbone_weight:
                backbone_sum, agreements = self._backbone_loss(
                    states, targets[:, 0], input_ids, attention_mask, rows
                )
                loss = loss + backbone_weight * backbone_sum / count
                sums |= {"backbone_loss": backbone_sum.detach(), "agreements": agreements}
            heads = self._heads_loss(states.float(), targets[:, 1:], count)
            return {"loss": loss + heads_weight * heads.pop("loss"), **sums, **heads}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the parameters that learn; the frozen ones are the original model's and may be missing.

        Raises: RuntimeError if a parameter that learns is missing, or a tensor is unknown.
        """
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if strict and (wrong := sorted(learning & set(found.missing_keys)) + found.unexpected_keys):
            raise RuntimeError(f"tensors that only the checkpoint or the model has: {wrong[:3]}")
        return found

    @contextlib.contextmanager
    def teacher(self) -> Iterator[PreTrainedModel]:
        """Lend the original model, with its adapter off, without dropout and without gradients.

        Afterwards everything is as it was.
        """
        if self.recipe.backbone == "full":
            with torch.no_grad():
                yield self.original_model.eval()
            return
        # peft switches gradients on for the whole adapter when it is enabled again, so remember which learnt.
        learning = {name: parameter.requires_grad for name, parameter in self.backbone.named_parameters()}
        training = self.backbone.training
        off = self.backbone.disable_adapter() if self.recipe.backbone == "lora" else contextlib.nullcontext()
        try:
            with torch.no_grad(), off:
                self.backbone.eval()
                yield self.model
        finally:
            self.backbone.train(training)
            for name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_(learning[name])

    def _hidden(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The decoder alone: the model's own forward pass would compute the logits of all positions.
        states: Tensor = model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states

    def _backbone_loss(
        self, states: Tensor, targets: Tensor, input_ids: Tensor, attention_mask: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of L_LM over the positions, and at how many of them the first choices agree.

        The model's first choice is compared with the teacher's under self-distillation, else with the token.

        Shapes: states `[R, H]`, targets and rows `[R]`; results scalar.
        """
        lm_head: Any = self.model.get_output_embeddings()
        loss_of: Callable[..., tuple[Tensor, Tensor]]
        if self.recipe.target == "original":
            with self.teacher() as original:
                references = self._hidden(original, input_ids, attention_mask).flatten(0, 1)[rows]
            unembedding, loss_of = self.original_lm_head, _divergence
        else:
            references, unembedding, loss_of = targets.long(), None, _cross_entropy
        total, agreements = (
            states.new_zeros((), dtype=torch.float32),
            torch.zeros((), dtype=torch.long, device=states.device),
        )
        # The checkpoint drops a chunk's logits after the forward pass and computes them again for gradients.
        for part, wanted in zip(
            torch.split(states, self._chunk_rows()), torch.split(references, self._chunk_rows()), strict=True
        ):
            part_sum, ranks = checkpoint(loss_of, lm_head, part, wanted, unembedding, use_reentrant=False)
            total, agreements = total + part_sum, agreements + (ranks == 0).sum()
        return total, agreements

    def _heads_loss(self, states: Tensor, targets: Tensor, count: Tensor | int) -> dict[str, Tensor]:
        """Return Eq. 1 as `loss`, and the sums for the log.

        Shapes: states `[R, H]`, targets `[R, K]`.
        """
        shared_and_adapted = self.heads.architecture == "shared" and self.recipe.heads_lm_head == "adapted"
        if shared_and_adapted:
            return self._adapted_heads_loss(states, targets, count)
        subset = self.subset
        result = medusa1_loss(
            states,
            targets if subset is None else subset.localise(targets),
            heads=self.heads,
            lm_head_weight=self.original_lm_head.weight.detach()
            if subset is None
            else self.get_buffer("_subset_weight"),
            lambdas=self.lambdas,
            subset=subset,
            num_positions=int(count),
        )
        return {
            "loss": result.loss,
            "head_losses": result.loss_sums,
            "head_targets": result.num_targets,
            "head_ranks": result.rank_hits,
        }

    def _adapted_heads_loss(self, states: Tensor, targets: Tensor, count: Tensor | int) -> dict[str, Tensor]:
        """Return the same for shared heads that read the LM head in training.

        The LM head's adapter gets the heads' gradients too, so its weight is not frozen, and `medusa1_loss`
        does not apply.
        """
        lm_head: Any = self.model.get_output_embeddings()
        head_states = self.heads.states(states)
        loss, size = states.new_zeros(()), self._chunk_rows()
        sums, ranks = [], []
        for head, weight in enumerate(self.lambdas):
            kept = targets[:, head] != NO_TARGET
            head_sum, head_ranks = states.new_zeros(()), []
            for part, wanted in zip(
                torch.split(head_states[kept, head], size),
                torch.split(targets[kept, head].long(), size),
                strict=True,
            ):
                part_sum, part_ranks = checkpoint(
                    _cross_entropy, lm_head, part, wanted, None, use_reentrant=False
                )
                head_sum = head_sum + part_sum
                head_ranks.append(part_ranks)
            loss = loss + weight * head_sum / count
            sums.append(head_sum.detach().double())
            ranks.append(torch.cat(head_ranks))
        groups = torch.cat([torch.full_like(head_ranks, head) for head, head_ranks in enumerate(ranks)])
        return {
            "loss": loss,
            "head_losses": torch.stack(sums),
            "head_targets": torch.tensor([len(head_ranks) for head_ranks in ranks], device=states.device),
            "head_ranks": rank_counts(torch.cat(ranks), groups, num_heads=len(ranks)),
        }

    def _chunk_rows(self) -> int:
        return max(1, DEFAULT_LOGITS_BYTES // (4 * self.heads.vocab_size))


def _cross_entropy(lm_head: nn.Module, states: Tensor, targets: Tensor, _: None) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy on token ids, and the rank of each: how many logits exceed its own.

    Shapes: states `[R, H]`, targets `[R]`; results scalar and `[R]`.
    """
    logits = _logits(lm_head, states)
    return cross_entropy(logits, targets, reduction="sum"), _ranks(logits, targets)


def _divergence(
    lm_head: nn.Module, states: Tensor, original_states: Tensor, original_lm_head: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return the summed KL(original || trained), and the rank of the original's first choice.

    The rank is the number of the trained model's logits that exceed that of this token. The original's logits
    are computed here, within the checkpoint, so no more than one chunk of either model's is ever in memory.

    Shapes: states and original_states `[R, H]`; results scalar and `[R]`.
    """
    logits = _logits(lm_head, states)
    with torch.no_grad():
        original_logits = _logits(original_lm_head, original_states)
        best, wanted = original_logits.argmax(-1), log_softmax(original_logits, -1)
    return (wanted.exp() * (wanted - log_softmax(logits, -1))).sum(), _ranks(logits, best)


def _logits(lm_head: nn.Module, states: Tensor) -> Tensor:
    logits: Tensor = lm_head(states.to(next(lm_head.parameters()).dtype))
    return logits.float()


@torch.no_grad()
def _ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    return (logits > logits.gather(1, token_ids[:, None])).sum(1)


def check_plain_lm_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not simply its LM head on its last hidden states.

    The losses here compute logits in this way, and would train on wrong ones.

    Raises: UserError for soft-capped or scaled logits.
    """
    config: Any = model.config
    scaled: Sequence[str] = [
        name
        for name, neutral in (
            ("final_logit_softcapping", None),
            ("logit_scale", 1.0),
            ("logits_scaling", 1.0),
        )
        if getattr(config, name, neutral) not in (None, neutral)
    ]
    if scaled:
        raise UserError(
            found=f"model type {config.model_type!r} with {', '.join(scaled)}",
            need="logits that are the LM head's output on the last hidden states",
            where="Medusa-2 training",
            do="train Medusa-1 heads on it, or choose another model",
        )
