"""A folder with a small whole one of each file: a model that loads in a blink, what is trained on it, suites
that run on it, and a sealed record of each kind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tomli_w
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.device.engine import load_model, new_heads
from harness.files import DataPath, ModelFolder
from harness.paths import shipped
from harness.specs.suite import ModelSpec
from harness.tests.tiny_suite import smoke_suite
from medusa_impl.checkpoints.adapter import add_adapter, save_adapter
from medusa_impl.checkpoints.heads import HeadsProvenance, save_heads
from medusa_impl.recipes import LoraSettings, Medusa1Settings
from medusa_impl.tests.conftest import TINY_VOCAB, tiny_llama
from medusa_impl.training_log import TrainingFigures

FIXTURES = Path(__file__).parents[1] / "records" / "fixtures" / "v1"
TEMPLATE = """{% for message in messages %}
<{{ message['role'] }}> {{ message['content'] }} <end>
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""
PROMPTS = [
    {"key": "one", "category": "words", "prompt": "word4 word9 é word5"},
    {"key": "two", "category": "words", "turns": ["word7 word8", "word6"]},
    {"prompt": "word11 word12 word13 word4"},
]
CONVERSATIONS = [
    {
        "id": f"c{number}",
        "conversations": [
            {"from": "human", "value": f"word{5 + number % 30} word8 é"},
            {"from": "gpt", "value": "word9 word10 word11 word12"},
            {"from": "human", "value": "word4"},
            {"from": "gpt", "value": "word5 word6 word7"},
        ],
    }
    for number in range(24)
]


def build(folder: Path) -> None:
    """Write everything that is altered, or read next to what is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_trained(folder)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tree.json").write_text('{"schema_version": 1, "paths": [[0], [1], [0, 0], [0, 1], [0, 0, 0]]}')
    (folder / "paths.json").write_text("[[0], [1], [0, 0], [0, 1]]")
    lines = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (folder / "prompts.txt").write_text("word4 word5\nword6 é word7\n", encoding="utf-8")
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in CONVERSATIONS)
    (folder / "conversations.jsonl").write_text(lines, encoding="utf-8")
    (folder / "conversations.json").write_text(json.dumps(CONVERSATIONS, indent=1), encoding="utf-8")
    shutil.copyfile(shipped("claims.toml"), folder / "claims.toml")
    shutil.copyfile(FIXTURES / "trace.npz", folder / "trace.npz")
    for kind in ("suite", "latency", "sweep", "ablation", "gpu", "gate"):
        shutil.copytree(FIXTURES / kind, folder / f"{kind}-record", dirs_exist_ok=True)
    _write_suites(folder)


def write_model(folder: Path) -> None:
    """Write a tiny Llama with a tokenizer of a few words and a chat template."""
    words = {"<end>": 0, "<unknown>": 1, "<user>": 2, "<assistant>": 3}
    words |= {f"word{index}": index for index in range(4, TINY_VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unknown>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    model = tiny_llama()
    model.generation_config.eos_token_id = 0
    model.save_pretrained(str(folder))


def write_trained(folder: Path) -> None:
    """Write heads on the bare model, and an adapter with heads of its own."""
    bare = load_model(ModelSpec(path=ModelFolder(folder / "model")), device=torch.device("cpu"))
    recipe = Medusa1Settings(num_heads=3, num_epochs=None, num_steps=1)
    counts = {
        name: 1 for name in ("num_positions_seen", "num_train_rows", "num_train_answers", "num_corpus_tokens")
    }
    figures = TrainingFigures(
        num_steps=1,
        num_subset_steps=0,
        subset_size=None,
        num_targets_outside=0,
        num_held_out_rows=0,
        num_held_out_answers=0,
        final_loss=1.0,
        held_out=None,
        **counts,
    )
    provenance = HeadsProvenance(
        backbone_name="model", backbone_sha256=bare.sha256, recipe=recipe, training=figures
    )
    save_heads(folder / "heads.safetensors", new_heads(bare, recipe), provenance=provenance)
    torch.manual_seed(5)
    tuned = add_adapter(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        LoraSettings(rank=2, alpha=4, dropout=0.0, lm_head=False),
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:  # zero at first: an adapter that changes nothing
                parameter.normal_(std=0.1)
    digest = save_adapter(folder / "adapter", tuned)
    save_heads(
        folder / "tuned.safetensors",
        new_heads(bare, recipe),
        provenance=provenance.model_copy(update={"adapter_sha256": digest}),
    )


def _write_suites(folder: Path) -> None:
    file_tree = {"kind": "file", "path": str(DataPath("tree.json"))}
    model: dict[str, Any] = {"path": "model"}
    prompts: dict[str, Any] = {"source": "file", "path": "prompts.jsonl"}
    heads: dict[str, Any] = {"path": "heads.safetensors", "num_heads": 3}
    plain = suite_data(model=model, heads=heads, prompts=prompts)
    tiny = suite_data(
        model=smoke_suite().model_dump(mode="json", exclude_none=True)["model"],
        heads={"train_steps": 20, "num_heads": 3},
        prompts={"source": "random", "limit": 2},
    )
    suites = {
        "suite": plain,
        "tiny": tiny,
        "tree-suite": suite_data(model=model, heads=heads, prompts=prompts, tree=file_tree),
        "adapter-suite": {
            **plain,
            "model": {**model, "adapter": "adapter"},
            "heads": {**heads, "path": "tuned.safetensors"},
        },
        "template-suite": {**plain, "model": {**model, "chat_template": "template.jinja"}},
        "searched-suite": {
            **suite_data(
                model=model, heads=heads, prompts=prompts, tree={"kind": "searched", "num_nodes": 4}
            ),
            "calibration_trace": "trace.npz",
        },
        "text-suite": {**plain, "prompts": {"source": "file", "path": "prompts.txt"}},
    }
    for name, data in suites.items():
        (folder / f"{name}.toml").write_text(tomli_w.dumps(data), encoding="utf-8")
    for suffix in ("jsonl", "json"):
        recipe = {
            "schema_version": 1,
            "kind": "recipe",
            "trains": "heads_and_backbone",
            "name": "talk",
            "description": "for tests",
            "conversations": f"conversations.{suffix}",
            "model": model,
            "recipe": {
                "num_heads": 2,
                "num_steps": 1,
                "batch_sequences": 2,
                "warmup_steps": 1,
                "max_length": 48,
                "backbone": "frozen",
            },
            "calibration": {"num_prompts": 2, "max_new_tokens": 4},
        }
        (folder / f"recipe-{suffix}.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")


def suite_data(*, tree: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """Return a suite of a vanilla and a Medusa arm that takes less than a second."""
    return {
        "schema_version": 1,
        "kind": "suite",
        "name": "fuzzed",
        "description": "For the prover, with an é.",
        "reports_speed": False,
        "max_new_tokens": 4,
        "interval": {"num_resamples": 100},
        "probes": {"step_nodes": [1, 4], "step_context_tokens": 8, "step_repeats": 1, "profile_prompts": 1},
        "arms": [
            {"name": "vanilla", "method": "vanilla"},
            {
                "name": "chain",
                "method": "medusa",
                "baseline": "vanilla",
                "tree": tree or {"kind": "chain", "depth": 3},
                "acceptance": {"rule": "greedy"},
            },
        ],
        **parts,
    }
