"""Races of kernels: every way runs here in small sizes, with its error, and what fails says why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cli.profile import profile_kernels_command
from harness.errors import UserError
from harness.measure.profiles import kernels
from harness.measure.profiles.kernels import SMALL, num_races, run_races
from harness.records.profiles.kernels import Contender, KernelRaces, Race, read_kernel_races
from harness.report.kernels import kernels_headline, render_kernel_races
from harness.tests.tiny_suite import command
from medusa_impl.tests.recorded_graphs import RecordedGraphs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CALLS", 2)
    monkeypatch.setattr(kernels, "_REPEATS", 3)


def races_of(**options: Any) -> list[Race]:
    given: dict[str, Any] = {"dtype": torch.float32, "clock": time.perf_counter, "compile_kernels": False}
    return list(run_races(SMALL, device=CPU, **{**given, **options}))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_every_way_gives_what_float64_gives(dtype: torch.dtype, bound: float) -> None:
    races = races_of(dtype=dtype)
    assert len(races) == num_races(SMALL)
    assert {race.computation for race in races} == {"product", "attention", "heads", "top-k"}
    for one in (one for race in races for one in race.contenders):
        assert one.failure is None and len(one.call_s) == kernels._REPEATS, one
        if not one.name.startswith("torch.topk"):  # which leaves the order of equal ones open
            assert one.max_error is not None and one.max_error <= bound, one


def test_on_a_gpu_many_calls_are_one_graph() -> None:
    graphs = RecordedGraphs()
    races = races_of(graphs=graphs)
    # flex attention compiles something of its own, which this recorder cannot follow
    ways = [one for race in races for one in race.contenders if one.name != "flex"]
    assert all(one.call_s for one in ways)
    assert graphs.num_captures == graphs.num_warm_ups >= len(ways)


def test_a_wrong_way_shows_its_error_and_one_that_fails_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(query)

    def missing(*given: object) -> torch.Tensor:
        raise NotImplementedError("no such kernel in /opt/torch/lib.so\nmore")

    def endless(query: torch.Tensor, *others: object) -> torch.Tensor:
        return torch.full_like(query, torch.nan)

    monkeypatch.setattr(kernels, "_masked", wrong)
    monkeypatch.setattr(kernels, "_flex", missing)
    monkeypatch.setattr(kernels, "_prefix_and_tail", endless)
    for race in (race for race in races_of() if race.computation == "attention"):
        masked, flex, joined = race.contenders
        assert masked.max_error is not None and masked.max_error > 0.1
        assert flex.failure is not None and flex.failure.startswith("NotImplementedError: no such kernel")
        assert "/opt" not in flex.failure and not flex.call_s
        assert joined.failure == "ArithmeticError: a result that is not finite"


def test_the_command_writes_a_record_and_ends_with_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    ran = command("profile-kernels", "--out", tmp_path / "kernels.json")
    assert ran.code == 0, ran.err
    races = read_kernel_races(tmp_path / "kernels.json")
    assert races.dtype == "float32" and races.origin.device.kind == "cpu"
    told = json.loads(ran.out.splitlines()[-1])
    assert [one["computation"] for one in told["races"]] == [one.computation for one in races.races]
    assert (told["num_left_out"], races.num_left_out) == (0, 0) and "were not run" not in ran.out
    few = command("profile-kernels", "--time-budget", "0", "--out", tmp_path / "few.json")
    cut = read_kernel_races(tmp_path / "few.json")
    assert few.code == 0 and len(cut.races) == 1 and cut.num_left_out == len(races.races) - 1
    assert f"Of {len(races.races)} races {cut.num_left_out} were not run." in few.out
    assert json.loads(few.out.splitlines()[-1])["num_left_out"] == cut.num_left_out
    refused = command("profile-kernels", "--dtype", "float8")
    assert refused.code == 3 and "float32, bfloat16 or float16" in refused.err


def test_an_interrupt_keeps_the_races_that_were_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All races were once written at the end alone, so that a part stopped at its limit left none."""

    def interrupted(*given: object) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(kernels, "_heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile_kernels_command(
            dtype="float32", small=True, minutes=3.0, out=tmp_path / "new" / "kernels.json"
        )
    kept = read_kernel_races(tmp_path / "new" / "kernels.json")
    assert [race.computation for race in kept.races] == ["product", *["attention"] * 4]
    assert kept.num_left_out == 3, "two of heads, one of top-k"


def test_unfinished_races_replace_no_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt, or a budget, once left the first races in the place of an older file with all of them."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("harness.cli.profile.default_results", lambda: tmp_path)
    monkeypatch.setattr(kernels, "SMALL", replace(SMALL, attention=SMALL.attention[:1], nodes=(1,)))
    assert command("profile-kernels").code == 0
    (whole,) = (tmp_path / "profile").iterdir()
    before = whole.read_bytes()
    assert whole.name.startswith("kernels-float32-cpu") and read_kernel_races(whole).num_left_out == 0
    cut = command("profile-kernels", "--time-budget", "0")
    apart = whole.with_name(f"{whole.stem}-unfinished.json")
    assert cut.code == 0 and f"the races that were run are in {apart.name}" in " ".join(cut.err.split())
    assert whole.read_bytes() == before and len(read_kernel_races(apart).races) == 1

    def interrupted(*given: object) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_heads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            profile_kernels_command(dtype="float32", small=True, minutes=3.0, out=None)
    assert whole.read_bytes() == before and len(read_kernel_races(apart).races) == 2
    again = command("profile-kernels")
    assert again.code == 0 and "the races that were run" not in again.err
    assert list((tmp_path / "profile").iterdir()) == [whole] and whole.read_bytes() != before


def test_the_table_compares_with_the_engine_s_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert command("profile-kernels", "--time-budget", "0", "--out", tmp_path / "k.json").code == 0
    origin = read_kernel_races(tmp_path / "k.json").origin
    ways = (
        Contender(name="masked", call_s=(2e-5, 4e-5, 3e-5), max_error=0.25),
        Contender(name="flex", call_s=(1e-5,), max_error=0.5),
        Contender(name="joined", failure="RuntimeError: none"),
    )
    race = Race(computation="attention", shape="64 nodes", read_bytes=3 * 10**6, contenders=ways)
    lost = Race(computation="heads", shape="5", read_bytes=1, contenders=ways[2:])
    races = KernelRaces(origin=origin, dtype="bfloat16", calls_a_repeat=20, races=(race, lost))
    page = " ".join(render_kernel_races(races).split())
    assert "| attention | 64 nodes | masked | 30.0 | 100 | 1.00 | 0.250 |" in page
    assert "| attention | 64 nodes | flex | 10.0 | 300 | 0.333 | 0.500 |" in page
    assert "did not run: RuntimeError: none" in page
    fastest, none = kernels_headline(races)["races"]
    assert fastest["fastest"] == "flex" and fastest["of_engine"] == pytest.approx(1 / 3)
    assert none["fastest"] is None


def test_a_file_that_holds_no_races_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text("{}")
    with pytest.raises(UserError, match="a KernelRaces record"):
        read_kernel_races(tmp_path / "k.json")
