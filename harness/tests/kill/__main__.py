"""`nox -s kill`: kill -9 of commands where they write and anywhere, then the same command again: sealed,
valid, nothing measured lost.

The exit code is 0 where all of it held. A run that was cut off goes on from the same folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from harness.tests.forks import keep_apart, warm_up
from harness.tests.fuzz.prover import nice, wanted


def main() -> int:
    """Kill, print what did not hold and a table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s kill --", description=__doc__)
    parser.add_argument("--limit", type=int, default=24, help="kills of each command (default 24)")
    parser.add_argument("--job", action="append", help="only this command")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other kills")
    parser.add_argument("--out", type=Path, default=Path(".nox/kill"), help="folder of what did not hold")
    asked = parser.parse_args()
    nice()
    warm_up()
    from harness.tests.kill.jobs import JOBS, build
    from harness.tests.kill.prover import HOWS, Prover, steady

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, steady():
        keep_apart(Path(folder))
        build(Path(folder, "inputs"))
        prover = Prover(Path(folder, "inputs"), asked.out.resolve(), seed=asked.seed)
        num: Counter[tuple[str, str]] = Counter()
        bad: Counter[tuple[str, str]] = Counter()
        missed = 0  # the command had ended before its time had come
        for kill in prover.run(wanted(asked.job, JOBS), limit=asked.limit):
            num[kill.job, kill.how] += kill.struck
            missed += not kill.struck
            bad[kill.job, kill.how] += bool(kill.faults)
            for fault in kill.faults:
                print(f"{kill.job}-{kill.number}, {kill.how} {kill.at:.4g}: {fault}", flush=True)
    for job in sorted({job for job, _ in num}):
        print(f"{job}: " + ", ".join(f"{how} {num[job, how]}/{bad[job, how]}" for how in HOWS))
    minutes = (time.monotonic() - started) / 60
    print(
        f"{num.total()} kills, {bad.total()} with faults, {missed} that came too late, {minutes:.1f} minutes"
    )
    return int(bad.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
