"""Reading heads in the file layouts that the authors and others published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa_impl.checkpoints.heads import fill
from medusa_impl.checkpoints.tensors import read_safetensors, some
from medusa_impl.errors import UserError
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import HeadArchitecture

_HEAD_NAME = re.compile(r"^(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)$")
_RELEASED_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


@dataclass(frozen=True)
class ReleasedHeads:
    """Heads read from a published file, and what is unusual about the file.

    configured_num_heads: the number of heads that the configuration next to the file names, or None.
    repeated_blocks: (head, layer) of every block that equals the head's first block bit by bit. This is how
    one module that was saved L times looks.
    """

    heads: MedusaHeads
    configured_num_heads: int | None
    repeated_blocks: tuple[tuple[int, int], ...]


def load_released_heads(
    path: Path, *, vocab_size: int | None = None, num_heads: int | None = None
) -> ReleasedHeads:
    """Return the heads of a published file, which is a `.pt` or `.safetensors` file, or of a folder.

    The folder holds such a file, or a whole model with its heads. The numbers of heads and layers come from
    the names and shapes of the tensors. Heads without unembeddings do not show the size of the vocabulary, so
    they need `vocab_size`. `num_heads` keeps only the first heads; with it, the `medusa_num_heads` of the
    configuration is ignored.

    Raises: UserError for files that cannot be read, missing or unknown names, wrong shapes, or a
    configuration that names another number of heads.
    """
    where = path.name
    tensors, config_file = _read_released(path)
    found_heads, num_layers, architecture = _infer_shape(tensors, where=where)
    configured = _configured_num_heads(config_file)
    if num_heads is None and configured is not None and configured != found_heads:
        raise UserError(
            found=f"{found_heads} heads in the file and medusa_num_heads = {configured} in its configuration",
            need="the same number",
            where=where,
            do=f"pass num_heads={found_heads} if the file is right (published configurations often are not)",
        )
    if num_heads is not None and not 1 <= num_heads <= found_heads:
        raise UserError(
            found=f"{found_heads} heads", need=f"at least the {num_heads} that were asked for", where=where
        )
    hidden_size = tensors["0.0.linear.weight"].shape[0]
    if architecture == "own":
        vocab_size = tensors[f"0.{num_layers}.weight"].shape[0]
    elif vocab_size is None:
        raise UserError(
            found="heads without unembeddings",
            need="vocab_size",
            where=where,
            do="pass the backbone's vocabulary size",
        )
    heads = MedusaHeads(
        num_heads=num_heads or found_heads,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        architecture=architecture,
    )
    kept = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[0]) < heads.num_heads}
    fill(heads, kept, where=where)
    return ReleasedHeads(
        heads=heads.eval(), configured_num_heads=configured, repeated_blocks=_repeated_blocks(heads)
    )


def _read_released(path: Path) -> tuple[dict[str, Tensor], Path]:
    """Return the heads' tensors, named from the head's number on, and the path of their configuration."""
    if path.is_dir():
        for name in _RELEASED_FILES:
            if (path / name).is_file():
                return _read_released(path / name)[0], path / "config.json"
        tensors: dict[str, Tensor] = {}
        for shard in sorted(path.glob("*.safetensors")):
            tensors.update(_read_model_shard(shard))
        if not tensors:
            raise UserError(
                found="no Medusa heads",
                need=f"{' or '.join(_RELEASED_FILES)}, or a model with medusa_head tensors",
                where=path.name,
            )
        return tensors, path / "config.json"
    config_file = path.with_name("config.json")
    if path.suffix == ".safetensors":
        # A file of a whole model has the heads under a prefix; a file of heads alone has no such names.
        return _read_model_shard(path) or read_safetensors(path)[0], config_file
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and unpickling errors share no base class
        raise UserError(
            found=f"no readable checkpoint ({type(error).__name__})",
            need="a dictionary of tensors",
            where=path.name,
            do="fetch it again",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(
            found="no dictionary of tensors",
            need="the heads' state dictionary",
            where=path.name,
        )
    return dict(loaded), config_file


def _read_model_shard(shard: Path) -> dict[str, Tensor]:
    """Return the `medusa_head.` tensors of a whole model, without this prefix; others are not read."""
    try:
        with safe_open(shard, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("medusa_head.")]  # noqa: SIM118
            return {name.removeprefix("medusa_head."): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            found=f"no readable safetensors file ({error})",
            need="a complete file",
            where=shard.name,
            do="fetch it again",
        ) from error


def _infer_shape(tensors: Mapping[str, Tensor], *, where: str) -> tuple[int, int, HeadArchitecture]:
    """Return the number of heads, of layers, and the architecture, read off the tensors' names."""
    unknown = sorted(name for name in tensors if not _HEAD_NAME.match(name))
    if unknown or not tensors:
        raise UserError(
            found=f"tensor names unknown: {some(unknown)}" if tensors else "no tensors",
            need="names such as 0.0.linear.weight and 0.1.weight",
            where=where,
        )
    parts = [name.split(".", 2) for name in tensors]
    num_heads = 1 + max(int(head) for head, _, _ in parts)
    layers = [int(layer) for _, layer, kind in parts if kind.startswith("linear")]
    if not layers or "0.0.linear.weight" not in tensors:
        raise UserError(found="no tensor 0.0.linear.weight", need="at least one residual block", where=where)
    num_layers = 1 + max(layers)
    own = any(kind == "weight" for _, _, kind in parts)
    if own and f"0.{num_layers}.weight" not in tensors:
        raise UserError(
            found=f"no tensor 0.{num_layers}.weight",
            need="an unembedding after the last block of head 0",
            where=where,
        )
    return num_heads, num_layers, "own" if own else "shared"


def _configured_num_heads(config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    try:
        value = json.loads(config_file.read_text(encoding="utf-8-sig")).get("medusa_num_heads")
        return None if value is None else int(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            found=f"an unreadable configuration ({error})", need="a JSON object", where=config_file.name
        ) from error


def _repeated_blocks(heads: MedusaHeads) -> tuple[tuple[int, int], ...]:
    repeated: list[tuple[int, int]] = []
    for head, blocks in enumerate(heads.blocks):
        states = [block.state_dict() for block in blocks.children()]
        first = states[0]
        repeated += [
            (head, layer)
            for layer, state in enumerate(states)
            if layer and all(torch.equal(state[name], first[name]) for name in first)
        ]
    return tuple(repeated)
