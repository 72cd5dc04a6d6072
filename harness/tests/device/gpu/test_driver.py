"""What the driver says of a GPU, as values; what it does not say is None and ends nothing."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace

import pytest
import torch
from pytest import MonkeyPatch

from harness.device.gpu.driver import GpuDriver, GpuProcess, _own_name, gpu_details, open_driver
from harness.tests.device.gpu.fake_nvml import FakeNvml, sample

FULL = {
    "used": 3 * 2**30,
    "total": 143771 * 2**20,
    "sm_clock": 1980,
    "memory_clock": 3201,
    "temperature": 45,
    "milliwatts": 350_500,
    "limit_milliwatts": 700_000,
    "reasons": 0x4 | 0x20,
    "version": "580.1",
}


def driver_of(nvml: FakeNvml) -> GpuDriver:
    nvml.nvmlInit()
    return GpuDriver(nvml, 0)


def test_answers_are_values_in_our_units() -> None:
    nvml = FakeNvml({0: [(7, None), (8, 2**30), (8, 2**30)]})
    nvml.answers = dict(FULL)
    driver = driver_of(nvml)
    assert driver.processes() == (GpuProcess(7, None), GpuProcess(8, 2**30))
    assert (driver.sm_clock_mhz, driver.memory_clock_mhz) == (1980, 3201)
    assert (driver.temperature_c, driver.power_w, driver.power_limit_w) == (45, 350.5, 700.0)
    assert (driver.memory_used_bytes, driver.memory_total_bytes) == (3 * 2**30, 143771 * 2**20)
    assert driver.throttle_reasons == ("software power cap", "software thermal slowdown")
    assert gpu_details(driver) == {"driver": "580.1", "memory": "143771 MiB", "power limit": "700 W"}


def test_an_unknown_reason_to_throttle_is_told_by_its_bit() -> None:
    nvml = FakeNvml()
    nvml.answers = {"reasons": 0x1000 | 0x1}
    assert driver_of(nvml).throttle_reasons == ("idle", "reason 0x1000")
    nvml.answers = {"reasons": 0}
    assert driver_of(nvml).throttle_reasons == ()


def test_a_driver_that_answers_nothing_is_no_error() -> None:
    driver = driver_of(FakeNvml())
    told = (driver.sm_clock_mhz, driver.temperature_c, driver.power_w, driver.memory_used_bytes)
    assert told == (None,) * 4 and driver.utilisation() is None and driver.throttle_reasons is None
    assert gpu_details(driver) == gpu_details(None) == {}


def test_a_package_that_lacks_a_call_is_no_error(monkeypatch: MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetComputeRunningProcesses")
    assert driver_of(nvml).processes() is None


@pytest.mark.parametrize("nothing_new", [0, 6])
def test_utilisation_is_that_since_the_last_call(nothing_new: int) -> None:
    nvml = FakeNvml()
    nvml.nothing_new = nothing_new
    nvml.samples = [sample(7, 50, at_us=100), sample(8, 20, at_us=110), sample(8, 30, at_us=120)]
    driver = driver_of(nvml)
    assert driver.utilisation() == {7: 0.5, 8: 0.3}
    assert driver.utilisation() == {}, "nothing new is no lack of an answer"
    nvml.samples.append(sample(9, 255, at_us=130))
    assert driver.utilisation() == {9: 1.0}


def test_the_library_is_closed_with_the_last_use() -> None:
    nvml = FakeNvml()
    driver = driver_of(nvml)
    assert nvml.num_open == 1
    del driver
    gc.collect()
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("visible", "pids"),
    [(None, [1]), ("2,0", [8, 9]), ("GPU-1f", [5]), ("3", None), ("GPU-1", None), ("0", [1])],
)
def test_the_gpu_asked_about_is_the_first_visible_one(
    visible: str | None, pids: list[int] | None, monkeypatch: MonkeyPatch
) -> None:
    nvml = FakeNvml({0: [(1, None)], 2: [(8, None), (9, None)], "GPU-1f": [(5, None)]})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = open_driver(0)
    if pids is None:
        assert driver is None and nvml.num_open == 0
        return
    assert driver is not None and [one.pid for one in driver.processes() or ()] == pids


@pytest.mark.parametrize("visible", [None, "1,0"])
@pytest.mark.parametrize(
    ("order", "told", "pids"),
    [
        (None, {"uuid": "1f"}, [5]),
        ("FASTEST_FIRST", {"uuid": "1f"}, [5]),
        (None, {"uuid": "77"}, None),  # a part of a GPU, which the driver lists under another name
        (None, {}, None),
        (None, None, None),
        ("PCI_BUS_ID", None, [1]),
    ],
)
def test_of_several_gpus_the_name_and_not_the_number_says_which_one_is_ours(
    visible: str | None,
    order: str | None,
    told: dict[str, str] | None,
    pids: list[int] | None,
    monkeypatch: MonkeyPatch,
) -> None:
    """CUDA counts the fastest GPU first, NVML by the bus: the watch once looked at the wrong one."""
    first = 0 if visible is None else 1
    nvml = FakeNvml({first: [(1, None)], 1 - first: [(2, None)], "GPU-1f": [(5, None)]})
    nvml.answers["count"] = 2

    def properties(index: int) -> SimpleNamespace:
        assert index == 0
        if told is None:
            raise AssertionError("Invalid device id")
        return SimpleNamespace(**told)

    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    driver = open_driver(0)
    assert nvml.num_open == (pids is not None)
    assert (None if driver is None else [one.pid for one in driver.processes() or ()]) == pids


@pytest.mark.gpu
def test_the_driver_knows_the_name_that_pytorch_tells() -> None:
    pynvml = pytest.importorskip("pynvml")
    name = _own_name(0)
    if name is None:
        pytest.skip("this PyTorch tells no name")
    if "MIG" in torch.cuda.get_device_name(0):
        pytest.skip("a part of a GPU has a name of its own")
    pynvml.nvmlInit()
    try:
        names = [
            pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()
    assert name in names


def test_a_gpu_beyond_the_visible_ones_is_not_asked_about(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert open_driver(1) is None


def test_the_package_has_what_is_asked_of_it() -> None:
    """The stand-in answers whatever it is asked; a name with a slip in it would be unknown to the package."""
    pynvml = pytest.importorskip("pynvml")
    asked = {name for name in vars(FakeNvml) if name.startswith("nvml")}
    assert len(asked) == 14 and [name for name in sorted(asked) if not hasattr(pynvml, name)] == []
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU) == (1, 2, 0)
    assert (pynvml.NVML_SUCCESS, pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED) == (0, 6, 3)
    assert pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND).value == 6
    assert pynvml.nvmlClocksThrottleReasonSwPowerCap == 0x4


def test_without_the_package_or_the_library_nothing_is_known(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert open_driver(0) is None
    broken = FakeNvml()
    broken.answers["nvmlInit"] = FakeNvml.NVMLError()
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert open_driver(0) is None
