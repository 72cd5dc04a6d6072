"""The simulations of Appendix G: speedup against candidates, batch and sequence length; all predicted.

The verdicts on them (RL-64, RL-32, RL-seq, RL-44, RL-acc) follow in `judge/claims/paper.py`; here are the
curves that those verdicts rest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.compose.roofline import Simulation, llama_7b_block, step_cost
from harness.errors import UserError
from harness.specs.claims import ClaimSpec, load_claims
from harness.specs.forms.paper import SimulatedBatchForm, SimulatedLengthForm, SimulatedPeakForm
from harness.specs.hardware import load_hardware

# The grid of the paper's Tables 6 to 8, and larger trees, since the simulated peak lies past that grid.
CANDIDATES = (
    1,
    2,
    4,
    8,
    16,
    32,
    48,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    256,
)
VERDICTS = ("RL-64", "RL-32", "RL-seq", "RL-44", "RL-acc")


@dataclass(frozen=True)
class SimulatedRow:
    """One setting: candidates with the simulated acceleration rate, step cost and speedup."""

    num_nodes: int
    batch: int
    context_tokens: int
    acceleration_rate: float
    step_cost: float
    speedup: float


@dataclass(frozen=True)
class SimulatedBest:
    """The best number of candidates of one setting, and its speedup."""

    batch: int
    context_tokens: int
    num_nodes: int
    speedup: float


@dataclass(frozen=True)
class AppendixG:
    """The simulations against candidates (Fig. 21), batch (Fig. 22) and sequence length (Fig. 23)."""

    device: str
    by_candidates: tuple[SimulatedRow, ...]
    by_batch: tuple[SimulatedBest, ...]
    by_length: tuple[SimulatedBest, ...]


def simulate(claims: Sequence[ClaimSpec] | None = None) -> AppendixG:
    """Return the simulations with the settings that the registry judges them at.

    Raises: UserError where the registry lacks one of the three claims.
    Paper: Appendix G.3, Figs 21 to 23.
    """
    forms = {claim.id: claim.paper_only for claim in (claims if claims is not None else load_claims())}
    peak, batches, lengths = forms.get("RL-64"), forms.get("RL-32"), forms.get("RL-seq")
    if (
        not isinstance(peak, SimulatedPeakForm)
        or not isinstance(batches, SimulatedBatchForm)
        or not isinstance(lengths, SimulatedLengthForm)
    ):
        raise UserError(
            found="no simulated forms",
            need="RL-64, RL-32 and RL-seq with their forms",
            where="the registry of claims",
        )
    candidates = simulation(peak)
    doubled = [2**power for power in range((2 * batches.batch).bit_length())]
    return AppendixG(
        device=peak.device,
        by_candidates=tuple(
            _row(candidates, nodes, context_tokens=peak.context_tokens, batch=peak.batch)
            for nodes in CANDIDATES
        ),
        by_batch=tuple(
            _best(simulation(batches), context_tokens=batches.context_tokens, batch=batch)
            for batch in doubled
        ),
        by_length=tuple(
            _best(simulation(lengths), context_tokens=length, batch=lengths.batch)
            for length in lengths.context_tokens
        ),
    )


def simulation(form: SimulatedPeakForm | SimulatedBatchForm | SimulatedLengthForm) -> Simulation:
    """Return the simulation that a claim's form is judged by.

    Raises: UserError where hardware.toml does not know the form's device.
    """
    devices = load_hardware()
    if form.device not in devices:
        raise UserError(
            found=f"device {form.device!r}", need=f"one of {sorted(devices)}", where="the registry of claims"
        )
    return Simulation(
        shape=llama_7b_block(), limits=devices[form.device].limits, slope=form.slope, log_base=form.log_base
    )


def _row(one: Simulation, num_nodes: int, *, context_tokens: int, batch: int) -> SimulatedRow:
    cost = step_cost(one.shape, one.limits, num_nodes=num_nodes, context_tokens=context_tokens, batch=batch)
    speedup = one.speedup(num_nodes, context_tokens=context_tokens, batch=batch)
    return SimulatedRow(
        num_nodes=num_nodes,
        batch=batch,
        context_tokens=context_tokens,
        acceleration_rate=speedup * cost,
        step_cost=cost,
        speedup=speedup,
    )


def _best(one: Simulation, *, context_tokens: int, batch: int) -> SimulatedBest:
    num_nodes, speedup = one.best(context_tokens=context_tokens, batch=batch)
    return SimulatedBest(batch=batch, context_tokens=context_tokens, num_nodes=num_nodes, speedup=speedup)
