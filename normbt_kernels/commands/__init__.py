"""The command line `normbt`: train, evaluate, diagnose, export and info."""
