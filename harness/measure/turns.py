"""Timed generations on request, so that two versions of this code take turns, each in a process of its own.

The gate starts this file by its path, once for each version, and lets Python find `harness` and `medusa_impl`
in that version's folder. So what is imported here from them has to be there in both; a base that is older
than this file is no obstacle. Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from harness.files import Frozen

if TYPE_CHECKING:  # torch is loaded by the processes that measure, not by the gate
    from harness.device.arms import ArmRunner
    from harness.device.engine import Engine


class Wanted(Frozen):
    """What both sides decode: the first prompts of a suite, at these numbers of nodes."""

    suite: str
    num_prompts: int
    max_new_tokens: int
    nodes: tuple[int, ...]


class Ready(Frozen):
    """What a side says once it is loaded: whose code it runs, where, and how."""

    code: str
    commit: str | None
    device: str
    mode: str
    dtype: str
    num_prompts: int


class Request(Frozen):
    """One turn: decode this prompt with a tree of so many nodes; one node is vanilla decoding."""

    prompt: int
    num_nodes: int


class Turn(Frozen):
    """The answer: seconds of each step after the prefill, what stands for the text, and what others did.

    `others_share` is the share of all cores' time that other processes used meanwhile.
    """

    step_s: tuple[float, ...]
    text_sha256: str
    others_share: float


@dataclass(frozen=True)
class _Spent:
    """Seconds: of the clock, of all cores that were busy, of those that were busy for this process."""

    clock_s: float
    busy_s: float
    own_s: float

    @staticmethod
    def until_now() -> _Spent:
        cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle_s = cores.idle + getattr(cores, "iowait", 0.0)
        guests_s = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # counted in user, too
        return _Spent(time.perf_counter(), sum(cores) - idle_s - guests_s, own.user + own.system)

    def others_share(self, after: _Spent) -> float:
        """Return the share of all cores' time between two moments that other processes used."""
        others_s = (after.busy_s - self.busy_s) - (after.own_s - self.own_s)
        cores_s = (after.clock_s - self.clock_s) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, others_s / cores_s))


def main(wanted: Wanted) -> None:
    """Load the suite's model, say so, and answer requests until there are no more."""
    from harness.device.clock import device_clock
    from harness.device.engine import best_device, load_model
    from harness.device.locks import device_turns
    from harness.device.machine import checkout_state, device_info
    from harness.device.prompts import suite_prompts
    from harness.measure.session import suite_engine
    from harness.safe_text import SafeConsole
    from harness.specs.suite import load_suite

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # standard output, which nothing else may write to
    sys.stdout = sys.stderr
    file, console, device = Path(wanted.suite), SafeConsole(stderr=True), best_device()
    suite = load_suite(file)
    suite = suite.model_copy(
        update={"prompts": suite.prompts.model_copy(update={"limit": wanted.num_prompts})}
    )
    loaded = load_model(suite.model, device=device, base_folder=file.parent)
    prompts = suite_prompts(
        suite, loaded, prompts_file=None, base_folder=file.parent, allow_hub=False, console=console
    )
    engine = suite_engine(suite, loaded, base_folder=file.parent)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    runners = {
        nodes: _runner(engine, nodes, wanted, longest=longest, clock=device_clock(device))
        for nodes in wanted.nodes
    }
    held = device_turns(device, console=console)
    with held():
        for runner in runners.values():  # warms kernels up, and captures what is captured
            runner.generate(prompts[-1].prompt_ids, seed=None)
    ready = Ready(
        code=str(Path(sys.modules["harness"].__path__[0]).resolve().parent),
        commit=checkout_state()[0],
        device=device_info(device).name,
        mode=engine.runner.mode,
        dtype=suite.model.dtype,
        num_prompts=len(prompts),
    )
    print(ready.model_dump_json(), file=answers, flush=True)
    for line in sys.stdin:
        request = Request.model_validate_json(line)
        with held():
            before = _Spent.until_now()
            result = runners[request.num_nodes].generate(prompts[request.prompt].prompt_ids, seed=None)
            others_share = before.others_share(_Spent.until_now())
        digest = hashlib.sha256(json.dumps(list(result.token_ids)).encode()).hexdigest()
        turn = Turn(step_s=result.step_times_s, text_sha256=digest, others_share=others_share)
        print(turn.model_dump_json(), file=answers, flush=True)


def _runner(engine: Engine, nodes: int, wanted: Wanted, *, longest: int, clock: Any) -> ArmRunner:
    """Return what decodes with a tree of so many nodes: what hangs where moves no step time."""
    from harness.device.arms import ArmRunner
    from harness.measure.latency.timers import comb_tree
    from harness.specs.suite import ArmSpec, ChainTree, GreedyAcceptance

    vanilla = ArmSpec(name="vanilla", method="vanilla")
    drafted = ArmSpec(
        name="medusa",
        method="medusa",
        baseline="vanilla",
        tree=ChainTree(kind="chain", depth=1),  # stands for the real one below
        acceptance=GreedyAcceptance(),
    )
    return ArmRunner(
        engine,
        vanilla if nodes == 1 else drafted,
        tree=None if nodes == 1 else comb_tree(nodes, depth=engine.heads.num_heads),
        max_new_tokens=wanted.max_new_tokens,
        max_prompt_tokens=longest,
        clock=clock,
    )


if __name__ == "__main__":
    main(Wanted.model_validate_json(sys.argv[1]))
