"""One of two processes that train together; started by torch's launcher from test_medusa2_trainer.py."""

from __future__ import annotations

import sys
from pathlib import Path

from medusa_impl.tests.test_medusa2 import LORA
from medusa_impl.tests.test_medusa2_trainer import make_trainer

if __name__ == "__main__":
    make_trainer(Path(sys.argv[1]), batch_sequences=1, lora=LORA.model_copy(update={"dropout": 0.0})).train()
