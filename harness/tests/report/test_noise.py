"""How a GPU fared over the trials, and who else used it, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judge.run import judge
from harness.records.trials import GpuObservation
from harness.report.noise import gpu_rows
from harness.report.run import render_report
from harness.tests.fake_record import FakeParts, write_fake_record

QUIET = GpuObservation(
    num_others=0,
    others_share=0.0,
    others_memory_bytes=0,
    sm_clock_mhz=1980,
    memory_clock_mhz=3201,
    temperature_c=45,
    power_w=350.4,
    throttle_reasons=(),
)


def said(*seen: GpuObservation | None) -> dict[str, str]:
    return dict(gpu_rows(seen, noun="trial"))


def test_a_quiet_gpu() -> None:
    warm = QUIET.model_copy(update={"sm_clock_mhz": 1755, "temperature_c": 61})
    assert said(QUIET, None, warm) == {
        "GPU": "multiprocessors at 1,755 to 1,980 MHz, memory at 3,201 MHz, 45 to 61 °C, 350 W",
        "GPU: clocks lowered by": "nothing, at the end of 2 trials",
        "GPU: other processes": "none, of 2 trials",
    }


def test_no_observation_is_no_row() -> None:
    assert said() == said(None, None) == {}


def test_what_the_driver_does_not_tell_is_not_known() -> None:
    assert said(GpuObservation()) == {
        "GPU": "not known",
        "GPU: clocks lowered by": "not known",
        "GPU: other processes": "cannot be known in 1 of 1 trial: the driver does not tell which process is "
        "ours",
    }
    other = said(GpuObservation(others_memory_bytes=5))["GPU: other processes"]
    assert other.endswith("which process is ours; no other memory was in use")


def test_reasons_are_counted_most_frequent_first() -> None:
    cap, hot = (
        QUIET.model_copy(update={"throttle_reasons": reasons})
        for reasons in (("software power cap",), ("hardware thermal slowdown", "software power cap"))
    )
    assert said(cap, hot, QUIET)["GPU: clocks lowered by"] == (
        "software power cap (2 of 3 trials), hardware thermal slowdown (1 of 3 trials)"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_others": 2, "others_share": 0.25}, "at most 2 processes, whose kernels ran for up to 25"),
        ({"num_others": 0, "others_share": 0.1}, "at most 1 process, whose kernels ran for up to 10"),
        ({"num_others": None, "others_share": None, "others_memory_bytes": 2**30}, "at most 1 process"),
    ],
)
def test_trials_with_other_processes_are_counted(changes: dict[str, object], words: str) -> None:
    told = said(QUIET, QUIET.model_copy(update=changes))["GPU: other processes"]
    assert told.startswith(f"**seen in 1 of 2 trials**, which the record marks: {words}")


def test_a_runs_page_tells_of_its_gpu_and_one_without_says_nothing(tmp_path: Path) -> None:
    def observed(parts: FakeParts) -> None:
        parts.edit(lambda row: {"gpu": QUIET})

    with_gpu = write_fake_record(tmp_path / "gpu", num_prompts=4, spoil=observed)
    assert all(one.gpu == QUIET for one in with_gpu.generations)
    page = render_report(with_gpu, judge(with_gpu))
    assert "1,980 MHz" in page and "GPU: other processes" in page
    bare = write_fake_record(tmp_path / "cpu", num_prompts=4)
    assert "GPU:" not in render_report(bare, judge(bare))
