"""Train the smoke suite's heads on the spot, in seconds.

Corpus, features, loss and trainer are those of the real ones.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.device.engine import LoadedModel
from harness.device.prompts import Prompt
from harness.specs.suite import SuiteSpec
from medusa_impl.engine.backbone import Backbone
from medusa_impl.heads import MedusaHeads
from medusa_impl.recipes import Medusa1Settings
from medusa_impl.training.distill import CorpusPrompt, CorpusStore, generate_corpus
from medusa_impl.training.features import load_features
from medusa_impl.training.medusa1 import train_medusa1

_NUM_TEXTS, _NUM_ROWS, _BATCH_POSITIONS = 96, 16, 256


def train_tiny_heads(loaded: LoadedModel, suite: SuiteSpec, *, prompts: Sequence[Prompt]) -> MedusaHeads:
    """Return heads trained for `suite.heads.train_steps` steps on greedy text of the tiny model.

    The text answers random prompts of its own.
    The prompts are drawn from another seed than the suite's, and `prompts` (the warm-up ones) set their
    lengths.
    """
    assert suite.model.tiny is not None and suite.heads.train_steps is not None
    spec = suite.model.tiny
    source = random.Random(f"{spec.seed}-training")
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    texts = [
        CorpusPrompt(
            key=f"tiny-{number}",
            category="random",
            prompt_ids=tuple(
                source.randrange(spec.vocab_size) for _ in range(lengths[number % len(lengths)])
            ),
            temperature=0.0,
            seed=number,
        )
        for number in range(_NUM_TEXTS)
    ]
    heads = MedusaHeads(
        num_heads=suite.heads.num_trained,
        num_layers=1,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        architecture="shared",
    )
    backbone = Backbone(loaded.model)
    recipe = Medusa1Settings(
        num_heads=suite.heads.num_trained,
        num_epochs=None,
        num_steps=suite.heads.train_steps,
        batch_positions=_BATCH_POSITIONS,
        learning_rate=0.01,
        subset_size=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = CorpusStore(Path(folder) / "corpus")
        generate_corpus(
            backbone,
            texts,
            store=store,
            num_rows=_NUM_ROWS,
            max_new_tokens=suite.max_new_tokens,
            eos_ids=loaded.eos_ids,
        )
        features = load_features(store, num_heads=suite.heads.num_trained)
        train_medusa1(
            features,
            heads,
            backbone.lm_head.get_parameter("weight").detach(),
            recipe=recipe,
            checkpoint_dir=Path(folder) / "train",
        )
    return heads
