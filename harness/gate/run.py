"""Is the engine of one git worktree slower than that of another?

    python -m harness.gate.run BASE HEAD          two folders, each a checkout of this project

Two processes, one a version, load the same model. For each prompt and each number of tree nodes they decode
in turns, base head head base, and the next prompt begins with the other one: what drifts on the machine falls
on both alike. A generation's figure is the lower quartile of its step times: what disturbs a machine makes
steps longer, never shorter. The ratio of the totals over prompts, head over base, has an interval from a
bootstrap over prompts. The engine is slower where that interval lies wholly above 1 + margin, for any number
of nodes, and not slower where it lies wholly below. Where other processes used more than a share of the cores
in too many turns, neither is said: on a busy machine such intervals once took one version for two.

Exit codes: 0 not slower, 1 slower, 2 neither can be said, or the texts differ; 3 user error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

import harness.measure.turns
from harness.errors import ExitCode, UserError
from harness.files import Frozen, write_json
from harness.measure.turns import Ready, Request, Turn, Wanted
from harness.paths import shipped
from harness.specs.suite import IntervalSpec
from harness.stats import Interval, bootstrap_ratio

SideName = Literal["base", "head"]
Outcome = Literal["slower", "not slower", "inconclusive"]
Ask = Callable[[SideName, Request], Turn]
_LEAST_PROMPTS = 8
_QUANTILE = 0.25
_DISTURBED_TURNS = 0.1  # the share of turns that others may have disturbed


class TurnTaken(Turn):
    """One turn as it was taken: which side, prompt and size."""

    side: SideName
    prompt: int
    num_nodes: int


class Comparison(Frozen):
    """All turns of a comparison, for a closer look."""

    turns: tuple[TurnTaken, ...]


@dataclass(frozen=True)
class Compared:
    """Step times of one number of nodes, head over base."""

    num_nodes: int
    ratio: Interval
    outcome: Outcome


@dataclass(frozen=True)
class Side:
    """One version's process, loaded and waiting for turns."""

    name: SideName
    ready: Ready
    process: subprocess.Popen[str]

    def ask(self, request: Request) -> Turn:
        """Return one turn. Raises: UserError where the process ended."""
        return Turn.model_validate_json(_exchange(self.process, request.model_dump_json(), name=self.name))


def order_of(prompt: int) -> tuple[SideName, ...]:
    """Return the four turns of a prompt: base first on even prompts, head first on odd ones."""
    return ("base", "head", "head", "base") if prompt % 2 == 0 else ("head", "base", "base", "head")


def take_turns(ask: Ask, *, nodes: Sequence[int], num_prompts: int) -> Iterator[TurnTaken]:
    """Yield every turn of every prompt and number of nodes."""
    for prompt in range(num_prompts):
        for num_nodes in nodes:
            request = Request(prompt=prompt, num_nodes=num_nodes)
            for side in order_of(prompt):
                turn = ask(side, request)
                yield TurnTaken(**turn.model_dump(), side=side, prompt=prompt, num_nodes=num_nodes)


def compare(
    turns: Sequence[TurnTaken], *, margin: float, interval: IntervalSpec | None = None
) -> tuple[Compared, ...]:
    """Return head over base for each number of nodes, from the lower quartile of each generation's steps.

    Raises: ValueError where a side lacks a prompt that the other has.
    """
    spec, compared = interval or IntervalSpec(), []
    for num_nodes in sorted({turn.num_nodes for turn in turns}):
        totals: dict[SideName, list[float]] = {"base": [], "head": []}
        for prompt in sorted({turn.prompt for turn in turns}):
            for side, column in totals.items():
                of_side = [
                    float(np.quantile(turn.step_s, _QUANTILE))
                    for turn in turns
                    if (turn.num_nodes, turn.prompt, turn.side) == (num_nodes, prompt, side) and turn.step_s
                ]
                if len(of_side) != 2:
                    raise ValueError(f"found {len(of_side)} turns of {side} on prompt {prompt}, need 2")
                column.append(sum(of_side))
        ratio = bootstrap_ratio(
            totals["head"], totals["base"], spec=spec, rng=np.random.default_rng(spec.seed)
        )
        compared.append(Compared(num_nodes, ratio, outcome_of(ratio, margin=margin)))
    return tuple(compared)


def outcome_of(ratio: Interval, *, margin: float) -> Outcome:
    """Return what an interval of head over base says of a slowdown by more than the margin."""
    if ratio.low > 1 + margin:
        return "slower"
    return "not slower" if ratio.high <= 1 + margin else "inconclusive"


def disturbed_share(turns: Sequence[TurnTaken], *, others: float) -> float:
    """Return the share of turns in which other processes used more than `others` of all cores' time."""
    return sum(turn.others_share > others for turn in turns) / len(turns)


def undecided(compared: Sequence[Compared]) -> tuple[Compared, ...]:
    """Return the same ratios without what they say."""
    return tuple(replace(one, outcome="inconclusive") for one in compared)


def differing_texts(turns: Sequence[TurnTaken]) -> int:
    """Return on how many prompts and sizes the two sides decoded other tokens."""
    texts: dict[tuple[int, int], set[str]] = {}
    for turn in turns:
        texts.setdefault((turn.prompt, turn.num_nodes), set()).add(turn.text_sha256)
    return sum(len(found) > 1 for found in texts.values())


def exit_code(compared: Sequence[Compared], *, num_differing: int) -> ExitCode:
    """Return what the comparison says to a shell."""
    if any(one.outcome == "slower" for one in compared):
        return ExitCode.GATE_REGRESSION
    if num_differing or any(one.outcome == "inconclusive" for one in compared):
        return ExitCode.INVALID_MEASUREMENT
    return ExitCode.OK


@contextlib.contextmanager
def started(folders: Mapping[SideName, Path], wanted: Wanted) -> Iterator[dict[SideName, Side]]:
    """Start both sides, and end them afterwards.

    Raises: UserError for a folder that is no checkout, a side that does not load, or one that runs other code
    than its folder's.
    """
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_process(name, folders[name], wanted)) for name in folders}
        sides: dict[SideName, Side] = {}
        for name, process in processes.items():
            ready = Ready.model_validate_json(_exchange(process, None, name=name))
            if Path(ready.code) != folders[name].resolve():
                raise UserError(
                    found=f"a {name} that runs the code of another folder",
                    need="its own",
                    where=folders[name].name,
                    do="name the root of a checkout",
                )
            sides[name] = Side(name, ready, process)
        yield sides


@contextlib.contextmanager
def _process(name: SideName, folder: Path, wanted: Wanted) -> Iterator[subprocess.Popen[str]]:
    if not (folder / "harness" / "device" / "arms.py").is_file():
        raise UserError(
            found=f"no checkout of this project as {name}",
            need="a folder with harness/ and medusa_impl/",
            where=folder.name,
            do="name the root of a git worktree",
        )
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(harness.measure.turns.__file__)), wanted.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.resolve())},  # before what the environment has installed
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _exchange(process: subprocess.Popen[str], request: str | None, *, name: str) -> str:
    """Send a request, where there is one, and return the answer's line."""
    assert process.stdin is not None and process.stdout is not None
    line = ""
    with contextlib.suppress(BrokenPipeError):
        if request is not None:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        raise UserError(
            found=f"the {name} ended without an answer",
            need="a version that decodes the suite",
            where="its process, whose own words stand above",
        )
    return line


def run(arguments: argparse.Namespace) -> ExitCode:
    """Compare two worktrees as the command line says; print one line a size and one of JSON.

    Raises: UserError as `started` does, and for a suite with too few prompts.
    """
    if arguments.prompts < _LEAST_PROMPTS:
        raise UserError(
            found=f"{arguments.prompts} prompts",
            need=f"at least {_LEAST_PROMPTS}: an interval over fewer holds everything",
            where="--prompts",
        )
    wanted = Wanted(
        suite=str(arguments.suite.absolute()),
        num_prompts=arguments.prompts,
        max_new_tokens=arguments.tokens,
        nodes=tuple(int(word) for word in arguments.nodes.split(",")),
    )
    turns: list[TurnTaken] = []
    with started({"base": arguments.base, "head": arguments.head}, wanted) as sides:
        ready = {name: side.ready for name, side in sides.items()}
        if (found := min(one.num_prompts for one in ready.values())) < wanted.num_prompts:
            raise UserError(
                found=f"{found} prompts",
                need=f"{wanted.num_prompts}",
                where=arguments.suite.name,
                do="ask for fewer",
            )
        for turn in take_turns(
            lambda side, request: sides[side].ask(request), nodes=wanted.nodes, num_prompts=found
        ):
            turns.append(turn)
            if len(turns) % (4 * len(wanted.nodes)) == 0:
                print(f"{turn.prompt + 1} of {found} prompts", file=sys.stderr)
    compared, num_differing = compare(turns, margin=arguments.margin), differing_texts(turns)
    disturbed = disturbed_share(turns, others=arguments.others)
    if disturbed > _DISTURBED_TURNS:
        compared = undecided(compared)
    _tell(
        compared,
        ready,
        num_differing=num_differing,
        margin=arguments.margin,
        num_prompts=found,
        disturbed=disturbed,
    )
    if arguments.out is not None:
        write_json(arguments.out, Comparison(turns=tuple(turns)))
    return exit_code(compared, num_differing=num_differing)


def _tell(
    compared: Sequence[Compared],
    ready: Mapping[SideName, Ready],
    *,
    num_differing: int,
    margin: float,
    num_prompts: int,
    disturbed: float,
) -> None:
    for one in compared:
        bounds = f"[{one.ratio.low:.4f}, {one.ratio.high:.4f}]"
        print(f"{one.num_nodes} nodes: head takes {one.ratio.estimate:.4f} {bounds} of base: {one.outcome}")
    if num_differing:
        print(f"texts differ on {num_differing} of {num_prompts * len(compared)} prompts and sizes")
    if disturbed > _DISTURBED_TURNS:
        print(f"other processes disturbed {100 * disturbed:.0f} % of the turns: run it on a quiet machine")
    told = {
        "commits": {name: one.commit for name, one in ready.items()},
        "modes": {name: one.mode for name, one in ready.items()},
        "device": ready["base"].device,
        "dtype": ready["base"].dtype,
        "margin": margin,
        "num_prompts": num_prompts,
        "texts_differ": num_differing,
        "disturbed": disturbed,
        "nodes": {
            one.num_nodes: {
                **one.ratio.model_dump(include={"estimate", "low", "high"}),
                "outcome": one.outcome,
            }
            for one in compared
        },
    }
    print(json.dumps(told))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's words."""
    parser = argparse.ArgumentParser(prog="python -m harness.gate.run", description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, help="worktree of the version before")
    parser.add_argument("head", type=Path, help="worktree of the version after")
    parser.add_argument(
        "--suite", type=Path, default=shipped("embedded.toml"), help="whose model and prompts"
    )
    parser.add_argument("--prompts", type=int, default=_LEAST_PROMPTS, help="how many prompts are decoded")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each generation")
    parser.add_argument("--nodes", default="1,8,64", help="tree nodes, root included, with commas")
    parser.add_argument("--margin", type=float, default=0.01, help="a slowdown by this share does not count")
    parser.add_argument(
        "--others", type=float, default=0.1, help="share of all cores that others may use in a turn"
    )
    parser.add_argument("--out", type=Path, help="JSON file for all turns")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        return run(parsed(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
