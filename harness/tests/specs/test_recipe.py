"""Recipes as data: the paper's own figures, the shipped ones, one difference at a time, and what this machine
cannot run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from harness.errors import ExitCode, UserError
from harness.measure.ablation.arm import arm_recipe
from harness.paths import shipped
from harness.specs.ablation import load_ablation, parse_ablation
from harness.specs.recipe import HeadsRecipe, JointRecipe, load_recipe
from harness.specs.shapes import load_shapes
from harness.tests.tiny_suite import command
from harness.training.corpus import catalogue_prompts
from harness.training.text import HELD_OUT_RATE
from medusa_impl.recipes import Medusa2Settings

SUITES = shipped()
RECIPES = sorted((SUITES / "recipes").glob("*.toml"))
ABLATIONS = sorted((SUITES / "ablations").glob("*.toml"))


def joint(name: str) -> JointRecipe:
    spec = load_recipe(SUITES / "recipes" / f"{name}.toml")
    assert isinstance(spec, JointRecipe)
    return spec


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_whole_and_bear_their_files_name(path: Path) -> None:
    spec = load_recipe(path)
    assert spec.name == path.stem
    assert isinstance(spec, HeadsRecipe) == (path.stem in ("embedded_medusa1", "paper_7b_medusa1", "tiny"))


def test_the_7b_recipe_of_heads_alone_keeps_no_states() -> None:
    spec = load_recipe(SUITES / "recipes" / "paper_7b_medusa1.toml")
    assert isinstance(spec, HeadsRecipe) and spec.conversations is not None
    recipe = spec.recipe
    assert (recipe.features, recipe.architecture, recipe.num_epochs) == ("none", "own", 2.0)
    both = joint("paper_7b_two_stage").recipe
    assert recipe.learning_rate == both.heads_learning_rate and recipe.warmup_steps == both.warmup_steps
    for changes, message in (
        ({"conversations": None}, "either corpus or conversations"),
        ({"corpus": {"num_samples": 2}}, "either corpus or conversations"),
        ({"packed_corpus": "x"}, "leave out packed_corpus"),
        ({"recipe": {"features": "file"}}, "no states of conversations"),
    ):
        with pytest.raises(ValidationError, match=message):
            HeadsRecipe.model_validate({**spec.model_dump(), **changes})


def test_the_7b_recipe_carries_appendix_b() -> None:
    spec, recipe = joint("paper_7b_two_stage"), joint("paper_7b_two_stage").recipe
    assert spec.conversations is not None and "sharegpt" in spec.conversations
    assert recipe.warmup == "two_stage" and recipe.stage_rate * (recipe.num_epochs or 0) == 2
    assert recipe.batch_sequences * recipe.accumulation_steps == 64
    assert (recipe.backbone_learning_rate, recipe.heads_learning_rate, recipe.warmup_steps) == (
        5e-4,
        2e-3,
        40,
    )
    assert (recipe.lambda_0, recipe.lambda_base, recipe.num_heads, recipe.num_layers) == (0.2, 0.8, 5, 1)
    assert (recipe.quantisation, recipe.optimizer, recipe.target, recipe.architecture) == (
        "4bit",
        "adamw_8bit",
        "tokens",
        "own",
    )
    assert (recipe.max_length, recipe.schedule) == (4096, "each_stage")
    lora = recipe.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets, lora.lm_head) == (
        32,
        16,
        0.05,
        "all-linear",
        True,
    )


def test_the_33b_recipe_carries_appendix_b() -> None:
    spec, recipe = joint("paper_33b_ramped"), joint("paper_33b_ramped").recipe
    assert spec.corpus is not None and spec.corpus.num_samples == 100_000
    assert (spec.corpus.sampled_share, spec.corpus.temperature) == (
        1.0,
        0.3,
    ) and spec.corpus.second_turn_share > 0
    assert (recipe.warmup, recipe.ramp, recipe.lambda_0, recipe.target) == (
        "ramped",
        "sine",
        0.01,
        "original",
    )
    assert recipe.batch_sequences * recipe.accumulation_steps == 128 and recipe.max_length == 2048
    assert (recipe.backbone_learning_rate, recipe.heads_learning_rate, recipe.warmup_steps) == (
        1e-4,
        4e-4,
        20,
    )
    assert (recipe.optimizer, recipe.lambda_base, recipe.num_heads, recipe.num_layers) == (
        "adamw_8bit",
        0.8,
        5,
        1,
    )
    lora = recipe.lora
    assert recipe.quantisation is None
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets, lora.lm_head) == (
        32,
        16,
        0.05,
        "all-linear",
        True,
    )


def test_the_33b_recipe_answers_on_one_80_gb_gpu() -> None:
    """Regression: 64 rows asked for 222 GB of key-value cache on top of 65 GB of weights; twice that while
    one cache replaces another.
    """
    shape = load_shapes()["vicuna-33b-v1.3"]
    spec = joint("paper_33b_ramped")
    assert (
        spec.corpus is not None
        and spec.corpus.max_prompt_tokens + spec.corpus.max_new_tokens <= shape.max_positions
    )
    slots = -(-(shape.max_positions + 128) // 64) * 64  # as decode_stream makes its cache
    weights = 2 * shape.num_parameters

    def held_bytes(rows: int) -> int:
        return weights + 2 * shape.cache_bytes(slots, batch=rows, dtype_bytes=2)

    assert held_bytes(spec.corpus.num_rows) < 80e9 < held_bytes(spec.corpus.num_rows + 1)
    text = (SUITES / "recipes" / "paper_33b_ramped.toml").read_text()
    told = (weights, shape.cache_bytes(slots, batch=1, dtype_bytes=2), held_bytes(2) - weights, held_bytes(2))
    assert all(f"{count / 1e9:.1f} GB" in text for count in told), "the arithmetic in its comment"


@pytest.mark.parametrize("name", ["paper_7b_two_stage", "paper_33b_ramped"])
def test_what_the_paper_does_not_state_is_said_to_be_chosen(name: str) -> None:
    recipe = joint(name).recipe
    assert {"max_gradient_norm", "weight_decay", "architecture"} <= recipe.model_fields_set
    assert (recipe.max_gradient_norm, recipe.weight_decay, HELD_OUT_RATE) == (1.0, 0.0, 0.03)
    comment = " ".join(
        line.lstrip("# ")
        for line in (SUITES / "recipes" / f"{name}.toml").read_text().splitlines()
        if line.startswith("#")
    )
    _, _, chosen = comment.partition("chosen here:")
    for words in (
        "gradients clipped at 1.0",
        "no weight decay",
        "3 % of the conversations held out",
        "own unembeddings",
    ):
        assert words in chosen


@pytest.mark.parametrize("name", ["paper_7b_two_stage", "paper_33b_ramped"])
def test_conversations_of_a_model_without_a_template_get_one(name: str) -> None:
    template = joint(name).model.chat_template
    assert template is not None and (SUITES / template).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_corpus_can_be_asked_for(path: Path) -> None:
    """Regression: a recipe wanted more prompts than the catalogue has combinations; such a one has to bring
    its own.
    """
    corpus = load_recipe(path).corpus
    if corpus is not None and corpus.prompts_file is None:
        assert len(catalogue_prompts(corpus, corpus.num_prompts())) == corpus.num_prompts()


def test_embedded_recipes_differ_in_what_they_are_the_control_of() -> None:
    """One factor at a time, so that a difference between two arms has one cause; direct fine-tuning is three
    of them at once.
    """
    ramped = joint("embedded_medusa2_ramped").recipe

    def differing(name: str) -> set[str]:
        other = joint(name).recipe
        return {key for key in Medusa2Settings.model_fields if getattr(other, key) != getattr(ramped, key)}

    assert differing("embedded_hard_labels") == {"target"}
    assert differing("embedded_medusa2_two_stage") == {"warmup", "schedule"}
    assert differing("embedded_no_warmup") == {"warmup"}
    assert differing("embedded_direct") == {"warmup", "lambda_0", "heads_learning_rate"}
    direct = joint("embedded_direct").recipe
    assert direct.heads_learning_rate == direct.backbone_learning_rate
    assert ramped.heads_learning_rate < ramped.backbone_learning_rate, (
        "heads that are trained already must not be thrown back"
    )
    assert joint("embedded_medusa1_continued").recipe.heads_learning_rate == ramped.heads_learning_rate


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_shipped_ablations_name_recipes_of_one_budget(path: Path) -> None:
    """Regression: the long suite was in no list of names here; now every file counts, and the long one needs
    no controls.
    """
    spec = load_ablation(path)
    assert spec.name == path.stem
    assert len(spec.seeds) >= 2 and spec.decides_claims == (spec.answer_tokens >= 50_000)
    controls = set() if path.stem == "embedded_training_long" else {"direct", "hard_labels"}
    assert {"medusa1", "two_stage", "ramped"} | controls <= {arm.name for arm in spec.arms}
    recipes = [arm_recipe(spec, arm.name, base_folder=None) for arm in spec.arms]
    assert {recipe.batch_sequences for recipe in recipes} == {4} and {
        recipe.max_length for recipe in recipes
    } == {512}
    assert all(recipe.lora.rank <= 8 for recipe in recipes if recipe.backbone == "lora")


def test_every_shipped_ablation_is_among_them_and_none_repeats_a_seed() -> None:
    """Claims are judged on trainings that no other suite, and no choice of a rate, has seen."""
    specs = [load_ablation(path) for path in ABLATIONS]
    assert [spec.name for spec in specs] == [
        "embedded_training",
        "embedded_training_long",
        "embedded_training_quick",
    ]
    seeds = [seed for spec in specs for seed in spec.seeds]
    assert len(seeds) == len(set(seeds))
    drawn = [spec.held_out.seed for spec in specs]
    assert len(drawn) == len(set(drawn))
    long = specs[1]
    earlier = {(spec.held_out.seed, spec.held_out.num_prompts) for spec in specs if spec is not long}
    left_out = {one.seed: one.num_prompts for one in long.held_out.left_out}
    assert all(left_out[seed] >= num_prompts for seed, num_prompts in earlier)


def test_a_quarter_of_the_quick_budget_is_not_a_claim() -> None:
    quick = load_ablation(SUITES / "ablations" / "embedded_training_quick.toml")
    assert quick.plan()[0] == ("start", None) and len(quick.plan()) == 1 + 2 * len(quick.arms)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('trains = "heads_and_backbone"', 'trains = "both"', "trains"),
        ('kind = "recipe"', 'kind = "suite"', 'found kind = "suite"; need kind = "recipe"'),
        ('kind = "recipe"', 'kind = "joint"', 'write kind = "recipe" and trains = "heads_and_backbone"'),
        ('kind = "recipe"', "", 'add the line kind = "recipe"'),
        ('packed_corpus = "embedded/corpus.safetensors"', "", "give packed_corpus, corpus or conversations"),
        ("num_steps = 96", "num_steps = 96\nnum_epochs = 1.0", "exactly one of num_epochs and num_steps"),
        ("rank = 8", "rank = 0", r"recipe\.lora\.rank"),
        ('target = "original"', 'target = "luck"', r"recipe\.target"),
        ("seed = 0", "sead = 0", r"recipe\.sead"),
    ],
)
def test_bad_recipes_are_refused_with_their_key(old: str, new: str, found: str, tmp_path: Path) -> None:
    text = (SUITES / "recipes" / "embedded_medusa2_ramped.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=found):
        load_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds: .*0 stands twice"),
        ('name = "direct"', 'name = "start"', "arm names"),
        ('calibration_trace = "embedded/calibration.npz"\n', "", "needs a calibration_trace"),
        ("answer_tokens = 10000", "answer_tokens = 0", "answer_tokens"),
        ("schema_version = 1", "schema_version = ", "invalid TOML"),
    ],
)
def test_bad_ablations_are_refused_with_their_key(old: str, new: str, found: str) -> None:
    text = (SUITES / "ablations" / "embedded_training_quick.toml").read_text()
    assert old in text
    with pytest.raises(UserError, match=found):
        parse_ablation(text.replace(old, new, 1), where="mine.toml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine that may have what the recipe needs")
@pytest.mark.parametrize("name", ["paper_7b_two_stage", "paper_33b_ramped"])
def test_what_needs_bitsandbytes_says_so_before_anything_is_fetched(name: str, tmp_path: Path) -> None:
    ran = command("train", name, "--work", tmp_path / "work")
    assert (
        ran.code == ExitCode.USER_ERROR
        and "a CUDA device" in ran.error_line
        and "4-bit backbone or an 8-bit optimiser" in ran.error_line
    )
    assert not (tmp_path / "work").exists()


def test_ablations_are_no_suites_and_suites_no_ablations() -> None:
    assert "embedded_training" not in command("reproduce", "nosuch").error_line
    listed = command("ablate", "nosuch").error_line
    assert "['embedded_training', 'embedded_training_long', 'embedded_training_quick']" in listed


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ('backbone = "full"\nheads_lm_head = "adapted"', "of a backbone trained in full"),
        ('backbone = "lora"\nquantisation = "4bit"', "of a 4-bit backbone"),
    ],
)
def test_an_ablation_refuses_arms_that_it_cannot_measure(tmp_path: Path, changes: str, found: str) -> None:
    """Regression: a 4-bit recipe was trained on the model as it is, and the record said 4bit; one in full
    failed after its training.
    """
    text = (
        (SUITES / "recipes" / "embedded_medusa2_ramped.toml")
        .read_text()
        .replace('backbone = "lora"', changes)
    )
    if "adapted" in changes:
        text = text.replace('heads_lm_head = "original"\nsubset_size = 8192\n', "")
    (tmp_path / "mine.toml").write_text(text)
    spec = load_ablation(SUITES / "ablations" / "embedded_training.toml")
    arm = spec.arms[1].model_copy(update={"recipe": "mine.toml"})
    with pytest.raises(UserError, match=found):
        arm_recipe(spec.model_copy(update={"arms": (arm,)}), arm.name, base_folder=tmp_path)
