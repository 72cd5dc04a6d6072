"""`nox -s noise`: runs of a suite next to a neighbour that takes a core in bursts or all the time.

A quiet run goes first and another one last. Each in between has to give speeds whose intervals hold the quiet
ones, or withhold its speeds and say why. The exit code is 0 where all did, and 2 where the two quiet runs
disagree. What was cut off goes on from the same folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.tests.noise.trial import is_fit, misses, plan, rendered, run_one, saved, taken_up


def main() -> int:
    """Run the trial, print its table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s noise --", description=__doc__)
    parser.add_argument("--suite", default="noise", help="which suite is run (default noise)")
    parser.add_argument("--bursts", type=int, default=10, help="runs next to bursts (default 10)")
    parser.add_argument("--steady", type=int, default=5, help="runs next to steady load (default 5)")
    parser.add_argument("--minutes", type=float, default=3.0, help="time budget of a run (default 3)")
    parser.add_argument("--out", type=Path, default=Path(".nox/noise"), help="folder of records and results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "runs.jsonl"
    runs = taken_up(file)
    for wanted in plan(num_bursts=asked.bursts, num_steady=asked.steady)[len(runs) :]:
        runs.append(run_one(wanted, asked.suite, results=asked.out, minutes=asked.minutes))
        saved(file, runs)
        print(f"{wanted.load} {wanted.seed}: {'; '.join(misses(runs[-1], runs[0])) or 'holds'}", flush=True)
    text = rendered(runs)
    (asked.out / "trial.md").write_text(text, encoding="utf-8")
    print(text)
    if not is_fit(runs[0], runs[-1]):
        return 2
    return int(any(misses(run, runs[0]) for run in runs[1:]))


if __name__ == "__main__":
    sys.exit(main())
