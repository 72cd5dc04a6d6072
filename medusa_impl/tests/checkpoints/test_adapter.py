"""Adapters on disk: merged equals unmerged, files name nothing of this machine, heads need their adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

from medusa_impl.acceptance import GreedyRule
from medusa_impl.checkpoints.adapter import ADAPTER_FILE, adapter_sha256, load_adapter, save_adapter
from medusa_impl.checkpoints.heads import HeadsProvenance, bind_heads, load_heads, save_heads
from medusa_impl.decode import decode_medusa
from medusa_impl.engine.runner import StepRunner
from medusa_impl.errors import UserError
from medusa_impl.recipes import LoraSettings, Medusa2Settings
from medusa_impl.tests.conftest import tiny_llama
from medusa_impl.tests.training.test_medusa2 import make_heads
from medusa_impl.training.medusa2 import MedusaTrainingModel
from medusa_impl.training_log import JointFigures
from medusa_impl.tree import DraftTree

TOKENS = torch.tensor([[3, 9, 4, 17, 33, 2, 8]])
BACKBONE = "ab" * 32


def base(*, tied: bool = False) -> LlamaForCausalLM:
    """A tiny model whose activations are small enough for rounding to stay below the sixth decimal."""
    model = tiny_llama(scale=0.2)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def tuned(*, tied: bool = False, lm_head: bool = True, **recipe: Any) -> MedusaTrainingModel:
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0, lm_head=lm_head)
    torch.manual_seed(1)
    model = base(tied=tied)
    made = MedusaTrainingModel(
        model, make_heads(), recipe=Medusa2Settings(num_heads=3, num_steps=2, lora=lora, **recipe)
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in made.backbone.named_parameters():
            # Away from 0, as training would move it, but not so far that rounding shows in the fifth decimal.
            if "lora_" in name:
                parameter.copy_(0.04 * torch.randn(parameter.shape, generator=generator))
    return made


def provenance(**changes: Any) -> HeadsProvenance:
    figures = JointFigures(
        num_steps=2, num_sequences=1, num_answer_tokens=4, num_positions_seen=4, final_loss=1.0, held_out=None
    )
    recipe = Medusa2Settings(num_heads=3, num_steps=2)
    return HeadsProvenance(
        backbone_name="tiny", backbone_sha256=BACKBONE, recipe=recipe, training=figures, **changes
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lm_head", [False, True])
def test_a_merged_adapter_computes_what_it_computed_before_it_was_saved(
    tmp_path: Path, tied: bool, lm_head: bool
) -> None:
    """Regression: a tied LM head was not untied when its adapter was loaded.

    Merging then wrote into the embedding as well.
    """
    model = tuned(tied=tied, lm_head=lm_head)
    digest = save_adapter(tmp_path / "adapter", model.backbone, dtype=torch.float32)
    loaded = load_adapter(base(tied=tied), tmp_path / "adapter")
    with torch.no_grad():
        expected, bare = (
            model.backbone.eval()(input_ids=TOKENS).logits,
            base(tied=tied)(input_ids=TOKENS).logits,
        )
        got = loaded.model(input_ids=TOKENS).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert float((got - bare).abs().max()) > 0.01, "an adapter that changes nothing would pass too"
    assert loaded.adapter_sha256 == digest == adapter_sha256(tmp_path / "adapter")
    assert (loaded.original_lm_head is not None) == lm_head
    is_tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert is_tied == (tied and not lm_head)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def peft_adapter(folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter as peft itself makes and saves it; return the logits of the model with it, unmerged."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        base(tied=True), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.04 * torch.randn(parameter.shape, generator=generator))
        logits: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    model.save_pretrained(str(folder))
    return logits


@pytest.mark.filterwarnings("ignore")  # peft warns of the ties that this is about
@pytest.mark.parametrize(
    ("config", "changes_lm_head"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": r".*(q_proj|lm_head)"}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_lora_on_tied_embeddings_merges_to_the_same_model(
    tmp_path: Path, config: dict[str, Any], changes_lm_head: bool
) -> None:
    """An adapter of the embedding alone was merged into the LM head as well, which is the same tensor."""
    expected = peft_adapter(tmp_path / "adapter", **config)
    loaded = load_adapter(base(tied=True), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=0)
    assert (loaded.original_lm_head is not None) == changes_lm_head
    if loaded.original_lm_head is not None:
        original: Any = base(tied=True).get_output_embeddings()
        assert torch.equal(loaded.original_lm_head.get_parameter("weight"), original.weight)


@pytest.mark.filterwarnings("ignore")
def test_lora_that_keeps_embeddings_tied_is_refused_by_name(tmp_path: Path) -> None:
    """peft merges such an adapter into the one tensor twice."""
    peft_adapter(tmp_path / "adapter", target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(UserError, match="an adapter with ensure_weight_tying"):
        load_adapter(base(tied=True), tmp_path / "adapter")


@pytest.mark.parametrize("text", ["[]", "{}", '{"peft_type": "SOME"}', "[" * 100_000, '{"peft_type": 3}'])
def test_a_damaged_adapter_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    save_adapter(tmp_path / "adapter", tuned().backbone)
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="an adapter that does not fit") as caught:
        load_adapter(base(), tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_in_bfloat16_it_is_small_and_still_one_model(tmp_path: Path) -> None:
    """An adapter is rounded only once, when it is saved: merged or not, the reloaded model is the same."""
    from peft import PeftModel

    model = tuned()
    save_adapter(tmp_path / "adapter", model.backbone)
    apart: Any = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    merged = load_adapter(base(), tmp_path / "adapter").model
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=TOKENS).logits, apart(input_ids=TOKENS).logits, atol=1e-5, rtol=0
        )
    num_learning = sum(
        parameter.numel() for name, parameter in model.backbone.named_parameters() if "lora_" in name
    )
    assert (tmp_path / "adapter" / ADAPTER_FILE).stat().st_size < 2 * num_learning + 8192
    with safe_open(tmp_path / "adapter" / ADAPTER_FILE, framework="pt") as file:
        names = list(file.keys())
    assert all(".lora_A." in name or ".lora_B." in name for name in names), "no embedding among the tensors"


def test_no_place_on_this_machine_is_written(tmp_path: Path) -> None:
    """peft would write the folder that the base model was loaded from, and an empty model card."""
    model = tuned()
    model.model.config._name_or_path = str(tmp_path / "secret")
    save_adapter(tmp_path / "adapter", model.backbone)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"] and str(tmp_path) not in json.dumps(config)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        ADAPTER_FILE,
    ]


def test_heads_are_tied_to_backbone_and_adapter(tmp_path: Path) -> None:
    heads = make_heads()
    save_heads(tmp_path / "bare.safetensors", heads, provenance=provenance())
    save_heads(tmp_path / "tuned.safetensors", heads, provenance=provenance(adapter_sha256="cd" * 32))
    load_heads(tmp_path / "bare.safetensors", backbone_sha256=BACKBONE)
    loaded, stored = load_heads(
        tmp_path / "tuned.safetensors", backbone_sha256=BACKBONE, adapter_sha256="cd" * 32
    )
    assert isinstance(stored.recipe, Medusa2Settings) and isinstance(stored.training, JointFigures)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with pytest.raises(
        UserError, match=r"heads trained with the adapter cdcd.*need heads trained without an adapter"
    ):
        load_heads(tmp_path / "tuned.safetensors", backbone_sha256=BACKBONE)
    with pytest.raises(UserError, match="heads trained without an adapter"):
        load_heads(tmp_path / "bare.safetensors", backbone_sha256=BACKBONE, adapter_sha256="cd" * 32)
    with pytest.raises(UserError, match="with the adapter efef"):
        load_heads(tmp_path / "tuned.safetensors", backbone_sha256=BACKBONE, adapter_sha256="ef" * 32)
    load_heads(tmp_path / "tuned.safetensors", backbone_sha256=None)


@pytest.mark.parametrize("reads", ["original", "adapted"])
def test_heads_read_the_lm_head_that_they_were_trained_to_read(tmp_path: Path, reads: Any) -> None:
    model = tuned(heads_lm_head=reads)
    save_adapter(tmp_path / "adapter", model.backbone, dtype=torch.float32)
    loaded = load_adapter(base(), tmp_path / "adapter")
    heads = copy.deepcopy(model.heads).eval()
    bind_heads(
        heads, provenance(lm_head_read=reads, lm_head_adapted=True), original_lm_head=loaded.original_lm_head
    )
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    own: Any = base().lm_head if reads == "original" else loaded.model.get_output_embeddings()
    with torch.no_grad():
        expected = own(model.heads.states(states))
        got = heads(states, lm_head=loaded.model.get_output_embeddings())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_decoding_loop_asks_the_heads_with_the_original_lm_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared heads read the original LM head, and the output is that of the tuned backbone.

    This holds in packed mode too, where this LM head is packed together with the heads.
    """
    model = tuned()
    save_adapter(tmp_path / "adapter", model.backbone, dtype=torch.float32)
    loaded = load_adapter(base(), tmp_path / "adapter")
    heads = copy.deepcopy(model.heads)
    bind_heads(heads, provenance(), original_lm_head=loaded.original_lm_head)
    runner = StepRunner(loaded.model, heads)
    assert runner.heads is not None
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = type(runner.heads).forward

    def noting(self: nn.Module, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = forward(self, hidden, **options)  # type: ignore[arg-type]
        asked.append((hidden.clone(), logits.clone()))
        return logits

    monkeypatch.setattr(type(runner.heads), "forward", noting)
    options: dict[str, Any] = {"rule": GreedyRule(), "max_new_tokens": 8, "eos_ids": frozenset()}
    steps = list(decode_medusa(runner.backbone, runner.heads, DraftTree.chain(2), [[3, 9, 4]], **options))
    original = base().lm_head
    with torch.inference_mode():
        for hidden, logits in asked:
            expected = original(model.heads.states(hidden))[:, :2]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    tokens = [token for step in steps for token in step.tokens[0]]
    with torch.no_grad():
        text = [3, 9, 4]
        for _ in tokens:
            text.append(int(model.backbone.eval()(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    assert tokens == text[3:] and asked


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable safetensors file"):
        load_adapter(base(), tmp_path)
    save_adapter(tmp_path / "adapter", tuned().backbone)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(tiny_llama(vocab_size=40), tmp_path / "adapter")


def test_each_stage_may_have_a_cosine_of_its_own() -> None:
    recipe = Medusa2Settings(num_steps=20, warmup="two_stage", schedule="each_stage", warmup_steps=2)
    rates = [recipe.learning_rates(step, num_steps=20) for step in range(20)]
    heads = [rate for rate, _ in rates]
    assert heads[:10] == heads[10:] and heads[9] < heads[2] == recipe.heads_learning_rate
    assert [rate for _, rate in rates[:10]] == [0.0] * 10 and rates[12][1] == recipe.backbone_learning_rate
    whole = recipe.model_copy(update={"schedule": "whole"})
    assert whole.learning_rates(10, num_steps=20)[0] == pytest.approx(
        recipe.heads_learning_rate * 0.587, rel=1e-2
    )
