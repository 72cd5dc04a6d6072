"""How many numbers of a model a decoding step reads: of a mixture's experts those that serve one token."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

# Under these names configurations tell both counts; most also know each other's.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts")
_NUM_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")


def step_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Return how many numbers of each parameter, by name, one token's pass reads and multiplies.

    Of a mixture's experts that is the share that a token is sent to. Many tokens may be sent to more of them,
    so for these it is the least that is read; each token is multiplied with so many in any case. Experts that
    every token goes through count whole.
    """
    share = chosen_share(model.config)
    return {
        name: int(parameter.numel() * share) if ".experts." in name else parameter.numel()
        for name, parameter in model.named_parameters()
    }


def chosen_share(config: Any) -> float:
    """Return the share of its experts that a mixture sends a token to; 1 where it tells not both counts."""
    inner = config.get_text_config()
    counted, chosen = (
        next((found for name in names if isinstance(found := getattr(inner, name, None), int)), None)
        for names in (_NUM_EXPERTS, _NUM_CHOSEN)
    )
    return min(chosen / counted, 1.0) if counted and chosen else 1.0
