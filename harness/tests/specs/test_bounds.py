"""What any data file may say: numbers have bounds, and what breaks them is one line that names the key."""

from __future__ import annotations

import copy
import datetime
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from harness.errors import UserError
from harness.paths import shipped
from harness.specs.ablation import load_ablation
from harness.specs.assets import load_asset_specs
from harness.specs.claims import load_claims
from harness.specs.hardware import load_hardware
from harness.specs.latency import load_latency_spec
from harness.specs.quoted import load_quoted
from harness.specs.recipe import load_recipe
from harness.specs.shapes import load_shapes
from harness.specs.suite import load_suite
from harness.specs.sweep import load_sweep

Loader = Callable[[Path], Any]
FILES: dict[str, Loader] = {
    "smoke.toml": load_suite,
    "embedded.toml": load_suite,
    "embedded_full.toml": load_suite,
    "latency/cpu.toml": load_latency_spec,
    "latency/embedded.toml": load_latency_spec,
    "latency/gpu.toml": load_latency_spec,
    "sweeps/embedded.toml": load_sweep,
    "ablations/embedded_training.toml": load_ablation,
    "ablations/embedded_training_long.toml": load_ablation,
    "ablations/embedded_training_quick.toml": load_ablation,
    "recipes/embedded_medusa1.toml": load_recipe,
    "recipes/paper_33b_ramped.toml": load_recipe,
    "recipes/paper_7b_two_stage.toml": load_recipe,
    "assets.toml": load_asset_specs,
    "hardware.toml": load_hardware,
    "shapes.toml": load_shapes,
    "quoted.toml": load_quoted,
    "claims.toml": load_claims,
}
DATE = datetime.date(2026, 1, 1)


def numbers_in(data: Any, at: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """Yield where whole numbers lie, once for each name of a key."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if type(value) is int:
            yield (*at, key)
        elif isinstance(value, dict | list):
            yield from numbers_in(value, (*at, key))


def with_value(data: dict[str, Any], at: tuple[int | str, ...], value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(data)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return dict(changed)


def refusal(load: Loader, text: str, folder: Path) -> str:
    """Return the one line with which a file is refused."""
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(folder / "mine.toml")
    assert "\n" not in str(caught.value) and caught.value.where is not None
    assert caught.value.where.startswith("mine.toml")
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_shipped_file_lies_within_the_bounds(name: str) -> None:
    FILES[name](shipped(name))


@pytest.mark.parametrize("name", sorted(set(FILES) - {"claims.toml"}))
@pytest.mark.parametrize("value", [10**15, -1, DATE, 2**70])
def test_no_number_of_a_data_file_is_without_bounds(name: str, value: object, tmp_path: Path) -> None:
    """`rounds = 10^9`, 10^12 resamples and a vocabulary of 2^40 were begun, and ended in a killed process."""
    data = tomllib.loads(shipped(name).read_text(encoding="utf-8"))
    seen: set[str] = set()
    for at in numbers_in(data):
        key = str(next(part for part in reversed(at) if isinstance(part, str)))
        if key not in seen:
            seen.add(key)
            refusal(FILES[name], tomli_w.dumps(with_value(data, at, value)), tmp_path)
    assert "schema_version" in seen


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("smoke.toml", "seeds = [1, 2]", "seeds = [1, 1]", "seeds: .*1 stands twice"),
        ("smoke.toml", "seeds = [1, 2]", "seeds = [-1]", r"seeds\.0: .*greater than or equal to 0"),
        ("smoke.toml", "step_nodes = [1, 4, 8]", "step_nodes = []", "step_nodes: .*at least 1 item"),
        ("smoke.toml", "step_nodes = [1, 4, 8]", "step_nodes = [0]", r"step_nodes\.0"),
        ("smoke.toml", "widths = [3, 2, 1]", "widths = []", "widths: .*at least 1 item"),
        ("smoke.toml", "widths = [3, 2, 1]", "widths = [0]", r"widths\.0"),
        ("smoke.toml", "temperature = 0.7", "temperature = inf", "temperature: .*finite number"),
        ("smoke.toml", "temperature = 0.7", "temperature = nan", "temperature: .*finite number"),
        ("smoke.toml", "train_steps = 250", "train_steps = 0", "train_steps"),
        ("smoke.toml", "num_heads = 4\n", "num_heads = 10_000_000\n", r"heads\.num_heads"),
        ("smoke.toml", "depth = 4", "depth = 1_000_000_000", r"tree\.chain\.depth"),
        ("smoke.toml", 'name = "smoke"', "name = 1979-05-27", "name: .*valid string"),
        ("smoke.toml", 'source = "random"', "source = 07:32:00", r"prompts\.source"),
        ("smoke.toml", "hidden_size = 64", "hidden_size = 63", "multiple of num_attention_heads"),
        ("smoke.toml", "vocab_size = 128", "vocab_size = 131072\nnum_kv = 1", "num_kv: Extra inputs"),
        ("smoke.toml", "hidden_size = 64", "hidden_size = 65536", "parameters, at most 100,000,000 are tiny"),
        ("latency/cpu.toml", 'modes = ["packed"]', "modes = []", "modes"),
        ("latency/cpu.toml", "num_heads = [5]", "num_heads = [5, 5]", "num_heads: .*5 stands twice"),
        ("latency/cpu.toml", "context_tokens = [128, 1024]", "context_tokens = [0]", "context_tokens"),
        ("sweeps/embedded.toml", "epsilons = [0.09]\ndeltas = [0.3]", "epsilons = []", "epsilons"),
        ("sweeps/embedded.toml", "seeds = [1]", "seeds = [1, 1]", "seeds: .*1 stands twice"),
    ],
)
def test_empty_lists_zeros_negative_numbers_and_repeated_seeds_are_refused_by_key(
    name: str, old: str, new: str, found: str, tmp_path: Path
) -> None:
    text = shipped(name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=found):
        FILES[name](tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "[" * 60 + "]" * 60, "nested more than 20 deep"),
        ("[" + ".".join("a" * 500) + "]", "nested more than 20 deep"),
        ("a = " + "{a = " * 5000, "nested too deeply"),
        ("a = 9223372036854775808", "an integer beyond 64 bits"),
        ("a = -9223372036854775809", "an integer beyond 64 bits"),
        ("a = " + "9" * 5000, "invalid TOML"),
        ("a = [", "invalid TOML"),
    ],
)
@pytest.mark.parametrize("name", ["smoke.toml", "claims.toml"])
def test_deep_nesting_and_huge_integers_are_one_line(
    name: str, line: str, found: str, tmp_path: Path
) -> None:
    """A RecursionError once ended in a traceback."""
    assert found in refusal(FILES[name], line, tmp_path)


def test_points_and_settings_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    many = list(range(1, 900))
    latency = tomllib.loads(shipped("latency/cpu.toml").read_text(encoding="utf-8"))
    latency["grids"] = [{"num_nodes": many, "context_tokens": many, "batch": many}]
    assert "points in a grid, at most 100,000" in refusal(load_latency_spec, tomli_w.dumps(latency), tmp_path)
    sweep = tomllib.loads(shipped("sweeps/embedded.toml").read_text(encoding="utf-8"))
    sweep["sampled"]["seeds"] = many
    sweep["sampled"]["vanilla"] = [number / 1000 for number in many]
    assert "need at most 100,000 runs" in refusal(load_sweep, tomli_w.dumps(sweep), tmp_path)


@pytest.mark.parametrize("text", ["literal = 3", "literal = [1]", "needs = 2026-01-01", "claims = [3]"])
def test_tables_of_the_registry_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    claim = '\n[[claims]]\nid = "a"\nliteral = "x"\nneeds = "y"' if "claims" not in text else ""
    refusal(load_claims, f"schema_version = 1\n{text}\n{claim}", tmp_path)


def test_arms_that_are_not_there_are_named() -> None:
    suite = load_suite(shipped("smoke.toml"))
    with pytest.raises(UserError, match="found arm 'gone'; need one of vanilla, chain"):
        suite.arm("gone")
    ablation = load_ablation(shipped("ablations/embedded_training_quick.toml"))
    with pytest.raises(UserError, match="found arm 'gone'; need one of"):
        ablation.arm("gone")
