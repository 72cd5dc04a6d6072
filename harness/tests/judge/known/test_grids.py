"""Modes, batches and schemas on made-up records, formed here in another way."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest

from harness.errors import UserError
from harness.judge.latency import batch_points, mode_rows, prediction_of, read_share
from harness.judge.schemas import json_schemas, write_schemas
from harness.records.latency import BatchTrial
from harness.specs.suite import IntervalSpec
from harness.tests.fake_latency import BANDWIDTH_BYTES_PER_S, fake_batches, fake_facts, write_fake_latency

SPEC = IntervalSpec(num_resamples=200)


def test_modes_in_the_order_of_the_spec_and_shares_of_reading(tmp_path: Path) -> None:
    made = write_fake_latency(tmp_path / "run")
    rows = mode_rows(made)
    assert [(row.dtype, row.mode) for row in rows] == [
        ("float32", mode) for mode in ("hf_generate", "eager", "packed")
    ]
    assert made.modes is not None
    for row in rows:
        mine = [one for one in made.modes.trials if one.mode == row.mode]
        stock = {one.prompt_key: one for one in made.modes.trials if one.mode == "hf_generate"}
        rate = sum(sum(one.step_tokens) for one in mine) / sum(sum(one.step_times_s) for one in mine)
        assert row.tokens_per_s.estimate == pytest.approx(rate)
        assert row.bandwidth_share == pytest.approx(
            fake_facts().step_bytes("float32") * rate / BANDWIDTH_BYTES_PER_S
        )
        same = [one.token_ids == stock[one.prompt_key].token_ids for one in mine]
        assert (row.num_same_text, row.num_prompts) == (sum(same), 3)
    assert rows[0].step_costs == () and len(rows[1].step_costs) == 3


def test_texts_that_come_before_or_after_stocks_are_others(tmp_path: Path) -> None:
    """Both a smaller and a greater text are another text."""
    made = write_fake_latency(tmp_path / "run")
    assert made.modes is not None

    def shifted(by: int) -> int:
        trials = tuple(
            one.model_copy(update={"token_ids": tuple(token + by for token in one.token_ids)})
            if one.mode == "packed"
            else one
            for one in made.modes.trials  # type: ignore[union-attr]
        )
        made.__dict__["modes"] = made.modes.model_copy(update={"trials": trials})  # type: ignore[union-attr]
        return next(row.num_same_text for row in mode_rows(made) if row.mode == "packed")

    assert (shifted(0), shifted(1), shifted(-2)) == (3, 0, 0)


def test_batches_are_sums_over_groups() -> None:
    trials = [
        BatchTrial(
            method=method,
            batch=batch,
            round=0,
            prompt_keys=tuple(f"p{batch}-{group}-{row}" for row in range(batch)),
            num_tokens=10 * batch + group,
            num_steps=4 + group if method == "medusa" else 9,
            decode_s=(1.0 + group) / (2 if method == "medusa" else 1),
        )
        for batch in (1, 2, 4)
        for group in range(3)
        for method in ("medusa", "vanilla")
    ]
    made = fake_batches().model_copy(update={"trials": tuple(trials)})
    for point in batch_points(made, spec=SPEC):
        tokens = 30 * point.batch + 3
        assert point.vanilla_tokens_per_s == pytest.approx(tokens / 6)
        assert point.medusa_tokens_per_s == pytest.approx(tokens / 3)
        assert point.tokens_per_step == pytest.approx(tokens / (point.batch * 15))
        assert point.speedup.estimate == pytest.approx(2.0) and point.speedup.num_prompts == 3
    assert [point.batch for point in batch_points(made, spec=SPEC)] == [1, 2, 4]


def test_a_share_of_reading_holds_weights_and_the_whole_cache(tmp_path: Path) -> None:
    made = write_fake_latency(tmp_path / "run")
    one = made.points[0].model_copy(update={"batch": 3, "context_tokens": 1000})
    facts = fake_facts()
    least_s = (facts.step_bytes("float32") + facts.cache_bytes(3000, dtype="float32")) / BANDWIDTH_BYTES_PER_S
    assert read_share(made, one) == pytest.approx(least_s / median(one.backbone_s))
    skipped = one.model_copy(update={"backbone_s": (), "skipped": "no memory"})
    assert (read_share(made, skipped), prediction_of(made, skipped)) == (None, None)
    (made.folder / "device_limits.json").unlink()
    bare = type(made)(made.folder)
    assert (read_share(bare, one), prediction_of(bare, one)) == (None, None)
    assert all(row.bandwidth_share is None for row in mode_rows(bare))


def test_schemas_are_written_each_into_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    for _ in range(2):
        paths = write_schemas(folder)
    schemas = json_schemas()
    assert [path.name for path in paths] == [f"{name}.schema.json" for name in schemas]
    for path, schema in zip(paths, schemas.values(), strict=True):
        assert path.parent == folder
        assert path.read_bytes() == (json.dumps(schema, indent=1) + "\n").encode()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found a failed write"):
        write_schemas(tmp_path / "file" / "deeper")
