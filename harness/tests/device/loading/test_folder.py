"""The loading matrix: twelve kinds of broken model folder, and every way in which a command loads one."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.device.engine import load_model, model_sha256, model_without_weights
from harness.errors import ExitCode, UserError
from harness.files import ModelFolder
from harness.specs.suite import ModelSpec
from harness.tests.test_layers import imports_of, source_files
from harness.tests.tiny_folder import edit_json, write_tiny_folder

Break = Callable[[Path], None]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def edited(**changes: Any) -> Break:
    return lambda folder: edit_json(folder / "config.json", **changes)


def cut(name: str) -> Break:
    """Return a break that leaves the first half of a file."""

    def halve(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return halve


def removed(*names: str) -> Break:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def odd_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", model_max_length=[64, 64])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


# name -> what breaks the folder, what the one line says, whether all doors tell it, those without weights too
BROKEN: dict[str, tuple[Break, str, bool]] = {
    "no config": (removed("config.json"), "no config.json", True),
    "config cut short": (cut("config.json"), "a broken config.json", True),
    "generation config cut short": (cut("generation_config.json"), "a broken generation_config.json", True),
    "tokenizer cut short": (cut("tokenizer.json"), "a broken tokenizer.json", True),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "tokenizer", False),
    "lengths of a tokenizer": (odd_tokenizer, "TypeError", False),
    "no weights": (removed("model.safetensors"), "no model.safetensors", False),
    "weights cut short": (cut("model.safetensors"), "a damaged safetensors file", False),
    "git-lfs pointer": (pointer, "a pointer of git-lfs", True),
    "quantised": (edited(quantization_config=GPTQ), r"quantised weights \(gptq\)", True),
    "flash attention": (edited(_attn_implementation="flash_attention_2"), "flash_attention_2", True),
    "layers without end": (edited(num_hidden_layers=10**9), "num_hidden_layers = 1000000000", True),
    "padding outside": (edited(pad_token_id=97), "pad_token_id = 97", True),
    "another size": (edited(intermediate_size=32), "of another shape: .*24 x 16.*32 x 16", False),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize("kind", BROKEN)
def test_loading_matrix(kind: str, folder: Path) -> None:
    """Each kind is one line in each of the three functions through which all commands go."""
    break_it, line, without_loading = BROKEN[kind]
    break_it(folder)
    spec = ModelSpec(path=ModelFolder(folder))
    doors: list[Callable[[], Any]] = [lambda: load_model(spec, device=torch.device("cpu"))]
    if without_loading:
        doors += [lambda: model_sha256(spec), lambda: model_without_weights(spec)]
    for door in doors:
        with pytest.raises(UserError, match=line) as caught:
            door()
        assert "\n" not in str(caught.value)


def test_every_command_that_loads_a_model_goes_through_those_functions() -> None:
    """No other file asks transformers for a model, but the one that makes an asset out of a GGUF file."""
    askers = {
        path.as_posix().partition("/harness/")[2]
        for path in source_files()
        for found in imports_of(path)
        if found.name.startswith("transformers.Auto")
    }
    assert askers == {"assets/files.py", "device/loading/weights.py", "device/random_model.py"}
    calls = {
        path.as_posix().partition("/harness/")[2]
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert {call for call in calls if call} == {"assets/files.py", "device/loading/weights.py"}


@pytest.mark.parametrize("kind", ["quantised", "another size"])
@pytest.mark.parametrize("command_name", ["reproduce", "trace", "latency"])
def test_a_command_ends_with_the_line_and_exit_code_3(
    kind: str, command_name: str, folder: Path, tmp_path: Path
) -> None:
    from harness.tests.tiny_suite import CHAIN, VANILLA, command, micro_data, write_suite

    BROKEN[kind][0](folder)
    model = {"path": str(folder)}
    data = micro_data(tmp_path / "none", arms=[VANILLA, CHAIN])
    data.update(model=model, prompts={"source": "mt_bench", "limit": 1})
    if command_name == "latency":
        data = {
            "schema_version": 1,
            "kind": "latency",
            "name": "micro",
            "description": "for tests",
            "dtypes": ["float32"],
            "model": model,
            "heads": {"num_heads": 1},
            "grids": [{"num_nodes": [1], "context_tokens": [8], "num_heads": [1]}],
        }
    suite = write_suite(tmp_path / "suite.toml", data)
    option = [] if command_name == "trace" else ["--results"]
    ran = command(command_name, suite, *option, tmp_path / "out")
    assert ran.code == ExitCode.USER_ERROR, ran
    assert re.search(BROKEN[kind][1], ran.error_line)
