"""The profile: sums and ratios on known clocks, sizes in turn, tables, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from harness.compose.replay import replay
from harness.device.clock import device_clock
from harness.device.engine import Engine, load_engine, load_model
from harness.device.prompts import suite_prompts
from harness.device.trace import calibration_of, record_trace
from harness.errors import ExitCode, UserError
from harness.files import write_json
from harness.measure.profiles.step import kept_contexts, measure_sizes, nested_trees
from harness.measure.run import describe
from harness.paths import holds_absolute_path
from harness.records.profiles.step import PARTS, SizeProfile, StepProfile, parse_sizes, read_step_profile
from harness.records.run import ArmTree
from harness.records.trace import Trace
from harness.report.profiles import profile_headline, render_step_profile
from harness.tests.device.test_trace import texts_of
from harness.tests.tiny_suite import TickClock, WorkClock, command, micro_data, smoke_suite, write_suite
from medusa_impl.heads import MedusaHeads
from medusa_impl.tree import DraftTree

SIZES = (1, 2, 6)


@pytest.fixture(scope="module")
def calibration(engine: Engine) -> Trace:
    return record_trace(engine, texts_of(engine, budget=30), max_new_tokens=30, extra={})


@pytest.fixture(scope="module")
def trees(engine: Engine, calibration: Trace) -> tuple[ArmTree, ...]:
    return nested_trees(calibration, sizes=SIZES, num_heads=engine.heads.num_heads)


@pytest.fixture(scope="module")
def contexts(engine: Engine) -> tuple[tuple[int, ...], ...]:
    prompts = [prompt.prompt_ids for prompt in suite_prompts(smoke_suite(), engine.loaded)[:2]]
    return kept_contexts(engine, prompts, max_new_tokens=12, clock=TickClock())


def size(num_nodes: int, *, predicted: float = 1.0, **changes: Any) -> SizeProfile:
    """A hand-made size: two marked steps with parts of 1 to 6 ms and 4 ms of host, and an unmarked step of 24
    ms a node.
    """
    steps = {"step_s": (0.025, 0.025), "unmarked_step_s": (0.024 * num_nodes,), "kept_tokens": (1, 1, 1)}
    parts = {part: (0.001 * place, 0.001 * place) for place, part in enumerate(PARTS, start=1)}
    tree = ArmTree(
        paths=DraftTree.chain(num_nodes - 1).paths, origin="by hand", predicted_tokens_per_step=predicted
    )
    return SizeProfile.model_validate({"tree": tree, "parts_s": parts, **steps, **changes})


def hand_made(engine: Engine, sizes: Sequence[SizeProfile]) -> StepProfile:
    environment = describe(engine, suite=smoke_suite(), prompts=(), command="medusa-repro profile")
    return StepProfile(suite="smoke", environment=environment, context_tokens=(20, 31), sizes=tuple(sizes))


def test_trees_are_nested_and_predicted_by_the_trace(trees: tuple[ArmTree, ...], calibration: Trace) -> None:
    assert [len(tree.paths) for tree in trees] == list(SIZES)
    assert set(trees[0].paths) < set(trees[1].paths) < set(trees[2].paths)
    for tree in trees:
        assert tree.predicted_tokens_per_step == replay(calibration, tree.tree()).tokens_per_step
    assert trees[0].predicted_tokens_per_step == 1


def test_contexts_are_prompts_with_half_their_answers(
    engine: Engine, contexts: tuple[tuple[int, ...], ...]
) -> None:
    texts = texts_of(engine, budget=12, count=2)
    assert contexts == tuple((*text.prompt.prompt_ids, *text.token_ids[:6]) for text in texts)


def test_a_clock_that_only_the_backbone_moves_gives_it_every_step(
    engine: Engine, trees: tuple[ArmTree, ...], contexts: tuple[tuple[int, ...], ...]
) -> None:
    with WorkClock(engine.loaded.model) as clock:
        profiles = measure_sizes(engine, trees, contexts, num_steps=3, clock=clock)
    for nodes, profile in zip(SIZES, profiles, strict=True):
        assert profile.step_s == profile.parts_s["backbone"] == profile.unmarked_step_s == (float(nodes),) * 3
        assert profile.host_s == profile.parts_s["heads"] == (0.0,) * 3 and profile.own_code_share == 0
        assert len(profile.kept_tokens) == 6 and profile.device_busy_s is None
    for nodes, factors in zip(SIZES, hand_made(engine, profiles).factors, strict=True):
        assert factors.step_cost == factors.overhead == nodes
        assert factors.predicted_speedup == factors.predicted_tokens_per_step / nodes
    assert profiles[0].kept_tokens == (1,) * 6 and max(profiles[2].kept_tokens) > 1


def test_every_part_is_marked_once_and_unmarked_steps_not_at_all(
    engine: Engine, trees: tuple[ArmTree, ...], contexts: tuple[tuple[int, ...], ...]
) -> None:
    """On a clock that ticks at each reading a part takes a second, a marked step two for each part and one
    more, an unmarked step one.
    """
    vanilla, *medusa = measure_sizes(engine, trees, contexts, num_steps=2, clock=TickClock())
    drafting = {"heads", "candidates"}
    assert {part for part in PARTS if any(vanilla.parts_s[part])} == set(PARTS) - drafting
    for profile, num_parts in ((vanilla, 4), *((profile, 6) for profile in medusa)):
        assert all(seconds in (0.0, 1.0) for part in PARTS for seconds in profile.parts_s[part])
        assert profile.step_s == (2.0 * num_parts + 1,) * 2 and profile.unmarked_step_s == (1.0,) * 2
        assert profile.host_s == (num_parts + 1.0,) * 2


def test_sizes_take_turns_and_each_round_begins_with_another(
    engine: Engine, trees: tuple[ArmTree, ...], contexts: tuple[tuple[int, ...], ...]
) -> None:
    seen: list[int] = []
    held: list[int] = []

    def note(module: object, args: object, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    class Held:
        def __enter__(self) -> None:
            held.append(len(seen))

        def __exit__(self, *error: object) -> None:
            held.append(len(seen))

    hook = engine.loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        profiles = measure_sizes(engine, trees, contexts, num_steps=20, clock=TickClock(), held=Held)
    finally:
        hook.remove()
    order = [length for length, _ in groupby(length for length in seen if length <= max(SIZES))]
    # both contexts to warm up, then three rounds
    assert order == [
        1,
        2,
        6,
        1,
        2,
        6,
        *(1, 2, 6, 2, 6, 1, 6, 1, 2),
    ]
    assert all(len(profile.step_s) == len(profile.unmarked_step_s) == 24 for profile in profiles)
    # nothing runs outside of a hold
    assert held[0] == 0 and held[1::2][:-1] == held[2::2] and held[-1] == len(seen)


def test_texts_that_end_at_once_are_refused(
    tiny: Any, trees: tuple[ArmTree, ...], contexts: tuple[tuple[int, ...], ...]
) -> None:
    loaded, engine = tiny
    ending = type(loaded)(**{**vars(loaded), "eos_ids": frozenset(range(128))})
    with pytest.raises(UserError, match="no timed step of the tree of 1 nodes"):
        measure_sizes(
            type(engine)(**{**vars(engine), "loaded": ending}),
            trees,
            contexts,
            num_steps=1,
            clock=TickClock(),
        )


def test_factors_are_the_arithmetic_of_the_record(engine: Engine) -> None:
    busy = size(4, predicted=2.0, device_busy_s=0.072)
    first, second = hand_made(engine, [size(1), busy]).factors
    assert busy.host_s == pytest.approx((0.004, 0.004)) and busy.mean_step_s == pytest.approx(0.096)
    assert second.overhead == pytest.approx(4) and second.step_cost == 1 and second.depth == 3
    assert second.predicted_speedup == pytest.approx(0.5) and first.predicted_speedup == 1
    assert second.own_code_share == pytest.approx(1 - (2 + 3) / 25)
    assert second.idle_share == pytest.approx(0.25) and first.idle_share is None
    assert size(4, device_busy_s=1.0).idle_share == 0


def test_tables_say_what_the_record_holds(engine: Engine) -> None:
    text = render_step_profile(hand_made(engine, [size(1), size(4, predicted=2.0)]))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| 4")
    ]
    times, shares, factors = rows
    assert times == ["4", "96.0 (96.0)", *(f"{ms}.00 ({ms}.00)" for ms in (1, 2, 3, 4, 5, 6, 4))]
    assert shares == ["4", "4.0 %", "8.0 %", "12.0 %", "16.0 %", "20.0 %", "24.0 %", "16.0 %", "80.0 %"]
    assert factors == ["4", "3", "1.00", "4.00", "2.00", "0.50"]
    assert "should take at most 3.0 % of a step; it takes more at 1, 4 nodes." in text
    assert "after 2 texts of 20 to 31 tokens" in text and "device idle" not in text
    with_gpu = render_step_profile(
        hand_made(engine, [size(1, device_busy_s=0.012), size(4, device_busy_s=0.072)])
    )
    assert "device idle" in with_gpu and "| 25.0 %" in with_gpu
    lean = {part: (0.0,) for part in PARTS} | {"backbone": (0.98,)}
    within = size(1, parts_s=lean, step_s=(1.0,), kept_tokens=(1, 1))
    assert "it does so at every size" in render_step_profile(hand_made(engine, [within]))


@pytest.mark.parametrize(
    "changes",
    [
        {"step_s": (0.025,)},
        {"step_s": ()},
        {"unmarked_step_s": ()},
        {"kept_tokens": (1,)},
        {"parts_s": {"backbone": (0.1, 0.1)}},
        {"sparts": 1},
        {"device_busy_s": -1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_size_that_does_not_add_up_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        size(2, **changes)


def test_a_record_begins_with_vanilla_and_survives_the_disk(engine: Engine, tmp_path: Path) -> None:
    for wrong in ([size(2)], [size(1), size(4), size(2)], [size(1), size(2), size(2)]):
        with pytest.raises(ValidationError, match="vanilla's one node first"):
            hand_made(engine, wrong)
    profile, path = hand_made(engine, [size(1), size(3)]), tmp_path / "profile.json"
    write_json(path, profile)
    assert read_step_profile(path) == profile
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9', 1))
    with pytest.raises(UserError, match=r"schema_version.*profile\.json"):
        read_step_profile(path)
    with pytest.raises(UserError, match=r"no readable absent\.json"):
        read_step_profile(tmp_path / "absent.json")


def test_sizes_as_typed() -> None:
    assert parse_sizes("8, 2,8") == (1, 2, 8)
    for wrong in ("", "1,x", "0", "2,-1", "2,,3", "1.5"):
        with pytest.raises(UserError, match="--nodes"):
            parse_sizes(wrong)


@pytest.fixture
def suite_file(heads_file: Path, calibration: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # a lock of our own: a real measurement elsewhere is not waited for
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    calibration.save(tmp_path / "calibration.npz")
    return write_suite(tmp_path / "micro.toml", micro_data(heads_file, calibration_trace="calibration.npz"))


def test_the_command_prints_tables_writes_a_record_and_ends_with_json(
    suite_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    ran = command("profile", suite_file, "--nodes", "4,2", "--steps", "2", "--mode", "eager", "--out", out)
    assert ran.code == ExitCode.OK, ran.err
    profile = read_step_profile(out)
    assert [size.num_nodes for size in profile.sizes] == [1, 2, 4]
    assert profile.environment.engine == "eager" and profile.environment.dtype == "float32"
    assert "--out out.json" in profile.environment.command and not holds_absolute_path(out.read_text())
    assert all(host >= 0 for size in profile.sizes for host in size.host_s)
    assert render_step_profile(profile) in ran.out
    last = json.loads(ran.out.splitlines()[-1])
    assert last == profile_headline(profile)
    assert [row["num_nodes"] for row in last["sizes"]] == [1, 2, 4] and last["sizes"][0]["overhead"] == 1


def test_json_alone(suite_file: Path) -> None:
    ran = command("profile", suite_file, "--nodes", "1", "--steps", "1", "--json")
    assert ran.code == ExitCode.OK and len(ran.out.splitlines()) == 1
    assert json.loads(ran.out)["suite"] == "micro"


def test_input_that_cannot_be_profiled_is_a_user_error(suite_file: Path) -> None:
    assert "--nodes 1,x" in command("profile", suite_file, "--nodes", "1,x").error_line
    assert "--mode warp" in command("profile", suite_file, "--mode", "warp").error_line
    assert "no calibration_trace" in command("profile", "smoke").error_line


def test_a_trace_of_other_heads_is_refused(engine: Engine, calibration: Trace, tmp_path: Path) -> None:
    other = calibration.provenance.model_copy(update={"heads_hash": "0" * 64})
    Trace(provenance=other, prompts=calibration.prompts).save(tmp_path / "other.npz")
    with pytest.raises(UserError, match="other heads"):
        calibration_of(engine, tmp_path / "other.npz")


@pytest.mark.gpu
def test_a_gpu_is_busy_for_a_part_of_a_step(
    trees: tuple[ArmTree, ...], contexts: tuple[tuple[int, ...], ...]
) -> None:
    suite, device = smoke_suite(), torch.device("cuda")
    loaded = load_model(suite.model, device=device)
    model: Any = loaded.model
    model.to(device)
    heads = MedusaHeads(num_heads=4, num_layers=1, hidden_size=64, vocab_size=128, architecture="shared")
    engine = load_engine(suite, loaded, base_folder=None, heads=heads)
    for profile in measure_sizes(engine, trees, contexts, num_steps=4, clock=device_clock(device)):
        assert profile.idle_share is not None and 0 < profile.idle_share < 1
