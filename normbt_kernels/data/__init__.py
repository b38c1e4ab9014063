"""Preference data: read and checked, laid out as tokens, and batched; the checkpoints that score them; and the built-in
data sets, which need no download."""

# A data set that `--dataset` takes by name; `stdlib_faults.py` makes it.
STDLIB_FAULTS = "stdlib-faults"
