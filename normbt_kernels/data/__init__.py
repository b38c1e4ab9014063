"""Preference data: read, checked, and turned into tokens and batches; checkpoints; the built-in data sets.

A new file format goes into rows.py, a new column into preferences.py, a new built-in data set into built_in.py.
"""

# A data set that `--dataset` accepts by name; `stdlib_faults.py` makes it.
STDLIB_FAULTS = "stdlib-faults"
