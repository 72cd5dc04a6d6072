"""Whether draft heads lose more the further ahead they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from harness.judge.claims.findings import Finding, NotTestable, above, combined, holds, shown
from harness.specs.suite import IntervalSpec
from harness.stats import bootstrap_ratio


def rising_losses(
    texts: Sequence[NDArray[np.float64]], *, bound: float, spec: IntervalSpec, whose: str = ""
) -> Finding:
    """Return whether each head's mean loss lies above that of the head before it by more than `bound` nats.

    Shapes: one array a text, [positions, heads]; nan where a head has no target, since the text ends first.
    Raises: NotTestable where a head has no target in any text.
    """
    parts = []
    for head in range(1, texts[0].shape[1]):
        rises = [losses[:, head] - losses[:, head - 1] for losses in texts]
        sums = np.array([float(np.nansum(rise)) for rise in rises])
        counts = np.array([float(np.isfinite(rise).sum()) for rise in rises])
        if not counts.sum():
            raise NotTestable(f"no position has a target for head {head + 1}")
        interval = bootstrap_ratio(sums, counts, spec=spec, rng=np.random.default_rng(spec.seed))
        kind = above(interval, bound)
        reason = f"{head} to {head + 1}: {holds(kind)}"
        parts.append(Finding(kind=kind, ours=shown(interval), reason=reason, figure_kind="measured"))
    both = combined(parts)
    return replace(
        both,
        ours=f"rise in nats from head to head: {both.ours}",
        reason=f"the mean loss{whose} rises by more than {bound:g} nats from one head to the next "
        f"({both.reason})",
    )
