"""`normbt diagnose` on half of its pairs, in the middle of half as long a training."""

import sys

from normbt_kernels.commands import cli, diagnose
from normbt_kernels.data import generated

if __name__ == "__main__":
    generated.NUM_TRAIN_PAIRS, generated.NUM_EVAL_PAIRS, diagnose.FEW_STEPS = 3200, 1000, 100
    sys.exit(cli.main(["diagnose"]))
