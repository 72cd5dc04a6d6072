"""`nox -s mutate`: change the code that judges in one place at a time, and see whether a test notices.

The exit code is 0 where every drawn mutant is killed by a test, or stands in `equivalent.toml` with the
reason why no output can differ. A run that was cut off goes on from the same folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from harness.tests.fuzz.prover import nice, wanted
from harness.tests.mutate.draw import NUM_MUTANTS, NUM_OF_EACH_FILE, draw, targets
from harness.tests.mutate.prover import Prover, reasons, table


def main() -> int:
    """Try the mutants, print those that live and a table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s mutate --", description=__doc__)
    parser.add_argument("--limit", type=int, default=NUM_MUTANTS, help=f"mutants (default {NUM_MUTANTS})")
    parser.add_argument("--file", action="append", help="only mutants of this file")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other mutants")
    parser.add_argument("--out", type=Path, default=Path(".nox/mutate"), help="folder of what was tried")
    asked = parser.parse_args()
    nice()
    started = time.monotonic()
    drawn = draw(targets(), seed=asked.seed, num=asked.limit, of_each=NUM_OF_EACH_FILE)
    files = wanted(asked.file, targets())
    drawn = [mutant for mutant in drawn if mutant.file in files]
    known = {(one.file, one.before, one.after): one.reason for one in reasons()}
    excused = {one.name for one in drawn if (one.file, one.before, one.after) in known}
    tried = []
    with tempfile.TemporaryDirectory() as folder:
        prover = Prover(Path(folder), asked.out.resolve(), seed=asked.seed)
        try:
            for mutant, after in prover.run(drawn):
                tried.append((mutant, after))
                if not after.killed and mutant.name not in excused:
                    print(f"{mutant.where} lives\n  - {mutant.before}\n  + {mutant.after}", flush=True)
        finally:
            prover.close()
    for mutant, after in tried:
        if not after.killed and mutant.name in excused:
            print(f"{mutant.where}: {known[mutant.file, mutant.before, mutant.after]}")
    left = sum(not after.killed and one.name not in excused for one, after in tried)
    print(f"\n{table(tried, excused)}\n")
    print(f"{len(tried)} mutants, {left} left, {(time.monotonic() - started) / 60:.1f} minutes")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
