"""Measurements: each module is run as `python -m bench.<name>` and prints what it measured and on what."""
