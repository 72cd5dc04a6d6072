"""A neighbour that takes a core: all the time, or in random bursts.

`python burner.py SEED SHARE MEAN_S`: bursts last MEAN_S seconds on average, and pauses so long that the core
is taken for SHARE of the time; both are drawn from exponential laws by SEED. A share of 1 is steady load.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator


def bursts(seed: int, *, share: float, mean_s: float) -> Iterator[tuple[float, float]]:
    """Yield pauses and bursts in turn, in seconds, without end."""
    draws = random.Random(seed)
    pause_s = mean_s * (1 - share) / share
    while True:
        yield (draws.expovariate(1 / pause_s) if pause_s > 0 else 0.0, draws.expovariate(1 / mean_s))


def burn(seed: int, *, share: float, mean_s: float) -> None:
    """Take a core until the process is ended."""
    for pause_s, burst_s in bursts(seed, share=share, mean_s=mean_s):
        time.sleep(pause_s)
        until = time.monotonic() + burst_s
        while time.monotonic() < until:
            pass


if __name__ == "__main__":
    burn(int(sys.argv[1]), share=float(sys.argv[2]), mean_s=float(sys.argv[3]))
