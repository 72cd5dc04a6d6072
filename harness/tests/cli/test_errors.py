"""Mistakes of a user: each ends in one clear line, a non-zero exit code and no traceback, and loses nothing
that was measured.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from pytest import MonkeyPatch

from harness.device.engine import Engine, LoadedModel
from harness.errors import ExitCode, InvalidMeasurement, UserError
from harness.records.run import RunRecord
from harness.records.store import LineFile
from harness.records.trace import Trace
from harness.records.trials import read_outcomes
from harness.tests.tiny_suite import (
    CHAIN,
    FASTEST,
    SMOKE_FILE,
    VANILLA,
    MicroRun,
    SmokeRun,
    command,
    micro_data,
    save_tiny_heads,
    write_suite,
)

Spoil = Callable[[dict[str, Any]], object]


def test_user_error_tells_what_where_and_how() -> None:
    error = UserError(found="x", need="y", where="z", do="w")
    assert str(error) == "found x; need y; in z; to mend it: w"
    assert str(UserError(found="x", need="y")) == "found x; need y"


def test_exit_codes_are_those_of_the_documentation() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3, 70, 130, 141]
    assert not issubclass(InvalidMeasurement, UserError)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('surprise = "yes"\n', "surprise: Extra inputs are not permitted"),
        ("max_new_tokens = 1\n", "invalid TOML (Cannot overwrite a value"),
        ("[unclosed\n", "invalid TOML"),
    ],
)
def test_wrong_suite_file(line: str, found: str, tmp_path: Path) -> None:
    text = SMOKE_FILE.read_text()
    suite = tmp_path / "wrong.toml"
    suite.write_text(text.replace("[model]\n", line + "[model]\n", 1))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line.startswith(f"error: found {found}") and "in wrong.toml" in ran.error_line
    assert not (tmp_path / "results").exists()


def test_a_version_that_is_true_is_not_one(tmp_path: Path) -> None:
    """Python takes true for 1, and so took it for version 1."""
    suite = tmp_path / "wrong.toml"
    suite.write_text(SMOKE_FILE.read_text().replace("schema_version = 1", "schema_version = true", 1))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and "found schema_version true" in ran.error_line


def test_suite_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_bytes(b"\xff\xfe\x00")
    ran = command("reproduce", tmp_path / "wrong.toml")
    assert (
        ran.code == ExitCode.USER_ERROR
        and "found no readable file (not UTF-8); need a suite in TOML" in ran.error_line
    )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("reproduce", "nosuch"), "found no suite 'nosuch'; need one of ['embedded', 'embedded_full'"),
        (("reproduce", "claims"), "found no suite 'claims'"),
        (("reproduce", "nosuch.toml"), "found no file nosuch.toml"),
        (("train", "nosuch"), "found no recipe 'nosuch'; need one of ['embedded_direct'"),
        (("assets", "nosuch"), "found no asset 'nosuch'"),
        (("report", "[/red]"), "found no record '[/red]'"),  # looks like markup: once a traceback
        (("validate", "nosuch"), "found no record"),
        (("search-tree", "nosuch.npz"), "found no readable trace"),
        (("search-tree", "nosuch.npz", "--values", "magic"), "found --values magic"),
        (("reproduce", "smoke", "--claims", "nosuch.toml"), "need "),
        (("reproduce", "smoke", "--resume", "nosuch"), "found no such folder"),
        (("reproduce", "embedded", "--tree", "nosuch.json", "--dry-run"), "need "),
        (
            ("reproduce", "embedded", "--prompts", "nosuch.txt", "--dry-run"),
            "found no such file; need a .jsonl or .txt",
        ),
        (("reproduce", "smoke", "--prompts", "{prompts}"), "found prompts of text for a tiny random model"),
    ],
)
def test_wrong_word_on_the_command_line(words: tuple[str, ...], found: str, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("hello\n")
    ran = command(*(word.format(prompts=prompts) for word in words))
    assert ran.code == ExitCode.USER_ERROR
    assert found in ran.error_line and "need " in ran.error_line


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (("reproduce", "suites/latency_gpu.toml"), "suites/latency/gpu.toml"),
        (("latency", "suites/latency_gpu.toml"), "suites/latency/gpu.toml"),
        (("sweep", "suites/sweep_embedded.toml"), "suites/sweeps/embedded.toml"),
        (("ablate", "suites/embedded_training.toml"), "suites/ablations/embedded_training.toml"),
    ],
)
def test_a_path_of_before_the_move_is_told_where_the_file_lies_now(
    words: tuple[str, ...], now: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command(*words)
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line == (
        f"error: found no file {words[1]}; need a TOML file that exists; in the command line; "
        f"to mend it: name {now}, where it lies now"
    )


@pytest.mark.parametrize(
    ("verb", "old", "now"), [("latency", "latency_gpu", "gpu"), ("sweep", "sweep_embedded", "embedded")]
)
def test_a_name_of_before_the_move_is_told_what_it_is_called_now(verb: str, old: str, now: str) -> None:
    ran = command(verb, old)
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line.endswith(f"to mend it: name {now}, which it is called now")


def test_only_runs_are_exported(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("")
    ran = command("export", tmp_path, tmp_path / "table.csv")
    assert ran.code == ExitCode.USER_ERROR
    assert "found a record of kind 'sweep'; need a run: only runs have a flat table" in ran.error_line


def test_a_file_without_kind_is_told_the_line_to_add(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SMOKE_FILE.read_text().replace('kind = "suite"\n', ""))
    ran = command("reproduce", tmp_path / "mine.toml")
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line == (
        'error: found a file that does not say its kind; need kind = "suite"; in mine.toml; '
        'to mend it: add the line kind = "suite", if it is a suite'
    )


@pytest.mark.parametrize(
    ("words", "said", "do"),
    [
        (
            ("reproduce", "latency/gpu.toml"),
            "latency",
            "give it to medusa-repro latency, or name another file",
        ),
        (("latency", "sweeps/embedded.toml"), "sweep", "give it to medusa-repro sweep, or name another file"),
        (("train", "smoke.toml"), "suite", "give it to medusa-repro reproduce, or name another file"),
    ],
)
def test_a_file_of_another_kind_is_told_its_command(words: tuple[str, str], said: str, do: str) -> None:
    name, file = words
    ran = command(name, SMOKE_FILE.parent / file)
    assert ran.code == ExitCode.USER_ERROR
    assert f'found kind = "{said}"; need kind = ' in ran.error_line
    assert ran.error_line.endswith(f"in {Path(file).name}; to mend it: {do}")


def test_a_recipe_of_an_older_kind_is_told_what_to_write(tmp_path: Path) -> None:
    text = (SMOKE_FILE.parent / "recipes" / "embedded_medusa1.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('kind = "recipe"', 'kind = "heads"'))
    ran = command("train", tmp_path / "mine.toml", "--work", tmp_path / "work")
    assert ran.code == ExitCode.USER_ERROR
    assert ran.error_line.endswith('to mend it: write kind = "recipe" and trains = "heads"')


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[[0], [0]]", "(0,)"),
        ("[[0, 1]]", "(0, 1)"),
        (
            "[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]]",
            "a tree of depth 5; need at most 4, the number of heads; in arm 'tree'",
        ),
        ("[[500]]", "rank 500 in node (500,); need a rank below the vocabulary size 128"),
        ("[[-1]]", "-1"),
        ("not a tree", "need "),
        ("[]", "no path"),
    ],
)
def test_wrong_tree_is_refused_before_anything_is_measured(
    text: str, found: str, heads_file: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(text)
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, arms=[VANILLA, FASTEST]))
    ran = command("reproduce", suite, "--tree", tree, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and found in ran.error_line
    assert not (tmp_path / "results").exists()


def deep_chain(data: dict[str, Any]) -> None:
    data["arms"] = [VANILLA, {**CHAIN, "tree": {"kind": "chain", "depth": 5}}]


def fewer_heads_than_tree(data: dict[str, Any]) -> None:
    data["arms"] = [VANILLA, {**CHAIN, "num_heads": 3}]


def searched_without_calibration(data: dict[str, Any]) -> None:
    data["arms"] = [VANILLA, FASTEST]


def short_positions(data: dict[str, Any]) -> None:
    data["max_new_tokens"] = 250


def no_heads_file(data: dict[str, Any]) -> None:
    data["heads"]["path"] = "nowhere.safetensors"


def more_heads_than_the_file_has(data: dict[str, Any]) -> None:
    data["heads"]["num_heads"] = 5


def vocabulary_of_2_to_the_40(data: dict[str, Any]) -> None:
    data["model"]["tiny"]["vocab_size"] = 2**40


def more_steps_than_positions(data: dict[str, Any]) -> None:
    data["probes"]["step_context_tokens"] = 100_000


def wider_steps_than_the_vocabulary(data: dict[str, Any]) -> None:
    data["probes"]["step_nodes"] = [1, 129]


def random_prompts_without_tiny_model(data: dict[str, Any]) -> None:
    data["model"] = {"asset": "nosuch"}


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (deep_chain, "found a tree of depth 5; need at most 4, the number of heads; in arm 'chain'"),
        (fewer_heads_than_tree, "found a tree of depth 4; need at most 3"),
        (searched_without_calibration, "found tree kind 'fastest'; need a calibration_trace"),
        (
            short_positions,
            "tokens with a budget of 250 and a tree of depth 4; need at most 256 positions; in prompt "
            "'measured-",
        ),
        (no_heads_file, "found no file 'nowhere.safetensors'"),
        (more_heads_than_the_file_has, "found num_heads = 5 and 4 heads in the file; need 1 to 4 heads"),
        (vocabulary_of_2_to_the_40, "found model.tiny.vocab_size: Input should be less than or equal to"),
        (
            more_steps_than_positions,
            "found 100000 tokens before a timed step; need at most 256 positions; in probes.step_context",
        ),
        (wider_steps_than_the_vocabulary, "found 129 nodes; need at most 128, the size of the vocabulary"),
        (random_prompts_without_tiny_model, "found model asset 'nosuch'; need one of"),
    ],
)
def test_suite_that_cannot_run_is_refused_before_anything_is_measured(
    spoil: Spoil, found: str, heads_file: Path, tmp_path: Path
) -> None:
    data = micro_data(heads_file)
    spoil(data)
    ran = command("reproduce", write_suite(tmp_path / "micro.toml", data), "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and found in ran.error_line
    assert not (tmp_path / "results").exists()


def test_trace_refuses_a_prompt_beyond_the_positions(heads_file: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file, max_new_tokens=250))
    ran = command("trace", suite, tmp_path / "out.npz")
    assert ran.code == ExitCode.USER_ERROR and "need at most 256 positions" in ran.error_line


def test_heads_of_another_model(tiny: tuple[LoadedModel, Engine], tmp_path: Path) -> None:
    save_tiny_heads(tmp_path / "theirs.safetensors", tiny[1].heads, backbone_sha256="0" * 64)
    suite = write_suite(tmp_path / "micro.toml", micro_data(tmp_path / "theirs.safetensors"))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR
    assert (
        "found heads trained on tiny with tensors 0000" in ran.error_line
        and "in theirs.safetensors" in ran.error_line
    )


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_truncated_heads(share: float, heads_file: Path, tmp_path: Path) -> None:
    content = heads_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    suite = write_suite(tmp_path / "micro.toml", micro_data(tmp_path / "cut.safetensors"))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and "in cut.safetensors" in ran.error_line
    assert str(tmp_path) not in ran.error_line


def test_altered_heads(heads_file: Path, tmp_path: Path) -> None:
    content = bytearray(heads_file.read_bytes())
    content[-5] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(content)
    suite = write_suite(tmp_path / "micro.toml", micro_data(tmp_path / "altered.safetensors"))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and "in altered.safetensors" in ran.error_line


def test_calibration_trace_of_other_heads(smoke: SmokeRun, heads_file: Path, tmp_path: Path) -> None:
    trace = smoke.record.trace
    assert trace is not None
    provenance = trace.provenance.model_copy(update={"heads_hash": "0" * 64})
    Trace(provenance=provenance, prompts=trace.prompts).save(tmp_path / "calibration.npz")
    data = micro_data(
        heads_file, arms=[VANILLA, FASTEST], calibration_trace=str(tmp_path / "calibration.npz")
    )
    ran = command("reproduce", write_suite(tmp_path / "micro.toml", data), "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR
    assert (
        "found a calibration trace of another model or other heads" in ran.error_line
        and not (tmp_path / "results").exists()
    )


@pytest.mark.parametrize(
    "name", ["generations.jsonl", "trace.npz", "environment.json", "suite.toml", "trees.json"]
)
def test_truncated_record_file(name: str, smoke: SmokeRun, tmp_path: Path) -> None:
    folder = tmp_path / "record"
    shutil.copytree(smoke.record.folder, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: 3 * len(content) // 4])
    ran = command("report", folder)
    assert ran.code == ExitCode.USER_ERROR and "need " in ran.error_line
    checked = command("validate", folder)
    assert (
        checked.code == ExitCode.INVALID_MEASUREMENT
        and name in checked.err
        and "Traceback" not in checked.err
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_keeps_what_was_measured(
    number: int, micro: MicroRun, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The disk fills inside a line; with room again, the same command finishes the run."""
    append = LineFile.append
    left = [6]

    def filling(lines: LineFile[Any], folder: Path, *records: BaseModel) -> None:
        left[0] -= 1
        if left[0] < 0:
            path = folder / lines.name
            with path.open("a") as file:
                file.write(records[0].model_dump_json()[:40])
            raise OSError(number, "No space left on device", str(path))
        append(lines, folder, *records)

    suite, results = write_suite(tmp_path / "micro.toml", dict(micro.data)), tmp_path / "results"
    with monkeypatch.context() as patched:
        patched.setattr(LineFile, "append", filling)
        ran = command("reproduce", suite, "--results", results)
    assert ran.code == ExitCode.USER_ERROR
    assert (
        "No space left on device at generations.jsonl" in ran.error_line
        and str(tmp_path) not in ran.error_line
    )
    (folder,) = results.glob("micro/*/*")
    kept = read_outcomes(folder / "generations.jsonl", allow_torn_tail=True)
    assert len(kept) == 6
    assert command("reproduce", suite, "--results", results).code == ExitCode.OK
    record = RunRecord(folder)
    assert {one.trial: one.token_ids for one in record.generations} == {
        one.trial: one.token_ids for one in micro.record.generations
    }
    assert [one.trial for one in record.outcomes[:6]] == [one.trial for one in kept]


def test_results_folder_that_cannot_be_made(heads_file: Path, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file, no folder")
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file))
    ran = command("reproduce", suite, "--results", tmp_path / "results")
    assert ran.code == ExitCode.USER_ERROR and str(tmp_path) not in ran.error_line


def test_wrong_claims_file_is_refused_before_the_run(heads_file: Path, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "micro.toml", micro_data(heads_file))
    (tmp_path / "claims.toml").write_text("schema_version = 1\nsurprise = 2\n")
    ran = command("reproduce", suite, "--claims", tmp_path / "claims.toml", "--results", tmp_path / "results")
    assert (
        ran.code == ExitCode.USER_ERROR
        and "claims.toml" in ran.error_line
        and not (tmp_path / "results").exists()
    )


def test_recipe_of_another_schema(tmp_path: Path) -> None:
    text = (SMOKE_FILE.parent / "recipes" / "embedded_medusa1.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("schema_version = 1", "schema_version = 2"))
    ran = command("train", tmp_path / "mine.toml", "--work", tmp_path / "work")
    assert ran.code == ExitCode.USER_ERROR and "schema_version" in ran.error_line


def _fails(monkeypatch: MonkeyPatch, error: BaseException) -> None:
    def fail(text: str) -> Path:
        raise error

    monkeypatch.setattr("harness.cli.reproduce.find_record", fail)


def test_a_defect_is_one_line_with_a_code_of_its_own(monkeypatch: MonkeyPatch) -> None:
    """Python's own code for a traceback is 1, which says that a gate found a regression."""
    _fails(monkeypatch, ZeroDivisionError("a defect near /home/somebody/files"))
    ran = command("report", "any")
    assert ran.code == ExitCode.DEFECT and "Traceback" not in ran.err
    assert ran.error_line.startswith(
        "defect: found ZeroDivisionError: a defect near .../files; at test_errors.py"
    )
    shown = command("report", "any", "--debug")
    assert shown.code == ExitCode.DEFECT and "Traceback" in shown.err and "in fail" in shown.err


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RecursionError("maximum recursion depth exceeded"), "found data nested too deeply"),
        (MemoryError(), "found too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "found too little memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "found text that cannot be read"),
        (PermissionError(13, "Permission denied", "/somewhere/report.md"), "Permission denied at report.md"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_or_a_file_lacks_is_one_line(
    error: BaseException, found: str, monkeypatch: MonkeyPatch
) -> None:
    _fails(monkeypatch, error)
    ran = command("report", "any")
    assert ran.code == ExitCode.USER_ERROR and found in ran.error_line and "Traceback" not in ran.err
    assert "Traceback" in command("report", "any", "--debug").err


@pytest.mark.parametrize("words", [("schemas", "--help"), ("assets",), ("report", "{record}")])
def test_a_reader_that_goes_away_ends_the_command_quietly(words: tuple[str, ...], smoke: SmokeRun) -> None:
    """As in `medusa-repro report RECORD | head -1`."""
    typed = [word.format(record=smoke.record.folder) for word in words]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        typed = [sys.executable, "-m", "harness", *typed]
        ran = subprocess.run(typed, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (ExitCode.PIPE_CLOSED, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_the_code_is_right_where_nobody_can_read_the_message() -> None:
    """A message that could not be written ended with 1, which says that a gate found a regression."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        words = [sys.executable, "-m", "harness", "validate", "nosuch"]
        ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, check=False)
    assert ran.returncode == ExitCode.USER_ERROR


def test_standard_output_may_be_closed_from_the_start(tmp_path: Path) -> None:
    program = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = [sys.executable, "-c", program, "-m", "harness", "schemas", str(tmp_path / "schemas")]
    ran = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == ExitCode.OK and "defect" not in ran.stderr


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: MonkeyPatch) -> None:
    """As in a container whose user has no entry in the list of users."""

    def no_home(name: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEDUSA_REPRO_CACHE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", no_home)
    ran = command("assets")
    assert ran.code == ExitCode.USER_ERROR and "need HOME or MEDUSA_REPRO_CACHE" in ran.error_line
    monkeypatch.setenv("MEDUSA_REPRO_CACHE", "~nosuchuser/cache")
    assert command("assets").code == ExitCode.USER_ERROR


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such pipes")
@pytest.mark.parametrize(
    "words",
    [
        ("report", "{record}", "--claims", "{pipe}"),
        ("report", "{record}", "--readme", "{pipe}"),
        ("reproduce", "smoke", "--dry-run", "--tree", "{pipe}"),
        ("reproduce", "{pipe}.toml"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(
    words: tuple[str, ...], smoke: SmokeRun, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "pipe.toml").symlink_to(pipe)
    ran = command(*(word.format(record=smoke.record.folder, pipe=pipe) for word in words))
    assert ran.code == ExitCode.USER_ERROR and (
        "regular file" in ran.error_line or "no file" in ran.error_line
    )
