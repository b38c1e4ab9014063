"""Preference data: rows read and checked, turned into tokens and batches; the checkpoints that score them; and the
built-in data sets, which need no download."""

# A data set that `--dataset` accepts by name; `stdlib_faults.py` makes it.
STDLIB_FAULTS = "stdlib-faults"
