"""Decoding step by step on request, so that two versions of this code take their steps in turn.

The gate starts this file by its path, once for each version, and lets Python find `harness` and `medusa_impl`
in that version's folder. So what is imported here from them has to be there in both; a base that is older
than this file is no obstacle. Requests and answers are lines of JSON on standard input and output. What goes
wrong is answered as a `Fault`, in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import UserError
from harness.files import Frozen

if TYPE_CHECKING:  # torch is loaded by the processes that measure, not by the gate
    from harness.device.arms import ArmRunner
    from harness.device.engine import Engine
    from harness.device.prompts import Prompt


_WARMUP_STEPS = 12
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Wanted(Frozen):
    """What the sides decode: a suite as data, whose paths go from a folder or are of shipped data.

    `gate_pid` is the process that asks; with its end the side ends, too.
    """

    suite: dict[str, Any]
    base_folder: str | None
    num_sides: int
    gate_pid: int | None = None


class Ready(Frozen):
    """What a side says once it is loaded: whose code it runs, where, how, and what its trees promise."""

    code: str
    commit: str | None
    dirty: bool | None
    python: str
    packages: dict[str, str]
    device: dict[str, Any]
    mode: str
    dtype: str
    prompt_keys: tuple[str, ...]
    prompts_sha256: str
    backbone_sha256: str
    replayed_tokens_per_step: dict[str, float]


class Request(Frozen):
    """One thing to do: begin a text, take one step of it, end it, or decode and score a whole one.

    `marked` asks for the times of the step's parts; `holds` lets this side hold the device for both.
    """

    do: Literal["begin", "step", "end", "score"]
    prompt: int = 0
    arm: str = ""
    marked: bool = False
    holds: bool = False


class Step(Frozen):
    """One step: seconds, kept tokens, whether the text is at its end, and seconds by part where marked.

    The answer to `begin` is the prefill as such a step.
    """

    step_s: float
    num_tokens: int
    ended: bool
    parts_s: dict[str, float] = {}


class Text(Frozen):
    """A text at its end: what stands for it, its likelihood where scored, and the process's memory."""

    text_sha256: str
    mean_log_likelihood: float | None = None
    step_tokens: tuple[int, ...] = ()
    peak_memory_bytes: int
    num_foreign: int


class Fault(Frozen):
    """Why a side cannot go on, in one line."""

    fault: str


@dataclass
class Worker:
    """One loaded version, with the text that it is at."""

    engine: Engine
    runners: dict[str, ArmRunner]
    seeds: dict[str, int | None]
    prompts: tuple[Prompt, ...]
    num_sides: int
    watch: Any = None
    _steps: Iterator[Any] = field(default_factory=lambda: iter(()))
    _token_ids: list[int] = field(default_factory=list)
    _clock: Any = None
    _marks: Any = None
    _holding: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def answer(self, request: Request) -> Frozen:
        """Do what is asked and return what came of it."""
        if request.do == "begin":
            return self._begin(request)
        if request.do == "step":
            return self._step(marked=request.marked)
        if request.do == "end":
            self._holding.close()
            return self._text(self._token_ids)
        return self._score(request)

    def _begin(self, request: Request) -> Step:
        from harness.device.clock import Marks, SectionTimer

        if request.holds:
            self._holding.enter_context(self._device())
        runner = self.runners[request.arm]
        self._marks = Marks(SectionTimer(runner.clock))
        self._marks.on = False
        self._steps = runner.steps(
            self.prompts[request.prompt].prompt_ids, seed=self.seeds[request.arm], section=self._marks
        )
        self._clock, self._token_ids = runner.clock, []
        return self._step(marked=False)

    def _step(self, *, marked: bool) -> Step:
        self._marks.on = marked
        self._marks.timer.seconds.clear()
        started = self._clock()
        step = next(self._steps)
        step_s = self._clock() - started
        self._token_ids.extend(step.tokens[0])
        return Step(
            step_s=step_s,
            num_tokens=len(step.tokens[0]),
            ended=step.ended[0] is not None,
            parts_s=dict(self._marks.timer.seconds) if marked else {},
        )

    def _score(self, request: Request) -> Text:
        from harness.device.trace import Text as Decoded
        from harness.measure.probes import mean_log_likelihood

        prompt = self.prompts[request.prompt]
        with self._device():
            done = self.runners[request.arm].generate(prompt.prompt_ids, seed=self.seeds[request.arm])
            score = mean_log_likelihood(self.engine, Decoded(prompt, done.token_ids, done.ended_by))
        return self._text(done.token_ids, step_tokens=done.step_tokens, score=score)

    def _device(self) -> contextlib.AbstractContextManager[None]:
        from harness.device.locks import device_turns
        from harness.safe_text import SafeConsole

        return device_turns(self.engine.runner.backbone.device, console=SafeConsole(stderr=True))()

    def _text(
        self, token_ids: Sequence[int], *, step_tokens: tuple[int, ...] = (), score: float | None = None
    ) -> Text:
        """Return a text at its end, with what the process held and who else is on its GPU."""
        import torch

        device = self.engine.runner.backbone.device
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
        if device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated(device))
        return Text(
            text_sha256=hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest(),
            mean_log_likelihood=score,
            step_tokens=step_tokens,
            peak_memory_bytes=peak,
            num_foreign=num_foreign(
                self.watch.num_others() if self.watch is not None else None, num_sides=self.num_sides
            ),
        )


def num_foreign(num_others: int | None, *, num_sides: int) -> int:
    """Return how many processes on a GPU are of no side of the gate; 0 where nothing tells.

    `num_others` are all but this side's own.
    """
    return max((num_others or 0) - (num_sides - 1), 0)


def load(wanted: Wanted) -> tuple[Worker, Ready]:
    """Load what is wanted, warm it up, and return it with what it says of itself."""
    from harness.device.clock import device_clock
    from harness.device.engine import best_device, load_model
    from harness.device.gpu.watch import gpu_watch
    from harness.device.prompts import check_lengths, suite_prompts, take_date, warmup_prompts
    from harness.measure.session import suite_engine
    from harness.safe_text import SafeConsole
    from harness.specs.suite import SuiteSpec

    suite = SuiteSpec.model_validate(wanted.suite)
    folder = None if wanted.base_folder is None else Path(wanted.base_folder)
    console, device = SafeConsole(stderr=True), best_device()
    watch = gpu_watch(device)
    loaded = load_model(suite.model, device=device, base_folder=folder)
    take_date(loaded)
    prompts = suite_prompts(suite, loaded, base_folder=folder, console=console)
    engine = suite_engine(suite, loaded, base_folder=folder)
    check_lengths(prompts, engine, max_new_tokens=suite.max_new_tokens)
    trees = _trees(suite, engine, folder)
    warmup = warmup_prompts(suite, loaded)
    longest = max(len(prompt.prompt_ids) for prompt in (*prompts, *warmup))
    runners = {
        arm.name: _runner(engine, arm, trees, suite, longest=longest, clock=device_clock(device))
        for arm in suite.arms
    }
    seeds = {arm.name: arm.seeds[0] if arm.seeds else None for arm in suite.arms}
    worker = Worker(engine, runners, seeds, prompts, wanted.num_sides, watch=watch)
    _warm_up(worker, warmup[0])
    return worker, _ready(suite, worker, trees)


def _trees(suite: Any, engine: Engine, folder: Path | None) -> dict[str, Any]:
    from harness.compose.trees import resolve_trees
    from harness.device.trace import calibration_of
    from harness.paths import resolve_path

    calibration = None
    if suite.calibration_trace is not None:
        calibration = calibration_of(engine, resolve_path(suite.calibration_trace, base_folder=folder))
    num_heads = engine.heads.num_heads
    return dict(
        resolve_trees(suite.arms, calibration=calibration, costs=(), num_heads=num_heads, base_folder=folder)
    )


def _runner(
    engine: Engine, arm: Any, trees: dict[str, Any], suite: Any, *, longest: int, clock: Any
) -> ArmRunner:
    from harness.device.arms import ArmRunner

    return ArmRunner(
        engine,
        arm,
        tree=trees[arm.name].tree() if arm.name in trees else None,
        max_new_tokens=suite.max_new_tokens,
        max_prompt_tokens=longest,
        clock=clock,
    )


def _warm_up(worker: Worker, prompt: Prompt) -> None:
    """Take steps on a prompt that is not measured with each arm, with parts and without.

    So kernels are loaded and, where steps are recorded, all of them are.
    """
    from harness.device.clock import Marks, SectionTimer
    from medusa_impl.engine.sections import no_section

    with worker._device():
        for arm, runner in worker.runners.items():
            for section in (no_section, Marks(SectionTimer(runner.clock))):
                steps = runner.steps(prompt.prompt_ids, seed=worker.seeds[arm], section=section)
                for _ in itertools.islice(steps, _WARMUP_STEPS):
                    continue
                runner.record(section=section)


def _ready(suite: Any, worker: Worker, trees: dict[str, Any]) -> Ready:
    from harness.device.machine import checkout_state, device_info, package_versions

    commit, dirty = checkout_state()
    told = [[prompt.key, list(prompt.prompt_ids)] for prompt in worker.prompts]
    promised = {name: tree.predicted_tokens_per_step for name, tree in trees.items()}
    return Ready(
        code=str(Path(sys.modules["harness"].__path__[0]).resolve().parent),
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        packages=package_versions(),
        device=device_info(worker.engine.runner.backbone.device).model_dump(),
        mode=worker.engine.runner.mode,
        dtype=suite.model.dtype,
        prompt_keys=tuple(prompt.key for prompt in worker.prompts),
        prompts_sha256=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        backbone_sha256=worker.engine.loaded.sha256,
        replayed_tokens_per_step={name: value for name, value in promised.items() if value is not None},
    )


def end_with(parent: int) -> None:
    """Let the system kill this process as soon as its parent is gone, and end here where it already is.

    A pipe that ends is noticed between two requests alone, which is late while a model is loaded. Where the
    system is not Linux, that is all there is. The thread that started this process has to live as long as it.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def main(wanted: Wanted) -> int:
    """Load, say so, and answer requests until there are no more."""
    if wanted.gate_pid is not None:
        end_with(wanted.gate_pid)
    import torch

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # standard output, which nothing else may write to
    sys.stdout = sys.stderr
    try:
        worker, ready = load(wanted)
        print(ready.model_dump_json(), file=answers, flush=True)
        with torch.inference_mode():
            for line in sys.stdin:
                done = worker.answer(Request.model_validate_json(line))
                print(done.model_dump_json(), file=answers, flush=True)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # of whatever version: the gate says it in one line
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(Fault(fault=" ".join(words.split())[:500]).model_dump_json(), file=answers, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Wanted.model_validate_json(sys.argv[1])))
