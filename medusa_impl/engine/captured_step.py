"""Steps recorded once as CUDA graphs and replayed.

At batch size 1 a step is hundreds of kernels of a few microseconds each. When Python launches them one by
one, the device waits for the host. A replay launches all of them at once.

What CUDA itself does is in `CudaGraphs`. All else here, what is recorded when and what is put back, is plain
bookkeeping, which tests run on a CPU with graphs of their own.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from medusa_impl.engine.backbone import BackboneOutput, ModelCall, StepInputs
from medusa_impl.engine.kv_cache import TreeCache
from medusa_impl.engine.launch import Step
from medusa_impl.engine.sections import Section, is_marking

# As PyTorch's documentation advises: in the first calls kernels choose their algorithms and workspaces, and
# code is compiled, which a capture cannot record.
_WARMUP_CALLS = 3


class Graph(Protocol):
    """What was recorded; a replay runs it again on the same memory."""

    def replay(self) -> None: ...


class Graphs(Protocol):
    """Where graphs come from."""

    def warming(self) -> contextlib.AbstractContextManager[None]:
        """Return where the calls before a capture run."""
        ...

    def capture(
        self, *, generator: torch.Generator | None = None, after: Graph | None = None
    ) -> contextlib.AbstractContextManager[Graph]:
        """Return a context that records what is called in it.

        `after` is a graph whose results this one reads: it is always replayed before, and both share memory.
        """
        ...


class CudaGraphs:
    """CUDA's graphs.

    Each graph has a memory pool of its own, which lives as long as the graph (parts of one step share one):
    PyTorch frees a shared pool with its last graph, and a capture that fails leaves the pool that it was to
    fill unusable for any other.
    """

    def __init__(self) -> None:
        self._stream: Any = None

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        # PyTorch requires that these calls run on another stream than the default one: always the same, since
        # libraries keep a workspace for each.
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def capture(
        self, *, generator: torch.Generator | None = None, after: Graph | None = None
    ) -> Iterator[Graph]:
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        pool = {} if after is None else {"pool": after.pool()}  # type: ignore[attr-defined]
        stream = torch.cuda.current_stream()
        try:
            with _no_collection(), torch.cuda.graph(graph, **pool):
                yield graph
        except BaseException:
            # A capture that fails at its end leaves its stream in use, and generators that believe in it.
            torch.cuda.set_stream(stream)
            for used in (generator, *torch.cuda.default_generators):
                if used is not None:
                    with contextlib.suppress(Exception):
                        used.graphsafe_set_state(used.clone_state())
            raise


class Failure:
    """Why nothing is recorded any more; empty while all is well. Those who record for one engine share it."""

    text = ""


class Recorder:
    """Records, and says once where that failed: from then on everything runs directly."""

    def __init__(self, graphs: Graphs | None = None, *, failed: Failure | None = None) -> None:
        self._graphs: Graphs = graphs or CudaGraphs()
        self._failed = failed or Failure()

    @property
    def failure(self) -> str:
        """Return why everything runs directly, or nothing while it does not."""
        return self._failed.text

    def try_to(self, record: Callable[[], None]) -> None:
        """Record something, or note why it cannot be.

        Raises: torch.OutOfMemoryError where memory runs out, which smaller sizes can survive.
        """
        try:
            record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error
            while first.__context__ is not None:  # the end of a broken capture complains about its beginning
                first = first.__context__
            self._failed.text = (str(first).splitlines() or [type(first).__name__])[0]


class RecordedSteps(Recorder):
    """Launches a step by its graphs: one for each length that attention reads, recorded when it occurs.

    Under a profiler that marks the parts of a step each part is a graph of its own.

    Raises: torch.OutOfMemoryError where memory runs out, which smaller sizes can survive.
    """

    def __call__(self, step: Step, section: Section) -> None:
        """Take the step that the host has planned."""
        by_part = is_marking(section)
        key = self, step.cache.plan.view_length, by_part
        if key not in step.recorded and not self.failure:
            self.try_to(lambda: step.recorded.update({key: self._record(step, by_part=by_part)}))
        if self.failure:
            step(section)
        else:
            step.recorded[key](section)

    def _record(self, step: Step, *, by_part: bool) -> Callable[[Section], None]:
        """Return what replays the step; state and generator are as before.

        PyTorch's own generator is not put back: a rule without one draws on from where the warm-ups ended.
        """
        generator = step.generator
        held = [tensor.clone() for tensor in step.state]
        drawn = generator.get_state() if generator is not None else None

        def put_back() -> None:
            for tensor, before in zip(step.state, held, strict=True):
                tensor.copy_(before)
            if generator is not None and drawn is not None:
                generator.set_state(drawn)

        try:
            # The calls write keys and values after the kept prefix, where the replay writes them again.
            with self._graphs.warming():
                for _ in range(_WARMUP_CALLS):
                    step()
                    put_back()
            return self._by_part(step) if by_part else self._whole(step)
        finally:
            put_back()

    def _whole(self, step: Step) -> Callable[[Section], None]:
        with self._graphs.capture(generator=step.generator) as graph:
            step()
        return lambda section: graph.replay()

    def _by_part(self, step: Step) -> Callable[[Section], None]:
        parts: list[tuple[str, Graph]] = []

        @contextlib.contextmanager
        def part(name: str) -> Iterator[None]:
            before = parts[-1][1] if parts else None
            with self._graphs.capture(generator=step.generator, after=before) as graph:
                yield
            parts.append((name, graph))

        step(part)

        def replay(section: Section) -> None:
            for name, graph in parts:
                with section(name):
                    graph.replay()

        return replay


class CapturedSteps(Recorder):
    """The model's call by graphs, one for each shape and cache; a new shape is captured when it occurs."""

    def __init__(
        self, call: ModelCall, graphs: Graphs | None = None, *, failed: Failure | None = None
    ) -> None:
        super().__init__(graphs, failed=failed)
        self._call = call
        self._captured: weakref.WeakKeyDictionary[TreeCache, dict[tuple[Any, ...], _CapturedStep]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the output of the step of this shape on these inputs; the next replay overwrites it."""
        captured = self._captured.setdefault(cache, {})
        key = (tuple(inputs.token_ids.shape), cache.plan.view_length, inputs.num_logits)
        if key not in captured and not self.failure:
            self.try_to(
                lambda: captured.update({key: _CapturedStep(self._call, inputs, cache, graphs=self._graphs)})
            )
        return self._call(inputs, cache) if self.failure else captured[key].replay(inputs, cache)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting cycles meanwhile; what is due is collected before.

    A cache and its layers name each other, so an old cache goes when Python looks for cycles, and its graphs
    with it. CUDA forbids freeing during a capture: a collection there makes the capture fail.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _CapturedStep:
    """One graph with the memory that it reads: a replay first copies its inputs there."""

    def __init__(self, call: ModelCall, inputs: StepInputs, cache: TreeCache, *, graphs: Graphs) -> None:
        assert cache.plan.flat_slots is not None
        self._slots = cache.plan.flat_slots.clone()
        self._inputs = StepInputs(
            token_ids=inputs.token_ids.clone(),
            position_ids=inputs.position_ids.clone(),
            mask={name: mask.clone() for name, mask in inputs.mask.items()}
            if isinstance(inputs.mask, dict)
            else inputs.mask.clone(),
            num_logits=inputs.num_logits,
        )
        cache.plan.flat_slots = self._slots  # so that the recorded write reads the slots from here
        with graphs.warming():
            for _ in range(_WARMUP_CALLS):  # each call writes the same keys and values into the same slots
                call(self._inputs, cache)
        with graphs.capture() as self._graph:
            self._output = call(self._inputs, cache)

    def replay(self, inputs: StepInputs, cache: TreeCache) -> BackboneOutput:
        """Return the recorded step's output on new inputs, in the same memory as before."""
        assert cache.plan.flat_slots is not None
        self._slots.copy_(cache.plan.flat_slots)
        for held, given in zip(_tensors(self._inputs), _tensors(inputs), strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output


def _tensors(inputs: StepInputs) -> list[Tensor]:
    masks = list(inputs.mask.values()) if isinstance(inputs.mask, dict) else [inputs.mask]
    return [inputs.token_ids, inputs.position_ids, *masks]
