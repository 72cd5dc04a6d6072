"""Kept tokens and the ranks of the heads, a prompt each: the .npz file that any tree is replayed from."""

from __future__ import annotations

import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, JsonValue, ValidationError

from harness.bounds import Count
from harness.errors import UserError
from harness.files import Frozen, write_bytes
from harness.records.folder import regular_file
from harness.versions import VERSION, ReadFrom, Versioned

SCHEMA_VERSION = 1
EndedBy = Literal["eos", "budget"]
Ints = NDArray[np.int64]
HEAD_TIES_KEY, TEXT_TIES_KEY = "head_ties", "text_ties"

_LARGEST = 2**31 - 1  # of ranks, token ids and counts
_MOST_BYTES = 2**31  # that the arrays of a file may take: a small file can unpack to any size


class TraceProvenance(Frozen):
    """What a trace was recorded from: enough to refuse another model's heads."""

    model_hash: str = Field(description="SHA-256 of the backbone's tensors")
    heads_hash: str = Field(description="SHA-256 of the draft heads' tensors")
    dtype: str = Field(description="dtype of the forward pass, such as float32")
    max_new_tokens: Count = Field(
        ge=1, description="most tokens of every answer, the first and the end of sequence counted"
    )
    versions: Mapping[str, str] = Field(
        default_factory=dict, description="versions of the libraries, by name"
    )
    extra: Mapping[str, JsonValue] = Field(
        default_factory=dict, description="anything else worth keeping: commit, device, prompt set"
    )


class PromptHeader(Frozen):
    """What a trace's header says of one prompt; its rows of the arrays come in the order of the prompts."""

    key: str = Field(description="which prompt, such as mt_bench-81")
    category: str | None = Field(description="category of the prompt; null where it has none")
    prompt_tokens: Count = Field(description="number of tokens of the prompt")
    ended_by: EndedBy = Field(description="end of sequence, or the budget of tokens")
    num_kept_tokens: Count = Field(ge=1, description="kept tokens of its answer: its rows of the arrays")


class TraceHeader(Versioned):
    """The JSON header of a trace's .npz file; the arrays are tokens, ranks and perhaps gaps and nll."""

    schema_version: Annotated[Literal[1], VERSION]
    provenance: TraceProvenance = Field(description="what the trace was recorded from")
    prompts: tuple[PromptHeader, ...] = Field(description="one entry a prompt, in the order of the arrays")


@dataclass(frozen=True, eq=False)
class PromptTrace:
    """One prompt's kept tokens and how each draft head ranked them.

    Shapes: `tokens` [n]; `ranks` [n, K], -1 exactly where i + k > n; `gaps` [n], the backbone's top-two logit
    gap when it produced y_i; `nll` [n, K], head k's negative log-likelihood of y_{i+k} in nats, nan beyond
    the end.
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
            self._refuse(
                f"tokens of shape {tokens.shape} and type {tokens.dtype}", "at least one token id in one row"
            )
        if ranks.ndim != 2 or len(ranks) != len(tokens) or not ranks.shape[1] or not _is_integer(ranks):
            self._refuse(
                f"ranks of shape {ranks.shape} and type {ranks.dtype}",
                f"whole numbers of shape ({len(tokens)}, heads)",
            )
        beyond = np.arange(1, len(tokens) + 1)[:, None] + np.arange(1, ranks.shape[1] + 1) > len(tokens)
        if not np.array_equal(ranks < 0, beyond) or (ranks < -1).any():
            self._refuse(
                "a rank where there is no token, or none where there is one", "-1 exactly where i + k > n"
            )
        if (tokens < 0).any() or max(tokens.max(), ranks.max()) > _LARGEST:
            self._refuse("a token id or a rank out of bounds", f"token ids and ranks from 0 to {_LARGEST}")
        if self.prompt_tokens < 1 or self.ended_by not in ("eos", "budget"):
            self._refuse(
                f"{self.prompt_tokens} prompt tokens, ended by {self.ended_by!r}",
                "at least 1 prompt token, and eos or budget",
            )
        for name, shape in (("gaps", tokens.shape), ("nll", ranks.shape)):
            if (array := getattr(self, name)) is not None and np.shape(array) != shape:
                self._refuse(f"{name} of shape {np.shape(array)}", f"shape {shape}")
        if self.gaps is not None and not (np.isfinite(self.gaps) & (np.asarray(self.gaps) >= 0)).all():
            self._refuse("a gap that is negative or no finite number", "the best logit less the second")
        if self.nll is not None and not (
            np.array_equal(np.isnan(self.nll), beyond) and np.isfinite(np.asarray(self.nll)[~beyond]).all()
        ):
            self._refuse(
                "a likelihood that is no finite number, or one beyond the end", "nan exactly where i + k > n"
            )
        for name, dtype in (
            ("tokens", np.int64),
            ("ranks", np.int32),
            ("gaps", np.float32),
            ("nll", np.float32),
        ):
            if (array := getattr(self, name)) is not None:
                copy = np.array(array, dtype=dtype)
                copy.setflags(write=False)
                object.__setattr__(self, name, copy)

    @property
    def num_kept_tokens(self) -> int:
        """Return n: the tokens kept, end of sequence included."""
        return len(self.tokens)

    @property
    def num_heads(self) -> int:
        """Return K: the draft heads that were read."""
        return int(self.ranks.shape[1])

    def _refuse(self, found: str, need: str) -> None:
        raise UserError(found=found, need=need, where=f"the trace of prompt {self.key!r}")


@dataclass(frozen=True, eq=False)
class Trace:
    """The traces of a set of prompts, all of one model, one set of heads and one budget.

    Raises: UserError if there is no prompt, a key occurs twice, prompts differ in heads or optional arrays,
    or one breaks the budget.
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
            raise UserError(
                found="prompts with different heads or optional arrays",
                need="the same for every prompt",
                where="the trace",
            )
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.key in seen:
                raise UserError(
                    found=f"prompt {prompt.key!r} twice", need="every prompt once", where="the trace"
                )
            if prompt.num_kept_tokens > budget or (
                prompt.ended_by == "budget" and prompt.num_kept_tokens != budget
            ):
                found = (
                    f"{prompt.num_kept_tokens} tokens ended by {prompt.ended_by} for prompt {prompt.key!r}"
                )
                raise UserError(
                    found=found, need=f"at most {budget} tokens, exactly as many where the budget ended it"
                )
            seen.add(prompt.key)
        _check_ties(self)

    @property
    def num_heads(self) -> int:
        """Return K: the draft heads that were read."""
        return self.prompts[0].num_heads

    @property
    def num_positions(self) -> int:
        """Return the number of kept tokens of all prompts, the first of each included."""
        return sum(prompt.num_kept_tokens for prompt in self.prompts)

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """Return the rank rows of all prompts in order, [positions, K], as the tree search takes them."""
        return np.concatenate([prompt.ranks for prompt in self.prompts])

    def require_same(
        self,
        *,
        backbone_sha256: str,
        heads_sha256: str | None,
        where: str,
        noun: str = "calibration trace",
        do: str = "record it again with medusa-repro trace",
    ) -> None:
        """Refuse to use a trace with another model or other heads than it was recorded with.

        Raises: UserError, in which `noun`, `where` and `do` say what the trace is for and where it is named.
        """
        if (self.provenance.model_hash, self.provenance.heads_hash) != (backbone_sha256, heads_sha256):
            raise UserError(
                found=f"a {noun} of another model or other heads",
                need=f"one of backbone {backbone_sha256[:12]} and heads {(heads_sha256 or 'none')[:12]}",
                where=where,
                do=do,
            )

    def save(self, path: str | Path) -> None:
        """Write one .npz with a JSON header, first to a temporary file in the same folder.

        Raises: UserError if the file cannot be written; an older file of that name is then untouched.
        """
        prompts = self.prompts
        header = TraceHeader(
            schema_version=1,
            provenance=self.provenance,
            prompts=tuple(
                PromptHeader(
                    key=prompt.key,
                    category=prompt.category,
                    prompt_tokens=prompt.prompt_tokens,
                    ended_by=prompt.ended_by,
                    num_kept_tokens=prompt.num_kept_tokens,
                )
                for prompt in prompts
            ),
        )
        arrays: dict[str, NDArray[Any]] = {
            "header": np.frombuffer(header.model_dump_json().encode(), dtype=np.uint8)
        }
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
                found=f"a failed write ({error})",
                need="room and permission",
                where=str(path),
                do="free space there",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Return the trace of a file that `save` wrote.

        Raises: UserError if the file is missing, truncated, corrupt, of another version, or breaks the rules
        of a trace.
        """
        try:
            arrays = _arrays(regular_file(Path(path).resolve()))
            header = TraceHeader.model_validate(
                json.loads(arrays.pop("header").tobytes()), context=ReadFrom(str(path))
            )
            return cls(provenance=header.provenance, prompts=tuple(_split(header.prompts, arrays)))
        except ValidationError as error:
            first = error.errors()[0]
            found = f"a header whose {'.'.join(map(str, first['loc']))} is wrong ({first['msg']})"
            raise UserError(
                found=found, need=f"a trace of schema version {SCHEMA_VERSION}", where=str(path)
            ) from error
        except UserError as error:
            raise UserError(found=error.found, need=error.need, where=str(path), do=error.do) from error
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            NotImplementedError,  # a way to compress that zipfile does not know
            RuntimeError,  # an encrypted member
            OverflowError,
            RecursionError,
            MemoryError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
        ) as error:
            found = f"no readable trace ({type(error).__name__}: {error})"
            raise UserError(
                found=found, need="a whole .npz trace", where=str(path), do="record it again"
            ) from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file, header included, once it is sure that they fit into memory."""
    if not path.exists():
        raise UserError(found="no readable trace (no such file)", need="a whole .npz trace")
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > _MOST_BYTES:
        raise UserError(found=f"arrays of {num_bytes} bytes", need=f"at most {_MOST_BYTES}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _check_ties(trace: Trace) -> None:
    """Refuse ties that name a position, head, rank or token that there cannot be.

    Raises: UserError.
    """
    for name, num_named in ((HEAD_TIES_KEY, 2), (TEXT_TIES_KEY, 1)):  # position and head, or position alone
        listed = trace.provenance.extra.get(name)
        if listed is None:
            continue
        highest = {prompt.key: (prompt.num_kept_tokens, trace.num_heads) for prompt in trace.prompts}
        for row in listed if isinstance(listed, list) else [listed]:
            key, *numbers = row if isinstance(row, list) and row else [None]
            whole = [one for one in numbers if isinstance(one, int) and 0 <= one <= _LARGEST]
            named, others = whole[:num_named], whole[num_named:]
            fits = (
                isinstance(key, str)
                and len(whole) == len(numbers) >= num_named
                and all(1 <= one <= most for one, most in zip(named, highest.get(key, ()), strict=False))
                and (name == TEXT_TIES_KEY or not others or (len(others) == 2 and others[0] <= others[1]))
            )
            if not fits:
                raise UserError(
                    found=f"{name} with {str(row)[:60]}",
                    need="rows of a prompt's key, a position of it, and whole numbers within their bounds",
                    where="the trace",
                )


def _split(headers: Iterable[PromptHeader], arrays: Mapping[str, NDArray[Any]]) -> list[PromptTrace]:
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
        raise UserError(
            found="arrays of another length than the header says",
            need=f"{start} positions",
            do="record it again",
        )
    return prompts


def _is_integer(array: ArrayLike) -> bool:
    return bool(np.issubdtype(np.asarray(array).dtype, np.integer))
