"""What a kill or a damaged disk left in a training's work folder stops no one with a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.training.corpus import check_same_behaviour
from harness.training.resume import check_same_run
from harness.training.text import JointText
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.sequences import TrainingSequence
from medusa_impl.training.whole_checkpoints import last_checkpoint

TEXT = JointText(train=(TrainingSequence(token_ids=(1, 2, 3), answers=((1, 3),)),), held_out=())


def state(folder: Path, step: int, text: str) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"global_step": Infinity, "max_steps": 1}',
        '{"global_step": [], "max_steps": 1}',
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path: Path, text: str) -> None:
    assert last_checkpoint(tmp_path) is None
    state(tmp_path, 10, json.dumps({"global_step": 10, "max_steps": 45}))
    state(tmp_path, 20, text)
    found = last_checkpoint(tmp_path)
    assert found is not None and (found.step, found.is_finished) == (10, False)


@pytest.mark.parametrize("text", ["", "[1]", "null", "\udcff", "[" * 100_000])
def test_a_work_folder_whose_beginning_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    def check() -> None:
        check_same_run(
            tmp_path, recipe=Medusa2Settings(num_steps=1), text=TEXT, backbone_sha256="a", heads_sha256="b"
        )

    check()
    check()  # the same run goes on
    (tmp_path / "run.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=r"no readable run\.json"):
        check()


def test_a_work_folder_keeps_what_its_model_does_besides_its_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another tokenizer makes other words of the same ids, and no tensor shows it."""
    behaviour = {"forward": "a", "end": "b", "tokenizer": "c", "template": "d"}
    check_same_behaviour(tmp_path / "new", behaviour)
    check_same_behaviour(tmp_path / "new", behaviour)
    with pytest.raises(UserError, match="work of another tokenizer of the same tensors"):
        check_same_behaviour(tmp_path / "new", {**behaviour, "tokenizer": "other"})
    (tmp_path / "new" / "behaviour.json").write_text("[1]")
    with pytest.raises(UserError, match=r"no readable behaviour\.json"):
        check_same_behaviour(tmp_path / "new", behaviour)
    assert not caplog.records
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    check_same_behaviour(tmp_path / "old", behaviour)
    assert (
        "only the tensors were compared" in caplog.text and not (tmp_path / "old" / "behaviour.json").exists()
    )
