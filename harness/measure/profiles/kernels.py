"""Races of kernels on one device: which way to compute a part of a step is the fastest, and how exact it is.

What only a card can decide is decided here in a minute. Each race is between the engine's way, which stands
first, and others that would give the same result: attention under a tree's mask, the best tokens of the
heads, the heads' products, and products of a single row, which most of a step is made of. On a CPU small
sizes run the same code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, silu

from harness.device.clock import Clock, device_clock
from harness.device.doctor import require_own_gpu
from harness.device.engine import best_device
from harness.device.locks import device_turns
from harness.device.machine import origin
from harness.errors import UserError
from harness.paths import without_paths
from harness.records.profiles.kernels import Contender, KernelRaces, Race
from harness.records.provenance import Provenance
from medusa_impl.engine.attention import grouped_sdpa_attention
from medusa_impl.engine.captured_step import CudaGraphs, Graphs
from medusa_impl.heads import topk_by_blocks

_CALLS, _REPEATS, _SEED = 20, 10, 0
_HEADS_RACES, _TOPK_RACES = 2, 1  # unembeddings and a residual block; all heads at once
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How large the races are.

    `attention` has query heads, key-value heads and head size; `view` slots are read, of which `kept` are
    kept tokens. `products` are output and input sizes of weights that one row is multiplied with.
    """

    attention: tuple[tuple[int, int, int], ...]
    nodes: tuple[int, ...]
    view: int
    kept: int
    hidden: int
    vocab: int
    num_heads: int
    products: tuple[tuple[int, int], ...]


SHAPE_7B = Sizes(
    attention=((32, 32, 128), (32, 8, 128)),
    nodes=(1, 16, 64),
    view=1152,
    kept=1000,
    hidden=4096,
    vocab=32_000,
    num_heads=5,
    products=((11_008, 4096), (4096, 4096), (4096, 11_008), (32_000, 4096)),
)
SMALL = Sizes(
    attention=((4, 4, 16), (4, 2, 16)),
    nodes=(1, 4),
    view=40,
    kept=30,
    hidden=32,
    vocab=300,
    num_heads=3,
    products=((48, 32),),
)


def race_kernels(
    *,
    dtype: str,
    small: bool,
    budget_s: float,
    command: str,
    console: Console,
    keep: Callable[[KernelRaces], None],
) -> KernelRaces:
    """Return the races on this machine's best device, in small sizes on a CPU.

    After `budget_s` seconds no further race is begun; the first always is. `keep` is given all races so far
    after each one, to write them to disk: an interrupt loses the race in progress alone.

    Raises: UserError for an unknown dtype.
    """
    ends = time.monotonic() + budget_s
    require_own_gpu()
    device = best_device()
    name = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(
            found=f"--dtype {name}", need="float32, bfloat16 or float16", where="the command line"
        )
    sizes = SMALL if small or device.type == "cpu" else SHAPE_7B
    where, races = Provenance(**origin(device, command=command)), list[Race]()

    def so_far() -> KernelRaces:
        left_out = num_races(sizes) - len(races)
        return KernelRaces(
            origin=where, dtype=name, calls_a_repeat=_CALLS, races=tuple(races), num_left_out=left_out
        )

    with device_turns(device, console=console)():
        for race in run_races(
            sizes,
            device=device,
            dtype=getattr(torch, name),
            clock=device_clock(device),
        ):
            console.print(f"{race.computation}: {race.shape}", highlight=False, markup=False)
            races.append(race)
            keep(so_far())
            if so_far().num_left_out and time.monotonic() > ends:
                console.print("time budget used up: the races after this one are left out")
                break
    return so_far()


def num_races(sizes: Sizes) -> int:
    """Return how many races `run_races` yields."""
    return len(sizes.products) + len(sizes.attention) * len(sizes.nodes) + _HEADS_RACES + _TOPK_RACES


def run_races(
    sizes: Sizes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    compile_kernels: bool = True,
    graphs: Graphs | None = None,
) -> Iterator[Race]:
    """Yield the races in order of worth, each as soon as it is run.

    On a GPU many calls are one graph, so that no launch is timed; `graphs` makes it, CUDA's by default.
    """
    torch.manual_seed(_SEED)
    timer = _Timer(device, clock, graphs or (CudaGraphs() if device.type == "cuda" else None))
    compiled = _compiler(compile_kernels)
    for make in (_products, _attention, _heads, _topk):
        for computation, shape, read_bytes, ways, error in make(sizes, device, dtype, compiled):
            yield Race(
                computation=computation,
                shape=shape,
                read_bytes=read_bytes,
                contenders=tuple(timer.time(name, call, error) for name, call in ways),
            )


_Entry = tuple[str, str, int, list[tuple[str, Call]], Callable[[Tensor], float]]


class _Timer:
    """Times calls, many at once."""

    def __init__(self, device: torch.device, clock: Clock, graphs: Graphs | None) -> None:
        self._device, self._clock, self._graphs = device, clock, graphs

    @torch.inference_mode()
    def time(self, name: str, call: Call, error: Callable[[Tensor], float]) -> Contender:
        """Return the times of a way and its error; a way that does not run here says why."""
        try:
            max_error = error(call())
            if not math.isfinite(max_error):
                raise ArithmeticError("a result that is not finite")
            repeat = self._repeated(call)
            repeat()
            times = []
            for _ in range(_REPEATS):
                started = self._clock()
                repeat()
                times.append((self._clock() - started) / _CALLS)
        except Exception as failed:  # whatever a compiler or a kernel raises
            words = " ".join(without_paths(str(failed)).split())[:200]
            return Contender(name=name, failure=f"{type(failed).__name__}: {words}")
        return Contender(name=name, call_s=tuple(times), max_error=max_error)

    def _repeated(self, call: Call) -> Callable[[], None]:
        def all_calls() -> None:
            for _ in range(_CALLS):
                call()

        if self._graphs is None:
            return all_calls
        with self._graphs.warming():
            call()
        with self._graphs.capture() as graph:
            all_calls()
        return graph.replay


def _compiler(compile_kernels: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if not compile_kernels:
        return lambda function: function
    return lambda function: torch.compile(function, dynamic=False)


def _largest(want: Tensor) -> Callable[[Tensor], float]:
    return lambda found: float((found.double() - want).abs().max())


def _products(sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: Any) -> Iterator[_Entry]:
    """One row times one weight: PyTorch's product, or a compiled one, which can be one fused reduction."""
    fused = compiled(linear)
    for num_out, num_in in sizes.products:
        weight = torch.randn(num_out, num_in, device=device, dtype=dtype) / math.sqrt(num_in)
        row = torch.randn(1, num_in, device=device, dtype=dtype)
        ways: list[tuple[str, Call]] = [
            ("linear", lambda row=row, weight=weight: linear(row, weight)),  # type: ignore[misc]
            ("compiled linear", lambda row=row, weight=weight: fused(row, weight)),  # type: ignore[misc]
        ]
        want = linear(row.double(), weight.double())
        yield "product", f"{num_out} x {num_in}, one row", _bytes(weight), ways, _largest(want)


def _attention(sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: Any) -> Iterator[_Entry]:
    """A tree's attention: one masked call, flex attention, or a certain prefix joined with a masked tail."""
    flex, joined = compiled(_flex), compiled(_prefix_and_tail)
    for num_query, num_kv, size in sizes.attention:
        for num_nodes in sizes.nodes:
            keys, values = (
                torch.randn(1, sizes.view, num_kv, size, device=device, dtype=dtype).transpose(1, 2)
                for _ in range(2)
            )
            query = torch.randn(1, num_query, num_nodes, size, device=device, dtype=dtype)
            seen = torch.zeros(num_nodes, sizes.view, dtype=torch.bool, device=device)
            seen[:, : sizes.kept] = True
            seen[:, sizes.kept : sizes.kept + num_nodes] = torch.ones(num_nodes, num_nodes).tril().bool()
            mask = torch.zeros(1, 1, num_nodes, sizes.view, device=device, dtype=dtype)
            mask.masked_fill_(~seen, torch.finfo(dtype).min)
            groups = num_query // num_kv
            scores = query.double() @ keys.double().repeat_interleave(groups, 1).transpose(-1, -2)
            law = (scores / math.sqrt(size)).masked_fill(~seen, -torch.inf).softmax(-1)
            want = law @ values.double().repeat_interleave(groups, 1)
            given = (query, keys, values, mask)
            ways: list[tuple[str, Call]] = [
                ("masked", lambda given=given: _masked(*given)),  # type: ignore[misc]
                ("flex", lambda given=given: flex(*given)),  # type: ignore[misc]
                (
                    "prefix + tail",
                    lambda given=given: joined(*given, sizes.kept),  # type: ignore[misc]
                ),
            ]
            shape = f"{num_query} query and {num_kv} key-value heads of {size}, {num_nodes} nodes"
            yield "attention", f"{shape}, {sizes.view} slots", 2 * _bytes(keys), ways, _largest(want)


def _masked(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    mixed, _ = grouped_sdpa_attention(torch.nn.Identity(), query, keys, values, mask)
    return mixed.transpose(1, 2)


def _flex(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    def with_mask(score: Tensor, batch: Tensor, head: Tensor, node: Tensor, slot: Tensor) -> Tensor:
        return score + mask[batch, 0, node, slot]

    mixed: Any = flex_attention(
        query, keys, values, score_mod=with_mask, enable_gqa=query.shape[1] != keys.shape[1]
    )
    result: Tensor = mixed
    return result


def _prefix_and_tail(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, kept: int) -> Tensor:
    """Attend to the kept tokens without a mask and to the rest with one, and join both by their weights.

    The sums of exponentials say how much weight each part has; they stay in float32, since a weight in
    bfloat16 would cost more than the part is exact to.
    """
    groups, num_nodes = query.shape[1] // keys.shape[1], query.shape[2]
    rows = query.reshape(1, -1, groups * num_nodes, query.shape[-1])  # heads of a group as rows
    prefix, prefix_weight = _flash(rows, keys[:, :, :kept], values[:, :, :kept])
    scores = rows.float() @ keys[:, :, kept:].float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores + mask[..., kept:].float().repeat(1, 1, groups, 1)
    tail_weight = scores.logsumexp(-1)
    tail = torch.exp(scores - tail_weight[..., None]) @ values[:, :, kept:].float()
    share = torch.sigmoid(prefix_weight[..., : rows.shape[2]].float() - tail_weight)[..., None]
    joined: Tensor = (prefix.float() * share + tail * (1 - share)).to(query.dtype)
    return joined.reshape(query.shape)


def _flash(rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return unmasked attention, and the logarithm of its sum of exponentials."""
    if rows.device.type == "cuda":
        found = torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values, 0.0, False)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, values, 0.0, False)
    return found[0], found[1]


def _heads(sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: Any) -> Iterator[_Entry]:
    """The heads' own unembeddings: one product a head, or all as one batched product of stacked weights."""
    stacked = torch.randn(sizes.num_heads, sizes.vocab, sizes.hidden, device=device, dtype=dtype)
    stacked /= math.sqrt(sizes.hidden)
    state = torch.randn(1, sizes.num_heads, sizes.hidden, device=device, dtype=dtype)
    weights = list(stacked)
    residual = compiled(lambda given: torch.bmm(given.transpose(0, 1), stacked.transpose(1, 2)))
    ways: list[tuple[str, Call]] = [
        (
            "a product a head",
            lambda: torch.stack([linear(state[:, k], weight) for k, weight in enumerate(weights)], 1),
        ),
        ("batched", lambda: torch.bmm(state.transpose(0, 1), stacked.transpose(1, 2)).transpose(0, 1)),
        ("compiled batched", lambda: residual(state).transpose(0, 1)),
    ]
    want = torch.einsum("bkh,kvh->bkv", state.double(), stacked.double())
    shape = f"{sizes.num_heads} heads, {sizes.vocab} x {sizes.hidden} each, one row"
    yield "heads", shape, _bytes(stacked), ways, _largest(want)
    gates = torch.randn(2, sizes.hidden, sizes.hidden, device=device, dtype=dtype) / math.sqrt(sizes.hidden)
    row = state[:, 0]
    fused = compiled(lambda given: given + silu(linear(given, gates[0])))
    block: list[tuple[str, Call]] = [
        ("linear, SiLU, sum", lambda: row + silu(linear(row, gates[0]))),
        ("compiled", lambda: fused(row)),
    ]
    exact = row.double() + silu(linear(row.double(), gates[0].double()))
    yield "heads", f"one residual block, {sizes.hidden}", _bytes(gates[0]), block, _largest(exact)


def _topk(sizes: Sizes, device: torch.device, dtype: torch.dtype, compiled: Any) -> Iterator[_Entry]:
    """The best ten tokens of each head in exact order, by blocks of several sizes, and in PyTorch's order."""
    logits = torch.randn(1, sizes.num_heads, sizes.vocab, device=device, dtype=dtype)
    count = min(10, sizes.vocab)
    want = logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    fused = compiled(topk_by_blocks)
    ways: list[tuple[str, Call]] = [
        (f"blocks of {size}", lambda size=size: topk_by_blocks(logits, count, block_tokens=size))  # type: ignore[misc]
        for size in (128, 64, 256)
    ]
    ways += [
        ("compiled blocks of 128", lambda: fused(logits, count)),
        ("torch.topk, ties in any order", lambda: logits.topk(count, dim=-1).indices),
    ]
    shape = f"best {count} of {sizes.vocab} for {sizes.num_heads} heads"
    yield "top-k", shape, _bytes(logits), ways, lambda found: float((found != want).sum())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
