"""`nox -s fuzz`: alter small files in ten ways, run the commands that read them, and tell what went wrong.

The exit code is 0 where nothing did. A run that was cut off goes on from the same folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from harness.tests.forks import keep_apart, warm_up
from harness.tests.fuzz.kinds import KINDS
from harness.tests.fuzz.mutations import MUTATIONS
from harness.tests.fuzz.prover import Prover, grouped, nice, table, wanted


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(prog="nox -s fuzz --", description=__doc__)
    parser.add_argument("--limit", type=int, default=40, help="cases that count of each pair (default 40)")
    parser.add_argument("--kind", action="append", help=f"only this kind of file: {', '.join(KINDS)}")
    parser.add_argument("--mutation", action="append", help=f"only this mutation: {', '.join(MUTATIONS)}")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases")
    parser.add_argument(
        "--out", type=Path, default=Path(".nox/fuzz"), help="folder for the cases and the failing inputs"
    )
    return parser.parse_args()


def main() -> int:
    """Run the cases, print the table and the faults, and return the exit code."""
    asked = arguments()
    nice()
    warm_up()
    from harness.tests.fuzz.world import build
    from harness.tests.tiny_suite import small_device_limits

    started = time.monotonic()
    # the benchmarks' prompts are not on every machine, and are not what is looked at here
    no_benchmarks = patch("harness.training.joint.check_overlap")
    with tempfile.TemporaryDirectory() as folder, small_device_limits(), no_benchmarks:
        keep_apart(Path(folder))
        world = Path(folder, "world")
        build(world)
        prover = Prover(world, asked.out.resolve(), seed=asked.seed)
        kinds, mutations = wanted(asked.kind, KINDS), wanted(asked.mutation, MUTATIONS)
        before = [wrong for kind in kinds for wrong in prover.baseline(kind)]
        for wrong in before:
            print(f"on whole files: {wrong}", flush=True)
        cases = []
        for case in prover.run(kinds, mutations, limit=asked.limit):
            cases.append(case)
            if case.fault:
                print(f"{case.label}: {case.fault}: {case.command}: {case.told[:160]}", flush=True)
    faults = len(before) + sum(bool(case.fault) for case in cases)
    counted = sum(not case.same for case in cases)
    print(f"\n{table(cases)}\n\n{grouped(cases)}\n")
    print(f"{counted} cases that count, {faults} faults, {(time.monotonic() - started) / 60:.1f} minutes")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
