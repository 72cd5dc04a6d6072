"""Self-distillation corpora: prompts that the backbone itself has answered, and the states of its answers.

Medusa-1 needs one state of the frozen backbone for each token. Decoding computes these states anyway, so they
are kept here, which saves a second pass over the corpus.

Paper: Section 2.3.2: answers of the model itself, at temperature 0.3 or greedy.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medusa_impl.checkpoints.tensors import read_safetensors, write_by_rename
from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.stream import decode_stream
from medusa_impl.stream_rows import StreamRequest
from medusa_impl.text_files import read_lines

SCHEMA_VERSION = 1
_METADATA_KEY, _BACKBONE_KEY = "medusa_repro_corpus", "backbone_sha256"


@dataclass(frozen=True)
class CorpusPrompt:
    """One prompt to answer: its key, its tokens, and how to sample; temperature 0 is greedy."""

    key: str
    category: str
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int


@dataclass(frozen=True)
class CorpusSample:
    """One answer: its tokens y_1 .. y_n and, if they were kept, the states from which they were predicted.

    Shapes: token_ids n integers; states `[n, H]` float16, row i - 1 for y_i, or None.
    """

    key: str
    category: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ended_by: Literal["eos", "budget"]
    temperature: float
    seed: int
    states: Tensor | None


class CorpusStore:
    """Finished answers in one folder, in files of `shard_samples` answers each, called shards.

    A shard appears complete or not at all, so a run that is killed loses one shard at the most. Several
    processes may write to one folder, each with its own `writer` name.
    """

    def __init__(self, folder: Path, *, writer: str = "0", shard_samples: int = 256) -> None:
        self.folder = folder
        self.writer = writer
        self.shard_samples = shard_samples
        self._pending: list[CorpusSample] = []
        folder.mkdir(parents=True, exist_ok=True)

    def shard_files(self) -> list[Path]:
        """Return the finished text shards in order."""
        return sorted(self.folder.glob("corpus-*.jsonl"))

    def finished_keys(self) -> set[str]:
        """Return the keys of all answers on disk."""
        return {sample.key for sample in self.samples(with_states=False)}

    def add(self, sample: CorpusSample) -> None:
        """Take one answer; a full shard is written at once."""
        self._pending.append(sample)
        if len(self._pending) >= self.shard_samples:
            self.flush()

    def flush(self) -> None:
        """Write the answers that no shard holds yet as one more shard."""
        if not self._pending:
            return
        index = f"{self.writer}-{len(list(self.folder.glob(f'corpus-{self.writer}-*.jsonl'))):05d}"
        states = {
            str(row): sample.states for row, sample in enumerate(self._pending) if sample.states is not None
        }
        if states:
            # The states first: a text shard without states would count as an answer that has none.
            write_by_rename(self.folder / f"states-{index}.safetensors", lambda path: save_file(states, path))
        lines = [json.dumps(_row(sample), separators=(",", ":")) for sample in self._pending]
        text = "\n".join(lines) + "\n"
        write_by_rename(
            self.folder / f"corpus-{index}.jsonl", lambda path: path.write_text(text, encoding="utf-8")
        )
        self._pending = []

    def samples(self, *, with_states: bool = True) -> Iterator[CorpusSample]:
        """Yield all answers on disk in order.

        Raises: UserError for a shard that cannot be read or has another schema version.
        """
        for shard in self.shard_files():
            states_file = shard.with_name(shard.name.replace("corpus-", "states-")).with_suffix(
                ".safetensors"
            )
            states = read_safetensors(states_file)[0] if with_states and states_file.exists() else {}
            for index, line in enumerate(_shard_lines(shard)):
                yield _sample(line, states.get(str(index)), where=f"{shard.name}:{index + 1}")


def _shard_lines(shard: Path) -> list[str]:
    """Return the lines of a text shard. Raises: UserError for one that cannot be read."""
    try:
        return read_lines(shard)
    except (OSError, UnicodeDecodeError) as error:
        found = f"an unreadable shard ({type(error).__name__})"
        raise UserError(found=found, need="answers, one JSON object a line", where=shard.name) from error


def generate_corpus(
    backbone: Backbone,
    prompts: Sequence[CorpusPrompt],
    *,
    store: CorpusStore,
    num_rows: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    on_sample: Callable[[CorpusSample], None] | None = None,
    stop: Callable[[], bool] | None = None,
    keep_states: bool = True,
) -> None:
    """Answer every prompt that the store does not hold yet, `num_rows` at a time, and store the answers.

    `on_sample` gets each answer when it is finished. `stop` is called after each answer; if it returns true,
    the finished answers are stored and those in progress are dropped. At most two key-value caches exist at a
    time: the one in use, and the shorter one that it replaced.

    Raises: UserError, before anything is generated, if the model has too few positions for a prompt and its
    answer.
    """
    finished = store.finished_keys()
    by_key = {prompt.key: prompt for prompt in prompts if prompt.key not in finished}
    check_answers_fit(backbone, by_key.values(), max_new_tokens=max_new_tokens)
    longest = 0
    # A cache and its layers refer to each other. Python frees such a ring only when it collects garbage, and
    # until then the cache of an earlier call would take up memory.
    gc.collect()
    requests: Iterable[StreamRequest] = (
        StreamRequest(key=p.key, prompt_ids=p.prompt_ids, temperature=p.temperature, seed=p.seed)
        for p in by_key.values()
    )
    for completion in decode_stream(
        backbone,
        requests,
        num_rows=num_rows,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        keep_states=keep_states,
    ):
        prompt = by_key[completion.key]
        if len(prompt.prompt_ids) > longest:  # a longer cache may have replaced the one before
            longest = len(prompt.prompt_ids)
            gc.collect()
        sample = CorpusSample(
            key=prompt.key,
            category=prompt.category,
            prompt_ids=prompt.prompt_ids,
            token_ids=tuple(completion.token_ids),
            ended_by=completion.ended_by,
            temperature=prompt.temperature,
            seed=prompt.seed,
            states=completion.states,
        )
        store.add(sample)
        if on_sample is not None:
            on_sample(sample)
        if stop is not None and stop():
            break
    store.flush()


def check_answers_fit(backbone: Backbone, prompts: Iterable[CorpusPrompt], *, max_new_tokens: int) -> None:
    """Refuse prompts if the model has too few positions for one of them and an answer of `max_new_tokens`.

    Raises: UserError that names both numbers.
    """
    for prompt in prompts:
        try:
            backbone.check_positions(
                prompt_tokens=len(prompt.prompt_ids), max_new_tokens=max_new_tokens, depth=0
            )
        except UserError as error:
            raise UserError(
                found=error.found,
                need=error.need,
                where="the corpus",
                do="lower max_prompt_tokens or max_new_tokens",
            ) from error


def answer_fits(backbone: Backbone, *, prompt_tokens: int, max_new_tokens: int) -> bool:
    """Return whether the model has enough positions for a prompt and an answer of `max_new_tokens`."""
    try:
        backbone.check_positions(prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens, depth=0)
    except UserError:
        return False
    return True


def _row(sample: CorpusSample) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "key": sample.key,
        "category": sample.category,
        "temperature": sample.temperature,
        "seed": sample.seed,
        "ended_by": sample.ended_by,
        "prompt_ids": sample.prompt_ids,
        "token_ids": sample.token_ids,
    }


def _sample(line: str, states: Tensor | None, *, where: str) -> CorpusSample:
    try:
        row = json.loads(line)
        if row.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("unknown schema version")
        row["prompt_ids"], row["token_ids"] = tuple(row["prompt_ids"]), tuple(row["token_ids"])
        if not all(type(token) is int and token >= 0 for token in (*row["prompt_ids"], *row["token_ids"])):
            raise ValueError("a token id that is no whole number from 0")
        if not isinstance(row["key"], str):
            raise ValueError("a key that is no text")
        sample = CorpusSample(**row, states=states)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            found=f"an unreadable answer ({error})", need="one JSON object a line, schema 1", where=where
        ) from error
    if states is not None and states.shape[0] != len(sample.token_ids):
        raise UserError(
            found=f"{states.shape[0]} states for {len(sample.token_ids)} tokens",
            need="one state for each token",
            where=where,
        )
    return sample


def pack_corpus(samples: Iterable[CorpusSample], path: Path, *, backbone_sha256: str | None) -> None:
    """Write the text of many answers, without states, as one safetensors file of a few bytes a token.

    `backbone_sha256` is the hash of the model whose answers they are, or None if it is not known. The file
    holds the token ids of all prompts in one tensor and their lengths in another, the same for the answers,
    and the rest as JSON in its metadata.

    Shapes: prompt_ids and token_ids flat int32; prompt_lengths and lengths `[samples]` int32.
    """
    kept = list(samples)
    tensors = {
        "prompt_ids": torch.tensor(
            [token for sample in kept for token in sample.prompt_ids], dtype=torch.int32
        ),
        "prompt_lengths": torch.tensor([len(sample.prompt_ids) for sample in kept], dtype=torch.int32),
        "token_ids": torch.tensor(
            [token for sample in kept for token in sample.token_ids], dtype=torch.int32
        ),
        "lengths": torch.tensor([len(sample.token_ids) for sample in kept], dtype=torch.int32),
    }
    rows = [
        {name: value for name, value in _row(sample).items() if name not in ("prompt_ids", "token_ids")}
        for sample in kept
    ]
    metadata = {_METADATA_KEY: json.dumps(rows, separators=(",", ":")), _BACKBONE_KEY: backbone_sha256 or ""}
    write_by_rename(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def unpack_corpus(path: Path, *, backbone_sha256: str | None) -> Iterator[CorpusSample]:
    """Yield the answers of a file that `pack_corpus` wrote.

    `backbone_sha256` is the hash of the model that will learn from them; None accepts any model's answers.

    Raises: UserError for a file that cannot be read, or that holds the answers of another model, whose token
    ids may mean other tokens.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            rows, theirs = json.loads(metadata[_METADATA_KEY]), metadata.get(_BACKBONE_KEY, "")
            tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 (not a dict)
        for flat, lengths in (("prompt_ids", "prompt_lengths"), ("token_ids", "lengths")):
            if (len(tensors[lengths]), sum(tensors[lengths])) != (len(rows), len(tensors[flat])):
                raise ValueError(f"{lengths} that do not add up to {flat}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            found=f"an unreadable corpus ({error})", need="a file of pack_corpus", where=path.name
        ) from error
    if backbone_sha256 is not None and theirs and theirs != backbone_sha256:
        raise UserError(
            found=f"the answers of a model with tensors {theirs[:16]}",
            need=f"those of the model with tensors {backbone_sha256[:16]}",
            where=path.name,
            do="make this model's own answers with medusa-repro distill",
        )
    prompt_start = start = 0
    for index, row in enumerate(rows):
        prompt_end, end = prompt_start + tensors["prompt_lengths"][index], start + tensors["lengths"][index]
        whole = {
            **row,
            "prompt_ids": tensors["prompt_ids"][prompt_start:prompt_end],
            "token_ids": tensors["token_ids"][start:end],
        }
        yield _sample(json.dumps(whole), None, where=f"{path.name}:{index}")
        prompt_start, start = prompt_end, end
