"""The Medusa-2 that ships: small, tied to its backbone, and one of the trainings of the record that it was
chosen by.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from harness.judge.ablation import ablation_rows
from harness.paths import shipped
from harness.records.ablation import newest_ablations
from harness.records.trace import Trace
from harness.specs.suite import load_suite
from medusa_impl.checkpoints.adapter import adapter_sha256
from medusa_impl.checkpoints.heads import HeadsProvenance, load_heads
from medusa_impl.checkpoints.tensors import backbone_sha256

ROOT = Path(__file__).resolve().parents[2]
SUITES = shipped()
FOLDER = SUITES / "embedded" / "medusa2"
MAX_KL = 0.02  # nats a token: the bound that the rule for shipping names


def provenance() -> HeadsProvenance:
    return load_heads(
        FOLDER / "heads.safetensors", backbone_sha256=None, adapter_sha256=adapter_sha256(FOLDER / "adapter")
    )[1]


def test_the_adapter_is_small_and_holds_no_embedding() -> None:
    with safe_open(FOLDER / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(
        "lora_" in name and tensor.dtype == torch.bfloat16 and min(tensor.shape) <= 8
        for name, tensor in tensors.items()
    )
    assert not any("embed" in name or "lm_head" in name for name in tensors)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 13e6


def test_heads_adapter_and_trace_belong_together() -> None:
    """All three know the model that they were made with: the shipped Medusa-1 heads name the same
    backbone.
    """
    heads, origin = load_heads(
        FOLDER / "heads.safetensors", backbone_sha256=None, adapter_sha256=adapter_sha256(FOLDER / "adapter")
    )
    _, first = load_heads(SUITES / "embedded" / "medusa1.safetensors", backbone_sha256=None)
    assert origin.backbone_sha256 == first.backbone_sha256
    trace = Trace.load(FOLDER / "calibration.npz")
    assert trace.provenance.heads_hash == backbone_sha256(heads)


def test_it_is_a_training_of_the_record_that_chose_it() -> None:
    """Each of the rule's intervals lies where it must, on the very weights that ship and on the other
    seed's.
    """
    heads, _ = load_heads(
        FOLDER / "heads.safetensors", backbone_sha256=None, adapter_sha256=adapter_sha256(FOLDER / "adapter")
    )
    (record,) = (
        one for one in newest_ablations(ROOT / "results") if one.spec.name == "embedded_training_long"
    )
    (result,) = (one for one in record.results if one.heads_sha256 == backbone_sha256(heads))
    assert result.adapter_sha256 == adapter_sha256(FOLDER / "adapter")
    (row,) = (one for one in ablation_rows(record) if one.arm == result.arm)
    gains = (row.gain, row.original_text_gain, row.start_gain, row.original_text_start_gain)
    assert all(gain is not None and gain.low > 1 for gain in gains) and row.kl.high <= MAX_KL


def test_the_default_suite_measures_it_beside_medusa_1() -> None:
    suite = load_suite(SUITES / "embedded.toml")
    assert suite.tuned is not None and suite.tuned.heads_path == "embedded/medusa2/heads.safetensors"
    tuned = [arm for arm in suite.arms if arm.backbone == "tuned"]
    trees = {arm.name.removeprefix("medusa2_"): arm.tree for arm in tuned if arm.tree is not None}
    assert trees == {name: suite.arm(name).tree for name in trees} and set(trees) == {"optimised", "fastest"}
