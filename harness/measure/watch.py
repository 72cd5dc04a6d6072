"""Watch a trainer's steps: seconds by the innermost part, and operations of matrix products.

The steps of a stage are

    dropped | plain, marked, plain, marked, .. | counted
              nothing touches a plain step: its length is the headline; a marked one tells its parts
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import medusa_impl.training.medusa1
from harness.device.clock import Clock
from harness.records.profiles.training import PartProfile, StageProfile
from medusa_impl.heads import MedusaHeads
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training.states import BackboneStates

OTHER = "other"
BACKBONE = "backbone"  # of heads alone, where no states are kept
HEADS_PARTS = ("states", "logits_loss", "backward", "optimiser", OTHER)
JOINT_PARTS = ("teacher", "student", "backbone_loss", "heads_loss", "backward", "optimiser", OTHER)

_ATEN = torch.ops.aten
# PyTorch's own, and its CPU attention, which it has no formula for; the arguments are the same
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class PartClock:
    """Gives every second of a step to the innermost part that runs."""

    def __init__(self, clock: Clock) -> None:
        self.current = OTHER
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock, self._mark = clock, clock()
        self._outer: list[str] = []

    def enter(self, part: str) -> None:
        """Begin a part; the one around it pauses."""
        self.turn()
        self._outer.append(self.current)
        self.current = part

    def leave(self) -> None:
        """End the part begun last."""
        self.turn()
        self.current = self._outer.pop()

    def turn(self) -> None:
        """Bring the seconds of the running part up to now."""
        now = self._clock()
        self.seconds[self.current] += now - self._mark
        self._mark = now

    def restart(self) -> None:
        """Forget all seconds so far."""
        self.turn()
        self.seconds.clear()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()


class ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products as they run.

    They are kept by part of the step and by dtype of the factors.
    """

    def __init__(self, parts: PartClock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # in inference mode layers come whole: their products are inside
                whole = func.decompose(*args, **options)
            if whole is not NotImplemented:
                return whole
        result = func(*args, **options)
        if formula is not None:
            factor = next(
                value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()
            )
            dtype = str(factor.dtype).removeprefix("torch.")
            self.flops[self._parts.current][dtype] += int(formula(*args, **options, out_val=result))
        return result


Marks = Callable[[PartClock], contextlib.AbstractContextManager[None]]


class StepWatch:
    """Times a trainer's steps, stage by stage; the trainer calls it after each step.

    A stage's first step is dropped, then `num_steps` plain and as many marked ones take turns, and one is
    counted. Between two steps the marks of the next are set, on no one's time.
    """

    def __init__(self, stages: Sequence[str], *, num_steps: int, clock: Clock, marks: Marks) -> None:
        kinds = ("dropped", *("plain", "marked") * num_steps, "counted")
        self._plan = [(stage, kind) for stage in stages for kind in kinds]
        self._clock, self._marks = clock, marks
        self.on_step: Callable[[], None] = lambda: None  # called between steps, on no one's time
        self._open = contextlib.ExitStack()
        self._place = 0
        self._parts, self._counter = PartClock(clock), ProductCounter(PartClock(clock))
        self.step_s: dict[str, list[float]] = {stage: [] for stage in stages}
        self.part_s: dict[str, list[dict[str, float]]] = {stage: [] for stage in stages}
        self.flops: dict[str, dict[str, dict[str, int]]] = {}
        self.num_positions: dict[str, int] = {}
        self._started = clock()

    @property
    def num_steps(self) -> int:
        """Steps that the trainer has to take in all."""
        return len(self._plan)

    def __call__(self, num_positions: int) -> None:
        """Close the step just taken, which learnt from so many positions, and open the next."""
        elapsed_s = self._clock() - self._started
        stage, kind = self._plan[self._place]
        if kind == "plain":
            self.step_s[stage].append(elapsed_s)
        elif kind == "marked":
            self._parts.turn()
            self.part_s[stage].append(dict(self._parts.seconds))
        self._open.close()
        if kind == "counted":
            self.flops[stage] = {part: dict(counts) for part, counts in self._counter.flops.items()}
            self.num_positions[stage] = num_positions
        self._place += 1
        self.on_step()
        if self._place < len(self._plan):
            self._begin(self._plan[self._place][1])
        self._started = self._clock()

    def __enter__(self) -> StepWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def profiles(self, rates: Mapping[str, float], *, parts: Sequence[str]) -> tuple[StageProfile, ...]:
        """Return what was taken, stage by stage, once all steps are."""
        return tuple(
            StageProfile(
                name=stage,
                step_rate=rate,
                num_positions=self.num_positions[stage],
                step_s=tuple(self.step_s[stage]),
                parts=tuple(
                    PartProfile(
                        name=part,
                        seconds=tuple(step.get(part, 0.0) for step in self.part_s[stage]),
                        flops=self.flops[stage].get(part, {}),
                    )
                    for part in parts
                ),
            )
            for stage, rate in rates.items()
        )

    def _begin(self, kind: str) -> None:
        if kind not in ("marked", "counted"):
            return
        self._parts = PartClock(self._clock)
        self._open.enter_context(self._marks(self._parts))
        if kind == "counted":
            self._counter = ProductCounter(self._parts)
            self._open.enter_context(self._counter)
        self._parts.restart()


@contextlib.contextmanager
def heads_marks(parts: PartClock, *, heads: MedusaHeads) -> Iterator[None]:
    """Mark the parts of Medusa-1's steps.

    `logits_loss` is the loss with the gradient that it forms, without the heads' own states.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_timed(medusa_impl.training.medusa1, "medusa1_loss", parts, part="logits_loss"))
        stack.enter_context(_timed(heads, "states", parts, part="states"))
        stack.enter_context(_timed(BackboneStates, "read", parts, part=BACKBONE))
        stack.enter_context(_timed(torch.nn.utils, "clip_grad_norm_", parts, part="optimiser"))
        stack.enter_context(_end_marks(parts))
        yield


@contextlib.contextmanager
def joint_marks(parts: PartClock, *, model: MedusaTrainingModel, accelerator: Any) -> Iterator[None]:
    """Mark the parts of joint steps.

    `student` is the model's call without losses and teacher; `backward` computes logits again.
    """

    def marked_teacher(teacher: Any) -> Any:
        @contextlib.contextmanager
        def lent() -> Iterator[Any]:
            with parts("teacher"), teacher() as original:
                yield original

        return lent

    with contextlib.ExitStack() as stack:
        stack.enter_context(_timed(model, "forward", parts, part="student"))
        stack.enter_context(_timed(model, "_backbone_loss", parts, part="backbone_loss"))
        stack.enter_context(_timed(model, "_heads_loss", parts, part="heads_loss"))
        stack.enter_context(_replaced(model, "teacher", marked_teacher))
        stack.enter_context(_timed(accelerator, "clip_grad_norm_", parts, part="optimiser"))
        stack.enter_context(_end_marks(parts))
        yield


@contextlib.contextmanager
def _end_marks(parts: PartClock) -> Iterator[None]:
    """Mark what both trainers end a step with: the backward pass and the optimiser's step."""
    with _timed(torch.Tensor, "backward", parts, part="backward"):
        hooks = (
            register_optimizer_step_pre_hook(lambda *_: parts.enter("optimiser")),
            register_optimizer_step_post_hook(lambda *_: parts.leave()),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _timed(owner: Any, name: str, parts: PartClock, *, part: str) -> contextlib.AbstractContextManager[None]:
    def marked(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with parts(part):
                return function(*arguments, **options)

        return call

    return _replaced(owner, name, marked)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put another function in an attribute's place; afterwards the owner is as it was."""
    original, was_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
