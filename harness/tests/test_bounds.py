"""Bounds of numbers, dates and names in records: every number of every file has some, and none is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from harness.bounds import Count, FileName, Finite, Rate, Seconds, Sha256, Utc
from harness.judge.schemas import json_schemas

# a spec is bounded where specs are; intervals may lack a bound, and a judgement is no file of a record
OTHERS = ("suite", "latency_spec", "sweep_spec", "ablation_spec", "judgement")
FREE = ("Interval", "FixedSampled", "SampledSetting")


def numbers(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema of every number of a file, with where it stands."""
    definitions = schema.get("$defs", {})
    for name, model in {**definitions, schema.get("title", ""): schema}.items():
        if not name.startswith(FREE):
            for field, value in model.get("properties", {}).items():
                for one in parts(value):
                    if one.get("type") in ("number", "integer") and "const" not in one:
                        yield f"{name}.{field}", one


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key in ("anyOf", "items", "prefixItems", "additionalProperties", "oneOf"):
                for one in inner if isinstance(inner, list) else [inner]:
                    yield from parts(one)


def test_every_number_of_every_file_has_bounds_on_both_sides() -> None:
    """NaN once passed `<= 0`, and infinite times and negative bandwidths passed as figures."""
    files = {name: schema for name, schema in json_schemas().items() if name not in OTHERS}
    found = [one for schema in files.values() for one in numbers(schema)]
    unbounded = sorted(
        {
            where
            for where, one in found
            if not ({"minimum", "exclusiveMinimum"} & set(one) and {"maximum", "exclusiveMaximum"} & set(one))
        }
    )
    assert unbounded == [] and len(found) > 150


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "1e10"])
def test_seconds_are_finite_and_not_negative(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Seconds).validate_json(text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Rate, "0"),
        (Finite, "NaN"),
        (Count, "-1"),
        (Count, str(2**63)),
        (Utc, '"yesterday"'),
        (Utc, '"2026-11-27T08:00:00"'),
        (Utc, '"9999999-01-01T00:00:00Z"'),
        (FileName, '"../suite.toml"'),
        (FileName, '"/dev/zero"'),
        (FileName, '".."'),
        (FileName, '"a\\\\b"'),
        (FileName, '"a\\u0000b"'),
        (Sha256, '"abc"'),
    ],
)
def test_what_no_record_may_hold(kind: Any, text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_json(text)
