"""The shipped devices, and the names that a measured device is found by."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.specs.claims import load_claims
from harness.specs.hardware import DeviceSpec, load_hardware, match_device

PAPERS_DEVICES = {"RL-hw-A100-80GB-PCIe": "a100-80gb-pcie", "RL-hw-A40": "a40", "RL-hw-A6000": "a6000"}
ROW = """
[devices.{key}]
name = "{name}"
read_bandwidth_gb_per_s = 1
dense_fp16_tflop_per_s = 1
dtypes = ["float16"]
memory_gb = 1
source = "a test"
"""


@pytest.fixture(scope="module")
def devices() -> dict[str, DeviceSpec]:
    return load_hardware()


def test_the_papers_devices_carry_the_papers_figures(devices: dict[str, DeviceSpec]) -> None:
    claims = {claim.id: claim for claim in load_claims()}
    for claim_id, key in PAPERS_DEVICES.items():
        assert claims[claim_id].value == {
            "gb_per_s": devices[key].read_bandwidth_gb_per_s,
            "tflop_per_s": devices[key].dense_fp16_tflop_per_s,
        }
    limits = [devices[key].limits for key in PAPERS_DEVICES.values()]
    ridges = [round(one.flop_per_s / one.bytes_per_s) for one in limits]
    assert ridges == [161, 215, 236]  # flop/byte, as in the notes of RL-hw-*


def test_a_halved_figure_is_half_of_what_its_source_is_said_to_print(devices: dict[str, DeviceSpec]) -> None:
    halved = {key: device for key, device in devices.items() if "halved" in device.source}
    assert {"h100-80gb-sxm", "h100-80gb-pcie", "h200-sxm", "b200", "l4"} == set(halved)
    for key, device in halved.items():
        printed = re.search(r"prints ([\d,]+) TFLOP/s with sparsity, halved", device.source)
        assert printed is not None, key
        assert 2 * device.dense_fp16_tflop_per_s == float(printed[1].replace(",", "")), key


def test_devices_without_bfloat16_units_say_so(devices: dict[str, DeviceSpec]) -> None:
    """The code once named these three itself."""
    without = {key for key, device in devices.items() if "bfloat16" not in device.dtypes}
    assert without == {"t4", "v100-16gb-sxm", "v100-32gb-sxm"}
    assert all("no bfloat16 units" in devices[key].source for key in without)


def test_every_name_finds_its_row(devices: dict[str, DeviceSpec]) -> None:
    for key, device in devices.items():
        for name in (device.name, *device.aliases):
            assert match_device(name) == key
            assert match_device(f" {name.upper()} ") == key


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100", "", "AMD EPYC 7B13"]
)
def test_another_device_matches_none(name: str) -> None:
    assert match_device(name) is None


def test_devices_of_the_users_own_are_matched(tmp_path: Path) -> None:
    path = tmp_path / "hardware.toml"
    path.write_text("schema_version = 1\n" + ROW.format(key="mine", name="Abacus"))
    own = load_hardware(path)
    assert match_device("abacus", own) == "mine"
    assert match_device("NVIDIA A10", own) is None


def test_a_name_of_two_devices_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hardware.toml"
    path.write_text(
        "schema_version = 1\n" + ROW.format(key="one", name="Abacus") + ROW.format(key="two", name="ABACUS")
    )
    with pytest.raises(UserError, match="'abacus' names two devices"):
        load_hardware(path)


@pytest.mark.parametrize(
    "text", ["schema_version = 1\n[devices.x]\nnmae = 'x'\n", "schema_version = 2\n[devices]\n", "not toml"]
)
def test_a_bad_hardware_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hardware.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"hardware\.toml"):
        load_hardware(path)
