"""The project's own training prompts: deterministic, balanced, distinct, split by hash, and refused where the
catalogue is at fault.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from harness.assets.catalogue import HELD_OUT_PERCENT, CategoryCatalogue, load_catalogue, training_prompts
from harness.errors import UserError

CATEGORIES = ["coding", "extraction", "humanities", "math", "reasoning", "roleplay", "stem", "writing"]


def catalogue(**changes: object) -> CategoryCatalogue:
    plain = {
        "schema_version": 1,
        "category": "math",
        "templates": ("Add {a} and {b}.", "Name {thing}."),
        "slots": {"thing": ("a prime", "a square")},
        "ranges": {"a": {"min": 1, "max": 50}, "b": {"min": 1, "max": 50}},
    }
    return CategoryCatalogue.model_validate({**plain, **changes})


def test_shipped_catalogue_covers_the_eight_kinds_of_task() -> None:
    shipped = load_catalogue()
    assert [category.category for category in shipped] == CATEGORIES
    assert all(len(category.templates) >= 5 for category in shipped)


def test_prompts_are_deterministic_and_a_prefix_of_more() -> None:
    many = training_prompts(num_prompts=400, seed=1)
    assert training_prompts(num_prompts=400, seed=1) == many
    assert training_prompts(num_prompts=37, seed=1) == many[:37]
    assert training_prompts(num_prompts=37, seed=2) != many[:37]


def test_prompts_are_balanced_and_distinct() -> None:
    prompts = training_prompts(num_prompts=1600, seed=1)
    assert set(Counter(prompt.category for prompt in prompts).values()) == {200}
    assert len({prompt.text for prompt in prompts}) == len({prompt.key for prompt in prompts}) == 1600
    assert all(prompt.key.startswith(prompt.category + "-") for prompt in prompts)
    slots = {name for category in load_catalogue() for name in (*category.slots, *category.ranges)}
    assert not [prompt.text for prompt in prompts for name in slots if "{" + name + "}" in prompt.text]


def test_prompts_vary_in_length() -> None:
    words = sorted(len(prompt.text.split()) for prompt in training_prompts(num_prompts=400, seed=1))
    assert words[40] * 3 < words[-40]


def test_splits_are_disjoint_whatever_their_seeds() -> None:
    train = {prompt.text for seed in (1, 3, 7) for prompt in training_prompts(num_prompts=800, seed=seed)}
    held_out = {
        prompt.text
        for seed in (1, 3, 7)
        for prompt in training_prompts(num_prompts=160, seed=seed, split="held_out")
    }
    assert not train & held_out and len(held_out) > 300


def test_a_prompts_key_follows_from_its_text() -> None:
    keys: dict[str, str] = {}
    for seed in (1, 2):
        for prompt in training_prompts(num_prompts=400, seed=seed):
            assert keys.setdefault(prompt.text, prompt.key) == prompt.key


def test_share_of_the_held_out_split() -> None:
    """Of 2,500 sums and 2 names about 5 % are held out: the generator finds them and then says that there are
    no more.
    """
    with pytest.raises(UserError, match="no new prompt") as caught:
        training_prompts(num_prompts=1000, seed=1, split="held_out", catalogue=[catalogue()])
    assert "distinct held_out prompts" in caught.value.need
    found = len(training_prompts(num_prompts=80, seed=1, split="held_out", catalogue=[catalogue()]))
    assert found == 80 < 2502 * HELD_OUT_PERCENT / 100


def test_too_few_combinations_are_an_error_not_an_endless_loop() -> None:
    small = catalogue(templates=("Name {thing}.",), ranges={})
    with pytest.raises(UserError, match="for category 'math'"):
        training_prompts(num_prompts=3, seed=1, catalogue=[small])


def write(folder: Path, text: str) -> Path:
    (folder / "mine.toml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('schema_version = 1\ncategory = "x"\ntemplates = ["Say {word}."]\n', "uses slots without values"),
        (
            'schema_version = 1\ncategory = "x"\ntemplates = ["Say."]\n[slots]\nword = ["a"]\n',
            "slots that no template uses",
        ),
        (
            'schema_version = 1\ncategory = "x"\ntemplates = ["Say {word}."]\n[slots]\nword = []\n',
            "slots without a value",
        ),
        (
            'schema_version = 1\ncategory = "x"\ntemplates = ["Add {a}."]\n[ranges]\na = { min = 3, max = '
            "2 }\n",
            "a range from 3 to 2",
        ),
        ('schema_version = 1\ncategory = "x"\ntemplates = []\n', "at least 1"),
        ('schema_version = 2\ncategory = "x"\ntemplates = ["Say."]\n', "Input should be 1"),
        ('schema_version = 1\ncategory = "x"\ntemplates = ["Say."]\ncolour = "red"\n', "Extra inputs"),
        ('schema_version = 1\ncategory = "x"\ntemplates = ["Say {word."]\n', "expected '}'"),
        ("schema_version = \n", "Invalid value"),
    ],
)
def test_catalogue_at_fault_is_named(text: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=found) as caught:
        load_catalogue(write(tmp_path, text))
    assert caught.value.where == "mine.toml"


def test_empty_folder_is_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.toml file"):
        load_catalogue(tmp_path)
