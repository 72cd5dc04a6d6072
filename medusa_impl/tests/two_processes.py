"""One of two processes that train together; started by torch's launcher from test_medusa2_trainer.py."""

from __future__ import annotations

import sys
from pathlib import Path

from medusa_impl.tests.test_medusa2_trainer import long_run, make_trainer

if __name__ == "__main__":
    folder, checkpoint = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    trainer = make_trainer(folder, **long_run())
    trainer.args.save_total_limit = None
    trainer.train(resume_from_checkpoint=checkpoint)
