"""Any causal language model of transformers as a Medusa backbone, through its public interface only.

One forward pass takes N new tokens a row, with their positions and a 4-D attention mask, and returns the
logits and the last hidden states of all of them. To this pass a prompt, a single token and a draft tree are
the same thing: they differ in positions and mask alone.

    a prompt              chain of N nodes          each token sees all tokens before it
    vanilla decoding      one node                  it sees the prefix and itself
    Medusa decoding       tree of N nodes           each node sees the prefix, its ancestors and itself

Paper: Section 2.1.2, tree attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_impl.engine.attention import GROUPED_ATTENTION
from medusa_impl.engine.families import (
    check_first_pass,
    check_follows_trees,
    has_learned_positions,
    position_limit,
    sliding_window,
    switch_position,
)
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.launch import Launcher, run_directly
from medusa_impl.engine.sections import Section, no_section
from medusa_impl.engine.tree_mask import NodeTables, TreeMask
from medusa_impl.errors import UserError
from medusa_impl.tree import DraftTree


@dataclass(frozen=True)
class BackboneOutput:
    """The result of one forward pass.

    It is valid until the next pass, which may write into the same memory.

    Shapes: logits `[B, N, V]`, or of the last tokens only; hidden `[B, N, H]`, the states that the LM head
    reads.
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class StepInputs:
    """The inputs of the model's own call, without the cache.

    Shapes: token_ids and position_ids `[B, N]`; mask `[B, 1, N, view_length]`, or one mask a layer type, its
    rows repeated for each query head of a group where our attention runs (`grouped_sdpa_attention`).
    """

    token_ids: Tensor
    position_ids: Tensor
    mask: Tensor | dict[str, Tensor]
    num_logits: int


# Caches are as long as the next multiple of this, so that one serves many prompts; so many are kept.
_LENGTH_CLASS_TOKENS, _MOST_FREE_CACHES = 512, 2

ModelCall = Callable[[StepInputs, TreeCache], BackboneOutput]


class _HiddenTap:
    """A forward hook that holds the decoder's last hidden states.

    The model's own output holds either no hidden states or those of all layers, which is far too much.
    """

    hidden: Tensor

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state

    @staticmethod
    def on(decoder: nn.Module) -> tuple[_HiddenTap, bool]:
        """Return the tap of a decoder, and whether it is new.

        There is one for the model, however many `Backbone`s share it.
        """
        for hook in decoder._forward_hooks.values():
            if isinstance(hook, _HiddenTap):
                return hook, False
        tap = _HiddenTap()
        decoder.register_forward_hook(tap)
        return tap, True


class Backbone:
    """A causal LM in evaluation mode that scores N new tokens a row after those that a `TreeCache` keeps.

    The first backbone of a model proves itself on a tree of three nodes.

    Raises: UserError for architectures that cannot follow a tree through the public interface, such as
    position biases by ALiBi or recurrent layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        check_follows_trees(model)
        model.eval()
        self.model = model
        implementation = config._attn_implementation
        # A model that another Backbone has wrapped before has our attention already.
        self._stock_attention: str = "sdpa" if implementation == GROUPED_ATTENTION else implementation
        # SDPA, ours included, would ignore a cap on the attention logits; eager attention applies it.
        if getattr(config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")
        elif implementation == "sdpa":
            model.set_attn_implementation(GROUPED_ATTENTION)
        self.lm_head: nn.Module = model.get_output_embeddings()
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(self.lm_head.get_parameter("weight").shape[1])
        self.vocab_size = int(config.vocab_size)
        self._num_embeddings = int(model.get_input_embeddings().get_parameter("weight").shape[0])
        self.max_positions = position_limit(config)
        self._switches_rope = switch_position(config) is not None
        self._positions_end = self._switches_rope or has_learned_positions(model, self.max_positions)
        layer_types = set(getattr(config, "layer_types", None) or ())
        # Our attention needs the mask's rows once for each query head of a group: repeated here, not in
        # every layer.
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        is_ours = config._attn_implementation == GROUPED_ATTENTION
        self._mask_repeats = config.num_attention_heads // num_kv_heads if is_ours else 1
        self._mask = TreeMask(sliding_window=sliding_window(model), mixed_layers=len(layer_types) > 1)
        # Not `base_model`: OPT's LM calls the decoder inside its base model, and a hook on the base model
        # would never run.
        self._tap, is_first = _HiddenTap.on(model.get_decoder())
        # How the model's kernels are called, how `forward` calls the model, and how a step is launched.
        self.model_call: ModelCall = self.call_model
        self.step_call: ModelCall = self.call_model
        self.launch: Launcher = run_directly
        self._tables: tuple[Tensor, NodeTables] | None = None
        self._free_caches: list[TreeCache] = []
        if is_first:
            check_first_pass(self)

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating-point type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        device: torch.device = self.model.device
        return device

    def new_cache(self, *, batch_size: int, max_length: int) -> TreeCache:
        """Return an empty cache for rows of at most `max_length` tokens, draft nodes included."""
        return TreeCache(
            num_layers=self.num_layers, batch_size=batch_size, max_length=max_length, device=self.device
        )

    @contextlib.contextmanager
    def lent_cache(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, tree: DraftTree
    ) -> Iterator[TreeCache]:
        """Lend an empty cache that is long enough for these prompts, their new tokens and a draft tree.

        Caches of one length class are lent again, with all that was recorded over them.

        Raises: UserError if the model has too few positions for them.
        """
        longest = max(len(prompt) for prompt in prompts)
        self.check_positions(prompt_tokens=longest, max_new_tokens=max_new_tokens, depth=tree.depth)
        # A row may end in the middle of a path. Then it has kept up to `depth` tokens more than its budget,
        # and while other rows go on, the tree is still written after them.
        needed = longest + max_new_tokens + tree.depth + tree.num_nodes
        max_length = -(-needed // _LENGTH_CLASS_TOKENS) * _LENGTH_CLASS_TOKENS
        fitting = (
            cache
            for cache in self._free_caches
            if (cache.num_rows, cache.max_length) == (len(prompts), max_length)
        )
        cache = next(fitting, None)
        if cache is None:
            cache = self.new_cache(batch_size=len(prompts), max_length=max_length)
        else:
            self._free_caches.remove(cache)
            cache.reset()  # what is not finite in an unused slot would spoil the next text
        try:
            yield cache
        finally:
            self._free_caches = [cache, *self._free_caches][:_MOST_FREE_CACHES]

    def check_positions(self, *, prompt_tokens: int, max_new_tokens: int, depth: int) -> None:
        """Refuse a generation whose last draft node needs a position that the model does not have.

        Raises: UserError that names both numbers.
        """
        needed = prompt_tokens + max_new_tokens + depth
        if self.max_positions is not None and needed > self.max_positions:
            raise self._too_long(
                f"a prompt of {prompt_tokens} tokens with a budget of {max_new_tokens} and a tree of depth "
                f"{depth}"
            )

    def _too_long(self, found: str) -> UserError:
        after = " (the original length, from which on longrope changes)" if self._switches_rope else ""
        return UserError(
            found=found,
            need=f"at most {self.max_positions} positions{after}",
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
        """Return the logits and states of N new tokens in every row.

        Their keys and values are written after the kept prefix; which of them stay is decided by
        `TreeCache.keep`. Streams and probes take their steps here, decoding in `score`. `step_call` is the
        model's call in the engine's mode. The sections `mask` and `backbone` are the preparation and this
        call. The logits are those of the last `num_logits` tokens, by default of all.

        Shapes: token_ids `[B, N]`; depths `[N]`, a node's position minus the kept length; visible `[N, N]`
        boolean, whether node n sees node m.
        Raises: UserError if the tokens do not fit into the cache.
        Paper: Section 2.1.2, tree attention.
        """
        with section("mask"):
            cache.begin_step(num_new=token_ids.shape[1])
            inputs = self._inputs(
                token_ids, depths, self._tables_of(depths, visible), cache, num_logits=num_logits
            )
        with section("backbone"):
            return self.step_call(inputs, cache)

    def score(
        self,
        token_ids: Tensor,
        *,
        depths: Tensor,
        tables: NodeTables,
        cache: TreeCache,
        section: Section = no_section,
    ) -> BackboneOutput:
        """Return what `forward` does, of a step that the host has planned (`TreeCache.plan_step`).

        Nothing in it waits for the host or asks it: it can be a part of a recorded step.

        Shapes: as in `forward`; the tables are those of `node_tables`.
        """
        with section("mask"):
            cache.place_step(num_new=token_ids.shape[1])
            inputs = self._inputs(token_ids, depths, tables, cache, num_logits=0)
        with section("backbone"):
            return self.model_call(inputs, cache)

    def node_tables(self, depths: Tensor, visible: Tensor) -> NodeTables:
        """Return what the masks of all steps of a tree are made from.

        Shapes: depths `[N]`, visible `[N, N]`.
        """
        return self._mask.tables(depths, visible, dtype=self.dtype)

    def _tables_of(self, depths: Tensor, visible: Tensor) -> NodeTables:
        """Return the tables of a tree; those of the last one are kept."""
        if self._tables is None or self._tables[0] is not visible:
            self._tables = visible, self.node_tables(depths, visible)
        return self._tables[1]

    @torch.inference_mode()
    def read(
        self, token_ids: Tensor, *, cache: TreeCache, row: int = 0, num_logits: int = 1
    ) -> BackboneOutput:
        """Return logits and states of a text that follows the kept tokens of one row; keep nothing of it.

        The logits are those of its last `num_logits` tokens.

        Shapes: token_ids `[T]`; logits `[1, num_logits, V]`, hidden `[1, T, H]`.
        Raises: UserError if the text needs a position that a table of positions does not hold, or a token
        that the embedding does not.
        """
        if token_ids.device.type == "cpu" and int(token_ids.max()) >= self._num_embeddings:
            raise UserError(
                found=f"token id {int(token_ids.max())}",
                need=f"ids below {self._num_embeddings}, the rows of the embedding",
                where="a text",
                do="use the tokenizer that belongs to the model",
            )
        end = cache.lengths[row] + token_ids.shape[0]
        if self._positions_end and self.max_positions is not None and end > self.max_positions:
            raise self._too_long(f"a text of {end} tokens")
        # Texts have many lengths, so no mode that prepares for a fixed shape is used: the model is called
        # as it is.
        positions = torch.arange(token_ids.shape[0], device=self.device)
        visible = positions[:, None] >= positions[None, :]
        cache.begin_step(num_new=token_ids.shape[0], rows=slice(row, row + 1))
        inputs = self._inputs(
            token_ids[None].to(self.device),
            positions,
            self.node_tables(positions, visible),
            cache,
            num_logits=num_logits,
        )
        return self.call_model(inputs, cache)

    def prefill(self, token_ids: Tensor, *, cache: TreeCache, row: int = 0) -> BackboneOutput:
        """Return the last token's logits and every token's state of one row's prompt; keep all of it.

        Shapes: token_ids `[T]`; logits `[1, 1, V]`, hidden `[1, T, H]`.
        """
        output = self.read(token_ids, cache=cache, row=row)
        cache.keep_all(row=row, count=token_ids.shape[0])
        return output

    def prefill_rows(self, prompts: Sequence[Sequence[int]], *, cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Return the last logits of every prompt and the states that they come from; keep all prompts.

        Prompts differ in length, so each is read on its own, and no padding is needed.

        Shapes: results `[B, V]` and `[B, H]`.
        Raises: UserError where a logit is not finite; decoding would go on with text that means nothing.
        """
        outputs = [
            self.prefill(torch.tensor(prompt), cache=cache, row=row) for row, prompt in enumerate(prompts)
        ]
        logits = torch.cat([output.logits[:, -1] for output in outputs])
        if not bool(torch.isfinite(logits).all()):
            raise UserError(
                found="a logit that is not finite",
                need="finite logits",
                where="the model's pass over a prompt",
                do="use float32 or bfloat16, or leave the prompt out",
            )
        return logits, torch.cat([output.hidden[:, -1] for output in outputs])

    def call_model(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the output of the model as it is, called kernel by kernel."""
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
        self, token_ids: Tensor, depths: Tensor, tables: NodeTables, cache: TreeCache, *, num_logits: int
    ) -> StepInputs:
        """Return the inputs of the step that the cache has planned and placed."""
        lengths = cache.device_lengths[cache.plan.rows]
        position_ids = lengths[:, None] + depths
        if self._positions_end and self.max_positions is not None:
            # Only a row that has ended is written beyond the last position, while other rows go on. Its
            # positions matter to nobody, but would change longrope for all rows, or miss the table.
            position_ids = position_ids.clamp(max=self.max_positions - 1)
        mask = self._mask(lengths, depths, tables, slots=cache.slots[: cache.plan.view_length])
        if self._mask_repeats > 1:
            rows = (1, 1, self._mask_repeats, 1)
            mask = (
                {name: one.repeat(rows) for name, one in mask.items()}
                if isinstance(mask, dict)
                else mask.repeat(rows)
            )
        return StepInputs(token_ids=token_ids, position_ids=position_ids, mask=mask, num_logits=num_logits)

    @contextlib.contextmanager
    def stock_attention(self) -> Iterator[None]:
        """Give the model its stock attention back until the block ends."""
        ours = self.model.config._attn_implementation
        self.model.set_attn_implementation(self._stock_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(ours)
