"""`train`, `calibrate` and `distill`: heads, adapters, and the text that they learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.find import find_data
from harness.cli.finish import draw_steps
from harness.cli.options import HubOption, RecipeArgument, console
from harness.errors import UserError
from harness.paths import cache_dir

if TYPE_CHECKING:  # the module imports torch, which most commands do without
    from harness.training.joint import JointFiles


DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="print what the training will need, counted before anything is loaded, and end"
    ),
]
ShapeOption = Annotated[
    str | None, typer.Option(help="with --dry-run: a model of shapes.toml in place of the recipe's")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="with --dry-run: a GPU of hardware.toml in place of this machine's")
]


def train(
    recipe: RecipeArgument = "embedded_medusa1",
    out: Annotated[
        Path | None, typer.Option(help="folder for the trained heads and their calibration trace")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="folder for the corpus and the training's checkpoints")
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="make the corpus too; how many hours that takes is printed first"
        ),
    ] = False,
    hub: HubOption = False,
    dry_run: DryRunOption = False,
    shape: ShapeOption = None,
    device: DeviceOption = None,
) -> None:
    """Train draft heads, alone or together with the backbone.

    Makes or reads the text, trains, prints figures on held-out text, and records a calibration trace.
    A training that was cut off is resumed by the same command.
    """
    if dry_run or shape is not None or device is not None:
        _plan(recipe, dry_run=dry_run, shape=shape, device=device, work=work)
        return
    from harness.specs.recipe import JointRecipe, load_recipe
    from harness.training.heads import train_heads
    from harness.training.joint import check_runnable, train_both
    from harness.training.workers import announce
    from medusa_impl.training.trainer import end_processes, process_state

    spec = load_recipe(find_data(recipe, kind="recipe"))
    place = work or cache_dir() / "training" / spec.name
    if isinstance(spec, JointRecipe):
        check_runnable(spec.recipe)
    announce(spec, work=place, from_scratch=from_scratch, console=console, allow_hub=hub)
    target = out or place / "out"
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(spec, JointRecipe):
        files = train_both(
            spec, work=place, target=target, console=console, from_scratch=from_scratch, allow_hub=hub
        )
        writes = process_state().is_main_process
        end_processes()
        if writes:
            _tell(spec.name, files)
        return
    heads = train_heads(
        spec, work=place, target=target, console=console, from_scratch=from_scratch, allow_hub=hub
    )
    print(json.dumps({"recipe": spec.name, "heads": heads.heads.name, "calibration": heads.calibration.name}))


def _plan(recipe: str, *, dry_run: bool, shape: str | None, device: str | None, work: Path | None) -> None:
    """Print the plan of a recipe, and as one JSON line."""
    from harness.specs.recipe import load_recipe
    from harness.training.dry_run import print_plan

    if not dry_run:
        raise UserError(
            found="--shape or --device without --dry-run",
            need="--dry-run with them: a training runs its own model on this machine",
            where="the command line",
        )
    spec = load_recipe(find_data(recipe, kind="recipe"))
    print(json.dumps(print_plan(spec, shape=shape, device=device, work=work, console=console)))


def _tell(recipe: str, files: JointFiles) -> None:
    """Draw the step log, and print the JSON line that names what a joint training wrote."""
    written = {
        "heads": files.heads,
        "adapter": files.adapter,
        "model": files.model,
        "calibration": files.calibration,
        "curves": draw_steps(files.step_log),
    }
    names = {name: path.name for name, path in written.items() if path is not None}
    print(json.dumps({"recipe": recipe, **names}))


def calibrate(
    recipe: Annotated[
        str, typer.Argument(help="name of a shipped recipe for heads and backbone, or a TOML file")
    ],
    folder: Annotated[
        Path, typer.Argument(help="folder that the training wrote, with heads and an adapter or a model")
    ],
    work: Annotated[
        Path | None, typer.Option(help="folder for the answers that the trace is made of")
    ] = None,
    hub: HubOption = False,
) -> None:
    """Record the calibration trace of trained heads, on which trees are searched.

    Training does so at its end; this command does it where the tuned model did not fit then.
    """
    from harness.specs.recipe import JointRecipe, load_recipe
    from harness.training.calibration import calibrate_folder

    spec = load_recipe(find_data(recipe, kind="recipe"))
    if not isinstance(spec, JointRecipe):
        raise UserError(
            found=f"the recipe {spec.name!r}, which trains heads alone",
            need='a recipe with trains = "heads_and_backbone"',
            where=recipe,
            do="take the calibration trace that medusa-repro train wrote next to the heads",
        )
    file = calibrate_folder(
        spec, folder, work=work or cache_dir() / "training" / spec.name, console=console, allow_hub=hub
    )
    print(json.dumps({"recipe": spec.name, "calibration": file.name if file is not None else None}))


def distill(
    recipe: Annotated[
        str, typer.Argument(help="name of a shipped recipe, or a TOML file; it needs a \\[corpus] table")
    ],
    out: Annotated[Path | None, typer.Option(help="folder for the finished corpus")] = None,
    work: Annotated[Path | None, typer.Option(help="folder for answers as they are made")] = None,
    hub: HubOption = False,
) -> None:
    """Make a recipe's corpus and nothing else: the model's own answers, of one turn or several.

    A run that was cut off is resumed by the same command.
    """
    from harness.specs.recipe import load_recipe
    from harness.training.workers import announce, distill_corpus

    spec = load_recipe(find_data(recipe, kind="recipe"))
    place = work or cache_dir() / "training" / spec.name
    announce(spec, work=place, from_scratch=True, console=console, allow_hub=hub)
    made = distill_corpus(spec, work=place, target=out or place / "out", console=console, allow_hub=hub)
    counts = {"answers": made.num_answers, "second_turns": made.num_second_turns, "tokens": made.num_tokens}
    print(json.dumps({"recipe": spec.name, "corpus": made.file.name, **counts}))
