"""Every field of every record says what it holds, with its unit."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import harness.records
from harness.judge.schemas import json_schemas

# what the name of a field says of its unit, and the word for it in the description
UNITS = {
    r"(?<!per)_s$|^seconds$": "seconds",
    r"_per_s$": "a second",
    r"bytes": "bytes",
    r"_utc$": "UTC",
    r"sha256|_hash$": "SHA-256|hash",
    r"tokens": "token",
    r"flop": "operations",
    r"nll|^kl|likelihood$|loss": "nats",
    r"_(share|rate|top1)$": "share",
    r"^p\d+$|^largest$": "logits",
}
NOT_FILES = ("suite", "judgement", "ablation_spec", "latency_spec", "sweep_spec")  # of other packages


def record_models() -> list[type[BaseModel]]:
    """Return all models that are defined in `harness/records/`, and those that their fields hold."""
    names = [found.name for found in pkgutil.walk_packages(harness.records.__path__, "harness.records.")]
    found: dict[type[BaseModel], None] = {}
    for module in map(importlib.import_module, names):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ in names:
                found |= dict.fromkeys(reachable(value))
    return list(found)


def reachable(model: type[BaseModel], seen: tuple[type[BaseModel], ...] = ()) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            if inner not in (*seen, model):
                yield from reachable(inner, (*seen, model))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


FIELDS = {
    f"{model.__name__}.{name}": (name, field)
    for model in record_models()
    for name, field in model.model_fields.items()
}


def faults_of(name: str, description: str | None) -> list[str]:
    """Return what is wrong with a field's description; nothing where it says what the field holds."""
    text = description or ""
    if not text or text != text.strip(" .") or text.lower() == name.replace("_", " "):
        return [f"found {text!r}, need a phrase that says more than the name"]
    return [
        f"found {text!r}, need its unit: {unit}"
        for pattern, unit in UNITS.items()
        if re.search(pattern, name) and not re.search(unit, text)
    ]


def test_every_field_says_what_it_holds_with_its_unit() -> None:
    faults = {
        label: found
        for label, (name, field) in FIELDS.items()
        if (found := faults_of(name, field.description))
    }
    assert faults == {}


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("step_s", None),
        ("step_s", ""),
        ("num_heads", "num heads"),
        ("step_s", "how long a step takes"),
        ("peak_memory_bytes", "most memory"),
        ("tokens_per_s", "tokens by the time"),
        ("kl_sum", "summed divergence"),
    ],
)
def test_a_field_that_says_too_little_is_found(name: str, description: str | None) -> None:
    assert faults_of(name, description)


def test_the_walk_finds_the_models_of_every_file() -> None:
    """A walk that finds nothing would let every field pass."""
    names = {model.__name__ for model in record_models()}
    assert {"TrialKey", "ProfileRow", "PartProfile", "PromptHeader", "SampledRow", "HeadText"} <= names
    assert {"Interval", "SampledSetting", "DeviceInfo", "TunedOrigin", "PredictionError"} <= names
    assert len(FIELDS) > 280


def test_the_schemas_carry_the_descriptions() -> None:
    described = {
        (found["title"], name): prop.get("description")
        for label, schema in json_schemas().items()
        if label not in NOT_FILES
        for found in (schema, *schema.get("$defs", {}).values())
        for name, prop in found.get("properties", {}).items()
    }
    for label, (name, field) in FIELDS.items():
        assert isinstance(field, FieldInfo)
        title = label.partition(".")[0]
        if (title, name) in described:
            assert described[title, name] == field.description, label
    assert {label.partition(".")[0] for label in FIELDS} - {title for title, _ in described} == set()
