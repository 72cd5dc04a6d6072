"""Run the command line: `python -m harness` is `medusa-repro`."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command line and run it; Ctrl-C while it is imported is as quiet as later."""
    try:
        from harness.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: nothing was begun\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
