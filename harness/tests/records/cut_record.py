"""Cut a committed record down to a few lines, as a fixture of its version.

    python -m harness.tests.records.cut_record RECORD TARGET

Data are cut as they lie on disk, past all models, so that a fixture keeps its version for good; the seal is
made anew. `fixtures/v1/` was cut, at version 1 of all files, from

    suite              results/embedded/cpu-amd-epyc-2c/20261125T202908Z-e4ce6458
    latency            results/latency/embedded/cpu-amd-epyc-2c/20261123T182039Z-65181af9
    sweep              results/sweep/embedded/cpu-amd-epyc-2c/20261123T191353Z-381fd0e6
    ablation           results/embedded_training_quick/cpu-amd-epyc-2c/20261123T222817Z-ca4ed959
    gpu                medusa-repro gpu --device cpu, at bc3d0a5a
    gate               medusa-repro gate smoke --base HEAD --minutes 3 --results ../../gfix, at 50c6ced
    step_profile.json, training_profile.json    results/profile/ embedded- and training-embedded_medusa1-
    trace.npz          results/embedded_full/trace-mt-bench-80.npz
"""

from __future__ import annotations

import io
import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from harness.files import file_sha256
from harness.records.folder import kind_of

NUM_PROMPTS = 2
RUN_ARMS = ("vanilla", "optimised", "vanilla_tuned", "medusa2_optimised", "vanilla_sampled", "typical")
ABLATION_ARMS = ("start", "medusa1", "ramped")
NODES, BATCHES, CONTEXTS = (1, 8, 64), (1, 2), (256,)
NUM_TREES, NUM_STEPS = 12, 4
UNSEALED = ("manifest.json", "report.md", "curves.png")

Data = dict[str, Any]


def cut_run(source: Path, target: Path) -> Data:
    spec = tomllib.loads((source / "suite.toml").read_text())
    spec["arms"] = [arm for arm in spec["arms"] if arm["name"] in RUN_ARMS]
    (target / "suite.toml").write_text(tomli_w.dumps(spec))
    lines = read_lines(source / "generations.jsonl")
    prompts = list(dict.fromkeys(line["trial"]["prompt_key"] for line in lines))[:NUM_PROMPTS]
    kept = [line for line in lines if of_run(line["trial"], prompts)]
    write_lines(target / "generations.jsonl", kept)
    trees, likelihoods = read(source / "trees.json"), read(source / "likelihoods.json")
    trees["trees"] = {name: tree for name, tree in trees["trees"].items() if name in RUN_ARMS}
    likelihoods["rows"] = [row for row in likelihoods["rows"] if of_run(row["trial"], prompts)]
    costs, profile = read(source / "step_costs.json"), read(source / "profile.json")
    costs["costs"] = [
        {**cost, **{name: cost[name][:NUM_STEPS] for name in ("backbone_s", "step_s")}}
        for cost in costs["costs"]
        if cost["num_nodes"] in NODES and cost["arm"] in (None, *RUN_ARMS)
    ]
    profile["rows"] = [row for row in profile["rows"] if row["arm"] in RUN_ARMS]
    for name, data in (
        ("trees", trees),
        ("likelihoods", likelihoods),
        ("step_costs", costs),
        ("profile", profile),
    ):
        write(target / f"{name}.json", data)
    steps = read_lines(source / "arm_steps.jsonl")
    write_lines(target / "arm_steps.jsonl", [line for line in steps if line["arm"] in RUN_ARMS][:NUM_STEPS])
    copy(source, target, "environment.json", "device_limits.json")
    copy(source, target, "heads_control.json", "heads_control-tuned.json")
    for name in ("trace.npz", "trace-tuned.npz", "calibration.npz", "calibration-tuned.npz"):
        cut_trace(source / name, target / name)
    return {"num_planned": len(kept), "num_generations": len(kept), "num_failures": 0}


def of_run(trial: Data, prompts: Iterable[str]) -> bool:
    return trial["arm"] in RUN_ARMS and trial["prompt_key"] in prompts


def cut_latency(source: Path, target: Path) -> Data:
    copy(source, target, "spec.toml", "environment.json", "model.json")
    copy(source, target, *(path.name for path in source.glob("device_limits*.json")))
    points = [
        point
        for point in read_lines(source / "points.jsonl")
        if (point["num_nodes"] in NODES and point["batch"] in BATCHES and point["context_tokens"] in CONTEXTS)
    ]
    write_lines(target / "points.jsonl", points)
    modes, batches = read(source / "modes.json"), read(source / "batches.json")
    prompts = list(dict.fromkeys(trial["prompt_key"] for trial in modes["trials"]))[:NUM_PROMPTS]
    modes["trials"] = [trial for trial in modes["trials"] if trial["prompt_key"] in prompts]
    texts = list(dict.fromkeys(key for trial in batches["trials"] for key in trial["prompt_keys"]))
    batches["trials"] = [
        trial
        for trial in batches["trials"]
        if trial["batch"] in BATCHES and set(trial["prompt_keys"]) <= set(texts[:NUM_PROMPTS])
    ]
    write(target / "modes.json", modes)
    write(target / "batches.json", batches)
    skipped = sum(point.get("skipped") is not None for point in points)
    return {"num_planned": len(points), "num_measured": len(points) - skipped, "num_skipped": skipped}


def cut_sweep(source: Path, target: Path) -> Data:
    copy(source, target, "sweep.toml", "origin.json")
    trees, lines = read(source / "trees.json"), read_lines(source / "cells.jsonl")
    cells = one_of_each(lines)
    chosen = {one["tree"] for cell in cells for one in cell.get("chosen", ())}
    asked = {cell["tree"] for cell in cells if cell.get("tree") is not None}
    kept = sorted({*range(NUM_TREES), *chosen, *asked})
    index = {old: new for new, old in enumerate(kept)}
    for cell in cells:
        if cell["cell"] == "composed":
            columns = [place for place, tree in enumerate(cell["trees"]) if tree in index]
            for name in ("step_s", "tokens_per_s", "speedup", "speedup_low", "speedup_high"):
                cell[name] = [cell[name][place] for place in columns]
            cell["trees"] = [index[cell["trees"][place]] for place in columns]
            for one in cell["chosen"]:
                one["tree"] = index[one["tree"]]
        elif cell.get("tree") is not None:
            cell["tree"] = index[cell["tree"]]
        if "rows" in cell:
            cell["rows"] = cell["rows"][:NUM_PROMPTS]
    trees["trees"] = [trees["trees"][old] for old in kept]
    trees["calibrated"] = [trees["calibrated"][old] for old in kept]
    trees["rates"] = [
        {**rate, "tree": index[rate["tree"]]} for rate in trees["rates"] if rate["tree"] in index
    ]
    write(target / "trees.json", trees)
    write_lines(target / "cells.jsonl", cells)
    failed = sum(cell["cell"] == "failed" for cell in cells)
    points = sum(len(cell["trees"]) for cell in cells if cell["cell"] == "composed")
    return {
        "num_planned": len(cells),
        "num_done": len(cells) - failed,
        "num_failed": failed,
        "num_points": points,
    }


def one_of_each(cells: list[Data]) -> list[Data]:
    """Return the first cell of each kind: of composed ones by the curve's kind, of sampled ones by rule."""
    found: dict[tuple[str, str | None], Data] = {}
    decoded = next(cell["curve"]["fingerprint"] for cell in cells if cell["cell"] == "decoded")
    for cell in cells:
        kind = cell.get("curve", {}).get("kind") or cell.get("setting", {}).get("rule")
        if cell["cell"] == "composed" and kind == "measured" and cell["curve"]["fingerprint"] != decoded:
            continue  # the decoded point is drawn with the composed ones of its own curve
        found.setdefault((cell["cell"], kind), cell)
    return list(found.values())


def cut_ablation(source: Path, target: Path) -> Data:
    spec = tomllib.loads((source / "suite.toml").read_text())
    spec["arms"] = [arm for arm in spec["arms"] if arm["name"] in ABLATION_ARMS]
    spec["seeds"] = spec["seeds"][:1]
    (target / "suite.toml").write_text(tomli_w.dumps(spec))
    copy(source, target, "environment.json", "tree.json")
    lines = [
        line
        for line in read_lines(source / "arms.jsonl")
        if line["arm"] in ABLATION_ARMS and line["seed"] in (None, *spec["seeds"])
    ]
    for line in lines:
        for name in ("held_out", "references", "greedy", "heads"):
            line[name] = line[name][:NUM_PROMPTS]
        label = line["arm"] if line["seed"] is None else f"{line['arm']}-{line['seed']}"
        for name in (f"trace-{label}.npz", f"trace-original-text-{label}.npz"):
            if (source / name).exists():
                cut_trace(source / name, target / name)
        if (source / f"steps-{label}.jsonl").exists():
            write_lines(
                target / f"steps-{label}.jsonl", read_lines(source / f"steps-{label}.jsonl")[:NUM_STEPS]
            )
            line["num_steps"] = NUM_STEPS
    write_lines(target / "arms.jsonl", lines)
    return {"num_planned": len(lines), "num_arms": len(lines)}


def cut_trace(source: Path, target: Path) -> None:
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    header["prompts"] = header["prompts"][:NUM_PROMPTS]
    num_rows = sum(prompt["num_kept_tokens"] for prompt in header["prompts"])
    text = json.dumps(header, separators=(",", ":")).encode()
    buffer = io.BytesIO()
    cut = {name: array[:num_rows] for name, array in arrays.items()}
    np.savez_compressed(buffer, header=np.frombuffer(text, dtype=np.uint8), **cut)
    target.write_bytes(buffer.getvalue())


def cut_profile(source: Path, target: Path) -> None:
    data = read(source)
    for size in data.get("sizes", ()):
        size["parts_s"] = {part: times[:NUM_STEPS] for part, times in size["parts_s"].items()}
        for name, number in (("step_s", 1), ("unmarked_step_s", 1), ("kept_tokens", 2)):
            size[name] = size[name][: number * NUM_STEPS]
    if "sizes" in data:
        data["sizes"] = [size for size in data["sizes"] if len(size["tree"]["paths"]) in NODES]
    for stage in data.get("stages", ()):
        stage["step_s"] = stage["step_s"][:NUM_STEPS]
        for part in stage["parts"]:
            part["seconds"] = part["seconds"][:NUM_STEPS]
    write(target, data)


def copy_gpu(source: Path, target: Path) -> Data:
    """Take all of an acceptance in small form, which is short as it is."""
    copy(source, target, *sorted(path.name for path in source.iterdir() if path.name not in UNSEALED))
    return {}


def cut_gate(source: Path, target: Path) -> Data:
    """Keep every turn with its first steps: looks and findings name how many there were."""
    record = read(source / "gate.json")
    for turn in record["turns"]:
        turn["step_s"], turn["step_tokens"] = turn["step_s"][:NUM_STEPS], turn["step_tokens"][:NUM_STEPS]
        turn["parts_s"] = {part: times[:1] for part, times in turn["parts_s"].items()}
    write(target / "gate.json", record)
    copy(source, target, "bmf.json", "headline.json", "junit.xml")
    return {}


CUTS = {
    "suite": cut_run,
    "latency": cut_latency,
    "sweep": cut_sweep,
    "ablation": cut_ablation,
    "gpu": copy_gpu,
    "gate": cut_gate,
}


def cut(source: Path, target: Path) -> None:
    """Cut a record's folder, a profile or a trace."""
    if source.suffix == ".npz":
        cut_trace(source, target)
    elif source.is_file():
        cut_profile(source, target)
    else:
        target.mkdir(parents=True, exist_ok=True)
        counts = CUTS[kind_of(source)](source, target)
        hashes = {
            path.name: file_sha256(path) for path in sorted(target.iterdir()) if path.name not in UNSEALED
        }
        write(target / "manifest.json", {**read(source / "manifest.json"), **counts, "sha256": hashes})


def copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())


def read(path: Path) -> Data:
    data: Data = json.loads(path.read_text(encoding="utf-8"))
    return data


def read_lines(path: Path) -> list[Data]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, data: Data) -> None:
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


def write_lines(path: Path, lines: Iterable[Data]) -> None:
    path.write_text(
        "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
