"""Run the command line: `python -m harness` is `medusa-repro`."""

from harness.cli.app import main

main()
