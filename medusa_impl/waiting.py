"""Where the host may look at a value in the middle of a decoding step."""

from __future__ import annotations

import torch


def may_look(device: torch.device) -> bool:
    """Return whether the host may decide by values that lie on this device.

    On a CPU a look costs nothing and can save work. On a GPU the host would have to wait, and a step that is
    recorded once and replayed cannot ask anybody; there the same result is computed without a decision.
    """
    return device.type == "cpu"
