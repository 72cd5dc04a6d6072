"""One step drawn: the tokens that decoding itself yields, the tree with its reasons, in terminal and page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.device.engine import Engine
from harness.errors import ExitCode
from harness.measure.profiles.drawn import drawn_step
from harness.records.profiles.drawn import DrawnNode, DrawnStep
from harness.report.anatomy.drawn import mask_rows, print_drawn_step, quoted, why
from harness.report.pages.step import render_drawn_step
from harness.safe_text import SafeConsole
from harness.tests.tiny_suite import command, micro_data, write_suite
from medusa_impl.acceptance import GreedyRule
from medusa_impl.decode import decode_medusa
from medusa_impl.tree import DraftTree

TREE = DraftTree.from_paths([(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


class Words:
    """A tokenizer whose tokens read as `<id>`."""

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(f"<{token}>" for token in tokens)


@pytest.fixture(scope="module")
def reader(engine: Engine) -> Engine:
    return replace(engine, loaded=replace(engine.loaded, tokenizer=Words()))


def ids(text: str) -> list[int]:
    return [int(part.rstrip(">")) for part in text.split("<") if part]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_step_that_decoding_takes(reader: Engine, seed: int) -> None:
    backbone = reader.runner.backbone
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(1, backbone.vocab_size, (8 + seed,), generator=generator).tolist()
    step = drawn_step(reader, context, tree=TREE)
    decoded = decode_medusa(
        backbone,
        reader.heads,
        TREE,
        [context],
        rule=GreedyRule(),
        max_new_tokens=12,
        eos_ids=frozenset(),
    )
    root, first = next(decoded).tokens[0], next(decoded).tokens[0]
    assert ids(step.nodes[0].text) == list(root)
    assert ids(step.kept) == list(first) and step.num_tokens == len(first)
    assert [node.path for node in step.nodes] == list(TREE.paths)
    for node in step.nodes:
        if node.path:
            (guess,) = [one for one in step.heads[len(node.path) - 1] if one.text == node.text]
            assert guess.probability == pytest.approx(node.probability)
            parent = next(one for one in step.nodes if one.path == node.path[:-1])
            assert node.is_kept == (parent.is_kept and parent.wanted == node.text)


def made_up() -> DrawnStep:
    nodes = (
        DrawnNode(path=(), text=" cat", probability=None, wanted=" sat", is_kept=True),
        DrawnNode(path=(0,), text=" sat", probability=0.6, wanted=" on", is_kept=True),
        DrawnNode(path=(1,), text=" ran", probability=0.2, wanted=" off", is_kept=False),
        DrawnNode(path=(0, 0), text=" on", probability=0.5, wanted=" the", is_kept=True),
        DrawnNode(path=(1, 0), text=" on", probability=0.5, wanted=" it", is_kept=False),
    )
    heads = ((("sat", 0.6), ("ran", 0.2)), (("on", 0.5),))
    guesses = [[{"text": f" {text}", "probability": chance} for text, chance in head] for head in heads]
    data = {"model": "m", "before": "The", "heads": guesses, "nodes": nodes, "bonus": " the", "num_tokens": 3}
    return DrawnStep.model_validate(data)


def test_the_terminal_tells_tree_reasons_and_mask() -> None:
    step = made_up()
    assert step.kept == " sat on the"
    stream = io.StringIO()
    print_drawn_step(SafeConsole(file=stream, width=100), step)
    text = stream.getvalue()
    assert 'head 1: " sat" 60 %, " ran" 20 %' in text and '4. Yielded: " sat on the", 3 tokens' in text
    assert '" cat" > " sat" > " on"' in text
    reasons = [
        why(node, parent=parent) for node, parent in zip(step.nodes[1:4], [step.nodes[0]] * 3, strict=True)
    ]
    assert reasons == ["the model says so too", 'the model says " sat"', "the model says so too"]
    assert why(step.nodes[4], parent=step.nodes[2]) == "not reached"
    assert mask_rows(step) == ["x . . . .", "x x . . .", "x . x . .", "x x . x .", "x . x . x"]


def test_the_page_tells_the_same_and_no_token_is_markup() -> None:
    step = made_up()
    page = render_drawn_step(step)
    assert page.count('class="node') == 5 and page.count('class="node kept"') == 3
    assert page.count('class="seen"') == 11
    evil = "<img src=x>\x1b\u202e"
    planted = step.model_copy(update={"before": evil, "bonus": evil, "model": evil})
    shown = render_drawn_step(planted)
    assert "<img" not in shown and "\x1b" not in shown and "\u202e" not in shown
    assert quoted("a\nb") == '"a\\nb"'


def test_a_model_that_reads_no_text_is_refused_in_one_line(heads_file: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file))
    ran = command("explain", "why?", "--suite", suite)
    assert ran.code == ExitCode.USER_ERROR and ran.error_line.startswith("error: found ")


def test_the_real_model_explains_a_step_at_the_command_line(tmp_path: Path) -> None:
    page = tmp_path / "step.html"
    ran = command("explain", "Name three fruits.", "--nodes", "6", "--after", "2", "--html", page)
    assert ran.code == ExitCode.OK, ran.err
    told = json.loads(ran.out.splitlines()[-1])
    assert told["nodes"] == 6 and 1 <= told["tokens"] <= 6
    assert "1. Draft" in ran.out and "<h2>2. Verify</h2>" in page.read_text(encoding="utf-8")
