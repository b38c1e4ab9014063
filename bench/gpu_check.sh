#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under ten minutes, from a bare checkout and without a network:
#
#     bash bench/gpu_check.sh [FOLDER]      results to FOLDER, or $OUT, or bench/results/<device>
#
# Needs Python with torch, triton, transformers, accelerate and tqdm ($PYTHON, else python3); nothing is installed.
# --help says what else it takes, bench/README.md what it does. The exit status says whether all of it passed.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET # which would take the kernels off the GPU
exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
