"""A part's own process: `python -m harness.measure.gpu.child PARENT WHAT ..`.

It ends with the process that started it, be that killed: else it would go on to hold the device and to write
into a record that the same command, run again, takes up. A part that is interrupted so leaves what Ctrl-C
leaves: a record that its own command resumes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from harness.errors import ExitCode, UserError

_LOOK_S, _GRACE_S = 0.5, 10.0


def end_with_parent(parent: int) -> None:
    """Interrupt this process as soon as its parent is gone, and end it where that does not."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_GRACE_S)
        os._exit(ExitCode.INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def main(words: list[str]) -> None:
    """Do what the words say: run a module with its arguments, or a part that has no command of its own."""
    parent, what, *rest = words
    # Where the command was started in the background of a script, interrupts are ignored, and children would
    # ignore them, too: a part could only be killed then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent(int(parent))
    if what == "module":
        _run_module(rest[0], rest[1:])
        return
    try:
        _do(what, rest)
    except KeyboardInterrupt:  # its time is up, or its parent gone: both are said elsewhere
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if not isinstance(error, UserError | MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split()) or 'found too little memory'}\n")
        sys.exit(ExitCode.USER_ERROR)


def _do(what: str, rest: list[str]) -> None:
    if what == "origin":
        print(json.dumps(_origin(command=rest[0])))
    elif what == "limits":
        _measure_limits(Path(rest[0]), dtypes=rest[1:])
    elif what == "rates":
        from harness.measure.gpu.rates import measure_rates

        target, recipe, corpus_s, num_steps, command = rest
        measure_rates(
            Path(target),
            recipe=Path(recipe),
            corpus_s=float(corpus_s),
            num_steps=int(num_steps),
            command=command,
        )


def _run_module(name: str, arguments: list[str]) -> None:
    """Run a module as `python -m` does."""
    if importlib.util.find_spec(name) is None:  # such as pytest on a machine that only measures
        sys.stderr.write(
            f"error: found no package {name}; need it for this part; to mend it: install {name}\n"
        )
        sys.exit(3)
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _origin(*, command: str) -> dict[str, object]:
    """Return where a record comes from that is begun now: the device is asked here, and only here."""
    from harness.device.engine import best_device
    from harness.device.machine import origin
    from harness.records.provenance import Provenance

    return Provenance(**origin(best_device(), command=command)).model_dump(mode="json")


def _measure_limits(target: Path, *, dtypes: list[str]) -> None:
    """Write what the device can do in each dtype, one file each."""
    import torch
    from rich.console import Console

    from harness.device.clock import device_clock
    from harness.device.doctor import require_own_gpu
    from harness.device.engine import best_device
    from harness.device.limits import measure_device_limits
    from harness.device.locks import device_turns
    from harness.files import write_json
    from harness.records.gpu.record import limits_of

    require_own_gpu()
    device = best_device()
    held = device_turns(device, console=Console(stderr=True))
    for dtype in dtypes:
        with held():
            limits = measure_device_limits(device, getattr(torch, dtype), clock=device_clock(device))
        write_json(target / limits_of(dtype), limits)


if __name__ == "__main__":
    main(sys.argv[1:])
