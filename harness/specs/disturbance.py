"""When a block of trials counts as disturbed, and what a run does then: set before it starts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.specs.bounds import Spec

_Share = Annotated[float, Field(ge=0, le=1)]


class DisturbanceRule(Spec):
    """A block (one prompt, all arms) is disturbed if one of its trials is; its times are then not used.

    A disturbed block is repeated after the others, while there is time. `max_others_share` is of the time of
    all cores, over one trial: what other processes used and the hypervisor gave away. A long step takes more
    than `long_step` times the median of the steps around it; `max_long_share` is of a trial's decoding time.
    `min_quiet_share` is of the prompts: with fewer that have a quiet block the run shows no speed. The arms
    of a block decode in turns of `turn_steps` steps, so that whatever comes meets all of them; 0 lets them
    decode one after another. Arms that `generate` of transformers decodes take no turns.
    """

    max_others_share: _Share = 0.05
    long_step: float = Field(default=2.0, gt=1)
    max_long_share: _Share = 0.1
    turn_steps: int = Field(default=4, ge=0, le=1000)
    max_repeats: int = Field(default=2, ge=0, le=100)
    min_quiet_share: _Share = 0.5
    reason: str = (
        "A thread that finds its core taken makes all others wait, so 5 % of all cores' time can lengthen a "
        "trial by about as much as arms differ. In the committed records of CPUs from before this rule 1 of "
        "1,280 trials of this engine spends more than a tenth of its time in steps of over twice the median. "
        "Half of the prompts still pair every arm with its baseline."
    )
