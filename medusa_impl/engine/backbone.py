"""Any causal language model of transformers as a Medusa backbone, through its public interface only.

One forward pass takes N new tokens a row, with explicit positions and a 4-D additive mask, and returns the
logits and the last hidden states of all of them: a prompt, a single token and a draft tree differ in the mask
alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.sections import Section, no_section
from medusa_impl.errors import UserError

_ALIBI_MODEL_TYPES = {"bloom", "mpt"}  # MPT would be silently wrong
_SLOT_MASK_MODEL_TYPES = {"gpt_neo"}  # masks by cache slot behind the mask that it is given: silently wrong
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NEEDED_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
GROUPED_ATTENTION = "medusa_grouped_sdpa"


def grouped_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Masked attention that reads each key-value head once: the query heads of a group are stacked as further
    query rows.

    Stock transformers repeats keys and values for every query head as soon as a step has more than one token
    and a mask.
    Shapes: query `[B, Hq, N, d]`, key and value `[B, Hkv, T, d]`, mask `[B, 1, N, T]`; returns `[B, N, Hq,
    d]`.
    """
    batch, num_heads, num_new, _ = query.shape
    groups = num_heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * num_new, query.shape[-1])
    mask = attention_mask
    if mask is not None and groups > 1:
        mask = (
            mask[:, :, None]
            .expand(-1, -1, groups, -1, -1)
            .reshape(mask.shape[0], 1, groups * num_new, mask.shape[-1])
        )
    mixed = scaled_dot_product_attention(rows, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return mixed.reshape(batch, num_heads, num_new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_sdpa_attention)


@dataclass(frozen=True)
class BackboneOutput:
    """What one forward pass yields; valid until the next one, which may write into the same memory.

    Shapes: logits `[B, N, V]` (or of the last tokens only), hidden `[B, N, H]`, the states that the LM head
    reads.
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class StepInputs:
    """What the model's own call reads besides the cache.

    Shapes: token_ids and position_ids `[B, N]`; mask `[B, 1, N, view_length]`, or one for each type of layer.
    """

    token_ids: Tensor
    position_ids: Tensor
    mask: Tensor | dict[str, Tensor]
    num_logits: int


ModelCall = Callable[[StepInputs, TreeCache], BackboneOutput]


class _HiddenTap:
    """A forward hook that holds the decoder's last output, once for a model however many backbones stand on
    it.
    """

    hidden: Tensor

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state

    @staticmethod
    def on(decoder: nn.Module) -> _HiddenTap:
        for hook in decoder._forward_hooks.values():
            if isinstance(hook, _HiddenTap):
                return hook
        tap = _HiddenTap()
        decoder.register_forward_hook(tap)
        return tap


class Backbone:
    """A causal LM in evaluation mode that scores N new tokens a row on top of a `TreeCache`.

    Raises: UserError for architectures that cannot follow a tree through the public interface: ALiBi,
    recurrent layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        _check_follows_trees(model)
        model.eval()
        self.model = model
        implementation = config._attn_implementation
        # ours from an earlier Backbone
        self._stock_attention: str = "sdpa" if implementation == GROUPED_ATTENTION else implementation
        if getattr(config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")
        elif implementation == "sdpa":
            model.set_attn_implementation(GROUPED_ATTENTION)
        self.lm_head: nn.Module = model.get_output_embeddings()
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(self.lm_head.get_parameter("weight").shape[1])
        self.vocab_size = int(config.vocab_size)
        self.max_positions = int(getattr(config, "max_position_embeddings", 0)) or None
        window, layer_types = (
            getattr(config, "sliding_window", None),
            set(getattr(config, "layer_types", None) or ()),
        )
        if "full_attention" in layer_types and len(layer_types) == 1:
            window = None
        self.sliding_window: int | None = window
        self._mixed_layers = len(layer_types) > 1
        # the base model but for OPT, whose LM goes past its base model to the decoder inside
        decoder = model.get_decoder()
        self._tap = _HiddenTap.on(decoder)
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.step_call: ModelCall = self.call_model

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    def new_cache(self, *, batch_size: int, max_length: int) -> TreeCache:
        """Return an empty cache for `batch_size` rows of at most `max_length` tokens, draft nodes
        included.
        """
        return TreeCache(
            num_layers=self.num_layers, batch_size=batch_size, max_length=max_length, device=self.device
        )

    def check_positions(self, *, prompt_tokens: int, max_new_tokens: int, depth: int) -> None:
        """Refuse a generation whose last draft node would lie beyond the positions that the model knows."""
        needed = prompt_tokens + max_new_tokens + depth
        if self.max_positions is not None and needed > self.max_positions:
            raise UserError(
                found=f"a prompt of {prompt_tokens} tokens with a budget of {max_new_tokens} and a tree of "
                f"depth {depth}",
                need=f"at most {self.max_positions} positions",
                where="the backbone",
                do="shorten the prompt or lower the token budget",
            )

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        *,
        depths: Tensor,
        visible: Tensor,
        cache: TreeCache,
        num_logits: int = 0,
        section: Section = no_section,
    ) -> BackboneOutput:
        """Score N new tokens in every row and write their keys and values behind the kept prefix (nothing is
        kept yet).

        This is the step that both arms take; `step_call` is the model's call in the engine's mode.
        Shapes: token_ids `[B, N]`; depths `[N]`, position minus kept length; visible `[N, N]` boolean,
        whether node n sees node m (itself included). The logits are those of the last `num_logits` tokens, of
        all by default. `section` sees the model's own call as `backbone`, what is prepared for it as `mask`.
        Paper: Section 2.1.2, tree attention.
        """
        with section("mask"):
            inputs = self._inputs(
                token_ids, depths, visible, cache, rows=slice(0, cache.num_rows), num_logits=num_logits
            )
        with section("backbone"):
            return self.step_call(inputs, cache)

    @torch.inference_mode()
    def read(
        self, token_ids: Tensor, *, cache: TreeCache, row: int = 0, num_logits: int = 1
    ) -> BackboneOutput:
        """Run a text behind what one row has kept, keeping nothing of it; logits are those of its last
        `num_logits` tokens.

        A text's length is its own, so no fixed-shape mode applies.
        Shapes: token_ids `[T]`; logits `[1, num_logits, V]`, hidden `[1, T, H]`.
        """
        positions = torch.arange(token_ids.shape[0], device=self.device)
        visible = positions[:, None] >= positions[None, :]
        rows = slice(row, row + 1)
        inputs = self._inputs(
            token_ids[None].to(self.device), positions, visible, cache, rows=rows, num_logits=num_logits
        )
        return self.call_model(inputs, cache)

    def prefill(self, token_ids: Tensor, *, cache: TreeCache, row: int = 0) -> BackboneOutput:
        """Run one row's prompt and keep all of it; logits are those of its last token, hidden those of every
        token.

        Shapes: token_ids `[T]`; logits `[1, 1, V]`, hidden `[1, T, H]`.
        """
        output = self.read(token_ids, cache=cache, row=row)
        cache.keep_all(row=row, count=token_ids.shape[0])
        return output

    def call_model(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Call the model as it is, kernel by kernel."""
        output = self.model(
            input_ids=inputs.token_ids,
            attention_mask=inputs.mask,
            position_ids=inputs.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=inputs.num_logits,
        )
        return BackboneOutput(logits=output.logits, hidden=self._tap.hidden)

    def _inputs(
        self,
        token_ids: Tensor,
        depths: Tensor,
        visible: Tensor,
        cache: TreeCache,
        *,
        rows: slice,
        num_logits: int,
    ) -> StepInputs:
        view_length = cache.begin_step(num_new=token_ids.shape[1], rows=rows)
        lengths = cache.device_lengths[rows]
        return StepInputs(
            token_ids=token_ids,
            position_ids=lengths[:, None] + depths,
            mask=self._mask(lengths, depths, visible, cache.slots[:view_length]),
            num_logits=num_logits,
        )

    def _mask(
        self, lengths: Tensor, depths: Tensor, visible: Tensor, slots: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Additive 4-D mask `[B, 1, N, slots]`: 0 over the kept prefix and the visible nodes, the dtype's
        minimum elsewhere.

        A row with 3 kept tokens, a root r with children a and b, and one unused slot:

              k0 k1 k2  r  a  b  -
          r    0  0  0  0  .  .  .
          a    0  0  0  0  0  .  .
          b    0  0  0  0  .  0  .

        A sliding window of W hides, from kept tokens and from nodes (a long prompt is a chain of them), what
        lies W or more positions back.
        """
        column = (slots - (lengths[:, None] - 1)).clamp_(0, visible.shape[0] + 1)
        mask = self._node_table("full", visible, visible)[:, column].transpose(0, 1).unsqueeze(1)
        if self.sliding_window is None:
            return mask
        near = depths[:, None] - depths[None, :] < self.sliding_window
        windowed = (
            self._node_table("sliding", visible, visible & near)[:, column].transpose(0, 1).unsqueeze(1)
        )
        distance = (lengths[:, None] + depths[None, :])[:, None, :, None] - slots
        kept = (slots[None, :] < lengths[:, None])[:, None, None, :]
        windowed = windowed.masked_fill(kept & (distance >= self.sliding_window), self._hiding)
        return {"full_attention": mask, "sliding_attention": windowed} if self._mixed_layers else windowed

    @property
    def _hiding(self) -> float:
        return torch.finfo(self.dtype).min

    def _node_table(self, name: str, tree: Tensor, visible: Tensor) -> Tensor:
        """Additive columns `[N, N + 2]`: that of any kept token first, those of the nodes, that of any unused
        slot last.

        The table of the last `tree` is held: all steps of a generation share it.
        """
        if name not in self._tables or self._tables[name][0] is not tree:
            nodes = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(
                ~visible, self._hiding
            )
            table = torch.cat(
                [nodes.new_zeros(len(nodes), 1), nodes, nodes.new_full((len(nodes), 1), self._hiding)], dim=1
            )
            self._tables[name] = (tree, table)
        return self._tables[name][1]

    @contextlib.contextmanager
    def stock_attention(self) -> Iterator[None]:
        """Give the model its stock attention back for the length of a block."""
        ours = self.model.config._attn_implementation
        self.model.set_attn_implementation(self._stock_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(ours)


def _check_follows_trees(model: PreTrainedModel) -> None:
    config = model.config
    missing = _NEEDED_ARGUMENTS - set(inspect.signature(model.forward).parameters)
    strange = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if config.model_type in _ALIBI_MODEL_TYPES or getattr(config, "alibi", False):
        found, reason = (
            "with ALiBi position biases",
            "its biases would follow cache slots instead of tree depths",
        )
    elif config.model_type in _SLOT_MASK_MODEL_TYPES:
        found, reason = (
            "with a causal mask of its own",
            "its mask would follow cache slots instead of tree depths",
        )
    elif missing:
        found, reason = (
            f"that takes no {', '.join(sorted(missing))}",
            "a tree needs explicit positions and masks and a key-value cache",
        )
    elif strange:
        found, reason = (
            f"with layers of type {', '.join(sorted(strange))}",
            "a tree needs attention that obeys a 4-D mask in every layer",
        )
    else:
        return
    raise UserError(
        found=f"model type {config.model_type!r} {found}",
        need="a model with rotary or learned positions and full or sliding-window attention",
        where="the backbone",
        do=f"choose another model: {reason}",
    )
