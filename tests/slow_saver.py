"""Trains like `test_trainer_checkpoints.py`, and stays in the middle of its second save, to be killed there:

python -m tests.slow_saver FOLDER
"""

import sys
import time
from pathlib import Path

from normbt_kernels.integrations.transformers import NormBTTrainer
from tests.test_trainer_checkpoints import SAVE_STEPS, make_trainer


class SlowSaver(NormBTTrainer):
    def _save_scaler(self, output_dir):  # which Trainer calls between the optimizer and the random states
        if self.state.global_step == 2 * SAVE_STEPS:
            Path(output_dir, "saving").touch()
            time.sleep(600)
        super()._save_scaler(output_dir)


if __name__ == "__main__":
    make_trainer(sys.argv[1], SlowSaver).train()
