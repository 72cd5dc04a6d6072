"""The rows of a corpus: the device chooses their tokens and ends them, and asks the host nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamRequest:
    """One prompt for `decode_stream`.

    Temperature 0 means greedy decoding; otherwise `seed` starts the random numbers of this prompt alone.
    """

    key: str
    prompt_ids: Sequence[int]
    temperature: float
    seed: int


class DeviceRows:
    """The answers that grow, in buffers on the device: `take` adds a token to each without asking the host.

    Shapes: next_ids `[B, 1]`; counts, active, temperatures `[B]`; tokens and uniforms `[B, n]` with n the
    budget; states `[B, n, H]` float16, if they are kept.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        hidden_size: int | None,
        device: torch.device,
    ) -> None:
        self.num_rows, self.max_new_tokens, self.device = num_rows, max_new_tokens, device
        self.next_ids = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.counts = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.active = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(num_rows, max_new_tokens, dtype=torch.long, device=device)
        self.temperatures = torch.ones(num_rows, device=device)
        self.uniforms = torch.zeros(num_rows, max_new_tokens, dtype=torch.float64, device=device)
        self.states: Tensor | None = None
        if hidden_size is not None:
            self.states = torch.zeros(
                num_rows, max_new_tokens, hidden_size, dtype=torch.float16, device=device
            )
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._sampled: dict[int, None] = {}
        self._sampled_rows = torch.zeros(0, dtype=torch.long, device=device)

    @torch.inference_mode()
    def start(self, row: int, request: StreamRequest) -> None:
        """Give a row a request whose prompt's keys are in the cache, all but the last token's."""
        self.next_ids[row] = request.prompt_ids[-1]
        self.counts[row] = 0
        self.active[row] = True
        was_sampled = row in self._sampled
        if request.temperature:
            # The numbers are drawn on the host: so the text does not depend on the device's generator.
            generator = torch.Generator().manual_seed(request.seed)
            drawn = torch.rand(self.max_new_tokens, generator=generator, dtype=torch.float64)
            self.uniforms[row] = drawn.to(self.device)
            self.temperatures[row] = request.temperature
            self._sampled[row] = None
        else:
            self._sampled.pop(row, None)
        if was_sampled != (row in self._sampled):
            self._sampled_rows = torch.tensor(sorted(self._sampled), dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def take(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Return which rows go on, after each active one has taken its next token from these logits.

        Shapes: logits `[B, V]`, hidden `[B, H]`; result `[B]` boolean.
        """
        chosen = logits.argmax(-1)
        if self._sampled:  # known to the host since the rows began
            rows = self._sampled_rows
            # Sampling by inverting the cumulative law takes one uniform number a token.
            place = self.counts[rows].clamp_max(self.max_new_tokens - 1)
            uniform = self.uniforms[rows].gather(1, place[:, None])
            law = torch.softmax(logits[rows].float() / self.temperatures[rows, None], dim=-1)
            cumulative = law.cumsum(-1, dtype=torch.float64)
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
            chosen = chosen.index_copy(0, rows, drawn.clamp_max(logits.shape[-1] - 1).squeeze(1))
        # A row that has ended writes its last token once more, so that no shape depends on it.
        place = self.counts.clamp_max(self.max_new_tokens - 1)[:, None]
        chosen = torch.where(self.active[:, None], chosen[:, None], self.tokens.gather(1, place))
        self.tokens.scatter_(1, place, chosen)
        if self.states is not None:
            index = place[:, :, None].expand(-1, -1, self.states.shape[2])
            kept = torch.where(
                self.active[:, None, None], hidden[:, None].half(), self.states.gather(1, index)
            )
            self.states.scatter_(1, index, kept)
        self.counts += self.active
        self.next_ids.copy_(torch.where(self.active[:, None], chosen, self.next_ids))
        at_end = torch.isin(chosen.squeeze(1), self._eos_ids) | (self.counts >= self.max_new_tokens)
        self.active &= ~at_end
        return self.active.clone()

    @torch.inference_mode()
    def answers(
        self, rows: Sequence[int], *, ready: torch.cuda.Event | None = None
    ) -> list[tuple[list[int], Tensor | None]]:
        """Return the tokens and states of rows that have ended. The host waits for these alone.

        On a GPU they are read while the next step runs, as soon as `ready`, the step in which they ended, is
        over: later steps write into ended rows what is there already.
        """
        if self._side_stream is not None and ready is not None:
            self._side_stream.wait_event(ready)
        with torch.cuda.stream(self._side_stream):  # None changes nothing
            index = torch.tensor(rows, device=self.device)
            counts, tokens = self.counts[index].tolist(), self.tokens[index].tolist()
            states = None if self.states is None else self.states[index].to("cpu")
        return [
            (tokens[place][:count], None if states is None else states[place, :count].clone())
            for place, count in enumerate(counts)
        ]
