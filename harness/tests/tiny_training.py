"""What tests of joint training share: a corpus that a tiny model wrote, joint recipes and an ablation of
it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tomli_w

from harness.device.engine import Engine
from harness.tests.tiny_suite import smoke_suite
from medusa_impl.training.distill import CorpusPrompt, CorpusStore, generate_corpus, pack_corpus

NUM_ANSWERS, ANSWER_TOKENS = 60, 10


def write_corpus(path: Path, engine: Engine) -> None:
    """Write the tiny model's answers to random prompts as a packed corpus."""
    source = random.Random(6)  # one of whose prompts is held out
    rows = [tuple(source.randrange(1, 128) for _ in range(6)) for _ in range(NUM_ANSWERS)]
    prompts = [CorpusPrompt(f"k{index:02d}", "random", ids, 0.0, index) for index, ids in enumerate(rows)]
    store = CorpusStore(path.parent / "answers")
    generate_corpus(
        engine.runner.backbone,
        prompts,
        store=store,
        num_rows=20,
        max_new_tokens=ANSWER_TOKENS,
        eos_ids=frozenset(),
    )
    pack_corpus(store.samples(with_states=False), path, backbone_sha256=engine.loaded.sha256)


def recipe_data(folder: Path, *, name: str = "tiny", **recipe: Any) -> dict[str, Any]:
    """A joint recipe on the tiny corpus, as a file holds it."""
    model = smoke_suite().model_dump(mode="json", exclude_none=True)["model"]
    table = {
        "num_heads": 4,
        "num_steps": 5,
        "batch_sequences": 4,
        "warmup_steps": 1,
        "max_length": 64,
        "heads_learning_rate": 0.002,
        "backbone_learning_rate": 0.002,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.05, "lm_head": False},
        **recipe,
    }
    return {
        "schema_version": 1,
        "kind": "recipe",
        "trains": "heads_and_backbone",
        "name": name,
        "description": "for tests",
        "packed_corpus": str(folder / "corpus.safetensors"),
        "model": model,
        "recipe": {key: value for key, value in table.items() if value is not None},
    }


def write_recipe(folder: Path, name: str, **recipe: Any) -> Path:
    """Write a joint recipe's file."""
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(recipe_data(folder, name=name, **recipe)))
    return path


def ablation_data(folder: Path, heads_file: Path, **changes: Any) -> dict[str, Any]:
    """An ablation of three arms and two seeds on the tiny corpus; its recipes are written to `folder`."""
    write_recipe(folder, "frozen", backbone="frozen")
    write_recipe(folder, "ramped", target="original", warmup="ramped")
    write_recipe(folder, "hard", target="tokens", warmup="none", lambda_0=1.0)
    model = smoke_suite().model_dump(mode="json", exclude_none=True)["model"]
    return {
        "schema_version": 1,
        "kind": "ablation",
        "name": "tiny_training",
        "description": "For tests.",
        "decides_claims": True,
        "answer_tokens": 120,
        "seeds": [0, 1],
        "packed_corpus": str(folder / "corpus.safetensors"),
        "start_heads": str(heads_file),
        "expected_tokens_per_s": 1000.0,
        "best_tree_nodes": 4,
        "model": model,
        "tree": {"kind": "chain", "depth": 3},
        "held_out": {"source": "random", "num_prompts": 5, "max_new_tokens": 12, "seed": 3},
        "interval": {"num_resamples": 200},
        "arms": [
            {"name": "medusa1", "recipe": "frozen.toml"},
            {"name": "ramped", "recipe": "ramped.toml"},
            {"name": "hard_labels", "recipe": "hard.toml"},
        ],
        **changes,
    }
