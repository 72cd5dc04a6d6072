"""Training throughput as the README shows it: one row a stage of every profile, the device's matrix throughput beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from harness.errors import UserError
from harness.files import write_bytes
from harness.records.training_profile import HEADS_BOUND, PartProfile, StageProfile, TrainingProfile, read_training_profile
from harness.report.formatting import ABSENT, cell, milliseconds, percent, significant, table
from harness.report.provenance import describe_commit, describe_device
from harness.report.readme import update_between_markers

MARKER = "training"
_HEADERS = ("recipe", "stage", "positions/s", "ms a step", "of matrix throughput", "the step's parts", "commit")
_NOTE = f"""\
*of matrix throughput*: the operations of all matrix products, counted as they run, over what the device does in the same time on one large
product, measured in the same run; heads alone on cached states are to reach {HEADS_BOUND:.0%} over the whole recipe. *the step's parts*:
share of the step's time, and in brackets the share of the matrix throughput that the part reaches while it
runs.""".replace("%", " %")


def committed_profiles(results: Path) -> tuple[Path, ...]:
    """Return the training profiles of a results folder.

    Raises: UserError where there is none.
    """
    found = tuple(sorted((results / "profile").glob("training-*.json")))
    if not found:
        raise UserError(found="no training profile", need="one under results/profile", do="run medusa-repro profile-training")
    return found


def render_readme_training(paths: Sequence[Path], *, base: Path) -> str:
    """Return the table of some profiles, each linked from the README's folder `base`."""
    profiles = [read_training_profile(path) for path in paths]
    rows = [row for path, profile in zip(paths, profiles, strict=True) for row in _rows(profile, link=_link(path, base=base))]
    devices = dict.fromkeys(cell(describe_device(profile.environment)) for profile in profiles)
    whole = [f"`{profile.recipe}` {percent(profile.share)}" for profile in profiles]
    return "\n\n".join([f"On {'; '.join(devices)}. Over the whole recipe: {', '.join(whole)}.", table(_HEADERS, rows), _NOTE])


def update_training(readme: Path, paths: Sequence[Path]) -> None:
    """Write the table between the README's `training` markers.

    Raises: UserError for a README without its markers.
    """
    try:
        text = readme.read_text()
        updated = update_between_markers(text, marker=MARKER, content=render_readme_training(paths, base=readme.parent))
    except OSError as error:
        raise UserError(found=f"no readable README ({error.strerror})", need="a Markdown file with markers", where=readme.name) from error
    if updated != text:
        write_bytes(readme, updated.encode())


def _rows(profile: TrainingProfile, *, link: str) -> list[tuple[object, ...]]:
    return [
        (
            link.format(profile.recipe),
            f"{stage.name}, {percent(stage.step_rate)} of the steps",
            significant(stage.num_positions / stage.median_step_s),
            milliseconds(stage.median_step_s),
            percent(profile.stage_share(stage)),
            ", ".join(_part(profile, stage, part) for part in stage.parts if any(part.seconds)),
            describe_commit(profile.environment),
        )
        for stage in profile.stages
    ]


def _part(profile: TrainingProfile, stage: StageProfile, part: PartProfile) -> str:
    reached = percent(profile.part_share(part)) if part.flops else ABSENT
    return f"{part.name} {percent(median(part.seconds) / stage.median_step_s)} ({reached})"


def _link(path: Path, *, base: Path) -> str:
    resolved = path.resolve()
    return f"[`{{}}`]({resolved.relative_to(base.resolve()).as_posix()})" if resolved.is_relative_to(base.resolve()) else "`{}`"
