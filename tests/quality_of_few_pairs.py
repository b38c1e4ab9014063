"""`python -m bench quality` on a tenth of its pairs, its workers forked from it, as processes.py forks commands."""

import multiprocessing
import sys

from bench.__main__ import main
from normbt_kernels.data import generated

if __name__ == "__main__":
    generated.NUM_TRAIN_PAIRS, generated.NUM_EVAL_PAIRS = 800, 200
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: fork
    sys.exit(main(sys.argv[1:]))
