"""Where the time of a decoding step goes, for vanilla and for trees of growing size.

A step of N nodes is cut into parts; what no part covers is the host's:

    mask | backbone | heads | candidates | acceptance | cache | host
           the calls of the modules      everything else is our own code

Step cost compares the backbone's part alone, overhead the whole step: a tree pays where it yields more tokens
a step than its overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from harness.bounds import Count, Seconds, StepSeconds
from harness.errors import UserError
from harness.files import Frozen
from harness.records.provenance import Environment
from harness.records.run import ArmTree
from harness.versions import VERSION, Versioned, read_versioned_file

Part = Literal["mask", "backbone", "heads", "candidates", "acceptance", "cache"]
PARTS: tuple[Part, ...] = get_args(Part)
OWN_CODE_BOUND = 0.03  # of a step: the most that this project allows itself


class SizeProfile(Frozen):
    """The timed steps of one tree; the root alone is vanilla decoding.

    Steps are timed in turn with and without marks around their parts. A mark makes the host wait for the
    device, so the marked steps tell where the time goes, and the others how long a step takes.
    """

    tree: ArmTree = Field(description="the tree, with what the calibration trace predicts for it")
    parts_s: dict[Part, tuple[Seconds, ...]] = Field(
        description="seconds of each part in every marked step, aligned with step_s"
    )
    step_s: tuple[StepSeconds, ...] = Field(min_length=1, description="seconds of every marked step")
    unmarked_step_s: tuple[StepSeconds, ...] = Field(
        min_length=1, description="seconds of every step without marks"
    )
    kept_tokens: tuple[Count, ...] = Field(description="tokens that each timed step kept, in order")
    device_busy_s: Seconds | None = Field(
        default=None, description="summed seconds of the kernels of a step; null on a CPU"
    )

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        self.tree.tree()
        if set(self.parts_s) != set(PARTS):
            raise ValueError(f"found parts {sorted(self.parts_s)}, need {sorted(PARTS)}")
        if {len(seconds) for seconds in self.parts_s.values()} != {len(self.step_s)}:
            raise ValueError(f"found parts of another number of steps, need {len(self.step_s)} of each")
        if len(self.kept_tokens) != len(self.step_s) + len(self.unmarked_step_s):
            raise ValueError(f"found tokens of {len(self.kept_tokens)} steps, need those of all timed ones")
        return self

    @property
    def num_nodes(self) -> int:
        """Return the nodes of the tree, root included."""
        return len(self.tree.paths)

    @property
    def depth(self) -> int:
        """Return the draft levels of the tree, which is the number of heads that it reads."""
        return max(len(path) for path in self.tree.paths)

    @property
    def host_s(self) -> tuple[float, ...]:
        """Return the seconds of each marked step that no part covers."""
        return tuple(
            step - sum(parts) for step, *parts in zip(self.step_s, *self.parts_s.values(), strict=True)
        )

    @property
    def seconds(self) -> dict[str, tuple[float, ...]]:
        """Return the seconds of the marked steps' parts in order, the host's last."""
        return {**{part: self.parts_s[part] for part in PARTS}, "host": self.host_s}

    @property
    def own_code_share(self) -> float:
        """Return 1 - (backbone + heads) / step: what our own code costs."""
        return 1 - (sum(self.parts_s["backbone"]) + sum(self.parts_s["heads"])) / sum(self.step_s)

    @property
    def mean_step_s(self) -> float:
        """Return the mean seconds of a step without marks."""
        return fmean(self.unmarked_step_s)

    @property
    def idle_share(self) -> float | None:
        """Return the share of an unmarked step in which the device ran no kernel; None on a CPU.

        Kernels that overlap count twice, so the share is cut at 0.
        """
        return None if self.device_busy_s is None else max(0.0, 1 - self.device_busy_s / self.mean_step_s)


@dataclass(frozen=True)
class SizeFactors:
    """What one tree's step costs against vanilla's, and what it must and should yield.

    `overhead` is also the tokens a step that the tree would need for a speedup of 1. The predicted speedup is
    composed of the calibration trace and of measured steps.
    Paper: Appendix B.1, overhead = mean step latency with heads and tree / vanilla's.
    """

    num_nodes: int
    depth: int
    step_cost: float
    overhead: float
    predicted_tokens_per_step: float
    own_code_share: float
    idle_share: float | None

    @property
    def predicted_speedup(self) -> float:
        """Return the predicted tokens a step over the overhead."""
        return self.predicted_tokens_per_step / self.overhead


class StepProfile(Versioned):
    """A profiling run: steps of every size after the same kept texts, sizes in turn."""

    schema_version: Annotated[Literal[1], VERSION] = 1
    suite: str = Field(description="name of the suite whose model and heads were profiled")
    environment: Environment = Field(description="where the profile comes from")
    context_tokens: tuple[Count, ...] = Field(
        min_length=1, description="tokens of each kept text that steps were timed after"
    )
    sizes: tuple[SizeProfile, ...] = Field(
        min_length=1, description="one entry a tree, vanilla's single node first, then larger ones"
    )

    @model_validator(mode="after")
    def _vanilla_first(self) -> Self:
        nodes = [size.num_nodes for size in self.sizes]
        if nodes[0] != 1 or nodes != sorted(set(nodes)):
            raise ValueError(f"found sizes {nodes}, need vanilla's one node first and each larger size once")
        return self

    @cached_property
    def factors(self) -> tuple[SizeFactors, ...]:
        """Return every size against vanilla; step costs are ratios of medians, overheads of means."""
        vanilla = self.sizes[0]
        return tuple(
            SizeFactors(
                num_nodes=size.num_nodes,
                depth=size.depth,
                step_cost=median(size.parts_s["backbone"]) / median(vanilla.parts_s["backbone"]),
                overhead=size.mean_step_s / vanilla.mean_step_s,
                predicted_tokens_per_step=size.tree.predicted_tokens_per_step or 1.0,
                own_code_share=size.own_code_share,
                idle_share=size.idle_share,
            )
            for size in self.sizes
        )


def read_step_profile(path: Path) -> StepProfile:
    """Return a step profile.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    return read_versioned_file(path, StepProfile, noun="a profile record")


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return the tree sizes of a list such as `1,2,4`, ascending, with vanilla's one node in any case.

    Raises: UserError where an entry is no whole number of at least 1.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(
            found=f"--nodes {text}",
            need="whole numbers of at least 1 with commas between them",
            where="the command line",
        )
    return tuple(sorted({1, *map(int, words)}))
