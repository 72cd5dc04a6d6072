"""Traces of greedy decoding, and the decoding of any tree replayed from them: arithmetic on a file, no model, no device.

A prompt's trace is the kept tokens y_1 .. y_n and, in row i and column k, the rank of y_{i+k} in draft head k read at the state that
produced y_i; -1 where i + k > n. Rank = number of tokens with a greater logit, or an equal logit and a lower id.

Replay of the tree {(), (0), (1), (0,0)} on n = 6 tokens, two heads:

    i   row i     longest path in the tree   hop
    1   ( 0, 0)   (0,0)                      3    y_2 y_3 y_4
    4   ( 5, 0)   ()                         1    y_5
    5   ( 1,-1)   (1)                        1    y_6: two would pass the end, y_6 is the last
    6   (-1,-1)                                   no step: y_6 is known

3 steps for n - 1 = 5 tokens. Exact in float32 but for rounding ties; half precision makes it an approximation.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from harness.errors import UserError
from harness.files import write_bytes
from medusa_impl.tree import DraftTree, RankPath

SCHEMA_VERSION = 1
EndedBy = Literal["eos", "budget"]
Ints = NDArray[np.int64]
HEAD_TIES_KEY, TEXT_TIES_KEY = "head_ties", "text_ties"


class TraceProvenance(BaseModel):
    """What a trace was recorded from: enough to refuse another model's heads and to say where a figure comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_hash: str = Field(description="hash of the backbone's tensors")
    heads_hash: str = Field(description="hash of the draft heads' tensors")
    dtype: str = Field(description="dtype of the forward pass, such as float32")
    max_new_tokens: int = Field(ge=1, description="token budget of every prompt, first token and end-of-sequence counted")
    versions: Mapping[str, str] = Field(default_factory=dict, description="library to version")
    extra: Mapping[str, JsonValue] = Field(default_factory=dict, description="anything else worth keeping: commit, device, prompt set")


class _PromptHeader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    category: str | None
    prompt_tokens: int
    ended_by: EndedBy
    num_kept_tokens: int = Field(ge=1)


class _TraceHeader(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    provenance: TraceProvenance
    prompts: tuple[_PromptHeader, ...]


@dataclass(frozen=True, eq=False)
class PromptTrace:
    """One prompt's kept tokens and how each draft head ranked them.

    Shapes: `tokens` [n]; `ranks` [n, K], -1 exactly where i + k > n; `gaps` [n], the backbone's top-two logit gap when it produced
    y_i; `nll` [n, K], head k's negative log-likelihood of y_{i+k} in nats, nan beyond the end.
    Raises: UserError on any other shape or content. Arrays are copied and made read-only.
    """

    key: str
    category: str | None
    prompt_tokens: int
    tokens: Ints
    ended_by: EndedBy
    ranks: NDArray[np.int32]
    gaps: NDArray[np.float32] | None = None
    nll: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        tokens, ranks = np.asarray(self.tokens), np.asarray(self.ranks)
        if tokens.ndim != 1 or not len(tokens) or not _is_integer(tokens):
            self._refuse(f"tokens of shape {tokens.shape} and type {tokens.dtype}", "at least one token id in one row")
        if ranks.ndim != 2 or len(ranks) != len(tokens) or not ranks.shape[1] or not _is_integer(ranks):
            self._refuse(f"ranks of shape {ranks.shape} and type {ranks.dtype}", f"whole numbers of shape ({len(tokens)}, heads)")
        beyond = np.arange(1, len(tokens) + 1)[:, None] + np.arange(1, ranks.shape[1] + 1) > len(tokens)
        if not np.array_equal(ranks < 0, beyond) or (ranks < -1).any():
            self._refuse("a rank where there is no token, or none where there is one", "-1 exactly where i + k > n")
        if self.prompt_tokens < 1 or self.ended_by not in ("eos", "budget"):
            self._refuse(f"{self.prompt_tokens} prompt tokens, ended by {self.ended_by!r}", "at least 1 prompt token, and eos or budget")
        for name, shape in (("gaps", tokens.shape), ("nll", ranks.shape)):
            if (array := getattr(self, name)) is not None and np.shape(array) != shape:
                self._refuse(f"{name} of shape {np.shape(array)}", f"shape {shape}")
        if self.nll is not None and not np.array_equal(np.isnan(self.nll), beyond):
            self._refuse("a likelihood that is no number, or one beyond the end", "nan exactly where i + k > n")
        for name, dtype in (("tokens", np.int64), ("ranks", np.int32), ("gaps", np.float32), ("nll", np.float32)):
            if (array := getattr(self, name)) is not None:
                copy = np.array(array, dtype=dtype)
                copy.setflags(write=False)
                object.__setattr__(self, name, copy)

    @property
    def num_kept_tokens(self) -> int:
        """n: the tokens kept, end-of-sequence included."""
        return len(self.tokens)

    @property
    def num_heads(self) -> int:
        """K: the draft heads that were read."""
        return int(self.ranks.shape[1])

    def _refuse(self, found: str, need: str) -> None:
        raise UserError(found=found, need=need, where=f"the trace of prompt {self.key!r}")


@dataclass(frozen=True, eq=False)
class Trace:
    """The traces of a set of prompts, all of one model, one set of heads and one budget.

    Raises: UserError if there is no prompt, a key occurs twice, prompts differ in heads or optional arrays, or one breaks the budget.
    """

    provenance: TraceProvenance
    prompts: tuple[PromptTrace, ...]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError(found="a trace without prompts", need="at least one prompt")
        budget = self.provenance.max_new_tokens
        kind = {(prompt.num_heads, prompt.gaps is None, prompt.nll is None) for prompt in self.prompts}
        if len(kind) > 1:
            raise UserError(found="prompts with different heads or optional arrays", need="the same for every prompt", where="the trace")
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.key in seen:
                raise UserError(found=f"prompt {prompt.key!r} twice", need="every prompt once", where="the trace")
            if prompt.num_kept_tokens > budget or (prompt.ended_by == "budget" and prompt.num_kept_tokens != budget):
                found = f"{prompt.num_kept_tokens} tokens ended by {prompt.ended_by} for prompt {prompt.key!r}"
                raise UserError(found=found, need=f"at most {budget} tokens, exactly as many where the budget ended it")
            seen.add(prompt.key)

    @property
    def num_heads(self) -> int:
        """K: the draft heads that were read."""
        return self.prompts[0].num_heads

    @property
    def num_positions(self) -> int:
        """The kept tokens of all prompts, the first of each included."""
        return sum(prompt.num_kept_tokens for prompt in self.prompts)

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """The rank rows of all prompts in order, [positions, K], as the tree search takes them."""
        return np.concatenate([prompt.ranks for prompt in self.prompts])

    def save(self, path: str | Path) -> None:
        """Write one .npz with a JSON header, first to a temporary file beside it.

        Raises: UserError if the file cannot be written; an older file of that name is then untouched.
        """
        prompts = self.prompts
        header = _TraceHeader(
            schema_version=1,
            provenance=self.provenance,
            prompts=tuple(
                _PromptHeader(
                    key=prompt.key,
                    category=prompt.category,
                    prompt_tokens=prompt.prompt_tokens,
                    ended_by=prompt.ended_by,
                    num_kept_tokens=prompt.num_kept_tokens,
                )
                for prompt in prompts
            ),
        )
        arrays: dict[str, NDArray[Any]] = {"header": np.frombuffer(header.model_dump_json().encode(), dtype=np.uint8)}
        for name in ("tokens", "ranks", "gaps", "nll"):
            if getattr(prompts[0], name) is not None:
                arrays[name] = np.concatenate([getattr(prompt, name) for prompt in prompts])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy types its keyword arrays as flags
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, buffer.getvalue())
        except OSError as error:
            raise UserError(
                found=f"a failed write ({error})", need="room and permission", where=str(path), do="free space there"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """The trace of a file that `save` wrote.

        Raises: UserError if the file is missing, truncated, corrupt, of another version, or breaks the rules of a trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = _TraceHeader.model_validate(json.loads(arrays.pop("header").tobytes()))
            return cls(provenance=header.provenance, prompts=tuple(_split(header.prompts, arrays)))
        except ValidationError as error:
            first = error.errors()[0]
            found = f"a header whose {'.'.join(map(str, first['loc']))} is wrong ({first['msg']})"
            raise UserError(found=found, need=f"a trace of schema version {SCHEMA_VERSION}", where=str(path)) from error
        except UserError as error:
            raise UserError(found=error.found, need=error.need, where=str(path)) from error
        except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            found = f"no readable trace ({type(error).__name__}: {error})"
            raise UserError(found=found, need="a whole .npz trace", where=str(path), do="record it again") from error


@dataclass(frozen=True, eq=False)
class Replay:
    """The decoding of one tree over a trace: raw counts a step and a prompt; ratios are formed from them once.

    Shapes: P prompts, S steps of all prompts in order. `num_kept_tokens`, `num_steps` [P]; `positions`, `acceptance_lengths` [S].
    A step at position i starts when y_i is the last known token; its acceptance length is cut at the prompt's last token.
    """

    trace: Trace
    tree: DraftTree
    batch: int
    num_kept_tokens: Ints
    num_steps: Ints
    positions: Ints
    acceptance_lengths: Ints

    @property
    def total_steps(self) -> int:
        """The verification passes of all prompts, each decoded alone."""
        return int(self.num_steps.sum())

    @property
    def tokens_per_step(self) -> float:
        """The acceleration rate: sum of n - 1 over sum of steps; 1 exactly for vanilla.

        Raises: UserError if no prompt took a step, which happens only where all end at their first token.
        """
        return self._rate(self.total_steps)

    @cached_property
    def batch_steps(self) -> Ints:
        """The steps of each batch of `batch` prompts in order: those of its slowest row."""
        return np.maximum.reduceat(self.num_steps, np.arange(0, len(self.num_steps), self.batch))

    @property
    def tokens_per_batch_step(self) -> float:
        """Kept tokens after each prompt's first over the steps of the batches; equals `tokens_per_step` at batch 1."""
        return self._rate(int(self.batch_steps.sum()))

    @cached_property
    def offsets(self) -> Ints:
        """Where each prompt's steps begin in the step arrays, [P + 1]."""
        return np.concatenate([[0], np.cumsum(self.num_steps)])

    def hops(self, prompt: int) -> Ints:
        """The positions i at which the steps of one prompt, given by its index, started."""
        return self.positions[self.offsets[prompt] : self.offsets[prompt + 1]]

    @cached_property
    def context_tokens(self) -> Ints:
        """For every step the tokens known when it started, root included: prompt_tokens + i, [S]."""
        prompt_tokens = np.array([prompt.prompt_tokens for prompt in self.trace.prompts])
        return np.repeat(prompt_tokens, self.num_steps) + self.positions

    @cached_property
    def batch_context_tokens(self) -> Ints:
        """For every step of every batch the longest context among its rows; a finished row stays with all its tokens."""
        longest: list[Ints] = []
        for first, steps in zip(range(0, len(self.num_steps), self.batch), self.batch_steps.tolist(), strict=True):
            context = np.zeros(steps, dtype=np.int64)
            for row in range(first, min(first + self.batch, len(self.num_steps))):
                own = self.context_tokens[self.offsets[row] : self.offsets[row + 1]]
                final = self.trace.prompts[row].prompt_tokens + int(self.num_kept_tokens[row])
                context = np.maximum(context, np.pad(own, (0, steps - len(own)), constant_values=final))
            longest.append(context)
        return np.concatenate(longest)

    def _rate(self, steps: int) -> float:
        if not steps:
            raise UserError(found="no decoding step: every prompt ends at its first token", need="a prompt of at least two kept tokens")
        return int((self.num_kept_tokens - 1).sum()) / steps


@dataclass(frozen=True)
class ReplayRow:
    """One prompt of a replay, flat, for tables; `tokens_per_step` is None where the prompt took no step."""

    key: str
    category: str | None
    prompt_tokens: int
    num_kept_tokens: int
    ended_by: EndedBy
    num_steps: int
    tokens_per_step: float | None


def replay_rows(replay: Replay) -> tuple[ReplayRow, ...]:
    """One row a prompt, ready for `pandas.DataFrame`."""
    counts = zip(replay.trace.prompts, replay.num_kept_tokens.tolist(), replay.num_steps.tolist(), strict=True)
    return tuple(
        ReplayRow(
            key=prompt.key,
            category=prompt.category,
            prompt_tokens=prompt.prompt_tokens,
            num_kept_tokens=kept,
            ended_by=prompt.ended_by if kept == prompt.num_kept_tokens else "budget",
            num_steps=steps,
            tokens_per_step=(kept - 1) / steps if steps else None,
        )
        for prompt, kept, steps in counts
    )


class ReplayIndex:
    """A trace prepared once so that thousands of trees replay at about the cost of a few passes over its positions each.

    Positions are sorted by their rank rows, so the positions whose row starts with a path are one range. A tree's nodes are looked up
    among these ranges; the number of ranges over a position is the depth it reaches, whatever the size of the tree.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        ranks = trace.ranks
        self._order = np.lexsort(ranks.T[::-1])
        self._ranges = _prefix_ranges(ranks[self._order])
        self._kept = np.array([prompt.num_kept_tokens for prompt in trace.prompts], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._kept)[:-1]])
        self._reach_of_root = np.arange(1, len(ranks) + 1)  # where a hop of one token lands
        self._prompt_of_row = np.repeat(np.arange(len(self._kept)), self._kept)

    def replay(self, tree: DraftTree, *, num_heads: int | None = None, budget: int | None = None, batch: int | None = None) -> Replay:
        """The decoding of `tree` with at most `num_heads` heads, `budget` tokens a prompt and batches of `batch` prompts.

        With fewer heads than the tree is deep, the tree is pruned to their number. A smaller budget cuts every prompt there.
        Raises: UserError if the tree is deeper than the traced heads, or the budget, heads or batch lie outside what was traced.
        """
        tree = self._usable(tree, num_heads=num_heads)
        limit = self.trace.provenance.max_new_tokens
        if budget is not None and not 1 <= budget <= limit:
            raise UserError(found=f"a budget of {budget} tokens", need=f"1 to {limit}, the budget of the trace", do="record a longer one")
        if batch is not None and batch < 1:
            raise UserError(found=f"a batch of {batch} prompts", need="at least 1")
        kept = self._kept if budget is None else np.minimum(self._kept, budget)
        last = self._first + kept - 1  # the row of y_n, where no step starts
        landing = np.minimum(self._reach_of_root + self._depths(tree), last[self._prompt_of_row])
        rows = _visited(landing, first=self._first, last=last)
        num_steps = np.diff(np.searchsorted(rows, np.append(self._first, len(landing))))
        return Replay(
            trace=self.trace,
            tree=tree,
            batch=batch or 1,
            num_kept_tokens=kept,
            num_steps=num_steps,
            positions=rows - np.repeat(self._first, num_steps) + 1,
            acceptance_lengths=landing[rows] - rows,
        )

    def _usable(self, tree: DraftTree, *, num_heads: int | None) -> DraftTree:
        traced = self.trace.num_heads
        if num_heads is not None and not 0 <= num_heads <= traced:
            raise UserError(found=f"{num_heads} heads asked for", need=f"0 to {traced}, the heads of the trace")
        tree = tree if num_heads is None else tree.pruned(num_heads)
        if tree.depth > traced:
            raise UserError(
                found=f"a tree of depth {tree.depth}",
                need=f"depth {traced} or less, the heads of the trace",
                where=f"tree {tree.fingerprint}",
                do="prune it with num_heads",
            )
        return tree

    def _depths(self, tree: DraftTree) -> Ints:
        """For every row the length of the longest prefix that is a node of the tree."""
        found = filter(None, map(self._ranges.get, tree.paths))  # the root has no range: it holds everywhere
        spans = np.fromiter(chain.from_iterable(found), dtype=np.int64).reshape(-1, 2)
        size = len(self._order) + 1
        opened, closed = (np.bincount(spans[:, side], minlength=size) for side in (0, 1))
        depths = np.empty(size - 1, dtype=np.int64)
        depths[self._order] = np.cumsum(opened - closed)[:-1]
        return depths


def replay(trace: Trace, tree: DraftTree, *, num_heads: int | None = None, budget: int | None = None, batch: int | None = None) -> Replay:
    """The decoding of one tree over a trace; for many trees prepare a `ReplayIndex` once and ask that."""
    return ReplayIndex(trace).replay(tree, num_heads=num_heads, budget=budget, batch=batch)


def _prefix_ranges(rows: NDArray[np.int32]) -> dict[RankPath, tuple[int, int]]:
    """For every path that begins a row of a lexicographically sorted table, the range of rows that begin with it."""
    ranges: dict[RankPath, tuple[int, int]] = {}
    is_new = np.zeros(len(rows), dtype=bool)
    is_new[0] = True
    for depth in range(1, rows.shape[1] + 1):
        column = rows[:, depth - 1]
        is_new[1:] |= column[1:] != column[:-1]
        starts = np.flatnonzero(is_new)
        stops = np.append(starts[1:], len(rows))
        paths = map(tuple, rows[starts, :depth].tolist())
        ranges.update(zip(paths, zip(starts.tolist(), stops.tolist(), strict=True), strict=True))
    return ranges


def _visited(landing: Ints, *, first: Ints, last: Ints) -> Ints:
    """The rows at which steps start, in order: from every `first` along `landing` until `last`, which is not one of them.

    Doubling: with the rows of the first 2^r hops and the landing of 2^r hops known, one gather gives twice as many of both. The last
    row of a prompt lands on itself.
    """
    rows, jump = first, landing
    while (jump[first] != last).any():
        rows = np.concatenate([rows, jump[rows]])
        jump = jump[jump]
    is_visited = np.zeros(len(landing), dtype=bool)
    is_visited[rows] = True
    is_visited[last] = False
    return np.flatnonzero(is_visited)


def _split(headers: Iterable[_PromptHeader], arrays: Mapping[str, NDArray[Any]]) -> list[PromptTrace]:
    if unknown := sorted(set(arrays) - {"tokens", "ranks", "gaps", "nll"}):
        raise UserError(found=f"unknown array {unknown[0]!r}", need="tokens, ranks and perhaps gaps and nll")
    prompts, start = [], 0
    for header in headers:
        rows = slice(start, start := start + header.num_kept_tokens)
        prompts.append(
            PromptTrace(
                key=header.key,
                category=header.category,
                prompt_tokens=header.prompt_tokens,
                tokens=arrays["tokens"][rows],
                ended_by=header.ended_by,
                ranks=arrays["ranks"][rows],
                gaps=arrays["gaps"][rows] if "gaps" in arrays else None,
                nll=arrays["nll"][rows] if "nll" in arrays else None,
            )
        )
    if any(len(array) != start for array in arrays.values()):
        raise UserError(found="arrays of another length than the header says", need=f"{start} positions", do="record it again")
    return prompts


def _is_integer(array: ArrayLike) -> bool:
    return bool(np.issubdtype(np.asarray(array).dtype, np.integer))
