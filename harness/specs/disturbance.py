"""When times count as disturbed, and what a run does then: set before it starts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.specs.bounds import Spec

_Share = Annotated[float, Field(ge=0, le=1)]


class OthersRule(Spec):
    """How much of the cores others may use while something is timed, and how often it is timed again.

    `max_others_share` is of the time of all cores, and `max_others_cores` how many of them on average: what
    other processes used and the hypervisor gave away. Either bound is enough to disturb, so that on a host of
    many cores a few full neighbours do not pass.
    """

    max_others_share: _Share = 0.05
    max_others_cores: float = Field(default=0.5, ge=0)
    max_repeats: int = Field(default=2, ge=0, le=100)
    min_quiet_share: _Share = 0.5


class LatencyDisturbance(OthersRule):
    """A sitting (one round over sizes that share a cache, all modes on one text, or one batch) is one try.

    Where others disturb it, it is timed again at once, up to `max_repeats` times; the last times are used,
    and all are kept. `min_quiet_share` is of all sizes and trials: with fewer of them quiet the record shows
    no times.
    """

    reason: str = (
        "A thread that finds its core taken makes all others wait, so 5 % of all cores' time can lengthen a "
        "step by about as much as sizes differ. Half a core is more than a system's own services use. The "
        "median of a size's rounds bears fewer than half of them disturbed."
    )


class DisturbanceRule(OthersRule):
    """A block (one prompt, all arms) is disturbed if one of its trials is; its times are then not used.

    A disturbed block is repeated after the others, while there is time. The bounds on others are over one
    trial. A long step takes more than `long_step` times the median of the steps around it; `max_long_share`
    is of a trial's decoding time. `min_quiet_share` is of the prompts: with fewer that have a quiet block the
    run shows no speed. The arms of a block decode in turns of `turn_steps` steps, so that whatever comes
    meets all of them; 0 lets them decode one after another. Arms that `generate` of transformers decodes
    take no turns.
    """

    long_step: float = Field(default=2.0, gt=1)
    max_long_share: _Share = 0.1
    turn_steps: int = Field(default=4, ge=0, le=1000)
    reason: str = (
        "A thread that finds its core taken makes all others wait, so 5 % of all cores' time can lengthen a "
        "trial by about as much as arms differ. In the committed records of CPUs from before this rule 1 of "
        "1,280 trials of this engine spends more than a tenth of its time in steps of over twice the median. "
        "Half of the prompts still pair every arm with its baseline."
    )
