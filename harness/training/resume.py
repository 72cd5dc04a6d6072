"""Whether a joint training that goes on is the one that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

from harness.errors import UserError
from harness.files import write_bytes
from harness.training.corpus import RUN_FILE, read_noted
from harness.training.text import JointText
from medusa_impl.recipes import Medusa2Settings
from medusa_impl.training.sequences import WINDOW_BATCHES


def check_same_run(
    work: Path, *, recipe: Medusa2Settings, text: JointText, backbone_sha256: str, heads_sha256: str
) -> None:
    """Note in the work folder what is trained there, or see that it is what the folder began with.

    Raises: UserError for a folder of another training.
    """
    ours = {
        "recipe": recipe.model_dump(mode="json"),
        "text": text.fingerprint(),
        "backbone": backbone_sha256,
        "first heads": heads_sha256,
        "order": [WINDOW_BATCHES, recipe.batch_sequences * recipe.accumulation_steps],
    }
    work.mkdir(parents=True, exist_ok=True)
    path = work / RUN_FILE
    if not path.exists():
        write_bytes(path, (json.dumps(ours, indent=1) + "\n").encode())
        return
    theirs = read_noted(path)
    if changed := sorted(name for name in ours if theirs.get(name) != ours[name]):
        raise UserError(
            found=f"a training of another {changed[0]}",
            need="the training that began in this folder",
            where="the work folder",
            do="give another --work, or empty it to start afresh",
        )
