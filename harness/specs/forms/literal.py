"""The literal form of a claim, as validated data: the paper's own run, and which of a run's figures are held
against what it prints.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from harness.specs.bounds import PromptCount, SomeDistinct, Spec, TextLength
from harness.specs.forms.paper import Form, Share

Metric = Literal["speedup", "acceleration_rate", "overhead", "tokens_per_s"]
Stated = float | tuple[float, ...] | dict[str, float | tuple[float, ...]] | None


class Setting(Spec):
    """What a record has to carry to stand for the paper's own run.

    `model` and `heads` are repositories of the hub; None where no published one is known, and then no record
    fits. `prompts` is the source that a suite names, of which at least `num_prompts` prompts are decoded, to
    at least `min_new_tokens` tokens. Figures in which times enter need one of the `dtypes` and, where the
    paper names its GPU (`gpu_is` stated), a GPU with `gpu` in its name. Where it names none, only a speed in
    tokens/s needs that GPU, which is then the project's guess (assumed).
    """

    model: str | None = None
    heads: str | None = None
    prompts: str
    num_prompts: PromptCount
    min_new_tokens: TextLength
    dtypes: SomeDistinct[Literal["float16", "bfloat16"]]
    gpu: str = Field(min_length=1)
    gpu_is: Literal["stated", "assumed"]


class LiteralForm(Form):
    """The same model, method, data and metric as the paper.

    Says what that needs, first in words and then, in `setting`, as a record shows it; `tolerance` is how
    close counts as the same figure. `departs` says what differs from the paper in every record that fits.
    """

    backbone: str
    heads: str
    device: str
    benchmark: str
    tolerance: Share
    setting: Setting | None = None
    departs: str | None = None


class Measure(Spec):
    """One figure of a run that a claim's printed figure is compared with.

    `arm` is named by its role; `category` takes the prompts of one category. The claim's `value` is one
    `figure`, the two ends of a `range`, or what a gain is `at_least`; `of` is its key where it has several.
    """

    metric: Metric
    arm: str
    category: str | None = None
    clock: Literal["decode", "wall"] = "decode"
    of: str | None = None
    stated: Literal["figure", "range", "at_least"] = "figure"

    @property
    def holds_times(self) -> bool:
        """Whether times enter the figure."""
        return self.metric != "acceleration_rate"

    def printed(self, value: Stated) -> tuple[float, float]:
        """Return the lowest and the highest figure that the paper's own would be.

        Raises: ValueError for a value of another shape.
        """
        if self.of is not None:
            if not isinstance(value, dict) or self.of not in value:
                raise ValueError(f"measures a figure {self.of!r}, which its value does not have")
            value = value[self.of]
        if isinstance(value, float | int) and value > 0 and self.stated != "range":
            return float(value), float(value) if self.stated == "figure" else math.inf
        if isinstance(value, tuple) and len(value) == 2 and self.stated == "range":
            low, high = sorted(value)
            if low > 0:
                return low, high
        raise ValueError(f"measures a {self.stated.replace('_', ' ')}, and its value is {value}")
