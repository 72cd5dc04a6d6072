"""What every arm of an ablation is measured on, and the measuring of one.

An arm's files are loaded from disk and compared with the original model.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from harness.assets.catalogue import training_prompts
from harness.assets.fetch import fetch_asset
from harness.assets.prompts import load_mt_bench
from harness.device.engine import Engine, LoadedModel, best_device, engine_from_heads, load_model
from harness.device.progress import progress_bar
from harness.device.prompts import Prompt
from harness.device.trace import Text, record_trace
from harness.errors import UserError
from harness.measure.ablation.arm import ArmJob, once_over
from harness.measure.ablation.backbone_change import (
    MeasuredText,
    Reading,
    greedy_text,
    head_text,
    read_text,
    text_change,
)
from harness.paths import cache_dir
from harness.records.ablation import ArmResult, HeadText, TextChange
from harness.records.trace import Trace
from harness.specs.ablation import START_ARM, AblationSpec
from harness.specs.assets import load_asset_specs
from harness.specs.recipe import CorpusSpec
from harness.training.conversations import conversation_sequence
from harness.training.corpus import corpus_prompts, make_corpus
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.distill import CorpusPrompt, CorpusSample, CorpusStore
from medusa_impl.training.sequences import TrainingSequence
from medusa_impl.training_log import STEP_LOG, read_step_log

_RANDOM_PROMPT_TOKENS = 12
_TEXT_ROWS = 32


def held_out_prompts(
    spec: AblationSpec, loaded: LoadedModel, *, left_out: set[str]
) -> tuple[CorpusPrompt, ...]:
    """Return the prompts that are answered to measure on.

    Those that the tree was grown on, or that recipes were chosen on, are left out.
    """
    wanted = spec.held_out
    if wanted.source == "random":
        vocab_size = int(loaded.model.config.vocab_size)
        source = random.Random(wanted.seed)
        rows = [
            tuple(source.randrange(vocab_size) for _ in range(_RANDOM_PROMPT_TOKENS))
            for _ in range(wanted.num_prompts)
        ]
        return tuple(
            CorpusPrompt(f"random-{index}", f"random-{index % 2}", ids, 0.0, 0)
            for index, ids in enumerate(rows)
        )
    if loaded.tokenizer is None:
        raise UserError(
            found="prompts of text for a tiny random model",
            need="held_out.source = 'random'",
            where=f"suite {spec.name!r}",
        )
    corpus = _greedy_corpus(spec)
    for draw in wanted.left_out:
        left_out = left_out | {
            prompt.key
            for prompt in training_prompts(num_prompts=draw.num_prompts, seed=draw.seed, split="held_out")
        }
    drawn = corpus_prompts(loaded.tokenizer, spec=corpus, num_prompts=wanted.num_prompts + len(left_out))
    return tuple(prompt for prompt in drawn if prompt.key not in left_out)[: wanted.num_prompts]


def reference_texts(spec: AblationSpec, loaded: LoadedModel, *, allow_hub: bool) -> tuple[MeasuredText, ...]:
    """Return MT-Bench's conversations with their reference answers, both turns as one text.

    There are none where the suite wants none.
    """
    if spec.references is None:
        return ()
    paths = fetch_asset(load_asset_specs()["mt-bench"], cache_dir=cache_dir(), allow_hub=allow_hub).paths
    prompts = load_mt_bench(paths["questions"], reference_file=paths["references"])
    texts = []
    for prompt in [prompt for prompt in prompts if prompt.reference][: spec.references.limit]:
        turns = list(zip(prompt.turns, prompt.reference or (), strict=False))
        sequence = conversation_sequence(loaded.tokenizer, turns, max_length=spec.references.max_length)
        if sequence is not None:
            texts.append(MeasuredText(prompt.key, prompt.category, sequence))
    return tuple(texts)


@dataclass(frozen=True)
class MeasuredArm:
    """An arm's result and the trace of the text that it wrote.

    Where its backbone was tuned, `original_text` is the trace of the original's text as the arm reads it.
    """

    result: ArmResult
    trace: Trace
    original_text: Trace | None


@dataclass(frozen=True)
class _Changes:
    """What training changed in the held-out answers, the references and the heads."""

    held_out: tuple[TextChange, ...]
    references: tuple[TextChange, ...]
    heads: tuple[HeadText, ...]


class ArmBench:
    """What every arm is measured on, made once.

    It holds the prompts, the original's greedy answers, and reference texts that neither model wrote.
    """

    def __init__(
        self,
        spec: AblationSpec,
        engine: Engine,
        prompts: Sequence[CorpusPrompt],
        references: tuple[MeasuredText, ...],
        work: Path,
        console: Console,
    ) -> None:
        self.spec, self.engine, self.prompts, self.references = spec, engine, prompts, references
        self.work, self.console = work, console
        self._readings: dict[str, Reading] = {}
        self.answers = self._answer(engine, work / "original")
        self.held_out = tuple(
            MeasuredText(
                sample.key,
                sample.category,
                TrainingSequence(
                    token_ids=(*sample.prompt_ids, *sample.token_ids),
                    answers=((len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.token_ids)),),
                ),
            )
            for sample in self.answers
        )

    def measure_start(self) -> MeasuredArm:
        """Return the untouched model under the heads that every arm starts from."""
        return self._result(self.engine, self.answers, began=time.monotonic(), job=None, recipe=None)

    def measure(self, job: ArmJob, recipe: Medusa2Settings) -> MeasuredArm:
        """Return what an arm's files are, loaded from disk as a user would.

        A frozen backbone is the original itself.
        """
        began = time.monotonic()
        adapter, base_folder = (
            job.target / "adapter",
            job.suite_file.parent if job.suite_file is not None else None,
        )
        if recipe.backbone == "frozen":
            engine, answers = (
                engine_from_heads(self.engine.loaded, job.target / "heads.safetensors", mode="eager"),
                self.answers,
            )
        else:
            model = self.spec.model.model_copy(update={"adapter": str(adapter.absolute())})
            tuned = load_model(model, device=best_device(), allow_hub=job.allow_hub, base_folder=base_folder)
            engine = engine_from_heads(tuned, job.target / "heads.safetensors")
            answers = self._answer(engine, job.work / "answers")
        found = self._result(engine, answers, began=began, job=job, recipe=once_over(recipe, seed=job.seed))
        del engine
        gc.collect()
        return found

    def _reading(self, text: MeasuredText) -> Reading:
        """Return a text's states under the original model, with which every arm is compared.

        They are kept from the first time on.
        """
        if text.key not in self._readings:
            self._readings[text.key] = read_text(self.engine.runner.backbone, text)
        return self._readings[text.key]

    def _answer(self, engine: Engine, folder: Path) -> tuple[CorpusSample, ...]:
        """Return the engine's greedy answers to all prompts, in their order.

        What is on disk is not generated again.
        """
        store = CorpusStore(folder)
        spec, eos_ids = _greedy_corpus(self.spec), engine.loaded.eos_ids
        make_corpus(
            engine.runner.backbone,
            self.prompts,
            store=store,
            spec=spec,
            eos_ids=eos_ids,
            console=self.console,
            keep_states=False,
        )
        by_key = {sample.key: sample for sample in store.samples(with_states=False)}
        return tuple(by_key[prompt.key] for prompt in self.prompts)

    def _result(
        self,
        engine: Engine,
        answers: Sequence[CorpusSample],
        *,
        began: float,
        job: ArmJob | None,
        recipe: Medusa2Settings | None,
    ) -> MeasuredArm:
        arm = job.arm if job is not None else START_ARM
        is_original = engine.loaded.model is self.engine.loaded.model
        with progress_bar(self.console) as progress:
            task = progress.add_task(
                f"measuring {arm}, texts",
                total=len(self.held_out) + len(self.references) + len(answers) * (1 if is_original else 2),
            )

            def advance() -> None:
                progress.advance(task)

            changes = self._changes(engine, is_original=is_original, advance=advance)
            trace = self._trace(engine, answers, arm=arm, advance=advance)
            original_text = (
                None if is_original else self._trace(engine, self.answers, arm=arm, advance=advance)
            )
        greedy = tuple(
            greedy_text(ours.key, ours.token_ids, original=theirs.token_ids)
            for ours, theirs in zip(answers, self.answers, strict=True)
        )
        steps = read_step_log(job.target / STEP_LOG) if job is not None else ()
        result = ArmResult(
            arm=arm,
            seed=job.seed if job is not None else None,
            recipe_name=self.spec.arm(arm).recipe if job is not None else None,
            recipe=recipe.model_dump(mode="json") if recipe is not None else None,
            num_steps=len(steps),
            num_sequences=_num_sequences(engine) if job is not None else 0,
            num_answer_tokens=sum(step.num_positions for step in steps),
            train_s=sum(step.num_positions / step.positions_per_s for step in steps if step.positions_per_s),
            evaluate_s=time.monotonic() - began,
            memory_bytes=max((step.memory_bytes for step in steps), default=None),
            backbone_sha256s=_trained_backbone(engine) if job is not None else None,
            heads_sha256=engine.heads_sha256 or "",
            adapter_sha256=engine.loaded.adapter_sha256,
            held_out=changes.held_out,
            references=changes.references,
            greedy=greedy,
            heads=changes.heads,
        )
        return MeasuredArm(result, trace, original_text)

    def _changes(self, engine: Engine, *, is_original: bool, advance: Callable[[], None]) -> _Changes:
        """Return what backbone and heads of the engine make of all texts, compared with the original."""
        held_out, references, heads = list[TextChange](), list[TextChange](), list[HeadText]()
        for text in (*self.held_out, *self.references):
            before = self._reading(text)
            after = before if is_original else read_text(engine.runner.backbone, text)
            change = text_change(text, original=before, tuned=after)
            if text in self.references:
                references.append(change)
            else:
                held_out.append(change)
                heads.append(head_text(text, engine.heads, after))
            advance()
        return _Changes(tuple(held_out), tuple(references), tuple(heads))

    def _trace(
        self,
        engine: Engine,
        samples: Sequence[CorpusSample],
        *,
        arm: str,
        advance: Callable[[], None],
    ) -> Trace:
        """Return the trace of answers as the engine reads them."""
        wanted = self.spec.held_out
        texts = [
            Text(Prompt(one.key, one.category, one.prompt_ids), one.token_ids, one.ended_by)
            for one in samples
        ]
        return record_trace(
            engine,
            texts,
            max_new_tokens=wanted.max_new_tokens,
            extra={"prompts": f"held-out prompts, {wanted.source}, seed {wanted.seed}", "arm": arm},
            on_text=advance,
        )


def _trained_backbone(engine: Engine) -> tuple[str, str] | None:
    training = engine.heads_provenance.get("training")
    found = training.get("backbone_sha256s") if isinstance(training, dict) else None
    return (str(found[0]), str(found[1])) if found else None


def _num_sequences(engine: Engine) -> int:
    training = engine.heads_provenance.get("training")
    return int(training["num_sequences"]) if isinstance(training, dict) else 0


def _greedy_corpus(spec: AblationSpec) -> CorpusSpec:
    wanted = spec.held_out
    return CorpusSpec(
        num_samples=wanted.num_prompts,
        max_new_tokens=wanted.max_new_tokens,
        sampled_share=0.0,
        num_rows=min(_TEXT_ROWS, wanted.num_prompts),
        seed=wanted.seed,
        split="held_out",
    )
