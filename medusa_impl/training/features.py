"""Training data of the heads: the frozen backbone's states and the tokens that follow, flat in memory.

State i of an answer produced y_i; head k reads it and is asked for y_{i+k}. The backbone never runs again
once its states are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medusa_impl.engine.backbone import Backbone
from medusa_impl.errors import UserError
from medusa_impl.training.distill import CorpusSample, CorpusStore
from medusa_impl.training.losses import NO_TARGET


@dataclass(frozen=True)
class FeatureSet:
    """States and targets of all positions that have at least a target for head 1.

    Shapes: states `[S, H]` float16; targets `[S, K]` int32, `NO_TARGET` beyond the end of the answer;
    sample_index `[S]` int32, the answer a row belongs to; held_out `[answers]` bool. num_tokens counts the
    answers' tokens, the last ones included.
    """

    states: Tensor
    targets: Tensor
    sample_index: Tensor
    held_out: Tensor
    keys: tuple[str, ...]
    num_tokens: int
    num_train_tokens: int

    @property
    def num_heads(self) -> int:
        """K, the number of heads that the targets serve."""
        return int(self.targets.shape[1])

    def train_rows(self) -> Tensor:
        """Return the rows to train on."""
        return (~self.held_out[self.sample_index.long()]).nonzero().squeeze(1)

    def held_out_rows(self) -> Tensor:
        """Return the rows that training never sees."""
        return self.held_out[self.sample_index.long()].nonzero().squeeze(1)

    def token_counts(self, *, vocab_size: int) -> Tensor:
        """Return how often each token is head 1's target in the training rows.

        Shapes: `[V]` int64.
        """
        return torch.bincount(self.targets[self.train_rows(), 0].long(), minlength=vocab_size)

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the answers, their order, their split or their states."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        for tensor in (
            self.targets,
            self.sample_index,
            self.held_out,
            self.states[:: max(1, len(self.states) // 4096)],
        ):
            digest.update(
                str(tuple(tensor.shape)).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()


def load_features(store: CorpusStore, *, num_heads: int, held_out_rate: float = 0.03) -> FeatureSet:
    """Return the features of every answer in the store; answers of one token have nothing to predict and are
    left out.

    The split is by the prompt's tokens, so that all answers to one prompt lie on one side, and no later
    answer moves an earlier one.
    Raises: UserError for an empty store, an answer without states, or a state that is not finite.
    """
    samples = [sample for sample in store.samples(with_states=False) if len(sample.token_ids) > 1]
    if not samples:
        raise UserError(
            found="no answer of two tokens or more",
            need="a corpus",
            where=store.folder.name,
            do="generate it first",
        )
    num_rows = sum(len(sample.token_ids) - 1 for sample in samples)
    targets = torch.full((num_rows, num_heads), NO_TARGET, dtype=torch.int32)
    states: Tensor | None = None
    start = 0
    # the store may grow, in the middle too, between the two passes
    wanted = {sample.key for sample in samples}
    for sample in store.samples():
        if sample.key not in wanted:
            continue
        part = _finite_states(sample)
        if states is None:
            states = torch.empty(num_rows, part.shape[1], dtype=torch.float16)
        length = len(sample.token_ids) - 1
        states[start : start + length] = part[:-1]
        _fill_targets(targets[start : start + length], sample.token_ids)
        start += length
    assert states is not None
    lengths = torch.tensor([len(sample.token_ids) - 1 for sample in samples])
    held_out = torch.tensor([is_held_out(sample.prompt_ids, rate=held_out_rate) for sample in samples])
    return FeatureSet(
        states=states,
        targets=targets,
        sample_index=torch.arange(len(samples), dtype=torch.int32).repeat_interleave(lengths),
        held_out=held_out,
        keys=tuple(sample.key for sample in samples),
        num_tokens=int(lengths.sum()) + len(samples),
        num_train_tokens=int((lengths + 1)[~held_out].sum()),
    )


def is_held_out(prompt_ids: Iterable[int], *, rate: float) -> bool:
    """Return whether a prompt belongs to the held-out share: a fixed function of its tokens."""
    digest = hashlib.sha256(",".join(map(str, prompt_ids)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < rate * 2**64


def compute_states(backbone: Backbone, sample: CorpusSample) -> Tensor:
    """Return the states that produced y_1..y_n, by one forward pass over prompt and answer.

    Shapes: `[n, H]` float16; row i - 1 is the state at position len(prompt) + i - 2, which produced y_i.
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
    """Return a store of the same answers with this backbone's states, kept in a folder of `cache_folder`
    named by its hash.

    Answers that the cache holds already are not computed again, so a killed run goes on where it stopped.
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
            need="one state a token",
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
    tokens = torch.tensor(token_ids, dtype=torch.int32)
    for head in range(min(rows.shape[1], len(rows))):
        rows[: len(rows) - head, head] = tokens[head + 1 :]
