"""Take one real step of Medusa decoding and keep all that is decided in it, for a reader to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness.assets.chat import render_chat
from harness.compose.trees import grow
from harness.device.engine import Engine, best_device, load_model
from harness.device.prompts import take_date
from harness.device.trace import calibration_of
from harness.errors import UserError
from harness.measure.session import suite_engine
from harness.paths import resolve_path
from harness.records.profiles.drawn import DrawnNode, DrawnStep, Guess
from harness.specs.suite import SuiteSpec
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import decode_vanilla, draft_tokens
from medusa_impl.tree import DraftTree
from medusa_impl.tree_buffers import tree_buffers

_NUM_GUESSES = 5
_SHOWN_BEFORE = 12  # tokens of the text before the root


def explain_step(
    suite: SuiteSpec,
    prompt: str,
    *,
    suite_file: Path,
    num_nodes: int,
    after: int,
    allow_hub: bool,
    console: Console,
) -> DrawnStep:
    """Return the step that a suite's model and heads take after so many tokens of a prompt's greedy answer.

    The tree has `num_nodes` nodes, grown on the suite's calibration trace.
    Raises: UserError for a suite without heads, tokenizer or calibration trace, and for an answer that ends
    before.
    """
    if suite.calibration_trace is None or suite.heads is None:
        raise UserError(
            found="no heads or no calibration_trace",
            need="both: the tree is grown on the trace",
            where=f"suite {suite.name!r}",
        )
    base = suite_file.parent
    console.print(f"{suite.name}: loading {suite.model.asset or suite.model.path or 'a tiny random model'}")
    loaded = load_model(suite.model, device=best_device(), allow_hub=allow_hub, base_folder=base)
    if loaded.tokenizer is None:
        raise UserError(
            found="a model without a tokenizer", need="one that reads text", where=f"suite {suite.name!r}"
        )
    take_date(loaded)
    engine = suite_engine(suite, loaded, base_folder=base, allow_hub=allow_hub)
    trace = calibration_of(
        engine, resolve_path(suite.calibration_trace, base_folder=base), where="calibration_trace"
    )
    tree = grow(trace, num_nodes=num_nodes, values="joint", num_heads=engine.heads.num_heads).tree
    context = [*render_chat(loaded.tokenizer, prompt), *_greedy_answer(engine, prompt, num_tokens=after)]
    return drawn_step(engine, context, tree=tree)


def _greedy_answer(engine: Engine, prompt: str, *, num_tokens: int) -> list[int]:
    """Return the first tokens of the model's greedy answer; raises where it is shorter."""
    if not num_tokens:
        return []
    prompt_ids = render_chat(engine.loaded.tokenizer, prompt)
    steps = decode_vanilla(
        engine.runner.backbone,
        [prompt_ids],
        rule=GreedyRule(),
        max_new_tokens=num_tokens,
        eos_ids=engine.loaded.eos_ids,
    )
    answer = [token for step in steps for token in step.tokens[0]]
    if len(answer) < num_tokens or answer[-1] in engine.loaded.eos_ids:
        raise UserError(
            found=f"an answer of {len(answer)} tokens",
            need=f"more than {num_tokens}",
            where="--after",
            do="lower it, or ask for a longer answer",
        )
    return answer


@torch.inference_mode()
def drawn_step(engine: Engine, context: Sequence[int], *, tree: DraftTree) -> DrawnStep:
    """Return the greedy step after a context: draft, verify, accept, as `TreeStep` takes it.

    The model's own next token after the context is the root.
    """
    backbone, heads, tokenizer = engine.runner.backbone, engine.heads, engine.loaded.tokenizer
    tree.check_fits(num_heads=heads.num_heads, vocab_size=backbone.vocab_size)
    engine.loaded.require_known_ids(context, where="the prompt")
    buffers = tree_buffers(tree, device=backbone.device)
    cache = backbone.new_cache(batch_size=1, max_length=len(context) + tree.num_nodes + 1)
    logits, states = backbone.prefill_rows([list(context)], cache=cache)
    roots = logits.argmax(-1)
    head_logits = heads(states, lm_head=backbone.lm_head, num_heads=max(tree.depth, 1))
    tokens = draft_tokens(head_logits, roots, buffers)
    output = backbone.forward(tokens, depths=buffers.depths, visible=buffers.visible, cache=cache)
    accepted = GreedyRule().verify(output.logits, tokens, buffers)
    kept = accepted.nodes[0, : int(accepted.num_kept[0])].tolist()
    probabilities = head_logits[0].float().softmax(-1)
    wanted = output.logits[0].argmax(-1).tolist()
    ids = tokens[0].tolist()
    return DrawnStep(
        model=engine.loaded.name,
        before="".join(_texts(tokenizer, list(context))[-_SHOWN_BEFORE:]),
        heads=tuple(_guesses(tokenizer, head) for head in probabilities),
        nodes=tuple(
            DrawnNode(
                path=path,
                text=_text(tokenizer, ids[node]),
                probability=float(probabilities[len(path) - 1, ids[node]]) if path else None,
                wanted=_text(tokenizer, wanted[node]),
                is_kept=node in kept,
            )
            for node, path in enumerate(tree.paths)
        ),
        bonus=_text(tokenizer, int(accepted.next_token[0])),
        num_tokens=len(kept),
    )


def _guesses(tokenizer: Any, probabilities: torch.Tensor) -> tuple[Guess, ...]:
    best = probabilities.topk(min(_NUM_GUESSES, probabilities.shape[-1]))
    return tuple(
        Guess(text=_text(tokenizer, token), probability=value)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    return [_text(tokenizer, token) for token in tokens]
