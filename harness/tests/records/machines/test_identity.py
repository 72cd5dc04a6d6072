"""Who a machine is: which facts make it another one, in words and in the name of its folder."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from harness.device.gpu.driver import GpuDriver, gpu_details
from harness.records.machines.identity import (
    device_differences,
    identity_of,
    machine_folders,
    machine_slug,
    plain_slug,
)
from harness.records.provenance import DeviceInfo
from harness.tests.device.gpu.fake_nvml import FakeNvml
from harness.tests.processors import EPYC, EPYC_CACHES, XEON, XEON_CACHES, cpu
from harness.tests.test_layers import ROOT

OLD = DeviceInfo(
    kind="cpu",
    name="AMD EPYC",
    num_cores=2,
    num_threads=2,
    memory_bytes=25276502016,
    details={"capability": "AVX512"},
)


@pytest.fixture
def epyc(tmp_path: Path) -> DeviceInfo:
    return cpu(tmp_path / "epyc", EPYC, EPYC_CACHES)


@pytest.fixture
def xeon(tmp_path: Path) -> DeviceInfo:
    return cpu(tmp_path / "xeon", XEON, XEON_CACHES)


def gpu(
    *, milliwatts: int = 700_000, driver: str = "580.1", memory_bytes: int = 150_109_880_320, **changes: Any
) -> DeviceInfo:
    """A GPU as a fake driver tells of it, on a host with a Xeon."""
    nvml = FakeNvml()
    nvml.answers = {
        "version": driver,
        "used": 0,
        "total": memory_bytes + 5 * 10**8,
        "limit_milliwatts": milliwatts,
    }
    details = {
        "capability": "9.0",
        "cuda": "13.0",
        **gpu_details(GpuDriver(nvml, 0)),
        "host processor": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, family 6, model 143, stepping 8",
    }
    parts = {"kind": "cuda", "name": "NVIDIA H200", "num_cores": 16, "num_threads": 16, "details": details}
    return DeviceInfo.model_validate({**parts, "memory_bytes": memory_bytes, **changes})


def with_details(device: DeviceInfo, **changes: str) -> DeviceInfo:
    details = {**device.details, **{name.replace("_", " "): value for name, value in changes.items()}}
    return device.model_copy(update={"details": details})


def test_two_processors_are_told_by_all_that_they_say(epyc: DeviceInfo, xeon: DeviceInfo) -> None:
    mine, theirs = identity_of(epyc), identity_of(xeon)
    assert mine.are_details_told and theirs.are_details_told
    facts = {name: value for name, value in mine.facts.items() if name != "architecture"}  # of this machine
    assert facts == {
        "kind": "cpu",
        "name": "AMD EPYC 9554 64-Core Processor",
        "cores": "2",
        "family": "25",
        "model": "17",
        "stepping": "1",
        "instruction sets": "avx2, avx512f, avx512_vnni, avx512_bf16",
        "hypervisor": "yes",
        "cache level 1": "32K",
        "cache level 2": "1024K",
        "cache level 3": "262144K",
    }
    assert theirs.facts["instruction sets"] == (
        "avx2, avx_vnni, avx512f, avx512_vnni, avx512_bf16, amx_bf16, amx_int8"
    )
    assert mine.differences(theirs) == (
        "name AMD EPYC 9554 64-Core Processor against Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "family 25 against 6",
        "model 17 against 143",
        "stepping 1 against 8",
        "instruction sets besides those of both: none against avx_vnni, amx_bf16, amx_int8",
        "cache level 1 32K against 48K",
        "cache level 2 1024K against 2048K",
        "cache level 3 262144K against 107520K",
    )
    assert mine.differences(mine) == () == mine.untold(theirs)


def test_one_flag_less_is_another_machine(tmp_path: Path, xeon: DeviceInfo) -> None:
    fewer = cpu(tmp_path / "fewer", XEON.replace(" amx_int8", ""), XEON_CACHES)
    assert identity_of(xeon).differences(identity_of(fewer)) == (
        "instruction sets besides those of both: amx_int8 against none",
    )
    assert machine_slug(fewer) != machine_slug(xeon)
    unknown = cpu(tmp_path / "unknown", XEON.replace(" serialize", ""), XEON_CACHES)
    assert machine_slug(unknown) == machine_slug(xeon)  # no library has kernels of its own for it


def test_every_fact_of_a_cpu_moves_its_name_and_nothing_else_does(epyc: DeviceInfo) -> None:
    others = [
        with_details(epyc, architecture="riscv64"),
        with_details(epyc, family="26"),
        with_details(epyc, model="18"),
        with_details(epyc, stepping="2"),
        with_details(epyc, instruction_sets="avx2"),
        with_details(epyc, hypervisor="no"),
        with_details(epyc, cache_level_3="32768K"),
        epyc.model_copy(update={"name": "AMD EPYC 9654 96-Core Processor"}),
        epyc.model_copy(update={"num_cores": 4}),
    ]
    names = [machine_slug(device) for device in (epyc, *others)]
    assert len(set(names)) == len(names)
    for one, other in combinations((epyc, *others), 2):
        assert identity_of(one).differences(identity_of(other))
    same = [
        with_details(epyc, capability="AVX2"),  # what PyTorch makes of it
        epyc.model_copy(update={"num_threads": 1}),
        epyc.model_copy(update={"memory_bytes": 8_000_008_192}),  # as it differs from start to start
        epyc.model_copy(update={"details": dict(reversed(epyc.details.items()))}),
    ]
    assert {machine_slug(device) for device in same} == {machine_slug(epyc)}


def test_a_gpu_is_its_name_memory_power_limit_and_host_and_its_driver_is_not() -> None:
    h200 = gpu()
    other_host = with_details(h200, host_processor="AMD EPYC 9554 64-Core Processor, family 25, model 17")
    others = {
        "power limit 700 W against 500 W": gpu(milliwatts=500_000),
        "memory up to 144 GiB against up to 80 GiB": gpu(memory_bytes=84_900_000_000),
        "name NVIDIA H200 against NVIDIA H100 80GB HBM3": gpu(name="NVIDIA H100 80GB HBM3"),
        "cores 16 against 8": gpu(num_cores=8),
        f"host processor {h200.details['host processor']} against "
        f"{other_host.details['host processor']}": other_host,
    }
    for words, device in others.items():
        assert identity_of(h200).differences(identity_of(device)) == (words,)
    assert len({machine_slug(device) for device in (h200, *others.values())}) == 6
    same = (
        gpu(driver="575.2"),
        with_details(h200, cuda="12.8"),
        gpu(memory_bytes=150_109_880_320 - 2**29),  # another driver keeps more of it back
        gpu(num_threads=4),
    )
    assert {machine_slug(device) for device in same} == {machine_slug(h200)}


@pytest.mark.parametrize(
    ("gib", "rounded"),
    [(79.1, 80), (79.25, 80), (80.0, 80), (39.4, 40), (22.05, 24), (22.49, 24), (139.8, 144), (140.4, 144)],
)
def test_what_drivers_tell_of_one_memory_is_one_size(gib: float, rounded: int) -> None:
    told = identity_of(gpu(memory_bytes=int(gib * 2**30))).facts["memory"]
    assert told == f"up to {rounded} GiB"


def test_names_of_folders_are_short_readable_and_do_not_change(epyc: DeviceInfo, xeon: DeviceInfo) -> None:
    """A name that changes from version to version parts the records of one machine.

    The last word is the start of the SHA-256 of the facts as JSON with sorted keys and no spaces.
    """
    told = [with_details(device, architecture="x86_64") for device in (epyc, xeon)]
    assert [machine_slug(device) for device in (*told, gpu())] == [
        "cpu-amd-epyc-9554-f25m17s1-2c-5d736b04",
        "cpu-intel-xeon-platinum-8481c-f6m143s8-2c-99066b59",
        "cuda-nvidia-h200-700w-16c-bf0bbf43",
    ]
    strange = [
        epyc.model_copy(update={"name": "../" * 90}),
        epyc.model_copy(update={"name": "华为 鲲鹏"}),
        epyc.model_copy(update={"name": "x" * 5000}),
    ]
    for device in (epyc, xeon, gpu(), *strange):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine_slug(device))
        assert len(machine_slug(device)) <= 80


def test_older_records_keep_their_names_and_say_that_they_do_not_say_more() -> None:
    assert machine_slug(OLD) == plain_slug(OLD) == "cpu-amd-epyc-2c" and machine_folders(OLD) == (
        "cpu-amd-epyc-2c",
    )
    assert not identity_of(OLD).are_details_told
    old_gpu = gpu(details={"capability": "9.0", "cuda": "13.0"})
    assert machine_slug(old_gpu) == "cuda-nvidia-h200-16c"
    assert machine_folders(gpu()) == (machine_slug(gpu()), "cuda-nvidia-h200-16c")


def test_every_committed_record_lies_in_the_folder_of_its_machine() -> None:
    from harness.records.opened import open_record

    folders = [path.parent for path in sorted((ROOT / "results").rglob("manifest.json"))]
    assert len(folders) >= 10
    for folder in folders:
        record: Any = open_record(folder)
        origin = record.origin if hasattr(record, "origin") else record.environment
        assert folder.parent.name in machine_folders(origin.device)


def test_facts_that_one_does_not_tell_do_not_differ_and_are_named(epyc: DeviceInfo) -> None:
    old = epyc.model_copy(update={"details": {"capability": "AVX512", "stepping": "1"}})
    assert identity_of(old).differences(identity_of(epyc)) == ()
    untold = identity_of(old).untold(identity_of(epyc))
    assert set(untold) == set(identity_of(epyc).facts) - {"kind", "name", "cores", "stepping"}
    assert set(identity_of(epyc).untold(identity_of(old))) == set(untold)


def test_all_in_which_two_devices_differ_is_told_for_a_resume() -> None:
    old, new = gpu(), gpu(driver="575.2", num_threads=8, details=gpu(driver="575.2").details | {"mig": "on"})
    assert device_differences(old, old) == ()
    assert device_differences(old, new) == (
        "threads 16 against 8",
        "driver 580.1 against 575.2",
        "mig not told against on",
    )
    assert device_differences(OLD, OLD.model_copy(update={"memory_bytes": 25276510208})) == (
        "bytes of memory 25,276,502,016 against 25,276,510,208",
    )
