"""The folder of an ablation under way: append arms, resume, seal."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from harness.ablation import (
    ARMS_FILE,
    TREE_FILE,
    AblationManifest,
    AblationRecord,
    ArmResult,
    original_text_file,
    read_results,
    steps_file,
    trace_file,
)
from harness.ablation_specs import AblationSpec
from harness.compose.replay import Trace
from harness.device.machine import machine_slug
from harness.files import write_bytes, write_json
from harness.records import ArmTree, Environment
from harness.run_store import append_line, drop_left_overs, hashes, open_folder, other_than, portable

_UNSEALED = ("manifest.json", "report.md", "curves.png")


class AblationStore:
    """One run's folder: an arm that is done is on disk, and survives a kill at any byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def open(results: Path, *, spec: AblationSpec, environment: Environment, resume: Path | None = None) -> AblationStore:
        """Return the store to write to: an unfinished run of the same suite, commit, versions, device and weights, else a new folder.

        Raises: UserError where `resume` names a run that is finished or that another suite, commit, version or device began.
        """
        folder, is_new = open_folder(
            results / spec.name / machine_slug(environment.device),
            commit=environment.commit,
            difference=lambda folder: _difference(folder, spec=spec, environment=environment),
            resume=resume,
        )
        if is_new:
            write_bytes(folder / "suite.toml", tomli_w.dumps(portable(spec)).encode())
            write_json(folder / "environment.json", environment)
        return AblationStore(folder)

    def write_tree(self, tree: ArmTree) -> None:
        """Write the tree that all arms are compared at."""
        write_json(self.folder / TREE_FILE, tree)

    def prepare(self) -> set[tuple[str, int | None]]:
        """Return the arms and seeds that are done; half a last line and temporary files, left by a kill, are dropped."""
        drop_left_overs(self.folder)
        path = self.folder / ARMS_FILE
        if not path.exists():
            return set()
        results = read_results(path, allow_torn_tail=True)
        write_bytes(path, "".join(result.model_dump_json() + "\n" for result in results).encode())
        return {(result.arm, result.seed) for result in results}

    def add(self, result: ArmResult, *, trace: Trace, original_text: Trace | None = None, step_log: Path | None) -> None:
        """Write an arm's files, its line last: without the line the arm counts as not done."""
        trace.save(self.folder / trace_file(result.label))
        if original_text is not None:
            original_text.save(self.folder / original_text_file(result.label))
        if step_log is not None:
            temporary = self.folder / (steps_file(result.label) + ".tmp")
            shutil.copyfile(step_log, temporary)
            os.replace(temporary, self.folder / steps_file(result.label))
        append_line(self.folder / ARMS_FILE, result)

    def seal(self, *, elapsed_s: float) -> AblationManifest:
        """Write the manifest, last of all."""
        record = AblationRecord(self.folder)
        manifest = AblationManifest(
            suite=record.spec.name,
            num_planned=len(record.spec.plan()),
            num_arms=len(record.results),
            finished_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            elapsed_s=elapsed_s,
            sha256=hashes(self.folder, unsealed=_UNSEALED),
        )
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def _difference(folder: Path, *, spec: AblationSpec, environment: Environment) -> str | None:
    record = AblationRecord(folder)
    if record.spec != AblationSpec.model_validate(portable(spec)):
        return "suite"
    return other_than(record.environment, environment)
