"""Which models can follow a draft tree, decided when a backbone is made, and what their layers really do.

The signs are a model's class, configuration and signature; a first pass over four tokens proves them.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_impl.errors import UserError

if TYPE_CHECKING:
    from medusa_impl.engine.backbone import Backbone

# Models that take their position biases, or an own mask, from the order of the cache's slots. In a tree this
# order is not that of the positions. MPT and GPT-Neo would give wrong logits without any error.
_ALIBI_MODEL_TYPES = {"bloom", "mpt"}
_SLOT_MASK_MODEL_TYPES = {"gpt_neo"}
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NEEDED_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
_NEED = "a model with rotary or learned positions and full or sliding-window attention"
# A tree of one root and two children after a prefix of two tokens, and the path to the second child.
_PREFIX, _ROOT, _CHILDREN = (0, 1), 2, (3, 4)
_NUM_POSITIONS = len(_PREFIX) + 2
# The largest part of the logits' spread by which tree and path may differ in float32. Rounding stays far
# below, TF32 too; a position or mask that is wrong does not.
_TOLERANCE = 0.05


def check_follows_trees(model: PreTrainedModel) -> None:
    """Refuse what class, configuration and signature show to be unable to follow a tree.

    Raises: UserError that names the model type and the reason.
    """
    config = model.config
    text_config = config.get_text_config()
    missing = _NEEDED_ARGUMENTS - set(inspect.signature(model.forward).parameters)
    strange = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if text_config is not config:
        found = f"that wraps a text model of type {text_config.model_type!r} among others"
        reason = "save the text model alone, in a folder of its own"
    elif config.model_type in _ALIBI_MODEL_TYPES or getattr(config, "alibi", False):
        found = "with ALiBi position biases"
        reason = "its biases would follow cache slots instead of tree depths"
    elif config.model_type in _SLOT_MASK_MODEL_TYPES:
        found = "with a causal mask of its own"
        reason = "its mask would follow cache slots instead of tree depths"
    elif missing:
        found = f"that takes no {', '.join(sorted(missing))}"
        reason = "a tree needs explicit positions and masks and a key-value cache"
    elif strange:
        found = f"with layers of type {', '.join(sorted(strange))}"
        reason = "a tree needs attention that obeys a 4-D mask in every layer"
    elif getattr(config, "kv_lora_rank", None):
        found = "with multi-head latent attention (MLA)"
        reason = "its keys and values differ in size, and the cache keeps them as one"
    else:
        return
    raise _refusal(model, found, reason)


def check_first_pass(backbone: Backbone) -> None:
    """Run a tree of three nodes after two tokens, and one of its paths as plain text.

    Raises: UserError if a pass fails, if the LM head reads other numbers than the decoder's last states or,
    in float32, if tree and text give other logits for the same token.
    """
    if backbone.max_positions is not None and backbone.max_positions < _NUM_POSITIONS:
        return
    try:
        of_tree, of_path, width = _tree_and_path(backbone)
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a family's own code raises
        text = (str(error).splitlines() or [""])[0]
        raise _refusal(
            backbone.model,
            f"whose pass over a small tree fails ({type(error).__name__}: {text})",
            "its code does not take the mask, the positions or the cache that a tree needs",
        ) from error
    if width != backbone.hidden_size:
        raise _refusal(
            backbone.model,
            f"whose LM head reads {backbone.hidden_size} numbers, not the decoder's {width}",
            "draft heads put the decoder's last state into the LM head's weights",
        )
    spread = float(of_path.max() - of_path.min())
    # Where plain text has no finite logits either, the weights are at fault: not this check's matter.
    agrees = float((of_tree - of_path).abs().max()) <= _TOLERANCE * spread  # not so where the tree gives NaN
    if backbone.dtype == torch.float32 and math.isfinite(spread) and not agrees:
        raise _refusal(
            backbone.model,
            "that gives a token other logits in a tree than in plain text",
            "its attention does not follow the mask and the positions that a tree needs",
        )


def _tree_and_path(backbone: Backbone) -> tuple[Tensor, Tensor, int]:
    """Return the logits of the second child in the tree and at the end of its path, and the states' size.

    Shapes: logits `[V]` each.
    """
    vocab_size, device = backbone.vocab_size, backbone.device

    def tokens(*ids: int) -> Tensor:
        return torch.tensor([token % vocab_size for token in ids], device=device)

    cache = backbone.new_cache(batch_size=2, max_length=len(_PREFIX) + 3)
    for row in range(2):  # some code takes one row only
        backbone.prefill(tokens(*_PREFIX), cache=cache, row=row)
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    depths = torch.tensor([0, 1, 1], device=device)
    nodes = tokens(_ROOT, *_CHILDREN).expand(2, -1)
    tree = backbone.forward(nodes, depths=depths, visible=visible, cache=cache)
    of_tree = tree.logits[0, 2].clone()
    path = backbone.read(
        tokens(*_PREFIX, _ROOT, _CHILDREN[1]), cache=backbone.new_cache(batch_size=1, max_length=4)
    )
    return of_tree, path.logits[0, -1], path.hidden.shape[-1]


def sliding_window(model: PreTrainedModel) -> int | None:
    """Return the window of the layers that have one, in tokens, or None.

    A window in the configuration counts only if the model's own code masks by it: Llama's, for one, ignores
    the field, and some configurations name a window that none of their layers uses.
    """
    config = model.config
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return None
    module = inspect.getmodule(type(model))
    source = inspect.getsource(module) if module is not None else ""
    return window if "create_sliding_window_causal_mask" in source else None


def position_limit(config: Any) -> int | None:
    """Return the number of positions that a model may be given, or None where it names none.

    A model with longrope (the Phi-3 family) changes all its frequencies once a pass reaches beyond the
    original length, those of kept tokens excepted. A tree or a batch would reach it earlier than plain
    decoding, so such a model ends at its original length.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 0) or None
    original = switch_position(config)
    return limit if original is None else min(limit or original, original)


def switch_position(config: Any) -> int | None:
    """Return the length from which on longrope has other frequencies, or None for every other rule."""
    rope = getattr(config, "rope_parameters", None) or {}
    # models with several layer types have one table for each
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    for table in tables:
        if table.get("rope_type", table.get("type")) == "longrope":
            original = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(original) if original else None
    return None


def has_learned_positions(model: PreTrainedModel, limit: int | None) -> bool:
    """Return whether a table holds the model's positions, so that no position beyond it exists."""
    tokens = model.get_input_embeddings()
    return limit is not None and any(
        isinstance(module, nn.Embedding) and module is not tokens and 0 <= module.num_embeddings - limit <= 2
        for module in model.modules()
    )


def _refusal(model: PreTrainedModel, found: str, reason: str) -> UserError:
    return UserError(
        found=f"model type {model.config.model_type!r} {found}",
        need=_NEED,
        where="the backbone",
        do=f"choose another model: {reason}",
    )
