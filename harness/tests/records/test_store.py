"""A record under way: what it keeps of a spec, the folder that it gets, and which one is gone on with."""

from __future__ import annotations

import json
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.paths import holds_absolute_path
from harness.records.run import RUN, RunRecord
from harness.records.store import Store, begun_folder, new_folder, portable
from harness.records.trials import Failure, Generation
from harness.specs.suite import SuiteSpec
from harness.specs.sweep import SweepSpec
from harness.tests.fake_sweep import sweep_data
from harness.tests.tiny_suite import micro_data


def test_a_record_keeps_no_folder_of_any_path(tmp_path: Path) -> None:
    """Regression: a list of keys said what is a path, and lacked `chat_template`: its folders stayed."""
    home = tmp_path / "someone"
    data = micro_data(home / "heads.safetensors") | {
        "model": {
            "path": str(home / "model"),
            "adapter": str(home / "adapter"),
            "chat_template": str(home / "chat.jinja"),
        },
        "calibration_trace": str(home / "calibration.npz"),
    }
    kept = portable(SuiteSpec.model_validate(data))
    assert kept["model"] == {
        "path": "model",
        "adapter": "adapter",
        "chat_template": "chat.jinja",
        "dtype": "float32",
        "trust_remote_code": False,
    }
    assert kept["heads"]["path"] == "heads.safetensors" and kept["calibration_trace"] == "calibration.npz"
    assert not holds_absolute_path(json.dumps(kept))


def test_relative_paths_stay_as_they_are(tmp_path: Path) -> None:
    sweep = SweepSpec.model_validate(
        sweep_data(
            trace=str(tmp_path / "traces" / "own.npz"), calibration_trace="../embedded/calibration.npz"
        )
    )
    kept = portable(sweep)
    assert (kept["trace"], kept["calibration_trace"]) == ("own.npz", "../embedded/calibration.npz")


FIXTURE = Path(__file__).parent / "fixtures" / "v1" / "suite"


def test_folders_made_in_the_same_second_are_each_run_s_own(tmp_path: Path) -> None:
    """The second of two runs once died, and said that a place with room was needed."""
    with ThreadPool(8) as pool:
        made = pool.map(lambda _: new_folder(tmp_path / "home", "20260101T000000Z-abc"), range(16))
    assert len(set(made)) == 16 and all(folder.is_dir() for folder in made)
    assert sorted(made)[0].name == "20260101T000000Z-abc"


def test_a_folder_holds_what_its_run_began_with_from_its_first_moment_on(tmp_path: Path) -> None:
    """`nox -s kill` found a folder that a kill had left before it said whose it was."""

    def begin(draft: Path) -> None:
        (draft / "suite.toml").write_text(draft.name)

    def die(draft: Path) -> None:
        begin(draft)
        raise KeyboardInterrupt

    with ThreadPool(8) as pool:
        made = pool.map(lambda _: begun_folder(tmp_path, "20260101T000000Z-abc", begin), range(16))
    assert len(set(made)) == 16 and all((folder / "suite.toml").exists() for folder in made)
    with pytest.raises(KeyboardInterrupt):
        begun_folder(tmp_path, "later", die)
    (left,) = tmp_path.glob(".later-*.tmp")  # of this process, which is alive
    gone = left.rename(tmp_path / f".later-{2**22 + 1}-ab.tmp")  # above every number of a process
    assert begun_folder(tmp_path, "later", begin).name == "later"
    assert not gone.exists() and not list(tmp_path.glob(".*.tmp"))


def opened(results: Path, *, resume: Path | None = None, **changes: object) -> Store[Generation | Failure]:
    record = RunRecord(FIXTURE)
    spec = record.suite.model_copy(update=changes)
    return Store.open(results, kind=RUN, spec=spec, provenance=record.environment, resume=resume)


def test_two_other_runs_of_a_suite_begun_at_once_both_get_a_folder(tmp_path: Path) -> None:
    folders = [opened(tmp_path, rounds=rounds).folder for rounds in (2, 3, 4)]
    assert len(set(folders)) == 3 and {folder.parent for folder in folders} == {folders[0].parent}


def test_a_shortened_suite_that_was_never_sealed_is_still_the_run_that_was_asked_for(tmp_path: Path) -> None:
    """The suite was once rewritten before the seal: a failure there left a run that nothing found again."""
    store = opened(tmp_path, rounds=3)
    asked = (store.folder / "suite.toml").read_bytes()
    store.shorten_spec(RunRecord(store.folder).suite.model_copy(update={"rounds": 1}))
    record = RunRecord(store.folder)
    assert (record.suite.rounds, record.asked.rounds) == (1, 3)
    again = opened(tmp_path, rounds=3)
    assert again.folder == store.folder
    again.restore_spec()
    assert (store.folder / "suite.toml").read_bytes() == asked and not (store.folder / "asked.toml").exists()
    again.restore_spec()  # nothing to undo


def test_a_sealed_run_without_a_report_is_gone_on_with(tmp_path: Path) -> None:
    """A kill between seal and report once began a new run."""
    record = RunRecord(FIXTURE)
    folder = opened(tmp_path).folder
    shutil.rmtree(folder)
    shutil.copytree(FIXTURE, folder)
    (folder / "report.md").unlink(missing_ok=True)
    found = opened(tmp_path)
    assert found.folder == folder and found.is_sealed and not found.folder.samefile(record.folder)
    assert opened(tmp_path, resume=folder).is_sealed
    (folder / "report.md").write_text("told")
    assert opened(tmp_path).folder != folder
    with pytest.raises(UserError, match="found a finished run"):
        opened(tmp_path, resume=folder)


def test_only_the_newest_sealed_run_can_lack_its_report(tmp_path: Path) -> None:
    folder = opened(tmp_path).folder
    shutil.rmtree(folder)
    shutil.copytree(FIXTURE, folder.with_name("20200101T000000Z-old"))
    newer = folder.with_name("20200201T000000Z-new")
    shutil.copytree(FIXTURE, newer)
    (newer / "report.md").write_text("told")
    assert not opened(tmp_path).is_sealed
