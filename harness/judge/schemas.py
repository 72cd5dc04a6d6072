"""The JSON schemas of all files of records: what each field holds, with its unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from harness.errors import UserError
from harness.files import write_bytes
from harness.judge.judgement import Judgement
from harness.records.ablation import AblationManifest, ArmResult, StepPoint
from harness.records.gate.folder import GateManifest
from harness.records.gate.record import Calibration, GateRecord
from harness.records.gpu.parts import CorpusRate, PartResult, TestCounts
from harness.records.gpu.record import GpuManifest
from harness.records.latency import BatchTrials, LatencyManifest, LatencyPoint, ModelFacts, ModeTrials
from harness.records.probes import DeviceLimits, HeadsControl, Profile, Rounding, StepCost, StepCosts
from harness.records.profiles.drawn import DrawnStep
from harness.records.profiles.kernels import KernelRaces
from harness.records.profiles.step import StepProfile
from harness.records.profiles.training import TrainingProfile
from harness.records.provenance import Environment
from harness.records.run import ArmTree, ArmTrees, Likelihoods, Manifest, TokenTexts
from harness.records.sweep import SweepManifest, SweepOrigin, SweepTrees
from harness.records.sweep_cells import SweepCell
from harness.records.trace import TraceHeader
from harness.records.trials import TrialOutcome
from harness.specs.ablation import AblationSpec
from harness.specs.gate import GateSpec
from harness.specs.gpu import GpuSpec
from harness.specs.latency import LatencySpec
from harness.specs.suite import SuiteSpec
from harness.specs.sweep import SweepSpec

_MODELS: dict[str, type[BaseModel]] = {
    "environment": Environment,
    "trees": ArmTrees,
    "step_costs": StepCosts,
    "profile": Profile,
    "device_limits": DeviceLimits,
    "arm_steps": StepCost,
    "trace_header": TraceHeader,
    "heads_control": HeadsControl,
    "rounding": Rounding,
    "likelihoods": Likelihoods,
    "tokens": TokenTexts,
    "manifest": Manifest,
    "judgement": Judgement,
    "ablation_spec": AblationSpec,
    "ablation_arm": ArmResult,
    "ablation_step": StepPoint,
    "ablation_tree": ArmTree,
    "ablation_manifest": AblationManifest,
    "gate_spec": GateSpec,
    "gate": GateRecord,
    "gate_calibration": Calibration,
    "gate_manifest": GateManifest,
    "gpu_plan": GpuSpec,
    "gpu_part": PartResult,
    "gpu_tests": TestCounts,
    "gpu_corpus": CorpusRate,
    "gpu_manifest": GpuManifest,
    "latency_spec": LatencySpec,
    "latency_model": ModelFacts,
    "latency_point": LatencyPoint,
    "latency_modes": ModeTrials,
    "latency_batches": BatchTrials,
    "latency_manifest": LatencyManifest,
    "sweep_spec": SweepSpec,
    "sweep_origin": SweepOrigin,
    "sweep_trees": SweepTrees,
    "sweep_manifest": SweepManifest,
    "step_profile": StepProfile,
    "training_profile": TrainingProfile,
    "drawn_step": DrawnStep,
    "kernel_races": KernelRaces,
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of every file of a record, and of a judgement, by name.

    Of files that grow by lines it is the schema of one line, of a trace that of its header.
    """
    schemas = {name: model.model_json_schema() for name, model in _MODELS.items()}
    schemas["suite"] = SuiteSpec.model_json_schema()
    outcome: TypeAdapter[Any] = TypeAdapter(TrialOutcome)
    schemas["generation"] = {"title": "TrialOutcome", **outcome.json_schema()}
    cell: TypeAdapter[Any] = TypeAdapter(SweepCell)
    schemas["sweep_cell"] = {"title": "SweepCell", **cell.json_schema()}
    return {
        name: {"$schema": "https://json-schema.org/draft/2020-12/schema", **schemas[name]}
        for name in sorted(schemas)
    }


def write_schemas(folder: Path) -> tuple[Path, ...]:
    """Write each schema as `NAME.schema.json` and return the files.

    Raises: UserError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, schema in json_schemas().items():
            paths.append(folder / f"{name}.schema.json")
            write_bytes(paths[-1], (json.dumps(schema, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            found=f"a failed write ({error.strerror})", need="room and permission", where=folder.name
        ) from error
    return tuple(paths)
