"""`medusa-repro trace`: answer a suite's prompts greedily on the engine and record the trace."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from harness.device.engine import best_device, load_model
from harness.device.progress import counted
from harness.device.prompts import check_lengths, suite_prompts, take_date
from harness.device.trace import Text, record_trace
from harness.measure.session import suite_engine
from harness.records.trace import Trace
from harness.specs.suite import SuiteSpec
from medusa_impl.stream import decode_stream
from medusa_impl.stream_rows import StreamRequest

_NUM_ROWS = 16


def trace_suite(
    suite: SuiteSpec, *, suite_file: Path, out: Path, limit: int | None, allow_hub: bool, console: Console
) -> Trace:
    """Write the trace of a suite's prompts, answered by vanilla greedy decoding, and return it.

    Prompts share a batch: where two logits lie within rounding, a text may part from its batch-1 text.
    """
    if limit is not None:
        suite = suite.model_copy(update={"prompts": suite.prompts.model_copy(update={"limit": limit})})
    device = best_device()
    loaded = load_model(suite.model, device=device, allow_hub=allow_hub, base_folder=suite_file.parent)
    take_date(loaded)
    prompts = suite_prompts(
        suite, loaded, base_folder=suite_file.parent, allow_hub=allow_hub, console=console
    )
    engine = suite_engine(suite, loaded, base_folder=suite_file.parent, allow_hub=allow_hub)
    check_lengths(prompts, engine, max_new_tokens=suite.max_new_tokens)
    rendered = {prompt.key: prompt for prompt in prompts}
    requests = [
        StreamRequest(key=prompt.key, prompt_ids=prompt.prompt_ids, temperature=0.0, seed=0)
        for prompt in prompts
    ]
    stream = decode_stream(
        engine.runner.backbone,
        requests,
        num_rows=_NUM_ROWS,
        max_new_tokens=suite.max_new_tokens,
        eos_ids=loaded.eos_ids,
    )
    texts = [
        Text(rendered[done.key], tuple(done.token_ids), done.ended_by)
        for done in counted(stream, "vanilla texts", total=len(prompts), console=console)
    ]
    texts.sort(key=lambda text: list(rendered).index(text.prompt.key))
    trace = record_trace(engine, texts, max_new_tokens=suite.max_new_tokens, extra={"suite": suite.name})
    trace.save(out)
    return trace
