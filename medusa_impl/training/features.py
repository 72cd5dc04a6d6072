"""Training data of Medusa-1: the frozen backbone's states, and the tokens that each head must predict.

The state in row i is the one from which the LM head predicted y_i. For an answer of five tokens and K = 3:

    state of        y_1   y_2   y_3   y_4   (y_5: nothing follows, no row)
    head 1          y_2   y_3   y_4   y_5
    head 2          y_3   y_4   y_5    .
    head 3          y_4   y_5    .     .

Once the states are kept, the backbone never runs again.

Paper: Section 2.2.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.training.distill import CorpusSample, CorpusStore
from medusa_impl.training.losses import NO_TARGET
from medusa_impl.training.sequences import TrainingSequence


@dataclass(frozen=True)
class AnswerTable:
    """The targets of all positions that have one for head 1, of all answers in one table.

    targets: token ids, `NO_TARGET` after the end of the answer.
    sample_index: the answer that a row belongs to; the rows of an answer are in order and together.
    held_out: whether an answer is kept out of training.
    num_tokens: the tokens of all answers, the last ones included.

    Shapes: targets `[S, K]` int32; sample_index `[S]` int32; held_out `[answers]` boolean.
    """

    targets: Tensor
    sample_index: Tensor
    held_out: Tensor
    keys: tuple[str, ...]
    num_tokens: int

    @property
    def num_heads(self) -> int:
        """Return K, the number of heads that there are targets for."""
        return int(self.targets.shape[1])

    def train_rows(self) -> Tensor:
        """Return the rows to train on."""
        return (~self.held_out[self.sample_index.long()]).nonzero().squeeze(1)

    def held_out_rows(self) -> Tensor:
        """Return the rows that training never sees."""
        return self.held_out[self.sample_index.long()].nonzero().squeeze(1)

    def answers_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return whose rows these are, in their order, and how many of them follow each other.

        Shapes: both `[A]` int64.
        """
        answers, counts = torch.unique_consecutive(self.sample_index[rows].long(), return_counts=True)
        return answers, counts

    def token_counts(self, *, vocab_size: int) -> Tensor:
        """Return how often each token is a target of head 1 in the training rows.

        Shapes: `[V]` int64.
        """
        return torch.bincount(self.targets[self.train_rows(), 0].long(), minlength=vocab_size)

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the answers, their order or their split."""
        return _digest(self.keys, (self.targets, self.sample_index, self.held_out))


@dataclass(frozen=True)
class FeatureSet(AnswerTable):
    """The same table with the frozen backbone's state of every row, in memory or mapped from a file.

    Shapes: states `[S, H]` float16.
    """

    states: Tensor

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the answers, their order, their split or their states.

        Of the states only some 4,096 rows are hashed: they are many gigabytes.
        """
        some_states = self.states[:: max(1, len(self.states) // 4096)]
        return _digest(self.keys, (self.targets, self.sample_index, self.held_out, some_states))


@dataclass(frozen=True)
class AnswerSet(AnswerTable):
    """The same table with the texts, for states that are computed while the heads train.

    A text may have several answers, the turns of a conversation. All rows of a text belong together:
    `sample_index` counts texts, and `keys` are theirs.
    """

    texts: tuple[TrainingSequence, ...]

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with any token of the texts, their order or their split."""
        tokens = [torch.tensor(text.token_ids, dtype=torch.int32) for text in self.texts]
        return _digest(self.keys, (self.targets, self.sample_index, self.held_out, *tokens))


def _digest(keys: Iterable[str], tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256("\n".join(keys).encode())
    for tensor in tensors:
        digest.update(
            str(tuple(tensor.shape)).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def load_features(
    store: CorpusStore, *, num_heads: int, held_out_rate: float = 0.03, states_file: Path | None = None
) -> FeatureSet:
    """Return the features of every answer in the store.

    Answers of one token are left out, since no token follows. Whether an answer is held out depends on its
    prompt's tokens only. So all answers to one prompt are on one side of the split, and answers that are
    added later move none of the others. With `states_file` the states are written to that file and mapped
    from it, and need no more memory than the rows that are read.

    Raises: UserError for an empty store, an answer without states, or a state that is not finite.
    """
    samples = _long_enough(store.samples(with_states=False), where=store.folder.name)
    table = _table(
        [_sequence(sample) for sample in samples],
        [sample.key for sample in samples],
        num_heads,
        held_out_rate,
    )
    states: Tensor | None = None
    start = 0
    # The first pass counted rows, this one fills them. Another process may add answers in between, not only
    # at the end, so the second pass takes only those that the first has seen.
    wanted = {sample.key for sample in samples}
    for sample in store.samples():
        if sample.key not in wanted:
            continue
        part = _finite_states(sample)
        if states is None:
            states = _room(len(table.targets), part.shape[1], file=states_file)
        length = len(sample.token_ids) - 1
        states[start : start + length] = part[:-1]
        start += length
    assert states is not None
    return FeatureSet(**vars(table), states=states)


def load_answers(
    samples: Iterable[CorpusSample], *, num_heads: int, held_out_rate: float = 0.03
) -> AnswerSet:
    """Return the table of these answers as `load_features` makes it, with their tokens in place of states.

    Raises: UserError where there are none.
    """
    kept = _long_enough(samples, where="the corpus")
    texts = tuple(_sequence(sample) for sample in kept)
    keys = tuple(sample.key for sample in kept)
    return load_texts(texts, keys=keys, num_heads=num_heads, held_out_rate=held_out_rate)


def load_texts(
    texts: Sequence[TrainingSequence], *, keys: Sequence[str], num_heads: int, held_out_rate: float = 0.03
) -> AnswerSet:
    """Return the table of these texts; whether one is held out depends on the tokens of its first prompt.

    Raises: UserError where no answer has two tokens.
    """
    kept = [
        (text, key) for text, key in zip(texts, keys, strict=True) if any(b - a > 1 for a, b in text.answers)
    ]
    if not kept:
        raise _nothing_to_learn("the texts")
    table = _table([text for text, _ in kept], [key for _, key in kept], num_heads, held_out_rate)
    return AnswerSet(**vars(table), texts=tuple(text for text, _ in kept))


def _sequence(sample: CorpusSample) -> TrainingSequence:
    start = len(sample.prompt_ids)
    tokens = sample.prompt_ids + sample.token_ids
    return TrainingSequence(token_ids=tokens, answers=((start, len(tokens)),))


def _long_enough(samples: Iterable[CorpusSample], *, where: str) -> list[CorpusSample]:
    kept = [sample for sample in samples if len(sample.token_ids) > 1]
    if not kept:
        raise _nothing_to_learn(where)
    return kept


def _nothing_to_learn(where: str) -> UserError:
    return UserError(
        found="no answer of two tokens or more", need="a corpus", where=where, do="generate it first"
    )


def _table(
    texts: Sequence[TrainingSequence], keys: Sequence[str], num_heads: int, held_out_rate: float
) -> AnswerTable:
    spans = [
        (index, *span) for index, text in enumerate(texts) for span in text.answers if span[1] - span[0] > 1
    ]
    lengths = torch.tensor([end - start - 1 for _, start, end in spans])
    targets = torch.full((int(lengths.sum()), num_heads), NO_TARGET, dtype=torch.int32)
    rows = torch.split(targets, lengths.tolist())
    for part, (index, start, end) in zip(rows, spans, strict=True):
        _fill_targets(part, texts[index].token_ids[start:end])
    first_prompts = [text.token_ids[: text.answers[0][0]] for text in texts]
    return AnswerTable(
        targets=targets,
        sample_index=torch.tensor([index for index, _, _ in spans], dtype=torch.int32).repeat_interleave(
            lengths
        ),
        held_out=torch.tensor([is_held_out(prompt, rate=held_out_rate) for prompt in first_prompts]),
        keys=tuple(keys),
        num_tokens=int(lengths.sum()) + len(spans),
    )


def _room(num_rows: int, hidden_size: int, *, file: Path | None) -> Tensor:
    """Return a table for all states, in memory, or mapped from a file that is made as large as the table."""
    if file is None:
        return torch.empty(num_rows, hidden_size, dtype=torch.float16)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # another process may still read the old one
    mapped = torch.from_file(str(file), shared=True, size=num_rows * hidden_size, dtype=torch.float16)
    return mapped.view(num_rows, hidden_size)


def is_held_out(prompt_ids: Iterable[int], *, rate: float) -> bool:
    """Return whether a prompt belongs to the held-out share, which is a fixed function of its tokens."""
    # The first 8 bytes of a hash are a uniform number below 2^64.
    digest = hashlib.sha256(",".join(map(str, prompt_ids)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < rate * 2**64


def compute_states(backbone: Backbone, sample: CorpusSample) -> Tensor:
    """Return the states from which y_1 .. y_n were predicted, by one forward pass over prompt and answer.

    Shapes: `[n, H]` float16; row i - 1 belongs to y_i. It is the state of the token before y_i, which for
    y_1 is the prompt's last token.
    """
    tokens = torch.tensor(sample.prompt_ids + sample.token_ids[:-1])
    cache = backbone.new_cache(batch_size=1, max_length=len(tokens))
    hidden = backbone.prefill(tokens, cache=cache).hidden
    return hidden[0, len(sample.prompt_ids) - 1 :].to("cpu", torch.float16)


def add_states(
    backbone: Backbone,
    samples: Iterable[CorpusSample],
    *,
    cache_folder: Path,
    backbone_sha256: str,
    on_sample: Callable[[CorpusSample], None] | None = None,
) -> CorpusStore:
    """Return a store of the same answers with this backbone's states.

    It is in a folder of `cache_folder` whose name has the backbone's hash. Answers that it holds already are
    not computed again, so a run that was killed continues where it stopped.
    """
    cached = CorpusStore(cache_folder / f"states-of-{backbone_sha256[:16]}")
    finished = cached.finished_keys()
    for sample in samples:
        if sample.key in finished:
            continue
        complete = CorpusSample(**{**sample.__dict__, "states": compute_states(backbone, sample)})
        cached.add(complete)
        if on_sample is not None:
            on_sample(complete)
    cached.flush()
    return cached


def _finite_states(sample: CorpusSample) -> Tensor:
    if sample.states is None:
        raise UserError(
            found=f"no states for the answer {sample.key!r}",
            need="one state for each token",
            where="the corpus",
            do="compute them with add_states",
        )
    if not torch.isfinite(sample.states).all():
        raise UserError(
            found=f"a state that is not finite in the answer {sample.key!r}",
            need="finite float16 states",
            where="the corpus",
        )
    return sample.states


def _fill_targets(rows: Tensor, token_ids: tuple[int, ...]) -> None:
    """Write the targets of one answer's rows, as the drawing at the top shows.

    Shapes: rows `[n - 1, K]`, filled with `NO_TARGET` so far.
    """
    tokens = torch.tensor(token_ids, dtype=torch.int32)
    for head in range(min(rows.shape[1], len(rows))):
        rows[: len(rows) - head, head] = tokens[head + 1 :]
