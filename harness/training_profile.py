"""Which share of the matrix throughput training steps reach, and where the rest of their time goes.

    share = sum over dtypes (counted operations / matrix throughput) / seconds of a step

Operations are those of matrix products as they run, counted by dtype on one real step. The steps of a stage are

    dropped | plain, marked, plain, marked, .. | counted
              nothing touches a plain step: its length is the headline; a marked one tells its parts

A stage is what the steps of a recipe have in common: heads alone on a subset of the vocabulary, then on all of it; joint training with the
heads alone, then with the backbone. The steps are the trainers' own, on the recipe's own text.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Column, Table
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PrinterCallback

import medusa_impl.training
from harness.clock import Clock, device_clock
from harness.config import Frozen
from harness.engine import LoadedModel, best_device, load_model
from harness.environment import blas_settings, device_info, git_state, package_versions, python_version, settings
from harness.errors import UserError
from harness.joint_run import check_runnable, first_heads, read_text, token_subset
from harness.locks import device_held
from harness.paths import resolve_path
from harness.probes import measure_device_limits
from harness.records import DeviceLimits, Environment, canonical_sha256
from harness.report.formatting import ABSENT, milliseconds, percent, significant
from harness.training_specs import AnySuite, JointSuite, TrainingSuite
from medusa_impl.checkpoint import backbone_sha256
from medusa_impl.distill import CorpusSample, unpack_corpus
from medusa_impl.features import FeatureSet, add_states, load_features
from medusa_impl.heads import MedusaHeads
from medusa_impl.medusa2 import MedusaTrainingModel
from medusa_impl.medusa2_trainer import MedusaTrainer, training_arguments
from medusa_impl.runner import StepRunner
from medusa_impl.sequences import LikeLengthSampler, TrainingSequence
from medusa_impl.training import Medusa1Recipe, train_medusa1

HEADS_BOUND = 0.6  # of the matrix throughput: what heads alone on cached states are to reach
OTHER = "other"
HEADS_PARTS = ("states", "logits_loss", "backward", "optimiser", OTHER)
JOINT_PARTS = ("teacher", "student", "backbone_loss", "heads_loss", "backward", "optimiser", OTHER)
_STATE_BATCHES = 2  # batches' worth of cached states that heads alone are profiled on
_NEVER = 1_000_000_000  # steps between two saves: none falls among the timed ones

_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Any] = {  # PyTorch's own, and its CPU attention, which it has no formula for; the arguments are the same
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_ATEN._scaled_dot_product_flash_attention_backward],
}


class MatrixThroughput(Frozen):
    """Matrix throughput in one dtype, measured in the same run before the steps and after them."""

    dtype: str
    before_flop_per_s: float = Field(gt=0)
    after_flop_per_s: float = Field(gt=0)
    method: str

    @property
    def flop_per_s(self) -> float:
        """The better of both: a limit is the most that the device was seen to do, so a share of it can only come out too small."""
        return max(self.before_flop_per_s, self.after_flop_per_s)


class PartProfile(Frozen):
    """One part of a stage's steps: its seconds in every marked step, and the operations of its products by dtype."""

    name: str
    seconds: tuple[float, ...] = Field(min_length=1)
    flops: dict[str, int]


class StageProfile(Frozen):
    """The timed steps of one stage: `step_s` untouched, the parts' from marked steps; `other` is what no part covers.

    `step_rate` is the stage's share of the recipe's steps; `num_positions` are the positions that one step learns from.
    """

    name: str
    step_rate: float = Field(gt=0, le=1)
    num_positions: int = Field(ge=1)
    step_s: tuple[float, ...] = Field(min_length=1)
    parts: tuple[PartProfile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len({len(part.seconds) for part in self.parts}) != 1:
            raise ValueError("found parts of another number of steps, need as many of each")
        return self

    @property
    def flops(self) -> dict[str, int]:
        """Operations of the whole step by dtype."""
        summed: dict[str, int] = defaultdict(int)
        for part in self.parts:
            for dtype, count in part.flops.items():
                summed[dtype] += count
        return dict(summed)

    @property
    def median_step_s(self) -> float:
        """Median of the steps that nothing touched."""
        return median(self.step_s)


class TrainingProfile(Frozen):
    """A profile of a recipe's training steps.

    Products that checkpointing computes again count as often as they run, and masked attention counts in full.
    """

    schema_version: Literal[1] = 1
    recipe: str
    kind: Literal["heads", "joint"]
    environment: Environment
    throughput: tuple[MatrixThroughput, ...] = Field(min_length=1)
    stages: tuple[StageProfile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _throughput_of_every_dtype(self) -> Self:
        counted = {dtype for stage in self.stages for dtype in stage.flops}
        if missing := sorted(counted - {limit.dtype for limit in self.throughput}):
            raise ValueError(f"found products in {missing}, need the matrix throughput there")
        return self

    def least_s(self, flops: Mapping[str, int]) -> float:
        """Return the seconds that these operations take at full matrix throughput."""
        limits = {limit.dtype: limit.flop_per_s for limit in self.throughput}
        return sum(count / limits[dtype] for dtype, count in flops.items())

    def stage_share(self, stage: StageProfile) -> float:
        """Return the share of the matrix throughput that a stage's steps reach."""
        return self.least_s(stage.flops) / stage.median_step_s

    def part_share(self, part: PartProfile) -> float | None:
        """Return the share that one part reaches while it runs; None for one that does not run."""
        return self.least_s(part.flops) / median(part.seconds) if median(part.seconds) > 0 else None

    @property
    def share(self) -> float:
        """The share over a whole run of the recipe: stages weighted by their shares of its steps."""
        least_s = sum(stage.step_rate * self.least_s(stage.flops) for stage in self.stages)
        return least_s / sum(stage.step_rate * stage.median_step_s for stage in self.stages)


def read_training_profile(path: Path) -> TrainingProfile:
    """Read a training profile.

    Raises: UserError for a missing or unreadable file, or one of another schema.
    """
    try:
        return TrainingProfile.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(found=f"{key}: {first['msg']}", need="a TrainingProfile record", where=path.name) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(found=f"no readable {path.name}", need="a training profile", where="the command line") from error


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
    """Counts the floating-point operations of matrix products as they run, by part of the step and by dtype of the factors."""

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
            factor = next(value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point())
            dtype = str(factor.dtype).removeprefix("torch.")
            self.flops[self._parts.current][dtype] += int(formula(*args, **options, out_val=result))
        return result


Marks = Callable[[PartClock], contextlib.AbstractContextManager[None]]


class StepWatch:
    """Times a trainer's steps, stage by stage; the trainer calls it after each step.

    A stage's first step is dropped, then `num_steps` plain and as many marked ones take turns, and one is counted. Between two steps the
    marks of the next are set, on no one's time.
    """

    def __init__(self, stages: Sequence[str], *, num_steps: int, clock: Clock, marks: Marks) -> None:
        kinds = ("dropped", *("plain", "marked") * num_steps, "counted")
        self._plan = [(stage, kind) for stage in stages for kind in kinds]
        self._clock, self._marks = clock, marks
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
        if self._place < len(self._plan):
            self._begin(self._plan[self._place][1])
        self._started = self._clock()

    def __enter__(self) -> StepWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
    """Mark the parts of Medusa-1's steps: `logits_loss` is the loss but for the heads' own states, with the gradient that it forms."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_timed(medusa_impl.training, "medusa1_loss", parts, part="logits_loss"))
        stack.enter_context(_timed(heads, "states", parts, part="states"))
        stack.enter_context(_timed(torch.nn.utils, "clip_grad_norm_", parts, part="optimiser"))
        stack.enter_context(_end_marks(parts))
        yield


@contextlib.contextmanager
def joint_marks(parts: PartClock, *, model: MedusaTrainingModel, accelerator: Any) -> Iterator[None]:
    """Mark the parts of joint steps: `student` is the model's call but for losses and teacher; `backward` computes logits again."""

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


@dataclass(frozen=True)
class _Bench:
    """A trainer that is ready to take the watched steps; `rates` are the stages' shares of the recipe's steps."""

    watch: StepWatch
    run: Callable[[], object]
    rates: Mapping[str, float]
    parts: tuple[str, ...]
    dtypes: tuple[str, ...]
    environment: Environment


def profile_training(spec: AnySuite, *, num_steps: int, allow_hub: bool, command: str, console: Console) -> TrainingProfile:
    """Take `num_steps` plain and as many marked steps of every stage of a recipe, count the products of one more, and say what they reach.

    Heads alone train on the CPU, whatever else there is. Matrix throughput is measured just before and after, the device held throughout.
    Raises: UserError for a recipe that cannot run here or whose text is not there.
    """
    if isinstance(spec, JointSuite):
        check_runnable(spec.recipe)
    if spec.packed_corpus is None and (isinstance(spec, TrainingSuite) or spec.conversations is None):
        raise UserError(
            found="a recipe whose text is still to be made",
            need="packed_corpus, or conversations",
            where=f"{spec.name}.toml",
            do="make it with medusa-repro distill and name it there",
        )
    device = best_device() if isinstance(spec, JointSuite) else torch.device("cpu")
    clock = device_clock(device)
    console.print(f"[bold]{spec.name}[/bold]: loading {spec.model.asset or spec.model.path or 'a tiny random model'}")
    quantisation = spec.recipe.quantisation if isinstance(spec, JointSuite) else None
    loaded = load_model(spec.model, device=device, allow_hub=allow_hub, quantisation=quantisation)
    with tempfile.TemporaryDirectory() as text:
        bench = (
            _joint_bench(spec, loaded, folder=Path(text), num_steps=num_steps, clock=clock, command=command)
            if isinstance(spec, JointSuite)
            else _heads_bench(spec, loaded, folder=Path(text), num_steps=num_steps, clock=clock, command=command)
        )
        console.print(f"{bench.watch.num_steps} steps, {num_steps} of them plain in each stage: {', '.join(bench.rates)}")
        with device_held(device, on_wait=lambda: console.print("another run holds the device: waiting for its turn")):
            before = _limits(bench.dtypes, device=device, clock=clock)
            with bench.watch:
                bench.run()
            after = _limits(bench.dtypes, device=device, clock=clock)
    stages = bench.watch.profiles(bench.rates, parts=bench.parts)
    counted = {dtype for stage in stages for dtype in stage.flops}
    return TrainingProfile(
        recipe=spec.name,
        kind=spec.kind,
        environment=bench.environment,
        throughput=tuple(
            MatrixThroughput(
                dtype=dtype,
                before_flop_per_s=before[dtype].matmul_flop_per_s,
                after_flop_per_s=after[dtype].matmul_flop_per_s,
                method=before[dtype].method,
            )
            for dtype in bench.dtypes
            if dtype in counted
        ),
        stages=stages,
    )


def _limits(dtypes: Sequence[str], *, device: torch.device, clock: Clock) -> dict[str, DeviceLimits]:
    return {dtype: measure_device_limits(device, getattr(torch, dtype), clock=clock) for dtype in dtypes}


def _heads_bench(spec: TrainingSuite, loaded: LoadedModel, *, folder: Path, num_steps: int, clock: Clock, command: str) -> _Bench:
    """Return Medusa-1's trainer on the cached states of as many answers as a few batches need."""
    recipe = spec.recipe
    samples = _samples(spec)
    features = _features(samples, loaded, recipe, folder=folder)
    lm_head: Any = loaded.model.get_output_embeddings()
    heads = MedusaHeads(
        num_heads=recipe.num_heads,
        num_layers=recipe.num_layers,
        hidden_size=lm_head.weight.shape[1],
        vocab_size=lm_head.weight.shape[0],
        architecture=recipe.architecture,
        lm_head=lm_head,
    )
    rates = heads_stages(recipe, vocab_size=heads.vocab_size)
    watch = StepWatch(tuple(rates), num_steps=num_steps, clock=clock, marks=partial(heads_marks, heads=heads))
    changed: dict[str, object] = {"num_epochs": None, "num_steps": watch.num_steps, "full_vocabulary_rate": (len(rates) - 1) / 2}
    if "subset" not in rates:
        changed["subset_size"] = None
    texts = [[sample.key, [*sample.prompt_ids, *sample.token_ids]] for sample in samples]
    environment = _describe(spec, loaded, heads=heads, texts=texts, command=command)
    run = partial(
        train_medusa1,
        features,
        heads,
        lm_head.weight.detach().float().cpu(),
        recipe=recipe.model_copy(update=changed),
        checkpoint_dir=folder / "training",
        resume=False,
        on_step=lambda _: watch(recipe.batch_positions),
        log_every_steps=1,
        save_every_steps=_NEVER,
    )
    dtypes = tuple(sorted({"float32", recipe.matmul_dtype}))
    return _Bench(watch=watch, run=run, rates=rates, parts=HEADS_PARTS, dtypes=dtypes, environment=environment)


def heads_stages(recipe: Medusa1Recipe, *, vocab_size: int) -> dict[str, float]:
    """Return Medusa-1's stages, with their shares of the recipe's steps: a subset of the vocabulary, then all of it."""
    full = recipe.full_vocabulary_rate if recipe.subset_size is not None and recipe.subset_size < vocab_size else 1.0
    return {stage: rate for stage, rate in (("subset", 1 - full), ("full", full)) if rate > 0}


def _samples(spec: TrainingSuite) -> list[CorpusSample]:
    """Return the corpus' first answers, enough for a few batches."""
    assert spec.packed_corpus is not None
    needed, rows, taken = _STATE_BATCHES * spec.recipe.batch_positions, 0, list[CorpusSample]()
    for sample in unpack_corpus(resolve_path(spec.packed_corpus, beside=None)):
        if rows >= needed:
            break
        taken.append(sample)
        rows += len(sample.token_ids) - 1
    if rows < spec.recipe.batch_positions:
        raise UserError(
            found=f"{rows} positions", need=f"a batch of {spec.recipe.batch_positions}", where=Path(spec.packed_corpus).name, do="add text"
        )
    return taken


def _features(samples: Sequence[CorpusSample], loaded: LoadedModel, recipe: Medusa1Recipe, *, folder: Path) -> FeatureSet:
    backbone = StepRunner(loaded.model, None, mode="eager").backbone
    store = add_states(backbone, samples, cache_folder=folder, backbone_sha256=loaded.sha256)
    return load_features(store, num_heads=recipe.num_heads, held_out_rate=0.0)


def _joint_bench(spec: JointSuite, loaded: LoadedModel, *, folder: Path, num_steps: int, clock: Clock, command: str) -> _Bench:
    """Return the joint trainer on one batch of the recipe's text, the same in every step, so that the counted step is like the timed."""
    recipe = spec.recipe
    text = read_text(spec, loaded, work=folder).train
    start = resolve_path(spec.start_heads, beside=None) if spec.start_heads is not None else None
    heads, _ = first_heads(loaded, recipe, start_heads=start)
    batch = one_batch(text, size=recipe.batch_sequences * recipe.accumulation_steps, seed=recipe.seed)
    texts = [[str(index), list(sequence.token_ids)] for index, sequence in enumerate(batch)]
    environment = _describe(spec, loaded, heads=heads, texts=texts, command=command)
    torch.manual_seed(recipe.seed)
    rates = joint_stages(spec)
    watch = StepWatch(
        tuple(rates),
        num_steps=num_steps,
        clock=clock,
        marks=lambda parts: joint_marks(parts, model=model, accelerator=trainer.accelerator),
    )
    planned = recipe.model_copy(update={"num_epochs": None, "num_steps": watch.num_steps, "stage_rate": 0.5})
    subset = token_subset(text, recipe, vocab_size=heads.vocab_size)
    model = MedusaTrainingModel(loaded.model, heads, recipe=planned, subset=subset)
    arguments = training_arguments(planned, folder=folder / "joint", save_steps=_NEVER, use_cpu=loaded.model.device.type == "cpu")
    arguments.set_save(strategy="no")
    arguments.train_sampling_strategy = "sequential"
    trainer = MedusaTrainer(model, sequences=batch * watch.num_steps, arguments=arguments, on_step=lambda step: watch(step.num_positions))
    trainer.remove_callback(PrinterCallback)  # standard output is for the table
    dtypes = tuple(sorted({"float32", spec.model.dtype, recipe.autocast or "float32"}))
    return _Bench(watch=watch, run=trainer.train, rates=rates, parts=JOINT_PARTS, dtypes=dtypes, environment=environment)


def joint_stages(spec: JointSuite) -> dict[str, float]:
    """Return the joint stages, with their shares of the recipe's steps: the heads alone, then heads and backbone."""
    if spec.recipe.backbone == "frozen":
        return {"heads": 1.0}
    if spec.recipe.warmup == "two_stage":
        return {"heads": spec.recipe.stage_rate, "both": 1 - spec.recipe.stage_rate}
    return {"both": 1.0}


def one_batch(sequences: Sequence[TrainingSequence], *, size: int, seed: int) -> tuple[TrainingSequence, ...]:
    """Return a batch as training under that seed sees it first.

    Raises: UserError where there are fewer.
    """
    if len(sequences) < size:
        raise UserError(found=f"{len(sequences)} sequences", need=f"a batch of {size}", where="the recipe's text", do="add text")
    sampler = LikeLengthSampler([len(sequence.token_ids) for sequence in sequences], batch_size=size, seed=seed)
    return tuple(sequences[index] for index in islice(sampler, size))


def _describe(spec: AnySuite, loaded: LoadedModel, *, heads: MedusaHeads, texts: list[list[Any]], command: str) -> Environment:
    """Return where the profile comes from; no engine is built, which would change the attention that joint training runs."""
    commit, dirty = git_state(Path(__file__).parent)
    weight_bytes, heads_bytes = (
        sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) for module in (loaded.model, heads)
    )
    return Environment(
        commit=commit,
        dirty=dirty,
        command=command,
        python=python_version(),
        packages=package_versions(),
        device=device_info(loaded.model.device),
        engine="eager",
        dtype=spec.model.dtype,
        blas=blas_settings(),
        variables=settings(),
        backbone_sha256=loaded.sha256,
        heads_sha256=backbone_sha256(heads),
        prompts_sha256=canonical_sha256(texts),
        model_name=loaded.name,
        weight_bytes=weight_bytes,
        heads_bytes=heads_bytes,
        assets=loaded.assets,
        started_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )


def training_headline(profile: TrainingProfile) -> dict[str, Any]:
    """Return the one JSON object that ends the command's output.

    Units: milliseconds (medians), GFLOP a step and GFLOP/s; shares of the matrix throughput.
    """
    return {
        "recipe": profile.recipe,
        "kind": profile.kind,
        "device": profile.environment.device.name,
        "share": profile.share,
        "bound": HEADS_BOUND if profile.kind == "heads" else None,
        "gflop_per_s": {limit.dtype: limit.flop_per_s / 1e9 for limit in profile.throughput},
        "stages": [
            {
                "name": stage.name,
                "share": profile.stage_share(stage),
                "num_steps": len(stage.step_s),
                "step_ms": 1e3 * stage.median_step_s,
                "positions_per_s": stage.num_positions / stage.median_step_s,
                "gflop": {dtype: count / 1e9 for dtype, count in sorted(stage.flops.items())},
                "parts": {
                    part.name: {"ms": 1e3 * median(part.seconds), "share": profile.part_share(part)}
                    for part in stage.parts
                    if any(part.seconds)
                },
            }
            for stage in profile.stages
        ],
    }


def print_training_profile(console: Console, profile: TrainingProfile) -> None:
    """Print one table a stage: where the time goes, what is counted in it, and how much of the step each part loses."""
    for stage in profile.stages:
        rate = significant(stage.num_positions / stage.median_step_s)
        title = f"{stage.name}: {milliseconds(stage.median_step_s)} ms a step, {rate} positions/s, {percent(stage.step_rate)} of the steps"
        shown = Table(Column("part", no_wrap=True), "ms", "of the step", "GFLOP", "of matrix throughput", "lost of the step", title=title)
        for part in (part for part in stage.parts if any(part.seconds)):
            lost_s = median(part.seconds) - profile.least_s(part.flops)
            shown.add_row(
                part.name,
                milliseconds(median(part.seconds)),
                percent(median(part.seconds) / stage.median_step_s),
                _gflop(part.flops),
                percent(profile.part_share(part)) if part.flops else ABSENT,
                percent(lost_s / stage.median_step_s),
            )
        share = profile.stage_share(stage)
        shown.add_section()
        shown.add_row("step", milliseconds(stage.median_step_s), percent(1), _gflop(stage.flops), percent(share), percent(1 - share))
        console.print(shown)
    for limit in profile.throughput:
        found = f"{limit.before_flop_per_s / 1e9:,.0f} before the steps, {limit.after_flop_per_s / 1e9:,.0f} after"
        console.print(f"matrix throughput, {limit.dtype}: {found}, GFLOP/s; the better counts", highlight=False, soft_wrap=True)
    bound = f"; at least {percent(HEADS_BOUND)} are wanted" if profile.kind == "heads" else ""
    console.print(f"over the recipe: {percent(profile.share)} of the matrix throughput{bound}", highlight=False, soft_wrap=True)


def _gflop(flops: Mapping[str, int]) -> str:
    return ", ".join(f"{significant(count / 1e9)} {dtype}" for dtype, count in sorted(flops.items())) or ABSENT
