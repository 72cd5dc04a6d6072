"""The command line. Exit codes: 0 ok, 1 gate regression, 2 invalid measurement or a failed trial, 3 user error, 130 Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from harness.paths import default_results, resolve_path, shipped

if "--hub" not in sys.argv:  # before huggingface_hub is imported, which reads it once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no command hangs on a hub that is not there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from harness.asset_specs import load_asset_specs
from harness.assets.fetch import fetch_asset
from harness.assets.listing import asset_rows
from harness.claim_specs import ClaimSpec, load_claims
from harness.config import SuiteSpec, load_suite
from harness.errors import ExitCode, InvalidMeasurement, UserError
from harness.export import export
from harness.files import write_bytes, write_json
from harness.judge import judge
from harness.judgement import Judgement
from harness.paths import cache_dir
from harness.records import RunRecord
from harness.report.markdown import headline, render_report
from harness.report.readme import update_readme
from harness.report.terminal import print_verdicts
from harness.validate import validate_record, write_schemas

app = typer.Typer(help="Do the Medusa paper's claims hold, on this model and this machine?", no_args_is_help=True, add_completion=False)
console = Console(stderr=True)
_NOT_SUITES = ("assets", "claims", "hardware", "quoted", "shapes")  # other data that lies beside the suites
_LATENCY, _SWEEP = "latency_", "sweep_"  # what the names of latency specs and of sweeps begin with
_ABLATION = "_training"  # what the names of ablations hold

SuiteArgument = Annotated[str, typer.Argument(help="a shipped suite's name or a TOML file")]
HubOption = Annotated[bool, typer.Option("--hub", help="may ask the Hugging Face hub for models")]


@app.command()
def assets(
    names: Annotated[list[str] | None, typer.Argument(help="assets to fetch and verify; none lists them")] = None, hub: HubOption = False
) -> None:
    """List assets, or fetch and verify some."""
    specs = load_asset_specs()
    for name in names or []:
        if name not in specs:
            raise UserError(found=f"asset {name!r}", need=f"one of {sorted(specs)}", where="the command line")
        fetched = fetch_asset(specs[name], cache_dir=cache_dir(), allow_hub=hub)
        console.print(f"{name}: {fetched.source}, {fetched.licence}, every hash right")
    if not names:
        table = Table(Column("asset", no_wrap=True), "kind", "licence", "cached", "MB", "source")
        for row in asset_rows(specs, cache_dir()):
            size = f"{row.size_bytes / 1e6:.1f}" if row.size_bytes is not None else "-"
            table.add_row(row.name, row.kind, row.licence, "yes" if row.is_cached else "no", size, row.source)
        Console().print(table)


@app.command()
def reproduce(
    suite: SuiteArgument = "embedded",
    limit: Annotated[int | None, typer.Option(help="only the first N prompts, categories in turn", min=1)] = None,
    time_budget: Annotated[float | None, typer.Option(help="minutes after which no further prompt begins", min=0.1)] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts of your own: .jsonl or .txt")] = None,
    tree: Annotated[Path | None, typer.Option(help="a tree (JSON) instead of the searched ones")] = None,
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished run")] = None,
    results: Annotated[Path | None, typer.Option(help="where records go")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and its minutes, run nothing")] = False,
    readme: Annotated[Path | None, typer.Option(help="write the tables between this file's markers")] = None,
    hub: HubOption = False,
) -> None:
    """Run a suite, judge it against the paper's claims, write the report; resumes an unfinished run of the same kind."""
    from harness.run import RunOptions, effective_suite, run_suite

    spec, file = find_suite(suite)
    registry = load_claims(claims)
    options = RunOptions(
        results=results or default_results(),
        limit=limit,
        time_budget_s=time_budget * 60 if time_budget is not None else None,
        prompts_file=prompts,
        tree_file=tree,
        resume=resume,
        allow_hub=hub,
        command=_command(),
    )
    if dry_run:
        from harness.estimate import print_plan

        print_plan(effective_suite(spec, options), results=options.results, prompts_file=prompts, console=Console())
        return
    folder = run_suite(spec, suite_file=file, options=options, console=console)
    record = RunRecord(folder)
    _finish(record, judge(record, claims=registry), readme=readme)


@app.command()
def report(
    record: Annotated[str, typer.Argument(help="a record folder, or a suite's name for its newest record")] = "embedded",
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    readme: Annotated[Path | None, typer.Option(help="write the tables between this file's markers")] = None,
) -> None:
    """Judge a record again and write its report; needs no device."""
    folder = find_record(record)
    if (folder / "arms.jsonl").exists():
        _finish_ablation(folder, claims=load_claims(claims), readme=readme)
        return
    found = RunRecord(folder)
    _finish(found, judge(found, claims=load_claims(claims)), readme=readme)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a TOML file")] = "embedded_medusa1",
    out: Annotated[Path | None, typer.Option(help="folder for heads and calibration trace")] = None,
    work: Annotated[Path | None, typer.Option(help="folder for corpus and training state")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="also make the corpus; prints the hours first")] = False,
    hub: HubOption = False,
) -> None:
    """Train draft heads, alone or with the backbone: text, training, held-out figures, calibration trace; resumes where it stopped."""
    from harness.joint_run import check_runnable, train_joint_suite
    from harness.training_run import announce, train_suite
    from harness.training_specs import JointSuite, load_training_suite
    from medusa_impl.medusa2_trainer import end_processes, process_state

    spec = load_training_suite(_find_data(recipe, folder="recipes"))
    place = work or cache_dir() / "training" / spec.name
    if isinstance(spec, JointSuite):
        check_runnable(spec.recipe)
    announce(spec, work=place, from_scratch=from_scratch, console=console, allow_hub=hub)
    target = out or place / "out"
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(spec, JointSuite):
        joint = train_joint_suite(spec, work=place, target=target, console=console, from_scratch=from_scratch, allow_hub=hub)
        writes = process_state().is_main_process
        end_processes()
        if not writes:
            return
        picture = _draw_steps(joint.step_log)
        written = {
            "heads": joint.heads,
            "adapter": joint.adapter,
            "model": joint.model,
            "calibration": joint.calibration,
            "curves": picture,
        }
        print(json.dumps({"recipe": spec.name, **{name: path.name for name, path in written.items() if path is not None}}))
        return
    files = train_suite(spec, work=place, target=target, console=console, from_scratch=from_scratch, allow_hub=hub)
    print(json.dumps({"recipe": spec.name, "heads": files.heads.name, "calibration": files.calibration.name}))


@app.command()
def calibrate(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a TOML file, of heads and backbone")],
    folder: Annotated[Path, typer.Argument(help="what its training wrote: heads, and adapter or model")],
    work: Annotated[Path | None, typer.Option(help="folder for the answers")] = None,
    hub: HubOption = False,
) -> None:
    """Record the calibration trace of trained heads, which trees are searched on, as training does at its end where the model fits."""
    from harness.joint_run import calibrate_folder
    from harness.training_specs import JointSuite, load_training_suite

    spec = load_training_suite(_find_data(recipe, folder="recipes"))
    if not isinstance(spec, JointSuite):
        raise UserError(found=f"the recipe {spec.name!r} of heads alone", need="kind = 'joint'", where=recipe)
    file = calibrate_folder(spec, folder, work=work or cache_dir() / "training" / spec.name, console=console, allow_hub=hub)
    print(json.dumps({"recipe": spec.name, "calibration": file.name if file is not None else None}))


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a TOML file with a [corpus]")],
    out: Annotated[Path | None, typer.Option(help="folder for the packed corpus")] = None,
    work: Annotated[Path | None, typer.Option(help="folder for the shards")] = None,
    hub: HubOption = False,
) -> None:
    """Make a recipe's corpus and nothing else: the model's own answers, of one turn or several; resumes where it stopped."""
    from harness.distill_run import distill_suite
    from harness.training_run import announce
    from harness.training_specs import load_training_suite

    spec = load_training_suite(_find_data(recipe, folder="recipes"))
    place = work or cache_dir() / "training" / spec.name
    announce(spec, work=place, from_scratch=True, console=console, allow_hub=hub)
    made = distill_suite(spec, work=place, target=out or place / "out", console=console, allow_hub=hub)
    counts = {"answers": made.num_answers, "second_turns": made.num_second_turns, "tokens": made.num_tokens}
    print(json.dumps({"recipe": spec.name, "corpus": made.file.name, **counts}))


@app.command()
def ablate(
    suite: Annotated[str, typer.Argument(help="a shipped ablation's name or a TOML file")] = "embedded_training_quick",
    results: Annotated[Path | None, typer.Option(help="where records go")] = None,
    work: Annotated[Path | None, typer.Option(help="folder for adapters, heads and training state")] = None,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished run")] = None,
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the arms and their minutes, train nothing")] = False,
    report: Annotated[Path | None, typer.Option(help="write this record's report again instead of training")] = None,
    readme: Annotated[Path | None, typer.Option(help="write the table between this file's markers")] = None,
    hub: HubOption = False,
) -> None:
    """Train recipes side by side at one token budget, measure what became of backbone and heads, judge the claims about training."""
    registry = load_claims(claims)
    if report is not None:
        _finish_ablation(report, claims=registry, readme=readme)
        return
    from harness.ablate import AblateOptions, print_ablation_plan, run_ablation
    from harness.ablation_specs import load_ablation

    file = _find_data(suite, folder=None, kind="ablation")
    spec = load_ablation(file)
    place = results or default_results()
    if dry_run:
        minutes = print_ablation_plan(spec, results=place, console=Console())
        print(json.dumps({"ablation": spec.name, "trainings": len(spec.plan()) - 1, "minutes": round(minutes)}))
        return
    options = AblateOptions(results=place, work=work, resume=resume, allow_hub=hub, command=_command())
    _finish_ablation(run_ablation(spec, suite_file=file, options=options, console=console), claims=registry, readme=readme)


@app.command()
def trace(
    suite: SuiteArgument,
    out: Annotated[Path, typer.Argument(help="the .npz file to write")],
    limit: Annotated[int | None, typer.Option(help="only the first N prompts", min=1)] = None,
    hub: HubOption = False,
) -> None:
    """Answer a suite's prompts greedily and record how its heads rank the answers."""
    from harness.tracing import trace_suite

    spec, file = find_suite(suite)
    written = trace_suite(spec, suite_file=file, out=out, limit=limit, allow_hub=hub, console=console)
    print(json.dumps({"trace": out.name, "prompts": len(written.prompts), "positions": written.num_positions}))


@app.command()
def profile(
    suite: SuiteArgument = "embedded",
    nodes: Annotated[str, typer.Option(help="tree sizes, root included")] = "1,2,4,8,16,32,64,128",
    mode: Annotated[str | None, typer.Option(help="an engine mode instead of the suite's")] = None,
    steps: Annotated[int, typer.Option(help="marked steps a size", min=1)] = 48,
    out: Annotated[Path | None, typer.Option(help="write the record (JSON)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the JSON line only")] = False,
    hub: HubOption = False,
) -> None:
    """Say where the time of a step goes, for vanilla and for trees of growing size."""
    from harness.record_profile import profile_suite
    from harness.report.profile import profile_headline, render_step_profile
    from harness.step_profile import parse_sizes

    sizes = parse_sizes(nodes)
    spec, file = find_suite(suite)
    profiled = profile_suite(
        spec, suite_file=file, sizes=sizes, mode=mode, num_steps=steps, allow_hub=hub, command=_command(), console=console
    )
    if out is not None:
        write_json(out, profiled)
    if not as_json:
        print(render_step_profile(profiled))
    print(json.dumps(profile_headline(profiled), allow_nan=False))


@app.command("profile-training")
def profile_training_command(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe's name or a TOML file")] = "embedded_medusa1",
    steps: Annotated[int, typer.Option(help="untouched steps a stage; as many are taken apart", min=1)] = 8,
    output: Annotated[Path | None, typer.Option(help="write the record (JSON) here, not under results/profile")] = None,
    report: Annotated[bool, typer.Option("--report", help="measure nothing: only write the table of all committed profiles")] = False,
    readme: Annotated[Path | None, typer.Option(help="write the table of all committed profiles between this file's markers")] = None,
    hub: HubOption = False,
) -> None:
    """Say which share of the matrix throughput a recipe's training steps reach, and where the rest of their time goes."""
    if not report:
        _profile_training(recipe, steps=steps, output=output, hub=hub)
    if report or readme is not None:
        from harness.report.training import committed_profiles, render_readme_training, update_training

        paths = committed_profiles(default_results())
        if readme is not None:
            update_training(readme, paths)
        else:
            print(render_readme_training(paths, base=default_results().parent))


def _profile_training(recipe: str, *, steps: int, output: Path | None, hub: bool) -> None:
    from harness.environment import machine_slug
    from harness.record_training_profile import profile_training
    from harness.training_profile import print_training_profile, training_headline
    from harness.training_specs import load_training_suite

    spec = load_training_suite(_find_data(recipe, folder="recipes"))
    profiled = profile_training(spec, num_steps=steps, allow_hub=hub, command=_command(), console=console)
    name = f"training-{spec.name}-{machine_slug(profiled.environment.device)}.json"
    target = output or default_results() / "profile" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, profiled)
    print_training_profile(Console(), profiled)
    print(json.dumps(training_headline(profiled), allow_nan=False))


@app.command()
def latency(
    spec: Annotated[str, typer.Argument(help="a shipped latency spec's name or a TOML file")] = "embedded",
    shape: Annotated[str | None, typer.Option(help="a published shape with random weights, or a model's folder")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtypes, with commas between them")] = None,
    modes: Annotated[str | None, typer.Option(help="engine modes, with commas between them, or auto")] = None,
    nodes: Annotated[str | None, typer.Option(help="numbers of tree nodes, root included, for every grid")] = None,
    heads: Annotated[str | None, typer.Option(help="numbers of draft heads, for every grid")] = None,
    contexts: Annotated[str | None, typer.Option(help="context lengths in tokens, for every grid")] = None,
    batches: Annotated[str | None, typer.Option(help="batches, for every grid")] = None,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished run")] = None,
    results: Annotated[Path | None, typer.Option(help="where records go")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the points and their memory, run nothing")] = False,
    report: Annotated[Path | None, typer.Option(help="write this record's report again instead of measuring")] = None,
    readme: Annotated[Path | None, typer.Option(help="write the table of modes between this file's markers")] = None,
    hub: HubOption = False,
) -> None:
    """Time a step against nodes, heads, context and batch; compare the engine's modes and the speed against batch."""
    if report is not None:
        _finish_latency(report, readme=readme)
        return
    from harness.latency_specs import load_latency_spec, overridden
    from harness.record_latency import LatencyOptions, print_latency_plan, run_latency

    file = _find_data(spec if spec.endswith(".toml") else spec.removeprefix(_LATENCY), folder=None, prefix=_LATENCY)
    changes = {"num_nodes": nodes, "num_heads": heads, "context_tokens": contexts, "batch": batches}
    wanted = overridden(load_latency_spec(file), shape=shape, dtypes=dtype, modes=modes, **changes)
    if dry_run:
        print(json.dumps({"latency": wanted.name, **print_latency_plan(wanted, console=Console())}))
        return
    options = LatencyOptions(results=results or default_results(), resume=resume, allow_hub=hub, command=_command())
    _finish_latency(run_latency(wanted, spec_file=file, options=options, console=console), readme=readme)


@app.command()
def sweep(
    suite: Annotated[str, typer.Argument(help="a shipped sweep's name or a TOML file")] = "embedded",
    replay_only: Annotated[bool, typer.Option("--replay-only", help="leave out all points that the device would have to run")] = False,
    resume: Annotated[Path | None, typer.Option(help="the folder of an unfinished sweep")] = None,
    results: Annotated[Path | None, typer.Option(help="where records go, and latency records are found")] = None,
    claims: Annotated[Path | None, typer.Option(help="a claims file of your own")] = None,
    report: Annotated[Path | None, typer.Option(help="write this record's report and figures again instead of sweeping")] = None,
    readme: Annotated[Path | None, typer.Option(help="write the table of devices between this file's markers")] = None,
    executor: Annotated[str, typer.Option(help="where points are run: local, or ray (a cluster)")] = "local",
    address: Annotated[str | None, typer.Option(help="the Ray cluster: auto (the default), local or HOST:PORT")] = None,
    hub: HubOption = False,
) -> None:
    """Compose trees x heads x devices from a trace and step times; run sampled points and check some composed ones."""
    if executor not in ("local", "ray") or (executor == "local" and address is not None):
        found = f"--executor {executor}" + (f" --address {address}" if address is not None else "")
        raise UserError(found=found, need="local, or ray with or without an address", where="the command line")
    registry = load_claims(claims)
    if report is not None:
        _finish_sweep(report, claims=registry, readme=readme)
        return
    from harness.record_sweep import SweepOptions, run_sweep
    from harness.sweep_specs import load_sweep

    file = _find_data(suite if suite.endswith(".toml") else suite.removeprefix(_SWEEP), folder=None, prefix=_SWEEP)
    options = SweepOptions(
        results=results or default_results(),
        resume=resume,
        replay_only=replay_only,
        cache=cache_dir() / "trees",
        allow_hub=hub,
        command=_command(address=address),
    )
    spec = load_sweep(file)
    if executor == "local":
        folder = run_sweep(spec, spec_file=file, options=options, console=console)
    else:
        from harness.ray_executor import RayExecutor

        with RayExecutor(address or "auto") as cluster:
            folder = run_sweep(spec, spec_file=file, options=options, console=console, executor=cluster)
    _finish_sweep(folder, claims=registry, readme=readme)


@app.command("search-tree")
def search_tree(
    calibration: Annotated[Path | None, typer.Argument(help="the trace (.npz) to grow trees on; the embedded one by default")] = None,
    num_nodes: Annotated[int, typer.Option(help="nodes, root included; with --device at most so many", min=2)] = 64,
    values: Annotated[str, typer.Option(help="joint (hits of whole paths) or marginals (the paper's)")] = "joint",
    check: Annotated[Path | None, typer.Option(help="a second trace to replay the trees on")] = None,
    out: Annotated[Path | None, typer.Option(help="write the tree as JSON")] = None,
    device: Annotated[str | None, typer.Option(help="the fastest tree there: a device of hardware.toml, or a latency record")] = None,
    shape: Annotated[str, typer.Option(help="the model's published shape, for --device")] = "smollm2-135m-instruct",
    dtype: Annotated[str | None, typer.Option(help="one dtype of --device")] = None,
) -> None:
    """Grow the best tree on a trace, or the fastest one on a device, and print what it promises and what it yields."""
    from harness.search import print_device_search, print_search

    if values not in ("joint", "marginals"):
        raise UserError(found=f"--values {values}", need="joint or marginals", where="the command line")
    trace_file = calibration or resolve_path("embedded/calibration.npz", beside=None)
    if device is None:
        tree = print_search(trace_file, num_nodes=num_nodes, values=values, check=check, console=console)
        text = tree.to_json(provenance={"values": values, "num_nodes": num_nodes})
    else:
        choice = print_device_search(
            trace_file,
            device=device,
            shape=shape,
            dtype=dtype,
            max_nodes=num_nodes,
            check=check,
            results=default_results(),
            cache=cache_dir() / "trees",
            console=console,
        )
        text = choice.tree().to_json(provenance={"device": device, "shape": shape, "method": choice.method, "step_s": choice.step_s})
    if out is not None:
        write_bytes(out, (text + "\n").encode())
    print(text)


@app.command()
def doctor() -> None:
    """Say whether this machine is fit to measure on."""
    from harness.doctor import examine

    table = Table("", "what", "found", "advice")
    for line in examine():
        table.add_row("ok" if line.fine else "!", line.name, line.found, "" if line.fine else line.advice)
    Console().print(table)


@app.command()
def validate(record: Annotated[Path, typer.Argument(help="a record folder")]) -> None:
    """Check every file of a record: schema, seal, counts."""
    faults = validate_record(record)
    for fault in faults:
        console.print(fault, markup=False)
    print(json.dumps({"record": record.name, "valid": not faults, "num_faults": len(faults)}))
    if faults:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


@app.command("export")
def export_command(
    record: Annotated[str, typer.Argument(help="a record folder or a suite's name")],
    target: Annotated[Path, typer.Argument(help="a .csv or .parquet file")],
    steps: Annotated[bool, typer.Option("--steps", help="one row a step instead of one a trial")] = False,
) -> None:
    """Write a record as one flat table for pandas."""
    export(RunRecord(find_record(record)), target, table="steps" if steps else "generations")


@app.command()
def schemas(folder: Annotated[Path, typer.Argument(help="where to write them")]) -> None:
    """Write the JSON schemas of all record files."""
    for path in write_schemas(folder):
        console.print(path.name)


def find_suite(text: str) -> tuple[SuiteSpec, Path]:
    """Return a suite and its file, by path or by the name of a shipped one."""
    path = _find_data(text, folder=None)
    return load_suite(path), path


def find_record(text: str) -> Path:
    """Return a record folder: as given, or the newest sealed one of a suite in the results folder."""
    if Path(text).is_dir():
        return Path(text)
    sealed = sorted((default_results() / text).glob("*/*/manifest.json"), key=lambda path: path.parent.name)
    if not sealed:
        raise UserError(found=f"no record {text!r}", need="a record folder or a suite with a finished run", where="results")
    return sealed[-1].parent


def _find_data(text: str, *, folder: str | None, prefix: str = "", kind: Literal["suite", "ablation"] = "suite") -> Path:
    """Return a data file by path or by name; names in the suites' own folder leave out `prefix`, which tells kinds of data apart.

    Ablations are told by `_training` in their names.
    """
    if Path(text).suffix == ".toml":
        if Path(text).is_file():
            return Path(text)
        raise UserError(found=f"no file {text}", need="a TOML file", where="the command line")
    suites = shipped()
    home = suites / folder if folder else suites
    stems = [found.stem for found in home.glob("*.toml") if found.stem not in _NOT_SUITES]
    if folder is None:
        stems = [stem for stem in stems if next((other for other in (_LATENCY, _SWEEP) if stem.startswith(other)), "") == prefix]
        stems = [stem for stem in stems if (_ABLATION in stem) == (kind == "ablation")]
    names = sorted(stem.removeprefix(prefix) for stem in stems)
    if text not in names:
        raise UserError(found=f"no {text!r}", need=f"one of {names} or a TOML file", where=f"the shipped {home.name}")
    return home / f"{prefix}{text}.toml"


def _finish(record: RunRecord, judgement: Judgement, *, readme: Path | None) -> None:
    """Write report and README tables, print the verdicts, end with one JSON line and the run's exit code."""
    write_bytes(record.folder / "report.md", render_report(record, judgement).encode())
    print_verdicts(Console(), judgement)
    print(json.dumps(headline(judgement, record), allow_nan=False))
    if readme is not None:
        update_readme(readme, record, judgement)
    if not judgement.valid or record.failures:
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def _finish_latency(folder: Path, *, readme: Path | None) -> None:
    """Write a latency record's report and README table, print its step costs, end with one JSON line."""
    from harness.latency import LatencyRecord
    from harness.report.latency import latency_headline, print_latency, render_latency_report
    from harness.report.readme import update_modes

    record = LatencyRecord(folder)
    write_bytes(folder / "report.md", render_latency_report(record).encode())
    print_latency(Console(), record)
    if readme is not None:
        update_modes(readme, record)
    print(json.dumps(latency_headline(record), allow_nan=False))


def _draw_steps(log: Path) -> Path | None:
    """Draw a joint training's log beside it; where that cannot be, say so."""
    from harness.report.training_curves import CURVES_FILE, draw_step_log

    picture = log.with_name(CURVES_FILE)
    try:
        draw_step_log(log, picture)
    except UserError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
        return None
    return picture


def _finish_ablation(folder: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Write an ablation's picture, report and README table, print its arms and verdicts, end with one JSON line."""
    from harness.ablation import AblationRecord, newest_ablations
    from harness.ablation_figures import ablation_rows
    from harness.claim_training import decided_elsewhere, training_verdicts
    from harness.report.ablation import CURVES_FILE, ablation_headline, print_ablation, render_ablation, update_ablation
    from harness.report.ablation_curves import draw_curves

    record = AblationRecord(folder)
    rows, verdicts = ablation_rows(record), training_verdicts(claims, record)
    try:
        draw_curves(record, folder / CURVES_FILE)
    except UserError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False, soft_wrap=True)
    text = render_ablation(record, rows, verdicts, has_curves=(folder / CURVES_FILE).exists())
    write_bytes(folder / "report.md", text.encode())
    print_ablation(Console(), rows, verdicts)
    if readme is not None:
        elsewhere = decided_elsewhere(claims, record, newest_ablations(folder.resolve().parents[2]))
        update_ablation(readme, record, rows, verdicts, elsewhere=elsewhere)
    print(json.dumps(ablation_headline(record, rows, verdicts), allow_nan=False))


def _finish_sweep(folder: Path, *, claims: Sequence[ClaimSpec], readme: Path | None) -> None:
    """Write a sweep's figures, report and README table, print its devices, end with one JSON line; a failed run cell is exit code 2."""
    from harness.report.figures import draw_figures
    from harness.report.readme import update_sweep
    from harness.report.sweep import print_sweep, render_sweep_report, sweep_headline
    from harness.sweep_record import SweepRecord

    record = SweepRecord(folder)
    try:
        draw_figures(record, folder / "figures")
    except UserError as error:
        console.print(f"no figures: {error}", highlight=False, markup=False, soft_wrap=True)
    names = [f"figures/{path.name}" for path in sorted((folder / "figures").glob("*.svg"))]
    write_bytes(folder / "report.md", render_sweep_report(record, claims=claims, figures=names).encode())
    print_sweep(Console(), record)
    if readme is not None:
        update_sweep(readme, record, figures=names)
    print(json.dumps(sweep_headline(record, claims=claims), allow_nan=False))
    if any(not failed.key.startswith("curve ") for failed in record.failed):
        raise typer.Exit(ExitCode.INVALID_MEASUREMENT)


def _command(*, address: str | None = None) -> str:
    """Return the command as it would be typed, with file names instead of paths and without a cluster's address."""
    words = sys.argv[1:]
    if address not in (None, "auto", "local"):
        words = [word.replace(address, "HOST:PORT") for word in words]
    return shlex.join(["medusa-repro", *map(_without_folders, words)])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if os.sep in value else value)


def main() -> None:
    """Run the command line and exit with the project's codes."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _print_error("error", str(error))
        code = ExitCode.USER_ERROR
    except InvalidMeasurement as error:
        _print_error("invalid measurement", str(error))
        code = ExitCode.INVALID_MEASUREMENT
    except OSError as error:
        _print_error("error", _disk_message(error))
        code = ExitCode.USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except Exception as error:
        code = _usage_code(error)
    if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        console.print("interrupted: what was measured is on disk; the same command resumes", soft_wrap=True)
    sys.exit(int(code or 0))


def _print_error(kind: str, message: str) -> None:
    """Print one line; what a user typed may look like markup and is shown as it is."""
    console.print(f"[red]{kind}:[/red] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)


def _disk_message(error: OSError) -> str:
    name = Path(str(error.filename)).name if error.filename else "a file"
    return f"found {error.strerror or error} at {name}; need a writable place with room; what was measured before is on disk"


def _usage_code(error: Exception) -> int:
    """Return the exit code of a usage error that typer raised; anything else is a defect and goes on with its traceback."""
    show, exit_code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or exit_code is None:
        raise error
    show()
    return ExitCode.USER_ERROR


if __name__ == "__main__":
    main()
