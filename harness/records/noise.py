"""What was seen of a GPU over one trial: who else used it, and how it fared."""

from __future__ import annotations

from pydantic import Field

from harness.bounds import Amount, Count, Finite, Share
from harness.files import Frozen

# A GPU whose processes the driver does not tell apart is taken to be shared from here on: our own memory
# outside of PyTorch's allocator (libraries, graphs) grows by a few hundred MiB.
NOTICED_BYTES = 2**30


class GpuObservation(Frozen):
    """A GPU as its driver described it at the end of a trial; null is what it did not tell."""

    num_others: Count | None = Field(
        default=None,
        description="other processes that computed on the GPU; null where ours cannot be told from them",
    )
    others_share: Share | None = Field(
        default=None,
        description="share of the time in which kernels of other processes ran, since the trial before; null "
        "where it is not known",
    )
    others_memory_bytes: Count | None = Field(
        default=None,
        description="bytes of the GPU in use that are not ours nor were in use before the run, an estimate",
    )
    sm_clock_mhz: Amount | None = Field(default=None, description="clock of the multiprocessors, MHz")
    memory_clock_mhz: Amount | None = Field(default=None, description="clock of the memory, MHz")
    temperature_c: Finite | None = Field(default=None, description="temperature, degrees Celsius")
    power_w: Amount | None = Field(default=None, description="power drawn, watts")
    throttle_reasons: tuple[str, ...] | None = Field(
        default=None, description="why the clocks are lower than they could be; empty where they are not"
    )

    @property
    def is_shared(self) -> bool:
        """Return whether another process is known to have used the GPU.

        Where processes cannot be told apart, much memory that is not ours tells of one.
        """
        if self.num_others is None and self.others_share is None:
            return (self.others_memory_bytes or 0) >= NOTICED_BYTES
        return bool(self.num_others or self.others_share)
