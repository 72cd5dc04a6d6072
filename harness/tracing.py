"""`medusa-repro trace`: answer a suite's prompts greedily on the engine and record the trace."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import track

from harness.arms import ArmRunner
from harness.clock import device_clock
from harness.config import ArmSpec, SuiteSpec
from harness.engine import best_device, load_engine, load_model
from harness.record_trace import KeptText, record_trace
from harness.suite_prompts import suite_prompts, warmup_prompts
from harness.tiny_heads import train_tiny_heads
from harness.trace import Trace


def trace_suite(suite: SuiteSpec, *, suite_file: Path, out: Path, limit: int | None, allow_hub: bool, console: Console) -> Trace:
    """Decode every prompt of a suite with vanilla greedy decoding, record how its heads rank the texts, and write the trace."""
    if limit is not None:
        suite = suite.model_copy(update={"prompts": suite.prompts.model_copy(update={"limit": limit})})
    device = best_device()
    loaded = load_model(suite.model, device=device, allow_hub=allow_hub)
    prompts = suite_prompts(suite, loaded, allow_hub=allow_hub)
    heads = train_tiny_heads(loaded, suite, prompts=warmup_prompts(suite, loaded)) if suite.heads.train_steps is not None else None
    engine = load_engine(suite, loaded, beside=suite_file.parent, heads=heads)
    check_lengths(engine, prompts, max_new_tokens=suite.max_new_tokens)
    runner = ArmRunner(
        engine,
        ArmSpec(name="vanilla", method="vanilla"),
        tree=None,
        max_new_tokens=suite.max_new_tokens,
        max_prompt_tokens=max(len(prompt.prompt_ids) for prompt in prompts),
        clock=device_clock(device),
    )
    texts = []
    for prompt in track(prompts, description="vanilla texts", console=console):
        result = runner.generate(prompt.prompt_ids, seed=None)
        texts.append(KeptText(prompt.key, prompt.category, prompt.prompt_ids, result.token_ids, result.ended_by))
    trace = record_trace(engine, texts, max_new_tokens=suite.max_new_tokens, extra={"suite": suite.name})
    trace.save(out)
    return trace
